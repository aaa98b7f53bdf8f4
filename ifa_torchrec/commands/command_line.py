"""Functions that the commands share."""

from __future__ import annotations

import json
import logging
import math
import os
import select
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ifa_torchrec.errors import ConfigError, UserError


@contextmanager
def as_command() -> Generator[None]:
    """Run a program as a command, whose output is meant for its user.

    For a UserError only the message is printed, for other errors a traceback. torch's and TorchRec's
    warnings about their own calls of each other are hidden. Under torchrun the error is recorded as by
    torch.distributed.elastic's ``record``, so the job's summary shows the first failure of all ranks. If
    the reader of the output has gone, as with ``| head``, the program exits silently with 141, like a
    program ended by SIGPIPE.

    Example:
        >>> from ifa_torchrec.commands.command_line import as_command
        >>> from ifa_torchrec.errors import UserError
        >>> with as_command():
        ...     raise UserError("no such thing; there are a, b")
        Traceback (most recent call last):
        SystemExit: error: no such thing; there are a, b
    """
    for name in ("torch.fx._symbolic_trace", "torchrec.distributed.planner.types"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
            yield
            sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _stdout_has_a_reader():
            raise SystemExit(141) from None
        # not by `record`, which handles the SystemExit of --help wrongly
        get_error_handler().record_exception(error)
        if isinstance(error, UserError):
            raise SystemExit(f"error: {error}") from error
        raise


def _stdout_has_a_reader() -> bool:
    """False if stdout is a pipe whose other end is closed; its buffered output is then dropped."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def check_picture(path: Path | None) -> None:
    """Refuse the file of a picture whose suffix names none of the formats.

    Args:
        path: as --picture gives it; None for no picture.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.command_line import check_picture
        >>> check_picture(Path("curves.PNG"))
        >>> check_picture(Path("curves"))
        Traceback (most recent call last):
        ifa_torchrec.errors.ConfigError: --picture curves: the name must end in .png, .svg or .pdf
    """
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--picture {path}: the name must end in .png, .svg or .pdf")


def result_as_json(result: Mapping[str, Any]) -> str:
    """A command's result as JSON. JSON has no NaN: a metric that cannot be measured is null.

    Example:
        >>> from ifa_torchrec.commands.command_line import result_as_json
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
