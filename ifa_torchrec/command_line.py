"""What the commands share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

from ifa_torchrec.data import LogError
from ifa_torchrec.distributed import CheckpointError
from ifa_torchrec.serving import StateError


@contextmanager
def as_command() -> Generator[None]:
    """Run a program for its user: what it prints is meant for that user.

    It ends with the message alone where the input is at fault, not the program; and without
    torch's and torchrec's warnings of their own calls of each other.

    Example:
        >>> from ifa_torchrec.command_line import as_command
        >>> with as_command():
        ...     raise ValueError("no such thing; there are a, b")
        Traceback (most recent call last):
        SystemExit: error: no such thing; there are a, b
    """
    for name in ("torch.fx._symbolic_trace", "torchrec.distributed.planner.types"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
            yield
    except (
        LogError,
        CheckpointError,
        StateError,
        ValueError,
        FloatingPointError,
        FileExistsError,
    ) as error:
        raise SystemExit(f"error: {error}") from error
