"""What is raised where the user, not the program, is at fault.

A command prints the message of a UserError and ends; every other exception keeps its traceback.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What was given cannot be used; the message names it and says what would be right.

    Raised where input enters: a file, an option, a request, an argument. Its subclasses are a
    ValueError, a RuntimeError or an OSError too, whichever a caller in Python would expect.

    Example:
        >>> from ifa_torchrec.data import LogError
        >>> from ifa_torchrec.errors import UserError
        >>> issubclass(LogError, UserError), issubclass(LogError, ValueError)
        (True, True)
    """


class ConfigError(UserError, ValueError):
    """A value of a configuration, or of a command's option, is not one that it can have.

    Example:
        >>> from ifa_torchrec import IFAConfig
        >>> IFAConfig(embedding_dim=0)
        Traceback (most recent call last):
        ifa_torchrec.errors.ConfigError: IFAConfig: embedding_dim must be positive, got 0
    """


class ExistsError(UserError, FileExistsError):
    """What would be written is there already."""


class WriteError(UserError, OSError):
    """A file or folder cannot be written: a full disk, a read-only file system, rights."""


class DivergedError(UserError, FloatingPointError):
    """A training's numbers are not finite any more: its learning rates are too high."""


@contextmanager
def writing(place: Path) -> Generator[None]:
    """What goes wrong with files inside is told with the place that was to be written.

    Raises:
        WriteError: in place of any other OSError, and of what torch's own writer makes of one.

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
        # torch writes tensors by C++, in which a full disk is a RuntimeError of inline_container.cc
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise WriteError(f"{place} cannot be written: {error}") from error


def require(extra: str, *modules: str) -> None:
    """Name what is not installed, and the line that installs it, before an import fails on it.

    Args:
        extra: of this package, that brings the modules.
        modules: names of modules at the top.

    Raises:
        ModuleNotFoundError: one of them is not installed.

    Example:
        >>> from ifa_torchrec.errors import require
        >>> require("demo", "torch", "no_module")
        Traceback (most recent call last):
        ModuleNotFoundError: no_module is not installed; uv pip install 'ifa-torchrec[demo]' brings it
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{module} is not installed; uv pip install 'ifa-torchrec[{extra}]' brings it",
                name=module,
            )
