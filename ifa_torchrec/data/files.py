""""""

from __future__ import annotations

import errno
import fcntl
import hashlib
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pandas.util import hash_pandas_object

from ifa_torchrec.data.schema import HASHED, LogError
from ifa_torchrec.errors import ExistsError

_Seen = list[Any]
"""A file as it was: bytes, time of its last change (ns), SHA-256."""


@contextmanager
def drafting(path: str | Path) -> Generator[Path]:
    """A folder beside ``path`` to write a log in, gone again unless ``EventLog.publish`` renamed it.

    Raises:
        FileExistsError: ``path`` exists.
        LogError: there is no room, or no right, to write there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.files import drafting
        >>> with drafting(Path(tempfile.mkdtemp()) / "log") as draft:
        ...     (draft / "requests").is_dir()
        True
        >>> draft.exists()
        False
    """
    path = Path(path)
    if path.exists():
        raise ExistsError(f"{path} exists; delete it or choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft(path.parent, f".{path.name}-")
    except OSError as error:
        raise LogError(
            f"{path}: the log cannot be written there ({error}); choose another folder"
        ) from error
    try:
        (draft / "requests").mkdir()
        yield draft
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LogError(
            f"{path}: no room to write the log ({error}); free some, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(folder: Path, prefix: str) -> Path:
    """A new folder in ``folder``; unlike tempfile's, open to whom the umask lets in."""
    draft = folder / f"{prefix}{secrets.token_hex(6)}"
    draft.mkdir()
    return draft


class _Changed(Exception):
    """A file is not what it was."""


def _see(file: Path) -> _Seen:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def _seen(file: Path, before: _Seen) -> _Seen:
    """The file as it is now, where its content is what it was.

    Raises:
        _Changed: it is another; read only where its time is another.
    """
    stat = file.stat()
    if [stat.st_size, stat.st_mtime_ns] == before[:2]:
        return before
    now = _see(file) if stat.st_size == before[0] else None
    if now is None or now[2] != before[2]:
        raise _Changed
    return now


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Generator[None]:
    """Hold the folder's lock, which ends with the process.

    Raises:
        OSError: the folder cannot be written or, without ``wait``, the lock cannot be had.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (
            OSError
        ):  # a file system without locks: what is made is published by a rename all the same
            if not wait:
                raise
        yield


def _codes_digest(file: Path) -> str:
    """Of the ids and their rows, not of the file: other programs may have written the same."""
    try:
        hashed = (pq.read_metadata(file).metadata or {}).get(HASHED.encode())
        if hashed is not None:
            return f"hashed to {hashed.decode()} rows"
        table = pq.read_table(file, columns=["id", "code"])
        table = table.cast(pa.schema({"id": pa.large_string(), "code": pa.int64()}))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise LogError(
            f"{file}: not readable as the columns id and code ({error}); write the log again"
        ) from error
    # pandas-stubs has no type for it
    rows = cast(Any, hash_pandas_object)(table.to_pandas(), index=False)
    return hashlib.sha256(rows.to_numpy()).hexdigest()[:16]
