"""Where states lie as bytes: LMDB, a file on one machine, or Redis, which several machines share."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class KeyValueStore(ABC):
    """Bytes by key. What is read is of one moment, and what is updated is so whole or not at all,
    whatever other processes do and wherever this one dies. Where the store itself fails, every method
    raises StoreError."""

    @abstractmethod
    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of the keys at one moment; None where there is none."""

    @abstractmethod
    def update(
        self,
        keys: Sequence[bytes],
        change: Callable[[list[bytes | None]], Mapping[bytes, bytes]],
    ) -> None:
        """Read the keys, and write what ``change`` makes of their values, with nothing between.

        ``change`` may be called again with newer values where another writer came first.
        """

    @abstractmethod
    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """The keys that begin with ``prefix``, from ``prefix + first`` on, in order."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these keys, where they are there."""

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
        raise StateError(
            f"{address}: there is no store of states; build one with python -m ifa_torchrec.build_states"
        )
    return LMDBStore(Path(address))


class LMDBStore(KeyValueStore):
    """LMDB: a memory-mapped file that the processes of one machine share; one writes at a time.

    Args:
        path: its folder, on a local disk.

    Raises:
        StateError: the folder cannot be made or opened.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.key_value import LMDBStore
        >>> store = LMDBStore(Path(tempfile.mkdtemp()))
        >>> store.update([], lambda found: {b"a1": b"", b"a2": b"", b"b": b""})
        >>> list(store.scan(b"a"))
        [b'a1', b'a2']
    """

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(str(path), map_size=_LARGEST_MAP, max_readers=1024)
        except (OSError, lmdb.Error) as error:
            raise StoreError(f"{path}: no LMDB store can be opened here ({error})") from error
        self._environment.reader_check()  # forget readers that were killed
        self.path = path

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See KeyValueStore."""
        with (
            _reported(self.path),
            self._environment.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            found = dict(cursor.getmulti(keys))
        return [found.get(key) for key in keys]

    def update(
        self,
        keys: Sequence[bytes],
        change: Callable[[list[bytes | None]], Mapping[bytes, bytes]],
    ) -> None:
        """See KeyValueStore."""
        with _reported(self.path), self._environment.begin(write=True) as transaction:
            changes = change([transaction.get(key) for key in keys])
            with transaction.cursor() as cursor:
                cursor.putmulti(changes.items())

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """See KeyValueStore."""
        with (
            _reported(self.path),
            self._environment.begin() as transaction,
            transaction.cursor() as cursor,
        ):
            found = cursor.set_range(prefix + first)
            while found and cursor.key().startswith(prefix):
                yield cursor.key()
                found = cursor.next()

    def delete(self, keys: Sequence[bytes]) -> None:
        """See KeyValueStore."""
        with _reported(self.path), self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key)

    def close(self) -> None:
        """See KeyValueStore."""
        self._environment.close()


class RedisStore(KeyValueStore):
    """Redis: one server, not a cluster, since a transaction's keys must lie together.

    What a crash of the server itself keeps is the server's setting: appendonly yes and
    appendfsync always for everything that was answered.

    Args:
        address: redis://HOST:PORT/NUMBER.

    Raises:
        StateError: no server answers there.
    """

    def __init__(self, address: str) -> None:
        self.address = _without_password(address)
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
                f"{self.address}: this is no address of a Redis, which is redis://HOST:PORT/NUMBER; "
                "what is no letter or digit in a password is written as %XX"
            ) from None
        with _reported(f"{self.address}: no Redis answers here"):
            self._client.ping()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See KeyValueStore."""
        with _reported(self.address):
            return list(self._client.mget(keys)) if keys else []

    def update(
        self,
        keys: Sequence[bytes],
        change: Callable[[list[bytes | None]], Mapping[bytes, bytes]],
    ) -> None:
        """See KeyValueStore."""
        with _reported(self.address), self._client.pipeline() as pipeline:
            while True:
                try:
                    if keys:
                        pipeline.watch(*keys)
                    changes = change(pipeline.mget(keys) if keys else [])
                    pipeline.multi()
                    if changes:
                        pipeline.mset(changes)
                    pipeline.execute()
                    return
                except redis.WatchError:  # another writer came first, and got on
                    continue

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[bytes]:
        """See KeyValueStore. It walks through all keys of the server."""
        pattern = b"".join(b"\\" + bytes([c]) if c in b"\\*?[]^-" else bytes([c]) for c in prefix)
        with _reported(self.address):
            found = set(self._client.scan_iter(match=pattern + b"*", count=10_000))  # may repeat some
        yield from sorted(key for key in found if key >= prefix + first)

    def delete(self, keys: Sequence[bytes]) -> None:
        """See KeyValueStore."""
        if keys:
            with _reported(self.address):
                self._client.delete(*keys)

    def close(self) -> None:
        """See KeyValueStore."""
        self._client.close()


def _without_password(address: str) -> str:
    """A Redis address as it may be shown. Of one that is not well formed nothing may, since its password
    may be anywhere."""
    found = _ADDRESS.fullmatch(address)
    return found[1] + found[2] if found else f"{address.partition('://')[0]}://..."


@contextmanager
def _reported(where: object) -> Generator[None]:
    """The libraries' errors as ours."""
    try:
        yield
    except redis.RedisError as error:
        # a server that does not know AUTH repeats its arguments
        text = re.sub(r"args beginning with:.*", "args ...", str(error), flags=re.DOTALL)
        raise StoreError(f"{where}: {text}") from None
    except lmdb.Error as error:
        raise StoreError(f"{where}: {error}") from error
