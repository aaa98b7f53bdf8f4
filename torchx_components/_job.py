"""What the components share.

TorchX takes every function in this package for a component whose signature it can read. These two have
signatures that it cannot, and so are none.
"""

from __future__ import annotations

# TorchX reads the annotations' source and knows no newer spelling.
# ruff: noqa: UP006, UP035, UP045
from collections.abc import Sequence
from typing import Any, Dict, Optional

from torchx.components import dist
from torchx.specs import AppDef


def check_least(least: int, **given: int) -> None:
    """Refuse a number that is too small.

    Args:
        least: what each may be at least.
        given: numbers by the names of their options.

    Raises:
        ValueError: one of them is less.

    Example:
        >>> from torchx_components._job import check_least
        >>> check_least(1, cpu=2, memMB=0)
        Traceback (most recent call last):
        ValueError: memMB must be at least 1, not 0
    """
    for option, value in given.items():
        if value < least:
            raise ValueError(f"{option} must be at least {least}, not {value}")


def torchrun_job(
    command: str,
    arguments: Sequence[str],
    *,
    name: str,
    j: str,
    env: Optional[Dict[str, str]],
    **options: Any,
) -> AppDef:
    """A command of ``ifa`` under torchrun, as TorchX's own ``dist.ddp`` has it.

    Args:
        command: e.g. "build-states", after which the job is called where its name is left out.
        arguments: of the command.
        name, j, env: the component's.
        options: the rest of the component's options for ``dist.ddp``.

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
    app.roles[0].name = command.replace("-", "_")  # by itself it is called by the module
    return app
