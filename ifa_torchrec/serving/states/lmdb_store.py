"""LMDB: a file on one machine, which its processes share."""

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
"""Bytes of address space for an LMDB file; it is not reserved, on disk or in memory."""
_SCANNED = 1024
"""Keys that a scan reads in one transaction."""
_READ_ALL = """
import lmdb, sys
with lmdb.open(sys.argv[1], map_size=int(sys.argv[2])).begin() as transaction:
    for _ in transaction.cursor():
        pass
"""


class LMDBStore(KeyValueStore):
    """LMDB: a memory-mapped file that the processes of one machine share; one writes at a time.

    Under a limit of address space (ulimit -v) the map, and so the file, is at most half of the limit.

    Args:
        path: its folder, on a local disk.

    Raises:
        StoreError: the folder cannot be made or opened, or its file is not whole.

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
            # held by all who have the store open, and by one alone that replaces its file
            self._lock = os.open(path / "open.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"{path}: no LMDB store can be opened here ({error})") from error
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
            raise StoreError(f"{self.path} is being compacted; try again when it is") from None

    def _open(self) -> lmdb.Environment:
        try:
            environment = lmdb.open(str(self.path), map_size=self._map, max_readers=1024)
        except lmdb.MemoryError as error:
            raise StoreError(
                f"{self.path}: its file wants {self._map:,} bytes of address space or more, and the "
                f"limit of this process (ulimit -v) has no room for them ({error}); raise the limit"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise StoreError(f"{self.path}: no LMDB store can be opened here ({error})") from error
        try:
            self._check_size(environment)
        except StoreError:
            environment.close()
            raise
        environment.reader_check()  # forget readers that were killed
        return environment

    def _check_size(self, environment: lmdb.Environment) -> None:
        """A page that the file has lost would end this process by SIGBUS when it is read."""
        # the pages first: the file of another process that writes can only have grown since
        pages = environment.info()["last_pgno"] + 1
        wanted = pages * environment.stat()["psize"]
        size = (self.path / "data.mdb").stat().st_size
        if size >= wanted:
            return
        # After deletions LMDB may leave pages at the end unwritten, which are free: then all can be read
        # nevertheless. A process of its own tries.
        command = [sys.executable, "-c", _READ_ALL, str(self.path), str(self._map)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise StoreError(
                f"{self.path}: data.mdb has {size:,} bytes of {wanted:,}: it was cut off, by an "
                "unfinished copy or a full disk. Bring it back from a copy, or remove the folder and "
                "build the states anew (ifa build-states)"
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
        # by parts: while a transaction reads, no page that is freed elsewhere is used again
        first = prefix
        while keys := self._scan_part(prefix, first, skip):
            yield from keys
            first = keys[-1] + b"\0"

    def _scan_part(self, prefix: bytes, first: bytes, skip: Skip) -> list[bytes]:
        """Some keys of a scan, from the key ``first`` on."""
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
        """See KeyValueStore. It wants room for the file once more, and no other thread that uses it."""
        self._environment.close()  # first: of two that compact, none may have the file open
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._reported():
                self._write_anew()
        except BlockingIOError:
            raise StoreError(
                f"{self.path}: another process has it open; stop all that serve from it or build into "
                "it, and then compact it (ifa states --compact)"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.path}: its file cannot be written anew ({error})") from error
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            self._environment = self._open()

    def _write_anew(self) -> None:
        """Put the records that there are into a new file, one after the other.

        LMDB's own compacting copy takes pages as they are, and with them some bytes of deleted records.
        """
        file, new = self.path / "data.mdb", self.path / "compact.mdb"
        new.unlink(missing_ok=True)  # of one that was killed
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
                f"{self.name}: {error}. This process has mapped {self._map:,} bytes for the file, which "
                "want as much address space twice: raise its limit (ulimit -v) and start it again"
            ) from error
        except lmdb.Error as error:
            raise StoreError(f"{self.name}: {error}") from error


def _found(cursor: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    found = dict(cursor.getmulti(keys))
    return [found.get(key) for key in keys]
