"""Where states lie as bytes: LMDB, a file on one machine, or Redis, which several machines share."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import redis

from ifa_torchrec.serving.errors import StateError, StoreError

_LARGEST_MAP = 1 << 40
"""Bytes of address space for an LMDB file; it is not reserved, on disk or in memory."""
_ADDRESS = re.compile(  # scheme, (user and password), host, port and number or path, (options)
    r"((?:rediss?|unix)://)(?:[^/?#@]*@)?((?:[\w.-]+|\[[\da-f:.]+\])?(?::\d+)?(?:/[^?#@]*)?)(?:\?[^@]*)?",
    re.IGNORECASE,
)
_READ_ALL = """
import lmdb, sys
with lmdb.open(sys.argv[1], map_size=int(sys.argv[2])).begin() as transaction:
    for _ in transaction.cursor():
        pass
"""


Change = Callable[[list[bytes | None]], Mapping[bytes, bytes | None]]
"""Makes of the values of some keys the records that are new or changed; None of those to delete."""
Follow = Callable[[list[bytes | None]], Sequence[bytes]]
"""Makes of the values of some keys the further keys that these name."""


def no_more(_: list[bytes | None]) -> Sequence[bytes]:
    """That they name none."""
    return ()


class KeyValueStore(ABC):
    """Bytes by key. What is read is of one moment, and what is updated is so whole or not at all,
    whatever other processes do and wherever this one dies. Where the store itself fails, every method
    raises StoreError.

    Attributes:
        name: the store in messages: its address, without a password.
    """

    name: str

    @abstractmethod
    def check(self) -> None:
        """Raise StoreError if the store is out of reach, or may lose keys by itself."""

    @abstractmethod
    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """The values of the keys, and of those that ``then`` makes of these values, all of one moment;
        None where there is none. ``then`` may be called again with newer values."""

    @abstractmethod
    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """Read as ``read`` does, and write what ``change`` makes of the values, with nothing between.

        A key whose new value is None is deleted. ``change`` may be called again with newer values where
        another writer came first.
        """

    @abstractmethod
    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """The keys that begin with ``prefix``, from ``prefix + first`` on, in order."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these keys, where they are there."""

    @abstractmethod
    def compact(self) -> None:
        """Leave no byte of what was deleted in the store's file. No one else may have the store open.

        Raises:
            StateError: it has no file of its own to write anew.
            StoreError: another process has it open, or the file cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file or the connection."""


def open_key_value_store(address: str, create: bool = True) -> KeyValueStore:
    """The store at an address.

    Args:
        address: the folder of an LMDB store, or redis://HOST:PORT/NUMBER (rediss:// with TLS, unix://
            for a socket). Its password is best in the variable IFA_REDIS_PASSWORD: everyone on the
            machine sees a program's arguments.
        create: whether to make an LMDB store that is not there.

    Raises:
        StateError: nothing can be opened there.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> store = open_key_value_store(tempfile.mkdtemp() + "/states")
        >>> store.update([b"n"], lambda found: {b"n": (found[0] or b"") + b"+"})
        >>> store.read([b"n", b"m"])
        [b'+', None]
        >>> store.close()
    """
    if address.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(address)
    if "://" in address:
        raise StateError(
            f"{_without_password(address)}: a store is a folder, or redis://HOST:PORT/NUMBER"
        )
    if not create and not (Path(address) / "data.mdb").exists():
        raise StateError(f"{address}: there is no store of states; build one with ifa build-states")
    return LMDBStore(Path(address))


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
        >>> from ifa_torchrec.serving.states.key_value import LMDBStore
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

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """See KeyValueStore."""
        with (
            self._reported(),
            self._environment.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            found = cursor.set_range(prefix + first)
            while found and cursor.key().startswith(prefix):
                yield cursor.key()
                found = cursor.next()

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


class RedisStore(KeyValueStore):
    """Redis: one server, not a cluster, since a transaction's keys must lie together.

    It must not evict keys (maxmemory-policy noeviction). What a crash of the server itself keeps is the
    server's setting: appendonly yes and appendfsync always for everything that it confirmed.

    Args:
        address: redis://HOST:PORT/NUMBER.

    Raises:
        StoreError: no server responds there, or it evicts keys.
    """

    def __init__(self, address: str) -> None:
        self.name = _without_password(address)
        try:
            # redis-py's own types are those of its sync and async clients at once; what the address says
            # goes before these. Without a time-out a host that is gone would hold a thread for ever.
            self._client: Any = redis.Redis.from_url(
                address,
                password=os.environ.get("IFA_REDIS_PASSWORD"),
                socket_timeout=5,
                socket_connect_timeout=5,
            )
        except ValueError:  # whose message may hold a part of the password
            raise StoreError(
                f"{self.name}: this is no address of a Redis, which is redis://HOST:PORT/NUMBER; "
                "what is no letter or digit in a password is written as %XX"
            ) from None
        self.check()

    def check(self) -> None:
        """See KeyValueStore."""
        with self._reported("no Redis responds here: "):
            # of INFO, since servers that others manage may forbid CONFIG
            policy = self._client.info("memory").get("maxmemory_policy")
        if policy != "noeviction":
            raise StoreError(
                f"{self.name}: its maxmemory-policy is {policy}, by which it drops parts of states "
                "when its memory is full; set it to noeviction"
            )

    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """See KeyValueStore."""
        with self._reported():
            return self._at_one_moment(self._client, keys, then, watched=False)

    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """See KeyValueStore."""
        with self._reported(), self._client.pipeline() as pipeline:
            while True:
                try:
                    changes = change(self._at_one_moment(pipeline, keys, then, watched=True))
                    pipeline.multi()
                    kept = {key: value for key, value in changes.items() if value is not None}
                    if kept:
                        pipeline.mset(kept)
                    if len(kept) < len(changes):
                        pipeline.delete(*(key for key in changes if key not in kept))
                    pipeline.execute()
                    return
                except redis.WatchError:  # another writer came first, and got on
                    continue

    @staticmethod
    def _at_one_moment(
        client: Any, keys: Sequence[bytes], then: Follow, watched: bool
    ) -> list[bytes | None]:
        """The values as ``read`` has them; ``watched`` where the client is a pipeline that writes."""
        if watched and keys:
            client.watch(*keys)
        found: list[bytes | None] = list(client.mget(keys)) if keys else []
        while more := then(found):
            if watched:
                client.watch(*more)
            # with the first ones again: what they name is of the same moment if they are unchanged
            values: list[bytes | None] = list(client.mget([*keys, *more]))
            if values[: len(keys)] == found:
                return values
            found = values[: len(keys)]
        return found

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """See KeyValueStore. It walks through all keys of the server."""
        pattern = b"".join(b"\\" + bytes([c]) if c in b"\\*?[]^-" else bytes([c]) for c in prefix)
        with self._reported():
            found = set(self._client.scan_iter(match=pattern + b"*", count=10_000))  # may repeat some
        yield from sorted(key for key in found if key >= prefix + first)

    def delete(self, keys: Sequence[bytes]) -> None:
        """See KeyValueStore."""
        if keys:
            with self._reported():
                self._client.delete(*keys)

    def compact(self) -> None:
        """See KeyValueStore."""
        raise StateError(
            f"{self.name}: Redis frees what is deleted by itself. Its own files have it until they are "
            "written anew: BGREWRITEAOF for the append-only file, BGSAVE for the snapshot"
        )

    def close(self) -> None:
        """See KeyValueStore."""
        self._client.close()

    @contextmanager
    def _reported(self, what: str = "") -> Generator[None]:
        try:
            yield
        except redis.RedisError as error:
            # a server that does not know AUTH repeats its arguments
            text = re.sub(r"args beginning with:.*", "args ...", str(error), flags=re.DOTALL)
            raise StoreError(f"{self.name}: {what}{text}") from None


def _found(cursor: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    found = dict(cursor.getmulti(keys))
    return [found.get(key) for key in keys]


def _without_password(address: str) -> str:
    """A Redis address as it may be shown. Of one that is not well formed nothing may, since its password
    may be anywhere."""
    found = _ADDRESS.fullmatch(address)
    return found[1] + found[2] if found else f"{address.partition('://')[0]}://..."
