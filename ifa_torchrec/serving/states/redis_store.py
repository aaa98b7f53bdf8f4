"""Redis, which several machines can share: one server or a cluster."""

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
"""Parts of a cluster, among which users are divided. Changing the number changes the store's layout."""
_PATIENCE = 1.0
"""Seconds during which a transaction that met a moving slot or a dead primary is retried."""
_ON_ITS_WAY = (AskError, TryAgainError)
"""Raised while a slot moves; the slots' owners have not changed yet."""
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

    It must not evict keys (maxmemory-policy noeviction). What survives a crash of the server depends on
    its settings; with appendonly yes and appendfsync always, everything that it confirmed does.

    Args:
        address: redis://HOST:PORT/NUMBER.

    Raises:
        StoreError: the address is malformed, or the server evicts keys.
        UnreachableError: no server responds there; every method may raise it.
    """

    def __init__(self, address: str) -> None:
        self.name = without_password(address)
        # Options in the address override these. Without a time-out, a dead host would block a thread
        # forever.
        options = {
            "password": os.environ.get("IFA_REDIS_PASSWORD"),
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
        }
        try:
            with self._reported(_NO_RESPONSE):
                # redis-py's own types are those of its sync and async clients at once
                self._client: Any = self._connect(address, options)
        except ValueError:  # its message may contain a part of the password
            raise StoreError(
                f"{self.name}: not a Redis address; expected redis://HOST:PORT/NUMBER. In a password, "
                "write characters other than letters and digits as %XX"
            ) from None
        self.check()

    @staticmethod
    def _connect(address: str, options: Mapping[str, Any]) -> Any:
        # Retry once after a broken connection. redis-py's default retries ten times, even time-outs, and
        # so could block a thread for a minute.
        once = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        return redis.Redis.from_url(address, retry=once, **options)

    @property
    def in_cluster(self) -> bool:
        """Whether the server belongs to a cluster."""
        with self._reported():
            return bool(self._client.info("cluster").get("cluster_enabled"))

    def check(self) -> None:
        """See KeyValueStore."""
        with self._reported(_NO_RESPONSE):
            for server in self._servers():
                # from INFO, since managed servers may forbid CONFIG
                policy = server.info("memory").get("maxmemory_policy")
                if policy != "noeviction":
                    raise StoreError(
                        f"{self.name}: maxmemory-policy is {policy}, which deletes parts of states when "
                        "memory is full; set it to noeviction"
                    )

    def _servers(self) -> list[Any]:
        """A client for each server that holds keys of its own."""
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
        """See KeyValueStore. It scans all keys of the server."""
        with self._reported():
            found = self._walk(prefix)
        wanted = prefix
        for key in sorted(found):
            if key >= wanted and (wanted := skip(key)) <= key:
                yield key

    def _walk(self, prefix: bytes) -> set[bytes]:
        """All keys that begin with a prefix; SCAN may return some of them repeatedly."""
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
            f"{self.name}: Redis frees deleted records by itself, but its own files contain them until "
            "they are rewritten; run BGREWRITEAOF for the append-only file, BGSAVE for the snapshot"
        )

    def close(self) -> None:
        """See KeyValueStore."""
        self._client.close()

    @contextmanager
    def _reported(self, what: str = "") -> Generator[None]:
        try:
            yield
        except (redis.RedisError, RedisClusterException) as error:
            # a server that does not know AUTH repeats its arguments, the password among them
            text = re.sub(r"args beginning with:.*", "args ...", str(error), flags=re.DOTALL)
            if type(error) in _ON_ITS_WAY:
                text = "a slot of the cluster is being moved; try again when it has arrived"
            kind = UnreachableError if isinstance(error, _OUT_OF_REACH) else StoreError
            raise kind(f"{self.name}: {what}{text}") from None


class RedisClusterStore(RedisStore):
    """Redis Cluster: keys with the same tag lie in one slot, and a transaction's keys have one tag.

    Slots may move, and replicas may replace dead primaries, during use: an update that meets this is
    retried for a second. A scan fails meanwhile, since it could miss keys.

    Args:
        address: redis://HOST:PORT of any of the cluster's servers.

    Raises:
        StoreError: no server responds there, a primary evicts keys, or slots have no primary.
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
        """See KeyValueStore. The first key determines the server."""
        # not with redis-py's cluster pipeline: when a connection breaks it resends a transaction without
        # its WATCH, and so overwrites what another process wrote meanwhile
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
                    owners_changed = type(error) not in _ON_ITS_WAY
                time.sleep(0.05)
                if owners_changed:
                    self._client.nodes_manager.initialize()

    def _walk(self, prefix: bytes) -> set[bytes]:
        self._client.nodes_manager.initialize()
        before = self._slots()
        found = super()._walk(prefix)
        if not before or self._slots() != before:
            raise StoreError(
                f"{self.name}: slots of the cluster are being moved, or a replica is replacing a "
                "primary, so a scan could miss keys; try again when that is over"
            )
        return found

    def _slots(self) -> dict[str, list[list[str]]]:
        """Each primary's slots, as it reports them itself; empty if a slot is moving or missing."""
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
    """The store on a server, or on the cluster that it belongs to.

    Raises:
        StoreError: see RedisStore and RedisClusterStore.
    """
    store = RedisStore(address)
    if not store.in_cluster:
        return store
    store.close()
    return RedisClusterStore(address)


def _tags() -> tuple[bytes, ...]:
    """One hash tag per part, evenly spread over the slots, so that primaries get equal shares."""
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
            except redis.WatchError:  # another writer came first and succeeded
                continue


def _at_one_moment(
    mget: Callable[[Sequence[bytes]], list[bytes | None]],
    keys: Sequence[bytes],
    then: Follow,
    watch: Callable[..., object] = lambda *_: None,
) -> list[bytes | None]:
    """The values as in ``KeyValueStore.read``.

    Args:
        mget: returns values, as one snapshot per server.
        keys, then: see ``KeyValueStore.read``.
        watch: called with keys before they are read.
    """
    if keys:
        watch(*keys)
    found = list(mget(keys)) if keys else []
    while more := then(found):
        watch(*more)
        # read the first keys again: if they are unchanged, all values belong to one snapshot
        values = list(mget([*keys, *more]))
        if values[: len(keys)] == found:
            return values
        found = values[: len(keys)]
    return found


def without_password(address: str) -> str:
    """A Redis address without its password, for messages. Of a malformed address only the scheme is
    shown, since the password may be anywhere."""
    found = _ADDRESS.fullmatch(address)
    return found[1] + found[2] if found else f"{address.partition('://')[0]}://..."
