"""Errors that are the user's to fix, not bugs in the program.

A command prints the message of a UserError and exits; every other exception keeps its traceback.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An input cannot be used; the message names it and says what would be right.

    Raised where input enters: a file, an option, a request, an argument. Each subclass is also the
    built-in exception that a caller in Python would expect, such as ValueError or OSError.

    Example:
        >>> from ifa_torchrec.data import LogError
        >>> from ifa_torchrec.errors import UserError
        >>> issubclass(LogError, UserError), issubclass(LogError, ValueError)
        (True, True)
    """


class ConfigError(UserError, ValueError):
    """A configuration field or a command-line option has an invalid value.

    Example:
        >>> from ifa_torchrec import IFAConfig
        >>> IFAConfig(embedding_dim=0)
        Traceback (most recent call last):
        ifa_torchrec.errors.ConfigError: IFAConfig: embedding_dim must be positive, got 0
    """


class ExistsError(UserError, FileExistsError):
    """The file or folder to be written already exists."""


class WriteError(UserError, OSError):
    """A file or folder cannot be written: full disk, read-only file system, missing permission."""


class DivergedError(UserError, FloatingPointError):
    """The numbers of a training run are no longer finite: its learning rates are too high."""


@contextmanager
def writing(place: Path) -> Generator[None]:
    """Turn file errors inside the block into a WriteError that names ``place``.

    Raises:
        WriteError: instead of any other OSError, or of the RuntimeError that torch's own writer raises
            for one.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.errors import writing
        >>> with writing(Path("/proc/run")):  # doctest: +ELLIPSIS
        ...     Path("/proc/run").mkdir()
        Traceback (most recent call last):
        ifa_torchrec.errors.WriteError: /proc/run cannot be written: [Errno 2] ...
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        # torch writes tensors in C++, where a full disk is a RuntimeError from inline_container.cc
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise WriteError(f"{place} cannot be written: {error}") from error


def require(extra: str, *modules: str) -> None:
    """Check that modules are installed, so that the error names the command that installs them.

    Args:
        extra: the extra of this package that installs the modules.
        modules: names of top-level modules.

    Raises:
        ModuleNotFoundError: one of them is not installed.

    Example:
        >>> from ifa_torchrec.errors import require
        >>> require("x", "torch", "nowhere")
        Traceback (most recent call last):
        ModuleNotFoundError: nowhere is not installed; install it with: uv pip install 'ifa-torchrec[x]'
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{module} is not installed; install it with: uv pip install 'ifa-torchrec[{extra}]'",
                name=module,
            )
