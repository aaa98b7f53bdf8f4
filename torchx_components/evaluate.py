"""The TorchX component that evaluates."""

# TorchX reads the annotations' source and does not know newer spellings.
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List, Optional

from torchx.specs import AppDef

from torchx_components._job import torchrun_job


def ddp(
    *script_args: str,
    run: str,
    split: str = "test",
    data: Optional[str] = None,
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
    """Score and measure a split: ifa evaluate under torchrun.

    Other options of the script go after "--", e.g. -- --by store.

    Args:
        script_args: more options of ifa evaluate
        run: folder of a training run (its out); every node must see it
        split: split whose requests are scored
        data: event log; by default the log that the run was trained on
        j: NODESxRANKS, e.g. 2x4 for two nodes with four ranks each
        h: a named resource, e.g. gpu.large, instead of cpu, gpu and memMB
        cpu: CPUs per node
        gpu: GPUs per node, one for each of its ranks
        memMB: memory per node, in MB
        image: container image with this package; not used by local_cwd and slurm
        name: EXPERIMENT/RUN, EXPERIMENT/ or RUN; the job is called evaluate if RUN is left out
        env: environment variables of the job, e.g. A=1,B=2
        max_retries: how often the scheduler may restart a failed job
        rdzv_port: rendezvous port on the first node; not used on one node
        mounts: mounts of the container, e.g. type=volume,src=CLAIM,dst=/shared
        debug: set torch.distributed's environment variables for debugging

    Returns:
        The job.

    Raises:
        ValueError: an argument is out of range or empty.

    Example:
        >>> from torchx_components.evaluate import ddp
        >>> role = ddp("--by", "store", run="/shared/run", j="1x4").roles[0]
        >>> role.args[1].partition("-m ")[2]
        'ifa_torchrec evaluate -- --run /shared/run --split test --by store'
    """
    if not run.strip():
        raise ValueError("run is empty; give the out of a training run, which every node must see")
    if not split.strip():
        raise ValueError("split is empty; give a split of the event log, e.g. test")
    arguments = ["--", "--run", run]  # without "--" torchrun would take --run for its --run-path
    arguments += ["--split", split, *(["--data", data] if data else [])]
    return torchrun_job(
        "evaluate",
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
