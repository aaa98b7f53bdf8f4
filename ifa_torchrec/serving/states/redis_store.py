"""Redis, which several machines share: one server, or a cluster of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    RedisClusterException,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.retry import Retry

from ifa_torchrec.serving.errors import StateError, StoreError, UnreachableError
from ifa_torchrec.serving.states.key_value import (
    Change,
    Follow,
    KeyValueStore,
    Skip,
    no_more,
    no_skip,
)

_ADDRESS = re.compile(  # scheme, (user and password), host, port and number or path, (options)
    r"((?:rediss?|unix)://)(?:[^/?#@]*@)?((?:[\w.-]+|\[[\da-f:.]+\])?(?::\d+)?(?:/[^?#@]*)?)(?:\?[^@]*)?",
    re.IGNORECASE,
)


_NO_RESPONSE = "no Redis responds here: "
_PARTS = 256
"""Of a cluster, in which users are divided. Another number is another layout."""
_PATIENCE = 1.0
"""Seconds in which a transaction is tried again that met a slot which moves, or a primary that died."""
_ON_ITS_WAY = (AskError, TryAgainError)
"""While a slot moves; who has which is as it was."""
_ELSEWHERE = (
    *_ON_ITS_WAY,  # a MovedError is an AskError
    ClusterDownError,
    SlotNotCoveredError,
    redis.ReadOnlyError,
    redis.ConnectionError,
)
_OUT_OF_REACH = (
    redis.ConnectionError,
    redis.TimeoutError,
    ClusterDownError,
    RedisClusterException,  # no server of the cluster responds, or one has no primary for a slot
)


class RedisStore(KeyValueStore):
    """Redis: one server.

    It must not evict keys (maxmemory-policy noeviction). What a crash of the server itself keeps is the
    server's setting: appendonly yes and appendfsync always for everything that it confirmed.

    Args:
        address: redis://HOST:PORT/NUMBER.

    Raises:
        StoreError: it evicts keys.
        UnreachableError: no server responds there; every method raises it likewise.
    """

    def __init__(self, address: str) -> None:
        self.name = without_password(address)
        # What the address says goes before these. Without a time-out a host that is gone would hold a
        # thread for ever.
        options = {
            "password": os.environ.get("IFA_REDIS_PASSWORD"),
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
        }
        try:
            with self._reported(_NO_RESPONSE):
                # redis-py's own types are those of its sync and async clients at once
                self._client: Any = self._connect(address, options)
        except ValueError:  # whose message may hold a part of the password
            raise StoreError(
                f"{self.name}: this is no address of a Redis, which is redis://HOST:PORT/NUMBER; "
                "what is no letter or digit in a password is written as %XX"
            ) from None
        self.check()

    @staticmethod
    def _connect(address: str, options: Mapping[str, Any]) -> Any:
        # Of a connection that broke meanwhile. redis-py's own way tries ten times, time-outs too, and so
        # held a thread for a minute.
        once = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        return redis.Redis.from_url(address, retry=once, **options)

    @property
    def in_cluster(self) -> bool:
        """Whether the server is one of a cluster."""
        with self._reported():
            return bool(self._client.info("cluster").get("cluster_enabled"))

    def check(self) -> None:
        """See KeyValueStore."""
        with self._reported(_NO_RESPONSE):
            for server in self._servers():
                # of INFO, since servers that others manage may forbid CONFIG
                policy = server.info("memory").get("maxmemory_policy")
                if policy != "noeviction":
                    raise StoreError(
                        f"{self.name}: its maxmemory-policy is {policy}, by which it drops parts of "
                        "states when its memory is full; set it to noeviction"
                    )

    def _servers(self) -> list[Any]:
        """The clients of all servers that have keys of their own."""
        return [self._client]

    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """See KeyValueStore."""
        with self._reported():
            return _at_one_moment(self._client.mget, keys, then)

    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """See KeyValueStore."""
        with self._reported():
            _transact(self._client, keys, change, then)

    def scan(self, prefix: bytes, skip: Skip = no_skip) -> Iterator[bytes]:
        """See KeyValueStore. It walks through all keys."""
        with self._reported():
            found = self._walk(prefix)
        wanted = prefix
        for key in sorted(found):
            if key >= wanted and (wanted := skip(key)) <= key:
                yield key

    def _walk(self, prefix: bytes) -> set[bytes]:
        """All keys that begin with a prefix, of which a walk may repeat some."""
        pattern = b"".join(b"\\" + bytes([c]) if c in b"\\*?[]^-" else bytes([c]) for c in prefix)
        found: set[bytes] = set()
        for server in self._servers():
            found.update(server.scan_iter(match=pattern + b"*", count=10_000))
        return found

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
        except (redis.RedisError, RedisClusterException) as error:
            # a server that does not know AUTH repeats its arguments
            text = re.sub(r"args beginning with:.*", "args ...", str(error), flags=re.DOTALL)
            if type(error) in _ON_ITS_WAY:
                text = "a slot of the cluster is being moved; try again when it has arrived"
            kind = UnreachableError if isinstance(error, _OUT_OF_REACH) else StoreError
            raise kind(f"{self.name}: {what}{text}") from None


class RedisClusterStore(RedisStore):
    """Redis Cluster: keys with one tag lie in one slot, and a transaction has keys of one tag alone.

    A slot moves, and a replica takes a dead primary's place, while it is used: what meets that is tried
    again for a second. Meanwhile no scan could be sure to have seen every key, so it fails.

    Args:
        address: redis://HOST:PORT of any of its servers.

    Raises:
        StoreError: no server responds there, a primary evicts keys, or the cluster is not whole.
    """

    def __init__(self, address: str) -> None:
        self.tags = _tags()
        super().__init__(address)

    @staticmethod
    def _connect(address: str, options: Mapping[str, Any]) -> Any:
        return redis.RedisCluster.from_url(address, retry=Retry(NoBackoff(), 3), **options)

    def _servers(self) -> list[Any]:
        return [self._client.get_redis_connection(node) for node in self._client.get_primaries()]

    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """See KeyValueStore."""
        with self._reported():
            return _at_one_moment(self._client.mget_nonatomic, keys, then)

    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """See KeyValueStore. The first key says which server it is for."""
        # not by the cluster's own pipeline: that sends a transaction again without its watch when a
        # connection breaks, and so writes over what another wrote meanwhile
        until = time.monotonic() + _PATIENCE
        with self._reported():
            while True:
                try:
                    node = self._client.get_node_from_key(keys[0])
                    _transact(self._client.get_redis_connection(node), keys, change, then)
                    return
                except _ELSEWHERE as error:
                    if time.monotonic() > until:
                        raise
                    look_anew = type(error) not in _ON_ITS_WAY
                time.sleep(0.05)
                if look_anew:
                    self._client.nodes_manager.initialize()

    def _walk(self, prefix: bytes) -> set[bytes]:
        self._client.nodes_manager.initialize()
        before = self._slots()
        found = super()._walk(prefix)
        if not before or self._slots() != before:
            raise StoreError(
                f"{self.name}: slots of the cluster are being moved, or a replica takes a primary's "
                "place, so that not every key is sure to be found; try again when that is over"
            )
        return found

    def _slots(self) -> dict[str, list[list[str]]]:
        """The slots of each primary, as it says itself; nothing where one is being moved or missing."""
        slots: dict[str, list[list[str]]] = {}
        for server in self._servers():
            for address, of_node in server.execute_command("CLUSTER NODES").items():
                if "myself" in of_node["flags"]:
                    if of_node["migrations"]:
                        return {}
                    slots[address] = of_node["slots"]
        count = sum(int(few[-1]) - int(few[0]) + 1 for of_node in slots.values() for few in of_node)
        return slots if count == REDIS_CLUSTER_HASH_SLOTS else {}


def open_redis(address: str) -> RedisStore:
    """The store of a server, or of the cluster that it is one of.

    Raises:
        StoreError: as RedisStore and RedisClusterStore.
    """
    store = RedisStore(address)
    if not store.in_cluster:
        return store
    store.close()
    return RedisClusterStore(address)


def _tags() -> tuple[bytes, ...]:
    """Hash tags, as many as parts: of every so many slots one, so that primaries have equally many."""
    tags: dict[int, bytes] = {}
    for number in range(4096):
        tag = b"{%03x}" % number
        tags.setdefault(key_slot(tag) * _PARTS // REDIS_CLUSTER_HASH_SLOTS, tag)
    return tuple(tags[part] for part in range(_PARTS))


def _transact(client: Any, keys: Sequence[bytes], change: Change, then: Follow) -> None:
    """``KeyValueStore.update`` on one server."""
    with client.pipeline() as pipeline:
        while True:
            try:
                changes = change(_at_one_moment(pipeline.mget, keys, then, pipeline.watch))
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


def _at_one_moment(
    mget: Callable[[Sequence[bytes]], list[bytes | None]],
    keys: Sequence[bytes],
    then: Follow,
    watch: Callable[..., object] = lambda *_: None,
) -> list[bytes | None]:
    """The values as ``KeyValueStore.read`` has them.

    Args:
        mget: gives values; those of one server of one moment.
        keys, then: as of ``read``.
        watch: called with keys before they are read.
    """
    if keys:
        watch(*keys)
    found = list(mget(keys)) if keys else []
    while more := then(found):
        watch(*more)
        # with the first ones again: what they name is of the same moment if they are unchanged
        values = list(mget([*keys, *more]))
        if values[: len(keys)] == found:
            return values
        found = values[: len(keys)]
    return found


def without_password(address: str) -> str:
    """A Redis address as it may be shown. Of one that is not well formed nothing may, since its password
    may be anywhere."""
    found = _ADDRESS.fullmatch(address)
    return found[1] + found[2] if found else f"{address.partition('://')[0]}://..."
