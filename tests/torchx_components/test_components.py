"""The components: TorchX's jobs, and their torchrun command lines."""

from __future__ import annotations

import dataclasses
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs import AppDef, BindMount, VolumeMount, named_resources
from torchx.specs.builders import _create_args_parser, materialize_appdef
from torchx.specs.file_linter import get_fn_docstring
from torchx.specs.finder import ModuleComponentsFinder, get_component, get_components

from ifa_torchrec.commands.build_states import BuildStatesConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig
from ifa_torchrec.commands.serve import ServeConfig
from ifa_torchrec.training.options import TrainConfig
from torchx_components import build_states, evaluate, serve, train

NAMED = {
    "ifa.train.ddp": train.ddp,
    "ifa.evaluate.ddp": evaluate.ddp,
    "ifa.build_states.ddp": build_states.ddp,
    "ifa.serve.server": serve.server,
}
TRAIN = {"data": "/shared/log", "out": "/shared/run"}
EVALUATE = {"run": "/shared/run"}
STATES = {"run": "/shared/run", "store": "redis://states:6379/0"}
BUILD = {**STATES, "position": "7"}
UNDER_TORCHRUN = [(train.ddp, TRAIN), (evaluate.ddp, EVALUATE), (build_states.ddp, BUILD)]


class TestFiles(ComponentTestCase):
    """As ``torchx run torchx_components/train.py:ddp`` finds them."""

    def test_train_is_valid(self):
        self.validate(train, "ddp")

    def test_evaluate_is_valid(self):
        self.validate(evaluate, "ddp")

    def test_build_states_is_valid(self):
        self.validate(build_states, "ddp")

    def test_serve_is_valid(self):
        self.validate(serve, "server")


def torchrun(app: AppDef) -> Namespace:
    """torchrun's arguments, parsed from a job's command line."""
    entrypoint, *arguments = shlex.split(app.roles[0].args[1])
    assert app.roles[0].entrypoint == "bash" and app.roles[0].args[0] == "-c"
    assert entrypoint == "torchrun"
    return get_args_parser().parse_args(arguments)


def script_line(app: AppDef) -> list[str]:
    parsed = torchrun(app)
    return [parsed.training_script, *parsed.training_script_args]


@pytest.mark.parametrize("name", NAMED)
def test_components_are_registered_by_name(name):
    component = get_component(name)
    assert component.fn is NAMED[name] and not component.validation_errors


def test_no_component_of_torchx_is_hidden_or_renamed():
    builtin = {
        c.name: c.fn
        for c in ModuleComponentsFinder("torchx.components", "").find()
        if not c.validation_errors
    }
    assert {"dist.ddp", "utils.echo"} <= builtin.keys()
    found = {name: component.fn for name, component in get_components().items()}
    assert found == builtin | NAMED


@pytest.mark.parametrize("name", NAMED)
def test_help_describes_every_option_and_nothing_else(name):
    component = NAMED[name]
    description, options = get_fn_docstring(component)
    assert all(text.strip() for text in options.values())
    shown = _create_args_parser(component).format_help()
    assert description in shown
    for section in ("Args:", "Raises:", "Example:", ">>>"):
        assert section not in shown


@pytest.mark.parametrize("name", NAMED)
def test_default_image_is_the_packages(name):
    assert _create_args_parser(NAMED[name]).get_default("image") == "ifa-torchrec"


def test_train_is_the_torchrun_line_one_would_write():
    by_hand = get_args_parser().parse_args(
        shlex.split(
            "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint first-node:29500"
            " --rdzv-id mine --tee 3 --role '' -m ifa_torchrec train --data /shared/log"
            " --out /shared/run --max-events 1000 --max-requests 8 --epochs 2"
        )
    )
    app = train.ddp("--epochs", "2", **TRAIN, max_events=1000, max_requests=8, j="2x4")
    made = torchrun(app)
    made.rdzv_endpoint, made.rdzv_id = by_hand.rdzv_endpoint, by_hand.rdzv_id
    assert made == by_hand


def test_evaluate_passes_its_options_to_the_script():
    assert script_line(evaluate.ddp("--by", "store", **EVALUATE, split="valid", data="/other")) == [
        *("ifa_torchrec", "evaluate", "--"),
        *("--run", "/shared/run", "--split", "valid", "--data", "/other", "--by", "store"),
    ]


def test_build_states_passes_its_options_to_the_script():
    app = build_states.ddp("--until", "2024-05-01", **BUILD, dtype="float16", data="/other")
    assert script_line(app) == [
        *("ifa_torchrec", "build-states", "--"),
        *("--run", "/shared/run", "--store", "redis://states:6379/0", "--position", "7"),
        *("--data", "/other", "--dtype", "float16", "--until", "2024-05-01"),
    ]


def test_build_states_passes_partitions_and_their_positions():
    app = build_states.ddp(**(BUILD | {"position": "0 1200 1 981"}))
    positions = ["--position", "0", "1200", "1", "981"]
    assert script_line(app)[-7:] == [*positions, "--dtype", "float32"]


def test_serve_is_one_process_that_others_can_reach():
    app = serve.server(
        "--drain", "5", **STATES, data="/other", port=8080, token_file="/secret", env={"A": "1"}
    )
    (role,) = app.roles
    assert (app.name, role.num_replicas, role.port_map) == ("serve", 1, {"http": 8080})
    assert role.entrypoint == "python" and role.args[:3] == ["-m", "ifa_torchrec", "serve"]
    assert role.env["A"] == "1"
    assert tyro.cli(ServeConfig, args=role.args[3:]) == ServeConfig(
        Path("/shared/run"),
        "redis://states:6379/0",
        data="/other",
        host="0.0.0.0",
        port=8080,
        token_file=Path("/secret"),
        drain=5,
    )


@pytest.mark.parametrize(
    "script, component, options",
    [
        (TrainConfig, train.ddp, ("max_events",)),
        (EvaluateConfig, evaluate.ddp, ("split",)),
        (BuildStatesConfig, build_states.ddp, ("dtype",)),
        (ServeConfig, serve.server, ("port",)),
    ],
)
def test_defaults_are_the_scripts(script, component, options):
    defaults = {field.name: field.default for field in dataclasses.fields(script)}
    parser = _create_args_parser(component)
    assert {o: parser.get_default(o) for o in options} == {o: defaults[o] for o in options}


@pytest.mark.parametrize("data", [None, ""])
def test_the_log_is_left_to_the_run(data):
    assert "--data" not in script_line(evaluate.ddp(**EVALUATE, data=data))
    assert "--data" not in script_line(build_states.ddp(**BUILD, data=data))
    assert "--data" not in serve.server(**STATES, data=data).roles[0].args


@pytest.mark.parametrize(
    "script, component, own, given",
    [
        (TrainConfig, train.ddp, TRAIN, {"data", "out"}),
        (EvaluateConfig, evaluate.ddp, EVALUATE, {"run"}),
        (BuildStatesConfig, build_states.ddp, BUILD, {"run", "store", "position"}),
    ],
)
def test_torchrun_takes_no_option_of_the_script_for_its_own(script, component, own, given):
    flags = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(script) if f.name not in given]
    assert script_line(component(*flags, **own))[-len(flags) :] == flags


def test_script_arguments_survive_the_shell():
    odd = ["--by", "two words", "--name=a=b", "it's", '"quoted"', "$HOME", "a;b", ""]
    command_line = ["--data", "my log", "--out", "a=b", "--", *odd]
    app = materialize_appdef(train.ddp, command_line)
    assert script_line(app)[2:6] == ["--data", "my log", "--out", "a=b"]
    assert script_line(app)[-len(odd) :] == odd


@pytest.mark.parametrize("component, own", UNDER_TORCHRUN)
def test_options_reach_the_job(component, own):
    app = materialize_appdef(
        component,
        [word for option, value in own.items() for word in (f"--{option}", str(value))]
        + ["-j", "1:2x4", "--cpu", "3", "--gpu", "4", "--memMB", "5000", "--image", "registry/ifa:1"]
        + ["--name", "trial/first", "--env", "A=1,B=2", "--max_retries", "3", "--rdzv_port", "29999"]
        + ["--mounts", "type=volume,src=claim,dst=/shared,type=bind,src=/host,dst=/here,readonly"],
    )
    (role,) = app.roles
    assert app.name == "first"
    assert role.env["TORCHX_TRACKING_EXPERIMENT_NAME"] == "trial"
    assert (role.env["A"], role.env["B"]) == ("1", "2")
    assert (role.min_replicas, role.num_replicas, role.max_retries) == (1, 2, 3)
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (3, 4, 5000)
    assert role.image == "registry/ifa:1"
    assert role.port_map == {"c10d": 29999} and torchrun(app).rdzv_endpoint.endswith(":29999")
    assert role.mounts == [VolumeMount("claim", "/shared"), BindMount("/host", "/here", read_only=True)]
    assert "TORCH_DISTRIBUTED_DEBUG" not in role.env
    assert "TORCH_DISTRIBUTED_DEBUG" in component(**own, debug=True).roles[0].env


@pytest.mark.parametrize("component, own", UNDER_TORCHRUN)
def test_a_named_resource_goes_before_cpu_gpu_and_memory(component, own):
    (role,) = component(**own, h="gpu.large", cpu=1, gpu=0, memMB=1).roles
    assert role.resource == named_resources["gpu.large"]


def test_what_a_server_may_use_reaches_the_job():
    app = materialize_appdef(
        serve.server,
        shlex.split(
            "--run run --store states --cpu 3 --memMB 5000 --max_retries 3 --name trial/first"
            " --image registry/ifa:1 --mounts type=volume,src=claim,dst=/shared"
        ),
    )
    (role,) = app.roles
    assert (app.name, role.env) == ("first", {"TORCHX_TRACKING_EXPERIMENT_NAME": "trial"})
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (3, 0, 5000)
    assert (role.image, role.max_retries) == ("registry/ifa:1", 3)
    assert role.mounts == [VolumeMount("claim", "/shared")]
    (role,) = serve.server(**STATES, h="gpu.large").roles
    assert role.resource == named_resources["gpu.large"]


@pytest.mark.parametrize("component, own", [*UNDER_TORCHRUN, (serve.server, STATES)])
def test_the_callers_env_is_left_alone(component, own):
    env = {"A": "1"}
    component(**own, env=env, max_retries=1)
    assert env == {"A": "1"}


@pytest.mark.parametrize(
    "options, resumes",
    [
        ({}, False),
        ({"max_retries": 1}, True),
        ({"max_restarts": 1}, True),
        ({"j": "1:2x2"}, True),
        ({"j": "2x2"}, False),
    ],
)
def test_a_job_that_may_be_started_again_resumes(options, resumes):
    assert ("--resume" in script_line(train.ddp(**TRAIN, **options))) == resumes


@pytest.mark.parametrize(
    "options, disabled",
    [({}, None), ({"max_retries": 1}, None), ({"max_restarts": 1}, "1"), ({"j": "1:2x2"}, "1")],
)
def test_ranks_that_torchrun_restarts_do_not_meet_in_its_old_store(options, disabled):
    env = train.ddp(**TRAIN, **options).roles[0].env
    assert env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == disabled


def test_max_restarts_is_torchruns(monkeypatch):
    for name, value in train.ddp(**TRAIN, max_restarts=3).roles[0].env.items():
        monkeypatch.setenv(name, value)
    assert torchrun(train.ddp(**TRAIN)).max_restarts == 3


@pytest.mark.parametrize(
    "component, own, options, message",
    [
        (train.ddp, TRAIN, {"data": ""}, "data is empty; give a folder"),
        (train.ddp, TRAIN, {"out": " "}, "out is empty; give a folder"),
        (train.ddp, TRAIN, {"max_events": 0}, "max_events must be at least 1, got 0"),
        (train.ddp, TRAIN, {"max_requests": -1}, "max_requests must be at least 0, got -1"),
        (train.ddp, TRAIN, {"max_restarts": -1}, "max_restarts must be at least 0, got -1"),
        (evaluate.ddp, EVALUATE, {"run": ""}, "run is empty; give the out of a training run"),
        (evaluate.ddp, EVALUATE, {"split": ""}, "split is empty; give a split"),
        (build_states.ddp, BUILD, {"run": ""}, "run is empty; give the out of a training run"),
        (build_states.ddp, BUILD, {"store": " "}, "store is empty; give a folder, or redis://"),
        (
            build_states.ddp,
            BUILD,
            {"position": "0 12 1"},
            "position must be a number, or partitions, each",
        ),
        (build_states.ddp, BUILD, {"dtype": "int8"}, "dtype must be float32 or float16, got 'int8'"),
        (
            build_states.ddp,
            BUILD,
            {"store": "/shared/states", "j": "2x1"},
            "store /shared/states is a folder, which works on one node",
        ),
        (serve.server, STATES, {"run": ""}, "run is empty; give the out of a training run"),
        (serve.server, STATES, {"store": ""}, "store is empty; give a folder, or redis://"),
        (serve.server, STATES, {"port": 0}, "port must be at least 1, got 0"),
        (serve.server, STATES, {"cpu": 0}, "cpu must be at least 1, got 0"),
        *(
            (component, own, options, message)
            for component, own in UNDER_TORCHRUN
            for options, message in (
                ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
                ({"cpu": 0}, "cpu must be at least 1, got 0"),
                ({"gpu": -1}, "gpu must be at least 0, got -1"),
                ({"memMB": 0}, "memMB must be at least 1, got 0"),
                ({"j": "0x2"}, "nodes in j must be at least 1, got 0"),
                ({"j": "2x0"}, "ranks in j must be at least 1, got 0"),
                ({"j": "two"}, "Invalid format for -j, usage example: 1:2x4"),
            )
        ),
    ],
)
def test_bad_arguments_are_named(component, own, options, message):
    with pytest.raises(ValueError, match=message):
        component(**(own | options))
