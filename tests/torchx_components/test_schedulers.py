"""Requests to slurm and kubernetes, as dry runs; two nodes with four ranks each."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from torchx.runner import Runner, get_runner

TRAIN = shlex.split(
    "--data /shared/log --out /shared/run -j 2x4 --cpu 8 --memMB 32000 --image registry/ifa:1"
    " --mounts type=volume,src=claim,dst=/shared --env A=1 --max_retries 2 --max_restarts 1"
    " -- --epochs 2"
)
SERVE = shlex.split("--run /shared/run --store /shared/states --token_file /secret -- --drain 5")
EVALUATE = shlex.split("--run /shared/run -j 2x4 -h gpu.large --rdzv_port 29501 -- --by store")

TORCHRUN = (
    "torchrun --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_id 'ID' --nnodes 2"
    " --nproc_per_node 4 --tee 3 --role '' -m {script}"
)
TRAIN_ENV = {
    "A": "1",
    "LOGLEVEL": "WARNING",
    "PET_MAX_RESTARTS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
TRAIN_SCRIPT = (
    "ifa_torchrec train --data /shared/log --out /shared/run --max-events 32768 --resume --epochs 2"
)
EVALUATE_SCRIPT = "ifa_torchrec evaluate -- --run /shared/run --split test --by store"


@pytest.fixture
def runner(monkeypatch, tmp_path):
    for variable in ("LOGLEVEL", "TORCHX_PARENT_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)  # a folder without .torchxconfig
    with get_runner() as runner:
        yield runner


def slurm_request(runner: Runner, component: str, arguments: list[str]) -> dict[str, Any]:
    cfg = {"partition": "compute", "time": "1:00:00"}
    request = runner.dryrun_component(component, arguments, "slurm", cfg).request
    return {
        "retries": request.max_retries,
        "nodes": {
            name: {
                "command": " ".join([node.entrypoint, *node.args]).replace("${app_id}", "ID"),
                "env": {k: v for k, v in node.env.items() if not k.startswith("TORCHX_")},
                "sbatch": node.sbatch_opts,
            }
            for name, node in request.replicas.items()
        },
    }


def test_slurm_train(runner):
    endpoint = "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500"
    node = {
        "command": "bash -c " + TORCHRUN.format(endpoint=endpoint, script=TRAIN_SCRIPT),
        "env": TRAIN_ENV,
        "sbatch": {
            "requeue": None,
            "partition": "compute",
            "time": "1:00:00",
            "ntasks-per-node": "1",
            "cpus-per-task": "8",
            "mem": "32000",
        },
    }
    assert slurm_request(runner, "ifa.train.ddp", TRAIN) == {
        "retries": 2,
        "nodes": {"train-0": node, "train-1": node},
    }


def test_slurm_evaluate(runner):
    endpoint = "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29501"
    node = {
        "command": "bash -c " + TORCHRUN.format(endpoint=endpoint, script=EVALUATE_SCRIPT),
        "env": {"LOGLEVEL": "WARNING"},
        "sbatch": {
            "requeue": None,
            "partition": "compute",
            "time": "1:00:00",
            "ntasks-per-node": "1",
            "cpus-per-task": "32",
            "mem": "131072",
            "gpus-per-task": "4",
        },
    }
    assert slurm_request(runner, "ifa.evaluate.ddp", EVALUATE) == {
        "retries": 0,
        "nodes": {"evaluate-0": node, "evaluate-1": node},
    }


SERVE_COMMAND = (
    "python -m ifa_torchrec serve --run /shared/run --store /shared/states --host 0.0.0.0 --port 8000"
    " --token-file /secret --drain 5"
)


def test_slurm_serve(runner):
    request = slurm_request(runner, "ifa.serve.server", SERVE)
    assert {name: node["command"] for name, node in request["nodes"].items()} == {
        "serve-0": SERVE_COMMAND
    }


def kubernetes_request(runner: Runner, component: str, arguments: list[str]) -> dict[str, Any]:
    request = runner.dryrun_component(component, arguments, "kubernetes", {"queue": "ranking"}).request
    job = request.resource
    tasks = {}
    for task in job["spec"]["tasks"]:
        pod = task["template"].spec
        (container,) = pod.containers
        claims = {v.name: v.persistent_volume_claim for v in pod.volumes if v.persistent_volume_claim}
        tasks[task["name"]] = {
            "command": " ".join(container.command).replace(job["metadata"]["name"], "ID"),
            "image": container.image,
            "env": {e.name: e.value for e in container.env if not e.name.startswith("TORCHX_")},
            "limits": container.resources.limits,
            "claims": {
                claims[m.name].claim_name: m.mount_path
                for m in container.volume_mounts
                if m.name in claims
            },
            "ports": [port.container_port for port in container.ports],
            "required": task.get("minAvailable"),
            "retries": task.get("maxRetry", 0),
        }
    return {"queue": job["spec"]["queue"], "retries": job["spec"]["maxRetry"], "tasks": tasks}


@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning")
def test_kubernetes_train(runner):
    def task(first: str) -> dict[str, Any]:
        endpoint = f"${{{first}:=localhost}}:29500"
        return {
            "command": "bash -c " + TORCHRUN.format(endpoint=endpoint, script=TRAIN_SCRIPT),
            "image": "registry/ifa:1",
            "env": TRAIN_ENV,
            "limits": {"cpu": "8000m", "memory": "32000M"},
            "claims": {"claim": "/shared"},
            "ports": [29500],
            "required": 1,
            "retries": 2,
        }

    assert kubernetes_request(runner, "ifa.train.ddp", TRAIN) == {
        "queue": "ranking",
        "retries": 2,
        "tasks": {"train-0": task("TORCHX_RANK0_HOST"), "train-1": task("VC_TRAIN_0_HOSTS")},
    }


def test_kubernetes_evaluate(runner):
    def task(first: str) -> dict[str, Any]:
        endpoint = f"${{{first}:=localhost}}:29501"
        return {
            "command": "bash -c " + TORCHRUN.format(endpoint=endpoint, script=EVALUATE_SCRIPT),
            "image": "ifa-torchrec",
            "env": {"LOGLEVEL": "WARNING"},
            "limits": {"cpu": "32000m", "memory": "131072M", "nvidia.com/gpu": "4"},
            "claims": {},
            "ports": [29501],
            "required": 1,
            "retries": 0,
        }

    assert kubernetes_request(runner, "ifa.evaluate.ddp", EVALUATE) == {
        "queue": "ranking",
        "retries": 0,
        "tasks": {
            "evaluate-0": task("TORCHX_RANK0_HOST"),
            "evaluate-1": task("VC_EVALUATE_0_HOSTS"),
        },
    }


@pytest.mark.filterwarnings("ignore:(?s).*Volcano:UserWarning")
def test_kubernetes_serve(runner):
    (task,) = kubernetes_request(runner, "ifa.serve.server", SERVE)["tasks"].values()
    assert (task["command"], task["ports"]) == (SERVE_COMMAND, [8000])
