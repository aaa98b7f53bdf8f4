"""What the commands share."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

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


def result_as_json(result: Mapping[str, Any]) -> str:
    """A command's result as JSON, which has no NaN: the GAUC of no request that has one is null.

    Example:
        >>> from ifa_torchrec.command_line import result_as_json
        >>> print(result_as_json({"like": {"gauc": float("nan"), "requests_ranked": 0}}))
        {
          "like": {
            "gauc": null,
            "requests_ranked": 0
          }
        }
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(item) for name, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(plain(result), indent=2, allow_nan=False)
