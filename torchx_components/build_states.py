"""The TorchX component that builds states."""

# TorchX reads the annotations' source and does not know newer spellings.
# ruff: noqa: UP006, UP035, UP045
import re
from typing import Dict, List, Optional

from torchx.components import dist
from torchx.specs import AppDef

from torchx_components._job import torchrun_job


def ddp(
    *script_args: str,
    run: str,
    store: str,
    position: str,
    data: Optional[str] = None,
    dtype: str = "float32",
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "ifa-torchrec",
    name: str = "/",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> AppDef:
    """Build user states: ifa build-states under torchrun.

    Other options of the script go after "--", e.g. -- --until 2024-05-01. A job that is started again
    continues where it stopped.

    Args:
        script_args: more options of ifa build-states
        run: folder of a training run (its out); every node must see it
        store: where the states go: a folder on one node, or redis://HOST:PORT/NUMBER
        position: position of the first event in the stream that the log lacks; for several partitions
            each partition and its position, e.g. "0 1200 1 981"
        data: event log; by default the log that the run was trained on
        dtype: dtype of stored states, float32 or float16
        j: NODESxRANKS, e.g. 2x4 for two nodes with four ranks each
        h: a named resource, e.g. gpu.large, instead of cpu, gpu and memMB
        cpu: CPUs per node
        gpu: GPUs per node, one for each of its ranks
        memMB: memory per node, in MB
        image: container image with this package; not used by local_cwd and slurm
        name: EXPERIMENT/RUN, EXPERIMENT/ or RUN; the job is called build-states if RUN is left out
        env: environment variables of the job, e.g. A=1,B=2
        max_retries: how often the scheduler may restart a failed job
        rdzv_port: rendezvous port on the first node; not used on one node
        mounts: mounts of the container, e.g. type=volume,src=CLAIM,dst=/shared
        debug: set torch.distributed's environment variables for debugging

    Returns:
        The job.

    Raises:
        ValueError: an argument is out of range or empty, or the store of several nodes is a folder.

    Example:
        >>> from torchx_components.build_states import ddp
        >>> role = ddp(run="/shared/run", store="redis://states:6379/0", position="7", j="2x4").roles[0]
        >>> role.args[1].partition("-m ")[2][:67]
        'ifa_torchrec build-states -- --run /shared/run --store redis://stat'
    """
    if not run.strip():
        raise ValueError("run is empty; give the out of a training run, which every node must see")
    if not store.strip():
        raise ValueError("store is empty; give a folder, or redis://HOST:PORT/NUMBER")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    if not re.fullmatch(r"\d+|\d+ \d+( \d+ \d+)*", position):
        raise ValueError(
            f"position must be a number, or partitions, each before its position, got {position!r}"
        )
    if dist.parse_nnodes(j)[1] > 1 and "://" not in store:
        raise ValueError(f"store {store} is a folder, which works on one node; on several use redis://")
    arguments = ["--", "--run", run]  # without "--" torchrun would take --run for its --run-path
    arguments += ["--store", store, "--position", *position.split()]
    arguments += [*(["--data", data] if data else []), "--dtype", dtype]
    return torchrun_job(
        "build-states",
        [*arguments, *script_args],
        name=name,
        j=j,
        env=env,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        image=image,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
        debug=debug,
    )
