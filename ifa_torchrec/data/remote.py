"""A remote log, given by a URI (s3://, gs://, hdfs://, file://), read through pyarrow.fs.

Its small files are copied into the cache (data/cache.py) when it is opened. Parts are copied one at a
time, when their columns are written; from then on only the columns are used. A copy belongs to one
version of the log: a log written again in the same place has another schema.json, or files with other
times, and is copied again.
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
    """Whether a place is a URI, not a folder of this machine.

    Example:
        >>> from ifa_torchrec.data.remote import is_uri
        >>> is_uri("s3://bucket/log"), is_uri("runs/data/mine")
        (True, False)
    """
    return _URI.match(str(place)) is not None


def full_name(place: str | Path) -> str:
    """The full name of a log: a URI unchanged, a folder as an absolute path.

    Example:
        >>> from ifa_torchrec.data.remote import full_name
        >>> full_name("s3://bucket/log"), full_name("/data/../log")
        ('s3://bucket/log', '/log')
    """
    return str(place) if is_uri(place) else str(Path(place).resolve())


class RemoteLog:
    """A remote log, and the local copies of its files.

    Args:
        uri: the URI of the log's folder.

    Attributes:
        folder: the folder of the copies; it is not deleted while this object exists.

    Raises:
        LogError: there is no such log, no access to it, or no space for copies.

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
                f"{uri}: schema.json is missing: no log, or an incomplete copy; copy the log there, "
                "schema.json last"
            )
        with _asking(uri), self._files.open_input_stream(f"{self._root}/schema.json") as stream:
            header = stream.read()
        # parts are identified by their SHA-256 in schema.json; other files by size and time
        others = {name: state for name, state in listing.items() if not _PART.fullmatch(name)}
        key = hashlib.sha256(header + repr((uri, sorted(others.items()))).encode()).hexdigest()[:16]
        self.folder = self._cache.folder / key / (Path(self._root).name or "log")
        self._sizes = {name: size for name, (size, _) in listing.items()}
        self._sizes["schema.json"] = len(header)
        with self._cache.room_for(0):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = use(self.folder)
        small = [name for name in listing if not _TABLE.fullmatch(name)]
        with (self.folder.parent / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank of a node copies them
            for name in small:
                if not (self.folder / name).exists():
                    # the key was made from this header, even if the log was written again meanwhile
                    self._copy(
                        name, stream=io.BytesIO(header) if name == "schema.json" else None
                    ).close()

    @contextmanager
    def file(self, name: str, part: Part | None) -> Generator[Path]:
        """The local copy of a table's file, which is kept inside the context.

        Args:
            name: the file's name in the log's folder.
            part: its entry in schema.json; None for a table that is not in parts.

        Raises:
            LogError: it is missing or is not the part that the log was written with, there is no
                access, or no space.
        """
        path = self.folder / name
        try:
            held = use(path)
        except OSError:
            held = self._copy(name, part)
        else:
            if part is not None and sha256_of(path) != part.sha256:  # the copy is damaged
                held.close()
                held = self._copy(name, part)
        try:
            yield path
        finally:
            held.close()

    def keep_within_bound(self) -> None:
        """Delete the least recently used copies if the cache is above its size limit.

        Raises:
            LogError: the copies in use are above the limit.
        """
        with self._cache.room_for(0):
            pass

    def _list(self) -> Mapping[str, tuple[int, int | None]]:
        """Size and time of last change of each file in the log's folder, by name."""
        with _asking(self.uri):
            found = self._files.get_file_info(pafs.FileSelector(self._root, recursive=True))
        names = {os.path.relpath(info.path, self._root): info for info in found if info.is_file}
        return {
            name: (info.size, info.mtime_ns)
            for name, info in names.items()
            if not any(folder.startswith(".") for folder in name.split("/"))
        }

    def _copy(self, name: str, part: Part | None = None, stream: Any = None) -> Held:
        """Copy a file atomically and hold the copy; from ``stream`` if it is given."""
        place, size = f"{self.uri.partition('?')[0]}/{name}", self._sizes.get(name)
        if size is None:
            raise LogError(f"{place}: the file is missing; copy the log there again")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, digest, read = path.with_name(f".draft-{secrets.token_hex(6)}"), hashlib.sha256(), 0
        with self._cache.room_for(size):
            draft.touch()
            held = use(draft)
            os.truncate(draft, size)  # counted by processes that free space
        try:
            with _asking(place):
                stream = stream or self._files.open_input_stream(f"{self._root}/{name}")
            with stream, _writing(draft.open("r+b"), draft) as file:
                while block := _read(stream, place):
                    digest.update(block)
                    read += file.write(block)
            if read != size:
                raise LogError(
                    f"{place}: got {read} bytes, expected {size}; was the log being written? "
                    "open it again when it is complete"
                )
            if part is not None and digest.hexdigest() != part.sha256:
                raise LogError(
                    f"{place}: not the part that the log was written with (its SHA-256 differs); "
                    "restore that part, or write the log again"
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
        LogError: pyarrow does not support the URI, or it contains a password.
    """
    parts = urlsplit(uri)
    # only in s3 is the text before an @ a key; elsewhere it is a container or a user
    if parts.password is not None or (parts.scheme == "s3" and "@" in parts.netloc):
        raise LogError(
            "a log's URI is saved in a run's files, so it must not contain a key or password; set them "
            "in the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        files, root = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise LogError(
            f"{uri}: a log cannot be read from there ({reason}); expected a folder, or a URI such as "
            "s3://BUCKET/LOG, gs://BUCKET/LOG, hdfs://HOST:PORT/LOG or file:///LOG"
        ) from error
    return files, root.rstrip("/")


@contextmanager
def _asking(place: str) -> Generator[None]:
    """Turn errors of a remote file system into errors that name the place.

    Raises:
        LogError: instead of any OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise LogError(f"{place}: no such log, folder or file; check the URI") from error
    except OSError as error:
        text = str(error)
        if "NO_SUCH_BUCKET" in text:
            what = "no such bucket; check its name and region"
        elif isinstance(error, PermissionError) or re.search("ACCESS|SIGNATURE|40[13]", text):
            what = "no access; set credentials with permission to list and read it"
        else:
            what = "cannot be reached or read; check the address and the network"
        raise LogError(f"{place}: {what} ({text})") from error


def _read(stream: Any, place: str) -> bytes:
    with _asking(place):
        return stream.read(_BLOCK)


@contextmanager
def _writing(file: Any, path: Path) -> Generator[Any]:
    """A file to write; an error such as a full disk names its folder."""
    try:
        with file:
            yield file
    except OSError as error:
        raise LogError(f"{path.parent}: cannot write a copy there ({error}); free some space") from error
