"""Functions that the components share.

TorchX treats every function in this package as a component if it can read its signature. It cannot read
the signatures of these two.
"""

from __future__ import annotations

# TorchX reads the annotations' source and does not know newer spellings.
# ruff: noqa: UP006, UP035, UP045
from collections.abc import Sequence
from typing import Any, Dict, Optional

from torchx.components import dist
from torchx.specs import AppDef


def check_least(least: int, **given: int) -> None:
    """Refuse numbers that are too small.

    Args:
        least: the smallest allowed number.
        given: numbers by option name.

    Raises:
        ValueError: one of them is smaller.

    Example:
        >>> from torchx_components._job import check_least
        >>> check_least(1, cpu=2, memMB=0)
        Traceback (most recent call last):
        ValueError: memMB must be at least 1, got 0
    """
    for option, value in given.items():
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")


def torchrun_job(
    command: str,
    arguments: Sequence[str],
    *,
    name: str,
    j: str,
    env: Optional[Dict[str, str]],
    **options: Any,
) -> AppDef:
    """A job that runs an ``ifa`` command under torchrun, based on TorchX's ``dist.ddp``.

    Args:
        command: e.g. "build-states"; also the job's name if that is left out.
        arguments: the command's arguments.
        name, j, env: the component's arguments.
        options: the component's other arguments for ``dist.ddp``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from torchx_components._job import torchrun_job
        >>> options = dict(cpu=2, gpu=0, memMB=1024, max_retries=0)
        >>> job = torchrun_job("train", ["--epochs", "2"], name="trial/", j="1x2", env=None, **options)
        >>> job.name, job.roles[0].name, job.roles[0].args[1].partition("-m ")[2]
        ('train', 'train', 'ifa_torchrec train --epochs 2')
    """
    nodes, _, ranks, _ = dist.parse_nnodes(j)
    check_least(1, **{"nodes in j": nodes, "ranks in j": ranks})
    check_least(1, cpu=options["cpu"], memMB=options["memMB"])
    check_least(0, gpu=options["gpu"], max_retries=options["max_retries"])
    app = dist.ddp(
        command,
        *arguments,
        m="ifa_torchrec",
        j=j,
        name=f"{name}{command}" if name.endswith("/") else name,
        env=dict(env or {}),
        **options,
    )
    app.roles[0].name = command.replace("-", "_")  # dist.ddp names it after the module
    return app
