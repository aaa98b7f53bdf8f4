"""What the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ifa_torchrec.data import LogError
from ifa_torchrec.distributed import CheckpointError


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with the message alone where the input is at fault, not the program.

    Example:
        >>> from ifa_torchrec.command_line import plain_errors
        >>> with plain_errors():
        ...     raise ValueError("no such thing; there are a, b")
        Traceback (most recent call last):
        SystemExit: error: no such thing; there are a, b
    """
    try:
        yield
    except (LogError, CheckpointError, ValueError, FloatingPointError, FileExistsError) as error:
        raise SystemExit(f"error: {error}") from error
