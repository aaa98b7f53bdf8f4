"""Copies of what lies elsewhere, on this machine's disk, up to a bound: the least recently used go.

    CACHE/                 IFA_LOG_CACHE, by default ~/.cache/ifa_torchrec
      .lock                held by who makes room
      KEY/                 a log; see data/remote.py
        FILES              small ones, which go when nothing else of the log is left
        events/..., requests/...   parts, a file each
        .columns/...       columns that were made of them, a folder each

What somebody uses is locked (``hold``) and never dropped. Parts and columns go first, by when they were
last used; then the other files of logs that nobody has open.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ifa_torchrec.data.schema import LogError

FOLDER, BOUND = "IFA_LOG_CACHE", "IFA_LOG_CACHE_GB"
"""Variables of the environment: where the cache is, and how many gigabytes (10^9 bytes) it may take."""
_DEFAULT_GB = 100.0
_TABLES = ("events.parquet", "events/*", "requests/*.parquet", "requests/*/*")
_COLUMNS = (".columns/*-*", ".columns/requests/*-*")


class Held:
    """A file or folder that is in use, until this is closed or forgotten, or the process ends.

    Args:
        path: of the file or folder.
        alone: with nobody else using it.

    Raises:
        BlockingIOError: ``alone``, and somebody uses it.
        OSError: there is none.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.cache import Held
        >>> folder = Path(tempfile.mkdtemp())
        >>> first, second = Held(folder), Held(folder)
        >>> first.close(), second.close()
        (None, None)
    """

    def __init__(self, path: Path, alone: bool = False) -> None:
        file = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except OSError:
            self.close()
            raise


class Cache:
    """The folder of copies, and its bound.

    Args:
        folder: where they are.
        bound: bytes that they may take together.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.cache import Cache
        >>> folder = Path(tempfile.mkdtemp())
        >>> old = folder / "key" / "log" / "events" / "part-00000.parquet"
        >>> old.parent.mkdir(parents=True)
        >>> _ = old.write_bytes(b"12345678")
        >>> with Cache(folder, bound=10).room_for(5):
        ...     old.exists()
        False
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Cache:
        """The cache that the environment names.

        Raises:
            LogError: the bound is no positive number.

        Example:
            >>> from ifa_torchrec.data.cache import Cache
            >>> Cache.of({"IFA_LOG_CACHE": "/scratch", "IFA_LOG_CACHE_GB": "0.5"}).bound
            500000000
        """
        home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(environment.get(FOLDER) or home / "ifa_torchrec")
        given = environment.get(BOUND) or str(_DEFAULT_GB)
        try:
            bound = float(given)
        except ValueError:
            bound = 0.0
        if not 0 < bound < float("inf"):
            raise LogError(f"{BOUND} must be a positive number of gigabytes, got {given!r}")
        return cls(folder.absolute(), int(1e9 * bound))

    @contextmanager
    def room_for(self, wanted: int) -> Generator[None]:
        """Drop what is least recently used until so many bytes more are within the bound; nobody else
        makes room, or takes it, inside.

        Raises:
            LogError: what is in use leaves no room, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise LogError(
                f"{self.folder}: copies of a log are kept there, which failed ({error}); name another "
                f"folder in {FOLDER}"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._make_room(wanted)
            yield

    def _make_room(self, wanted: int) -> None:
        total = _size(self.folder)
        if total + wanted <= self.bound:
            return
        parts = [path for name in _TABLES + _COLUMNS for path in self.folder.glob(f"*/*/{name}")]
        for path in sorted(parts, key=_used):
            total -= drop(path)
            if total + wanted <= self.bound:
                return
        in_use = {path.relative_to(self.folder).parts[:2] for path in parts if path.exists()}
        logs = [path for path in self.folder.glob("*/*") if path.is_dir()]
        for path in sorted(logs, key=_used):
            if path.relative_to(self.folder).parts not in in_use:
                total -= drop(path)
            if total + wanted <= self.bound:
                return
        raise LogError(
            f"{self.folder}: {total:,} bytes are in use and {wanted:,} more are wanted, above the bound "
            f"of {self.bound:,}; give more in {BOUND}"
        )


def use(path: Path) -> Held:
    """Hold what is in the cache, and note that it was used now.

    Raises:
        OSError: it is not there.
    """
    held = Held(path)
    os.utime(path)
    return held


def _used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):  # dropped, or renamed, meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def drop(path: Path) -> int:
    """Delete a file or a folder, unless somebody uses it.

    Returns:
        Bytes that are free now.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.cache import Held, drop
        >>> folder = Path(tempfile.mkdtemp())
        >>> held = Held(folder)
        >>> drop(folder), folder.exists()
        (0, True)
        >>> held.close()
        >>> drop(folder), folder.exists()
        (0, False)
    """
    try:
        held = Held(path, alone=True)
    except OSError:
        return 0
    size = _size(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
    held.close()
    return size - _size(path)
