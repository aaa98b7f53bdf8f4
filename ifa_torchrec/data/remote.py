"""A log that lies behind a URI (s3://, gs://, hdfs://, file://), read through pyarrow.fs.

Its small files are copied into the cache (data/cache.py) when it is opened. Parts follow one at a time,
when columns are made of them; then these are what is used. A copy belongs to the log as it was: one that
was written anew in the same place has another schema.json, or files of other times, and is copied anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ifa_torchrec.data.cache import Cache, Held, use
from ifa_torchrec.data.parts import Part, sha256_of
from ifa_torchrec.data.schema import LogError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PART = re.compile(r"(events|requests/[^/]+)/part-\d+\.parquet")
_TABLE = re.compile(r"(events|requests)(/.*|\.parquet)")
_BLOCK = 1 << 23  # bytes that are read at a time


def is_uri(place: str | Path) -> bool:
    """Whether a place is no folder of this machine but a URI.

    Example:
        >>> from ifa_torchrec.data.remote import is_uri
        >>> is_uri("s3://bucket/log"), is_uri("runs/data/mine")
        (True, False)
    """
    return _URI.match(str(place)) is not None


def full_name(place: str | Path) -> str:
    """The name of a log from anywhere: a URI as it is, a folder from the root on.

    Example:
        >>> from ifa_torchrec.data.remote import full_name
        >>> full_name("s3://bucket/log"), full_name("/data/../log")
        ('s3://bucket/log', '/log')
    """
    return str(place) if is_uri(place) else str(Path(place).resolve())


class RemoteLog:
    """A log behind a URI, and the copies of its files.

    Args:
        uri: of the log's folder.

    Attributes:
        folder: of the copies; whoever has this object keeps it from being dropped.

    Raises:
        LogError: there is no such log, no access to it, or no room for copies.

    Example:
        >>> import os, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.remote import RemoteLog
        >>> log, os.environ["IFA_LOG_CACHE"] = Path(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> _ = (log / "schema.json").write_text("{}")
        >>> (RemoteLog(log.as_uri()).folder / "schema.json").read_text()
        '{}'
        >>> del os.environ["IFA_LOG_CACHE"]
    """

    def __init__(self, uri: str) -> None:
        self.uri, self._cache = uri, Cache.of(os.environ)
        self._files, self._root = _opened(uri)
        listing = self._list()
        if "schema.json" not in listing:
            raise LogError(
                f"{uri}: no schema.json, so that there is no log, or it was not copied to the end; copy "
                "it there, schema.json last"
            )
        with _asking(uri), self._files.open_input_stream(f"{self._root}/schema.json") as stream:
            header = stream.read()
        # parts are known by their SHA-256, which schema.json has; other files by size and time
        others = {name: told for name, told in listing.items() if not _PART.fullmatch(name)}
        key = hashlib.sha256(header + repr((uri, sorted(others.items()))).encode()).hexdigest()[:16]
        self.folder = self._cache.folder / key / (Path(self._root).name or "log")
        self._sizes = {name: size for name, (size, _) in listing.items()}
        self._sizes["schema.json"] = len(header)
        with self._cache.room_for(0):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = use(self.folder)
        small = [name for name in listing if not _TABLE.fullmatch(name)]
        with (self.folder.parent / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a node's ranks copy them once
            for name in small:
                if not (self.folder / name).exists():
                    # the header is what the key was made of, though the log be written anew meanwhile
                    self._copy(
                        name, stream=io.BytesIO(header) if name == "schema.json" else None
                    ).close()

    @contextmanager
    def file(self, name: str, part: Part | None) -> Generator[Path]:
        """The copy of a table's file, which stays while it is used inside.

        Args:
            name: in the log's folder.
            part: what schema.json says of it; None of a table that is not in parts.

        Raises:
            LogError: it is missing or is not the part that the log was written with, there is no
                access, or no room.
        """
        path = self.folder / name
        try:
            held = use(path)
        except OSError:
            held = self._copy(name, part)
        else:
            if part is not None and sha256_of(path) != part.sha256:  # damaged here
                held.close()
                held = self._copy(name, part)
        try:
            yield path
        finally:
            held.close()

    def keep_within_bound(self) -> None:
        """Drop what is least recently used where the cache is above its bound.

        Raises:
            LogError: what is in use is above it.
        """
        with self._cache.room_for(0):
            pass

    def _list(self) -> Mapping[str, tuple[int, int | None]]:
        """Size and time of last change of each file in the log's folder, by its name there."""
        with _asking(self.uri):
            found = self._files.get_file_info(pafs.FileSelector(self._root, recursive=True))
        names = {os.path.relpath(info.path, self._root): info for info in found if info.is_file}
        return {
            name: (info.size, info.mtime_ns)
            for name, info in names.items()
            if not any(folder.startswith(".") for folder in name.split("/"))
        }

    def _copy(self, name: str, part: Part | None = None, stream: Any = None) -> Held:
        """Copy a file, whole or not at all, and hold the copy; the stream, where it is read already."""
        place, size = f"{self.uri.partition('?')[0]}/{name}", self._sizes.get(name)
        if size is None:
            raise LogError(f"{place}: missing; the log is incomplete, copy it there again")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, digest, read = path.with_name(f".draft-{secrets.token_hex(6)}"), hashlib.sha256(), 0
        with self._cache.room_for(size):
            draft.touch()
            held = use(draft)
            os.truncate(draft, size)  # counts for who makes room
        try:
            with _asking(place):
                stream = stream or self._files.open_input_stream(f"{self._root}/{name}")
            with stream, _writing(draft.open("r+b"), draft) as file:
                while block := _read(stream, place):
                    digest.update(block)
                    read += file.write(block)
            if read != size:
                raise LogError(f"{place}: {read} of {size} bytes came; is it written meanwhile?")
            if part is not None and digest.hexdigest() != part.sha256:
                raise LogError(
                    f"{place}: not the part that the log was written with, its SHA-256 is another; copy "
                    "that there, or write the log again"
                )
            draft.replace(path)
        except BaseException:
            held.close()
            draft.unlink(missing_ok=True)
            raise
        return held


def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the folder in it.

    Raises:
        LogError: it is no URI that pyarrow knows, or it has a password in it.
    """
    parts = urlsplit(uri)
    # what stands before an @ is a key in s3 alone; elsewhere it is a container or a user
    if parts.password is not None or (parts.scheme == "s3" and "@" in parts.netloc):
        raise LogError(
            "a log's URI stands in a run's files, so that it must have no key or password in it; give "
            "them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)"
        )
    try:
        files, root = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise LogError(
            f"{uri}: not a place that a log can be read from ({reason}); give a folder, or a URI such "
            "as s3://BUCKET/LOG, gs://BUCKET/LOG, hdfs://HOST:PORT/LOG or file:///LOG"
        ) from error
    return files, root.rstrip("/")


@contextmanager
def _asking(place: str) -> Generator[None]:
    """What goes wrong elsewhere is told by its name.

    Raises:
        LogError: in place of any OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise LogError(f"{place}: there is no such log, folder or file; look for it there") from error
    except OSError as error:
        text = str(error)
        if "NO_SUCH_BUCKET" in text:
            what = "there is no such bucket; look at its name and region"
        elif isinstance(error, PermissionError) or re.search("ACCESS|SIGNATURE|40[13]", text):
            what = "no access; give credentials that may list and read it"
        else:
            what = "it cannot be reached or read; look at the address and the network"
        raise LogError(f"{place}: {what} ({text})") from error


def _read(stream: Any, place: str) -> bytes:
    with _asking(place):
        return stream.read(_BLOCK)


@contextmanager
def _writing(file: Any, path: Path) -> Generator[Any]:
    """A file that is written; a full disk is told by its folder."""
    try:
        with file:
            yield file
    except OSError as error:
        raise LogError(f"{path.parent}: a copy cannot be written there ({error}); make room") from error
