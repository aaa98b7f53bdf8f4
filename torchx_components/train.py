"""The TorchX component that trains."""

# TorchX reads the annotations' source and does not know newer spellings.
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List, Optional

from torchx.specs import AppDef

from torchx_components._job import check_least, torchrun_job


def ddp(
    *script_args: str,
    data: str,
    out: str,
    max_events: int = 32768,
    max_requests: int = 0,
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "ifa-torchrec",
    name: str = "/",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> AppDef:
    """Train on an event log: ifa train under torchrun.

    Other options of the script go after "--", e.g. -- --interaction softmax --epochs 2. A job that may
    be restarted (max_retries, max_restarts, a varying number of nodes) gets the script's --resume: each
    start continues from the last checkpoint in out, if there is one.

    Args:
        script_args: more options of ifa train
        data: event log to train on; every node must see it
        out: folder of the run; every node must see it
        max_events: budget of history events per batch and rank
        max_requests: maximum of requests per batch and rank; 0 to choose it from the log
        j: [MIN_NODES:]NODESxRANKS, e.g. 2x4 for two nodes with four ranks each
        h: a named resource, e.g. gpu.large, instead of cpu, gpu and memMB
        cpu: CPUs per node
        gpu: GPUs per node, one for each of its ranks
        memMB: memory per node, in MB
        image: container image with this package; not used by local_cwd and slurm
        name: EXPERIMENT/RUN, EXPERIMENT/ or RUN; the job is called train if RUN is left out
        env: environment variables of the job, e.g. A=1,B=2
        max_retries: how often the scheduler may restart a failed job
        max_restarts: how often torchrun may restart the ranks within the job
        rdzv_port: rendezvous port on the first node; not used on one node
        mounts: mounts of the container, e.g. type=volume,src=CLAIM,dst=/shared
        debug: set torch.distributed's environment variables for debugging

    Returns:
        The job.

    Raises:
        ValueError: an argument is out of range or empty.

    Example:
        >>> from torchx_components.train import ddp
        >>> role = ddp("--epochs", "2", data="/shared/log", out="/shared/run", j="2x4").roles[0]
        >>> role.num_replicas
        2
        >>> role.args[1].partition("-m ")[2][:55]
        'ifa_torchrec train --data /shared/log --out /shared/run'
    """
    for option, path in (("data", data), ("out", out)):
        if not path.strip():
            raise ValueError(f"{option} is empty; give a folder that every node can see")
    check_least(1, max_events=max_events)
    check_least(0, max_requests=max_requests, max_restarts=max_restarts)
    env = dict(env or {})
    torchrun_may_restart = max_restarts > 0 or ":" in j
    if torchrun_may_restart:
        env["PET_MAX_RESTARTS"] = str(max_restarts)  # torchrun's --max-restarts
        # otherwise the new ranks may find the dead ranks' addresses in torchrun's store, and fail
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    arguments = ["--data", data, "--out", out]
    arguments += ["--max-events", str(max_events)]
    arguments += ["--max-requests", str(max_requests)] if max_requests else []
    arguments += ["--resume"] if torchrun_may_restart or max_retries else []
    return torchrun_job(
        "train",
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
