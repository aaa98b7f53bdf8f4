"""What the commands share."""

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
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ifa_torchrec.errors import UserError


@contextmanager
def as_command() -> Generator[None]:
    """Run a program for its user: what it prints is meant for that user.

    It ends with the message alone where the user is at fault (a UserError), and with a traceback where
    the program is; and without torch's and torchrec's warnings of their own calls of each other. Under
    torchrun, either is told to it, as by torch.distributed.elastic's ``record``: the summary
    of the job then shows the first failure of all ranks. Where the reader of its output has gone, as
    behind ``| head``, it ends without a word, with 141, as a program that SIGPIPE ended.

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
        # not by `record`, which takes the SystemExit of --help for an end without one
        get_error_handler().record_exception(error)
        if isinstance(error, UserError):
            raise SystemExit(f"error: {error}") from error
        raise


def _stdout_has_a_reader() -> bool:
    """False where stdout is a pipe whose other end is closed; what it still holds is then dropped."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def result_as_json(result: Mapping[str, Any]) -> str:
    """A command's result as JSON, which has no NaN: the GAUC of no request that has one is null.

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
