"""The local disk cache of remote logs. It has a size limit; the least recently used copies are deleted.

    CACHE/                 IFA_LOG_CACHE, by default ~/.cache/ifa_torchrec
      .lock                held by the process that frees space
      KEY/                 one log; see data/remote.py
        FILES              its small files, deleted when nothing else of the log is left
        events/..., requests/...   its parts, one file each
        .columns/...       the columns made from them, one folder per table

A copy that is in use is locked (``Held``) and never deleted. Parts and columns are deleted first, least
recently used first; then the small files of logs that no process has open.
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
"""Environment variables: the folder of the cache, and its maximum size in gigabytes (10^9 bytes)."""
_DEFAULT_GB = 100.0
_TABLES = ("events.parquet", "events/*", "requests/*.parquet", "requests/*/*")
_COLUMNS = (".columns/*-*", ".columns/requests/*-*")


class Held:
    """Marks a file or folder as in use until this object is closed or deleted, or the process ends.

    Args:
        path: the file or folder.
        exclusive: fail if it is in use.

    Raises:
        BlockingIOError: ``exclusive``, and another process uses it.
        OSError: it does not exist.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.cache import Held
        >>> folder = Path(tempfile.mkdtemp())
        >>> first, second = Held(folder), Held(folder)
        >>> first.close(), second.close()
        (None, None)
    """

    def __init__(self, path: Path, exclusive: bool = False) -> None:
        file = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except OSError:
            self.close()
            raise


class Cache:
    """The cache folder and its size limit.

    Args:
        folder: where the copies are.
        bound: maximum size of all copies in bytes.

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
        """The cache that the environment variables name.

        Raises:
            LogError: the size limit is not a positive number.

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
        """Delete the least recently used copies until ``wanted`` more bytes fit the size limit.

        Inside the context no other process frees or takes space.

        Raises:
            LogError: the copies in use leave too little space, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise LogError(
                f"{self.folder}: cannot write the cache of remote logs ({error}); set {FOLDER} to a "
                "folder that can be written"
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
            f"{self.folder}: {total:,} bytes are in use and {wanted:,} more are needed, above the limit "
            f"of {self.bound:,} bytes; raise {BOUND}"
        )


def use(path: Path) -> Held:
    """Hold a file or folder of the cache, and record that it was used now.

    Raises:
        OSError: it does not exist.
    """
    held = Held(path)
    os.utime(path)
    return held


def _used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    """The size in bytes of a file, or of all files in a folder."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):  # dropped, or renamed, meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def drop(path: Path) -> int:
    """Delete a file or a folder, unless it is in use.

    Returns:
        The number of bytes freed.

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
        held = Held(path, exclusive=True)
    except OSError:
        return 0
    size = _size(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
    held.close()
    return size - _size(path)
