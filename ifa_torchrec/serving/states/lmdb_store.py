"""LMDB: a file that the processes of one machine share."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from ifa_torchrec.serving.errors import StoreError
from ifa_torchrec.serving.states.key_value import (
    Change,
    Follow,
    KeyValueStore,
    Skip,
    no_more,
    no_skip,
)

_LARGEST_MAP = 1 << 40
"""Bytes of address space for an LMDB file; neither disk nor memory is reserved."""
_SCANNED = 1024
"""Keys that a scan reads per transaction."""
_READ_ALL = """
import lmdb, sys
with lmdb.open(sys.argv[1], map_size=int(sys.argv[2])).begin() as transaction:
    for _ in transaction.cursor():
        pass
"""


class LMDBStore(KeyValueStore):
    """LMDB: a memory-mapped file that the processes of one machine share; one process writes at a time.

    If address space is limited (ulimit -v), the map, and so the file, is at most half of the limit.

    Args:
        path: the store's folder, on a local disk.

    Raises:
        StoreError: the folder cannot be created or opened, or its file is truncated.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.states.lmdb_store import LMDBStore
        >>> store = LMDBStore(Path(tempfile.mkdtemp()))
        >>> store.update([], lambda found: {b"a1": b"", b"a2": b"", b"b": b""})
        >>> list(store.scan(b"a"))
        [b'a1', b'a2']
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        self._map = _LARGEST_MAP
        if limit != resource.RLIM_INFINITY:
            self._map = min(_LARGEST_MAP, limit // 2 // resource.getpagesize() * resource.getpagesize())
        try:
            path.mkdir(parents=True, exist_ok=True)
            # locked shared by every process that has the store open, exclusively to replace its file
            self._lock = os.open(path / "open.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"{path}: cannot open an LMDB store here ({error})") from error
        try:
            self._share()
            self._environment = self._open()
        except StoreError:
            os.close(self._lock)
            raise

    def _share(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{self.path} is being compacted; try again when that is done") from None

    def _open(self) -> lmdb.Environment:
        try:
            environment = lmdb.open(str(self.path), map_size=self._map, max_readers=1024)
        except lmdb.MemoryError as error:
            raise StoreError(
                f"{self.path}: the file needs at least {self._map:,} bytes of address space, more than "
                f"this process's limit leaves ({error}); raise the limit (ulimit -v)"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise StoreError(f"{self.path}: cannot open an LMDB store here ({error})") from error
        try:
            self._check_size(environment)
        except StoreError:
            environment.close()
            raise
        environment.reader_check()  # clear the slots of readers that were killed
        return environment

    def _check_size(self, environment: lmdb.Environment) -> None:
        """Refuse a truncated file: reading a lost page would kill this process with SIGBUS."""
        # read the page count first: if another process writes, the file can only have grown since
        pages = environment.info()["last_pgno"] + 1
        wanted = pages * environment.stat()["psize"]
        size = (self.path / "data.mdb").stat().st_size
        if size >= wanted:
            return
        # After deletions LMDB may leave free pages at the end unwritten; then all records are readable
        # nevertheless. A separate process tries.
        command = [sys.executable, "-c", _READ_ALL, str(self.path), str(self._map)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise StoreError(
                f"{self.path}: data.mdb has {size:,} bytes, expected {wanted:,}; an unfinished copy or "
                "a full disk truncated it. Restore it from a copy, or remove the folder and rebuild the "
                "states (ifa build-states)"
            )

    def check(self) -> None:
        """See KeyValueStore."""
        self.read([])

    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """See KeyValueStore."""
        with (
            self._reported(),
            self._environment.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            found = _found(cursor, keys)
            return found + _found(cursor, then(found))

    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """See KeyValueStore."""
        with self._reported(), self._environment.begin(write=True) as transaction:
            found = [transaction.get(key) for key in keys]
            changes = change(found + [transaction.get(key) for key in then(found)])
            with transaction.cursor() as cursor:
                cursor.putmulti((key, value) for key, value in changes.items() if value is not None)
            for key, value in changes.items():
                if value is None:
                    transaction.delete(key)

    def scan(self, prefix: bytes, skip: Skip = no_skip) -> Iterator[bytes]:
        """See KeyValueStore."""
        # in parts: while a read transaction is open, LMDB reuses no page that others free
        first = prefix
        while keys := self._scan_part(prefix, first, skip):
            yield from keys
            first = keys[-1] + b"\0"

    def _scan_part(self, prefix: bytes, first: bytes, skip: Skip) -> list[bytes]:
        """The next keys of a scan, starting at the key ``first``."""
        keys: list[bytes] = []
        with (
            self._reported(),
            self._environment.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            found = cursor.set_range(first)
            while found and len(keys) < _SCANNED and (key := cursor.key()).startswith(prefix):
                if (wanted := skip(key)) > key:
                    found = cursor.set_range(wanted)
                else:
                    keys.append(key)
                    found = cursor.next()
        return keys

    def delete(self, keys: Sequence[bytes]) -> None:
        """See KeyValueStore."""
        with self._reported(), self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key)

    def compact(self) -> None:
        """See KeyValueStore. It needs disk space for a second file, and no other thread may use the
        store."""
        self._environment.close()  # before locking: if two processes compact, neither may have it open
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._reported():
                self._rewrite()
        except BlockingIOError:
            raise StoreError(
                f"{self.path}: another process has it open; stop all services and builds that use it, "
                "then compact it (ifa states --compact)"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.path}: cannot rewrite the file ({error})") from error
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            self._environment = self._open()

    def _rewrite(self) -> None:
        """Copy the records into a new file, one by one, and replace the file.

        LMDB's own compacting copy copies pages as they are, including bytes of deleted records.
        """
        file, new = self.path / "data.mdb", self.path / "compact.mdb"
        new.unlink(missing_ok=True)  # left by a process that was killed
        size = file.stat().st_size + (1 << 20)
        with (
            lmdb.open(str(self.path), map_size=size, readonly=True, lock=False) as old,
            lmdb.open(str(new), map_size=2 * size, subdir=False, lock=False) as environment,
            old.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            records = iter(cursor)
            while some := list(islice(records, 10_000)):
                with environment.begin(write=True) as writing, writing.cursor() as target:
                    target.putmulti(some, append=True)
            environment.sync(True)
        os.replace(new, file)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """See KeyValueStore."""
        self._environment.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextmanager
    def _reported(self) -> Generator[None]:
        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError) as error:
            raise StoreError(
                f"{self.name}: {error}. This process mapped {self._map:,} bytes for the file; a larger "
                "map needs twice its size in address space. Raise the limit (ulimit -v) and restart"
            ) from error
        except lmdb.Error as error:
            raise StoreError(f"{self.name}: {error}") from error


def _found(cursor: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    found = dict(cursor.getmulti(keys))
    return [found.get(key) for key in keys]
