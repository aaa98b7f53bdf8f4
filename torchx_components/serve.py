"""The TorchX component that serves."""

# TorchX reads the annotations' source and does not know newer spellings.
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List, Optional

from torchx.components.structured_arg import StructuredNameArgument
from torchx.specs import AppDef, Role, parse_mounts, resource

from torchx_components._job import check_least


def server(
    *script_args: str,
    run: str,
    store: str,
    data: Optional[str] = None,
    host: str = "0.0.0.0",
    port: int = 8000,
    token_file: Optional[str] = None,
    h: Optional[str] = None,
    cpu: int = 2,
    memMB: int = 8192,
    image: str = "ifa-torchrec",
    name: str = "/",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Rank and take events over HTTP: one process of ifa serve.

    Other options of the script go after "--", e.g. -- --limits.timeout 1. The service needs a bearer
    token, unless host is 127.0.0.1: give token_file, or IFA_TOKEN in the job's environment.

    Args:
        script_args: more options of ifa serve
        run: folder of a training run (its out), or of its bundle, or a link to either
        store: where its states are: a folder, or redis://HOST:PORT/NUMBER (password: IFA_REDIS_PASSWORD)
        data: event log; by default the log that the run was trained on
        host: address to listen on; 0.0.0.0 for all addresses
        port: port to listen on
        token_file: file with the bearer token, e.g. a mounted secret
        h: a named resource, e.g. cpu.large, instead of cpu and memMB
        cpu: CPUs
        memMB: memory, in MB
        image: container image with this package; not used by local_cwd and slurm
        name: EXPERIMENT/RUN, EXPERIMENT/ or RUN; the job is called serve if RUN is left out
        env: environment variables of the job, e.g. A=1,B=2
        max_retries: how often the scheduler may restart a failed job
        mounts: mounts of the container, e.g. type=volume,src=CLAIM,dst=/shared

    Returns:
        The job.

    Raises:
        ValueError: an argument is out of range or empty.

    Example:
        >>> from torchx_components.serve import server
        >>> role = server(run="/shared/run", store="/shared/states", port=8080).roles[0]
        >>> role.entrypoint, role.args[:3], role.port_map
        ('python', ['-m', 'ifa_torchrec', 'serve'], {'http': 8080})
    """
    if not run.strip():
        raise ValueError("run is empty; give the out of a training run")
    if not store.strip():
        raise ValueError("store is empty; give a folder, or redis://HOST:PORT/NUMBER")
    check_least(1, port=port, cpu=cpu, memMB=memMB)
    check_least(0, max_retries=max_retries)
    names = StructuredNameArgument.parse_from(name, m="serve")
    arguments = ["-m", "ifa_torchrec", "serve", "--run", run, "--store", store]
    arguments += ["--data", data] if data else []
    arguments += ["--host", host, "--port", str(port)]
    arguments += ["--token-file", token_file] if token_file else []
    role = Role(
        name="serve",
        image=image,
        entrypoint="python",
        args=[*arguments, *script_args],
        env={**(env or {}), "TORCHX_TRACKING_EXPERIMENT_NAME": names.experiment_name},
        port_map={"http": port},
        resource=resource(cpu=cpu, gpu=0, memMB=memMB, h=h),
        max_retries=max_retries,
        mounts=parse_mounts(mounts) if mounts else [],
    )
    return AppDef(name=names.run_name, roles=[role])
