"""The commands in the pages of docs/launch, as dry runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
from torch.distributed.run import config_from_args, get_args_parser
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main as torchx
from torchx.runner import Runner
from torchx.specs import AppDef

from ifa_torchrec.commands.build_states import BuildStatesConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig
from ifa_torchrec.training.options import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page for page in (ROOT / "docs" / "launch").glob("*.md")}
SCRIPTS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "build-states": BuildStatesConfig,
}


def commands(page: Path, program: str) -> list[str]:
    """The page's command lines that run a program, each on one line and without its pipe."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" | ")[0] for line in lines if re.match(rf"([A-Z_]+=\S+ )*{program} ", line)]


ALL = [
    (name, line)
    for name, page in PAGES.items()
    for line in commands(page, "torchx run")
    if not line.endswith("--help")
]
BY_HAND = [(name, line) for name, page in PAGES.items() for line in commands(page, "torchrun")]


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """Run a ``torchx run`` command line as a dry run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # otherwise torchrun sets it in this process
    jobs: list[AppDef] = []
    dryrun = Runner.dryrun

    def remember(runner: Runner, app: AppDef, *args, **kwargs):
        jobs.append(app)
        return dryrun(runner, app, *args, **kwargs)

    monkeypatch.setattr(Runner, "dryrun", remember)

    def run(line: str) -> AppDef:
        for once_a_process in (ArgOnceAction, torchxconfig):
            once_a_process.called_args.clear()
        torchx(["run", "--dryrun", *shlex.split(line)[2:]])
        assert "=== SCHEDULER REQUEST ===" in capsys.readouterr().out
        return jobs[-1]

    return run


def meaning(words: list[str], environment: dict[str, str], monkeypatch) -> dict[str, Any]:
    """A torchrun command line, normalised."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        config, _, command = config_from_args(get_args_parser().parse_args(words[1:]))
    package, script, *arguments = [w for w in command[command.index("-m") + 1 :] if w != "--"]
    assert package == "ifa_torchrec"
    several = config.max_nodes > 1
    return {
        "nodes": (config.min_nodes, config.max_nodes),
        "ranks": config.nproc_per_node,
        "restarts": config.max_restarts,
        "meet by": config.rdzv_backend if several else None,
        "port": config.rdzv_endpoint.rpartition(":")[2] if several else None,
        "own store": environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
        "script": script,
        "options": tyro.cli(SCRIPTS[script], args=arguments),
    }


def test_there_are_pages_with_commands_for_both_components():
    assert {"one_machine", "slurm", "kubernetes"} <= PAGES.keys()
    for page in ("one_machine", "slurm", "kubernetes"):
        for found in (ALL, BY_HAND):
            lines = " ".join(line for name, line in found if name == page)
            assert "train" in lines and "evaluate" in lines


@pytest.mark.parametrize("page, line", ALL)
@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning")
def test_a_printed_command_is_one_that_torchx_takes(page, line, dry_run):
    assert dry_run(line).name in ("train", "evaluate", "build-states", "serve")


@pytest.mark.parametrize("page, line", BY_HAND)
@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning")
def test_a_printed_torchrun_line_does_what_one_of_the_components_does(page, line, dry_run, monkeypatch):
    words = shlex.split(line)
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    by_hand = meaning(words, environment, monkeypatch)
    made = []
    for name, command in ALL:
        if name == page:
            (role,) = dry_run(command).roles
            if role.entrypoint == "python":  # a server does not need torchrun
                continue
            own = {k: v for k, v in role.env.items() if k.startswith(("PET_", "TORCH_"))}
            made.append(meaning(shlex.split(role.args[1]), own, monkeypatch))
    assert by_hand in made
