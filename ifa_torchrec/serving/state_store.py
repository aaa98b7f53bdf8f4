"""States in a key-value store: one record a user, one an identity bucket that the user has.

Keys, of one version of the weights (VVVVVVVV, the first 8 bytes of the version's hash):

    v VVVVVVVV                the version and its layout, JSON
    s VVVVVVVV user           head: time and position of the last event, count, dense heads
    i VVVVVVVV user key       one row of the identity tables, with its own time
    a VVVVVVVV block          which positions of the event stream are in the states, a bit each
    j position                the event itself, for versions that are built later

An event touches its user's head, K rows, one block and one journal entry, in one transaction. So the
cost does not depend on the history, and an event is in the states exactly if its bit is set.
Numbers are big endian, so that keys sort by them.

Sums are kept as mean and weight: S = mean * z. Decay then touches the weights alone, a mean fits
float16 whatever the length of the history, and a bucket whose events all have one value (every item,
unless two collide) needs that value once, not once a half-life.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import InteractionFidelityAttention, UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.errors import StateError, UnknownUserError
from ifa_torchrec.serving.key_value import KeyValueStore

FORMAT = "ifa-states/1"
_BLOCK = 4096  # positions a block
_SAME = 1e-6
"""Means of a bucket that differ by no more than this share of their size are stored once."""
_HEAD = struct.Struct("<8sqqq")  # version, time, position, count
_EVENT = struct.Struct(">qqq")  # user, item, time


@dataclass(frozen=True)
class Event:
    """Something a user did.

    Args:
        position: 0 or more, its place in the stream of all events; what tells an event that comes
            twice from two alike. Several streams share the range, e.g. PARTITION * 2**40 + OFFSET.
        user, item: ids.
        time: microseconds since 1970, UTC.

    Example:
        >>> from ifa_torchrec.serving import Event
        >>> Event(position=1017, user=7, item=55, time=1_700_000_000_000_000).item
        55
    """

    position: int
    user: int
    item: int
    time: int


@dataclass(frozen=True)
class StateLayout:
    """What the states of one configuration look like.

    Args:
        num_heads: H; feature_dim: d_phi; head_dim: d.
        identity_key_range: K R, 0 without identity features.
        decay: rate a day of each dense head, [H].
        identity_decay: rate a day of each identity half-life, [L].
        dtype: how means are stored; weights and counts are float32 and int64. Means in float16 are
            rounded to the nearest when built, and at random, without bias, when events are added.

    Example:
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout
        >>> ifa = InteractionFidelityAttention(IFAConfig(64, num_heads=2))
        >>> StateLayout.of(ifa).feature_dim
        32
    """

    num_heads: int
    feature_dim: int
    head_dim: int
    identity_key_range: int
    decay: tuple[float, ...]
    identity_decay: tuple[float, ...]
    dtype: Literal["float32", "float16"] = "float32"

    @staticmethod
    def of(
        ifa: InteractionFidelityAttention, dtype: Literal["float32", "float16"] = "float32"
    ) -> StateLayout:
        """The layout of a module's states; its ages are in days."""
        if dtype not in ("float32", "float16"):
            raise StateError(f"states are stored as float32 or float16, not {dtype!r}")
        return StateLayout(
            num_heads=ifa.config.num_heads,
            feature_dim=ifa.config.feature_width,
            head_dim=ifa.config.head_width,
            identity_key_range=ifa.config.identity_key_range,
            decay=tuple(ifa.decay.tolist()),
            identity_decay=() if ifa.identity is None else tuple(ifa.identity.decay.tolist()),
            dtype=dtype,
        )


@dataclass
class _Sums:
    """Sums of one head record or row at a time: weight [*, F] and mean [*, F, d], float64."""

    time: int
    weight: np.ndarray
    mean: np.ndarray

    def at(self, time: int, decay: np.ndarray) -> np.ndarray:
        """The weights at a later time."""
        days = (time - self.time) / MICROSECONDS_PER_DAY
        return self.weight * np.exp(-decay * days).reshape(-1, *[1] * (self.weight.ndim - 1))

    def add(self, other: _Sums, decay: np.ndarray) -> None:
        """Add another's, as of the later time of the two."""
        time = max(self.time, other.time)
        mine, theirs = self.at(time, decay), other.at(time, decay)
        weight = mine + theirs
        share = np.divide(theirs, weight, out=np.zeros_like(weight), where=weight > 0)
        self.mean = self.mean + (other.mean - self.mean) * share[..., None]
        self.time, self.weight = time, weight


class StateStore:
    """The states that one version of the weights made.

    Args:
        key_values: where they lie.
        version: of the weights.

    Raises:
        StateError: there are no states of this version, or they were not built to the end; the
            message says which there are.

    Attributes:
        layout: StateLayout.
        position: events of the stream before this one are in the log that the states were built from.

    Example:
        >>> import tempfile, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout, StateStore, open_key_value_store
        >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2, half_lives=(7.0, 90.0)))
        >>> lmdb = open_key_value_store(tempfile.mkdtemp())
        >>> store = StateStore.begin(lmdb, "weights-1", StateLayout.of(ifa), position=0)
        >>> history = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 2]))
        >>> _ = store.write([70, 71], ifa.encode(history), times=[0, 0])
        >>> store.finish()
        >>> StateStore(lmdb, "weights-1").read([71], times=[1_000_000]).count.tolist()
        [2]
    """

    def __init__(self, key_values: KeyValueStore, version: str) -> None:
        self.key_values, self.version = key_values, version
        header = _header(key_values, version)
        if header is None or not header["complete"]:
            ready = [v for v, found in versions(key_values).items() if found["complete"]]
            missing = "there are none" if header is None else "they were not built to the end"
            raise StateError(
                f"states of weights {version!r}: {missing}; build them with python -m "
                f"ifa_torchrec.build_states. The store has those of {ready or 'no weights'}"
            )
        self._configure(header)

    def _configure(self, header: dict[str, Any]) -> None:
        layout = dict(header["layout"])
        for name in ("decay", "identity_decay"):
            layout[name] = tuple(layout[name])
        self.layout = StateLayout(**layout)
        self.position: int = header["position"]
        self._id = _version_id(self.version)
        self._decay = np.array(self.layout.decay)
        self._identity_decay = np.array(self.layout.identity_decay)
        self._dtype = np.dtype(self.layout.dtype)
        # a row holds one mean, or one for each half-life
        self._row_record = {
            means: np.dtype(
                [
                    ("time", "<i8"),
                    ("weight", "<f4", len(self._identity_decay)),
                    ("mean", self._dtype, (means, self.layout.head_dim)),
                ]
            )
            for means in {1, len(self._identity_decay)}
        }

    # -------------------------------------------------------------------------------- building

    @classmethod
    def begin(
        cls,
        key_values: KeyValueStore,
        version: str,
        layout: StateLayout,
        position: int,
        source: str = "",
    ) -> StateStore:
        """Begin to build a version's states, or go on; none can be read before ``finish``.

        Args:
            key_values: where they go.
            version: of the weights.
            layout: StateLayout.
            position: the first position of the event stream that is not in the log they are built
                from.
            source: says which log; going on must say the same.

        Raises:
            StateError: they are finished, or were begun with another layout, position or source.
        """
        header = {
            "format": FORMAT,
            "version": version,
            "layout": dataclasses.asdict(layout),
            "position": position,
            "source": source,
            "complete": False,
        }
        header = json.loads(json.dumps(header))  # tuples become lists
        found = _header(key_values, version)
        if found is None:
            text = json.dumps(header).encode()
            key_values.update([], lambda _: {b"v" + _version_id(version): text})
        elif found["complete"]:
            raise StateError(
                f"states of weights {version!r} are built; new events are added to them as they "
                "come. To build them anew, drop them first (python -m ifa_torchrec.states)"
            )
        elif found != header:
            differing = [name for name in header if header[name] != found.get(name)]
            raise StateError(
                f"states of weights {version!r} were begun with another {' and '.join(differing)}; "
                "go on with the same, or drop them first (python -m ifa_torchrec.states)"
            )
        store = cls.__new__(cls)
        store.key_values, store.version = key_values, version
        store._configure(header)
        return store

    def finish(self) -> None:
        """Say that every state is written."""
        header = _header(self.key_values, self.version)
        assert header is not None
        text = json.dumps({**header, "complete": True}).encode()
        self.key_values.update([], lambda _: {b"v" + self._id: text})

    def write(self, users: Sequence[int], state: UserState, times: Sequence[int]) -> int:
        """Write whole states, in one transaction.

        Args:
            users: B ids.
            state: their states.
            times: B, of each user's last event; microseconds.

        Returns:
            The bytes written, keys included.
        """
        written = {}
        head_time = np.asarray(times, np.int64)
        weight, mean = _weight_and_mean(state.key_sum, state.key_value)
        for b, user in enumerate(users):
            head = _Sums(times[b], weight[b], mean[b])
            count, position = int(state.count[b]), self.position - 1
            written[self._head_key(user)] = self._pack_head(head, count, position)
        if state.identity_offsets is not None:
            offsets, key, value, total = state.identity_tables()
            lengths = offsets.diff().numpy()
            user_of_row = np.repeat(np.asarray(users, np.int64), lengths)
            keys = self._row_keys(user_of_row, key.numpy())
            sums = _weight_and_mean(total, value)
            written |= zip(keys, self._pack_rows(np.repeat(head_time, lengths), *sums), strict=True)
        self.key_values.update([], lambda _: written)
        return sum(len(key) + len(value) for key, value in written.items())

    def known(self, users: Sequence[int]) -> np.ndarray:
        """Which users have a state; [B] bool."""
        found = self.key_values.read([self._head_key(user) for user in users])
        return np.array([value is not None for value in found], dtype=bool)

    # --------------------------------------------------------------------------------- reading

    def read(
        self,
        users: Sequence[int],
        times: Sequence[int | None],
        keys: Sequence[np.ndarray] | None = None,
        new_users: Sequence[bool] | None = None,
    ) -> UserState:
        """The states at some times, with the identity rows that are asked for.

        Args:
            users: B ids.
            times: B, microseconds; elapsed time decays each state. None is now, or the user's last
                event where the clock that stamped it is ahead.
            keys: B arrays of identity keys (IdentityHeads.keys of the candidates), in any order.
            new_users: B, whether a user may have no state, and then has had no event.

        Returns:
            UserState of B requests, float32.

        Raises:
            UnknownUserError: a user has no state.
            StateError: a state has events after the time.
        """
        layout = self.layout
        wanted = [self._head_key(user) for user in users]
        asked = [np.unique(of_user) for of_user in keys or ()]
        user_of_row = np.repeat(np.asarray(users, np.int64), [len(of_user) for of_user in asked] or 0)
        asked_key = np.concatenate([np.empty(0, np.int64), *asked])
        wanted += self._row_keys(user_of_row, asked_key)
        found = self.key_values.read(wanted)
        weight = np.zeros((len(users), layout.num_heads, layout.feature_dim))
        mean = np.zeros((*weight.shape, layout.head_dim))
        count = np.zeros(len(users), np.int64)
        now = time.time_ns() // 1000
        at = np.array([now if asked_time is None else asked_time for asked_time in times], np.int64)
        for b, (user, value) in enumerate(zip(users, found, strict=False)):
            if value is None:
                if new_users is not None and new_users[b]:
                    continue
                raise UnknownUserError(
                    f"user {user} has no state; for one who is new and has had no event give new_user"
                )
            head, count[b], _ = self._unpack_head(value)
            if times[b] is None:
                at[b] = max(at[b], head.time)
            if head.time > at[b]:
                raise StateError(
                    f"user {user} has an event at {_utc(head.time)}, after the request's time "
                    f"{_utc(int(at[b]))}; a state cannot go back in time"
                )
            weight[b], mean[b] = head.at(int(at[b]), self._decay), head.mean
        dense = (_tensor(mean * weight[..., None]), _tensor(weight), torch.from_numpy(count))
        if not layout.identity_key_range:
            return UserState(*dense)
        rows = found[len(users) :]
        there = np.array([row is not None for row in rows], dtype=bool)
        request = np.repeat(np.arange(len(users)), [len(of_user) for of_user in asked] or 0)[there]
        row_time, sums, means = self._unpack_rows([row for row in rows if row is not None])
        days = (at[request] - row_time) / MICROSECONDS_PER_DAY
        sums = sums * np.exp(-days[:, None] * self._identity_decay)
        return UserState(
            *dense,
            torch.from_numpy(np.searchsorted(request, np.arange(len(users) + 1))),
            torch.from_numpy(asked_key[there]),
            _tensor(means * sums[..., None]),
            _tensor(sums),
            layout.identity_key_range,
        )

    # ------------------------------------------------------------------------------- appending

    def append(
        self, events: Sequence[Event], encode: Callable[[Sequence[Event]], UserState]
    ) -> list[bool]:
        """Add events to their users' states, each once however often it is given.

        All of them in one transaction. They may come in any order: what is added does not depend
        on it, but for rounding. A user without a state gets one.

        Args:
            events: the events.
            encode: gives a state of each event alone, at age 0, as UserState of len(events)
                requests.

        Returns:
            Whether each event was new.
        """
        if not events:
            return []
        state = encode(events)
        weight, mean = _weight_and_mean(state.key_sum, state.key_value)
        heads = [_Sums(event.time, weight[e], mean[e]) for e, event in enumerate(events)]
        rows: list[list[tuple[bytes, _Sums]]] = [[] for _ in events]
        if state.identity_offsets is not None:
            offsets, row_key, value, total = state.identity_tables()
            weight, mean = _weight_and_mean(total, value)
            event_of_row = request_of_row(offsets).tolist()
            for row, key in enumerate(row_key.tolist()):
                event = events[event_of_row[row]]
                sums = _Sums(event.time, weight[row], mean[row])
                rows[event_of_row[row]].append((self._row_key(event.user, key), sums))
        blocks = [self._block_key(event.position) for event in events]
        keys = [*blocks, *(self._head_key(event.user) for event in events)]
        keys = list(dict.fromkeys(keys + [key for of_event in rows for key, _ in of_event]))
        new: list[bool] = []

        def change(values: list[bytes | None]) -> dict[bytes, bytes]:
            new.clear()
            found = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
            bits = {key: bytearray(found.get(key) or bytes(_BLOCK // 8)) for key in blocks}
            open_heads: dict[bytes, tuple[_Sums, int, int]] = {}
            open_rows: dict[bytes, _Sums] = {}
            written: dict[bytes, bytes] = {}
            for e, event in enumerate(events):
                byte, bit = divmod(event.position % _BLOCK, 8)
                block = bits[blocks[e]]
                new.append(event.position >= self.position and not block[byte] >> bit & 1)
                if not new[-1]:
                    continue
                block[byte] |= 1 << bit
                written[blocks[e]] = b""  # filled below, when all bits are set
                written[b"j" + struct.pack(">q", event.position)] = _EVENT.pack(
                    event.user, event.item, event.time
                )
                key = self._head_key(event.user)
                if key not in open_heads and key in found:
                    open_heads[key] = self._unpack_head(found[key])
                if key in open_heads:
                    head, count, position = open_heads[key]
                    head.add(heads[e], self._decay)
                    open_heads[key] = (head, count + 1, max(position, event.position))
                else:
                    open_heads[key] = (dataclasses.replace(heads[e]), 1, event.position)
                for key, row in rows[e]:
                    if key not in open_rows and key in found:
                        time, *sums = self._unpack_rows([found[key]])
                        open_rows[key] = _Sums(int(time[0]), *(column[0] for column in sums))
                    if key in open_rows:
                        open_rows[key].add(row, self._identity_decay)
                    else:
                        open_rows[key] = dataclasses.replace(row)
            seed = np.random.default_rng(events[0].position)
            for key in written.keys() & bits.keys():
                written[key] = bytes(bits[key])
            for key, (head, count, position) in open_heads.items():
                written[key] = self._pack_head(head, count, position, seed)
            if open_rows:
                time = np.array([row.time for row in open_rows.values()])
                weight = np.stack([row.weight for row in open_rows.values()])
                mean = np.stack([row.mean for row in open_rows.values()])
                written |= zip(open_rows, self._pack_rows(time, weight, mean, seed), strict=True)
            return written

        self.key_values.update(keys, change)
        return new

    def missed(self) -> Iterator[list[Event]]:
        """Events that this store's journal has and these states have not, some at a time."""
        first = struct.pack(">q", self.position)
        found: list[bytes] = []
        for key in self.key_values.scan(b"j", first):
            found.append(key)
            if len(found) == 1024:
                yield self._not_applied(found)
                found = []
        yield self._not_applied(found)

    def _not_applied(self, journal_keys: list[bytes]) -> list[Event]:
        positions = [struct.unpack(">q", key[1:])[0] for key in journal_keys]
        blocks = self.key_values.read([self._block_key(position) for position in positions])
        events = self.key_values.read(journal_keys)
        result = []
        for position, block, value in zip(positions, blocks, events, strict=True):
            byte, bit = divmod(position % _BLOCK, 8)
            if value is not None and not (block and block[byte] >> bit & 1):
                result.append(Event(position, *_EVENT.unpack(value)))
        return result

    # --------------------------------------------------------------------------------- records

    def _head_key(self, user: int) -> bytes:
        return b"s" + self._id + struct.pack(">q", user)

    def _row_key(self, user: int, key: int) -> bytes:
        return b"i" + self._id + struct.pack(">qq", user, key)

    def _block_key(self, position: int) -> bytes:
        return b"a" + self._id + struct.pack(">q", position // _BLOCK)

    def _pack_head(
        self, head: _Sums, count: int, position: int, seed: np.random.Generator | None = None
    ) -> bytes:
        weight = head.weight.astype(np.float32)
        fixed = _HEAD.pack(self._id, head.time, position, count)
        return fixed + weight.tobytes() + self._rounded(head.mean, seed).tobytes()

    def _unpack_head(self, value: bytes) -> tuple[_Sums, int, int]:
        version, last, position, count = _HEAD.unpack_from(value)
        if version != self._id:
            raise StateError(f"a state of other weights lies where those of {self.version!r} should")
        shape = (self.layout.num_heads, self.layout.feature_dim)
        end = _HEAD.size + 4 * math.prod(shape)
        weight = np.frombuffer(value[_HEAD.size : end], np.float32).reshape(shape)
        mean = np.frombuffer(value[end:], self._dtype).reshape(*shape, self.layout.head_dim)
        return _Sums(last, weight.astype(np.float64), mean.astype(np.float64)), count, position

    def _row_keys(self, user: np.ndarray, key: np.ndarray) -> list[bytes]:
        """The keys of many rows at once; user and key are [n] int64."""
        record = np.dtype([("prefix", "S9"), ("user", ">i8"), ("key", ">i8")])
        keys = np.empty(len(user), record)
        keys["prefix"], keys["user"], keys["key"] = b"i" + self._id, user, key
        return _pieces(keys)

    def _pack_rows(
        self,
        time: np.ndarray,
        weight: np.ndarray,
        mean: np.ndarray,
        seed: np.random.Generator | None = None,
    ) -> list[bytes]:
        """Rows of time [n], weight [n, L] and mean [n, L, d]."""
        heaviest = mean[np.arange(len(mean)), weight.argmax(1)]  # [n, d]
        differs = (np.abs(mean - heaviest[:, None]).max(2) * (weight > 0)).max(1)
        one = differs <= _SAME * np.abs(heaviest).max(1)
        mean = self._rounded(mean, seed)
        packed: list[bytes] = [b""] * len(time)
        for means, chosen in (1, np.flatnonzero(one)), (weight.shape[1], np.flatnonzero(~one)):
            rows = np.empty(len(chosen), self._row_record[means])
            rows["time"], rows["weight"] = time[chosen], weight[chosen]
            # of one mean alone, the heaviest half-life's
            first = weight[chosen].argmax(1)[:, None] if means == 1 else np.arange(means)[None]
            rows["mean"] = mean[chosen[:, None], first]
            for row, piece in zip(chosen, _pieces(rows), strict=True):
                packed[row] = piece
        return packed

    def _unpack_rows(self, values: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """time [n] int64, weight [n, L] and mean [n, L, d] of rows, all at once."""
        half_lives, width = len(self._identity_decay), self.layout.head_dim
        time = np.empty(len(values), np.int64)
        weight = np.empty((len(values), half_lives))
        mean = np.empty((len(values), half_lives, width))
        size = np.fromiter(map(len, values), np.int64, len(values))
        for record in self._row_record.values():
            chosen = np.flatnonzero(size == record.itemsize)
            found = np.frombuffer(b"".join([values[n] for n in chosen]), record)
            time[chosen], weight[chosen], mean[chosen] = found["time"], found["weight"], found["mean"]
        return time, weight, mean

    def _rounded(self, mean: np.ndarray, seed: np.random.Generator | None) -> np.ndarray:
        """Means as they are stored. With a seed, float16 is rounded up or down at random, so that
        many small steps add up: to the nearest, none of them might ever be seen."""
        with np.errstate(over="ignore"):
            near = mean.astype(self._dtype)
        if not np.isfinite(near).all():
            largest = np.abs(mean).max()
            raise StateError(
                f"a mean of {largest:g} is beyond {self._dtype}; build with --dtype float32"
            )
        if seed is None or self._dtype != np.float16:
            return near
        beyond = np.nextafter(near, np.where(mean > near, np.inf, -np.inf).astype(np.float16))
        gap = np.abs(beyond.astype(np.float64) - near)
        distance = np.abs(mean - near.astype(np.float64))
        return np.where(seed.random(mean.shape) * gap < distance, beyond, near)


def versions(key_values: KeyValueStore) -> dict[str, dict[str, Any]]:
    """The versions whose states a store holds, each with its header.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store, versions
        >>> versions(open_key_value_store(tempfile.mkdtemp()))
        {}
    """
    values = key_values.read(list(key_values.scan(b"v")))
    headers = [json.loads(value) for value in values if value is not None]
    return {header["version"]: header for header in headers}


def drop(key_values: KeyValueStore, version: str) -> None:
    """Delete a version's states, and what of the journal no other version can want.

    Raises:
        StateError: there are none of this version.
    """
    there = versions(key_values)
    if version not in there:
        raise StateError(f"no states of weights {version!r} here; there are {sorted(there)}")
    # the header first: half a version must not look whole
    _delete_all(key_values, b"v" + _version_id(version))
    for kind in (b"s", b"i", b"a"):
        _delete_all(key_values, kind + _version_id(version))
    rest = [header["position"] for name, header in there.items() if name != version]
    if rest:
        _delete_all(key_values, b"j", until=b"j" + struct.pack(">q", min(rest)))


def _delete_all(key_values: KeyValueStore, prefix: bytes, until: bytes | None = None) -> None:
    keys = []
    for key in key_values.scan(prefix):
        if until is not None and key >= until:
            break
        keys.append(key)
    for first in range(0, len(keys), 10_000):
        key_values.delete(keys[first : first + 10_000])


def _header(key_values: KeyValueStore, version: str) -> dict[str, Any] | None:
    (value,) = key_values.read([b"v" + _version_id(version)])
    if value is None:
        return None
    header = json.loads(value)
    if header["format"] != FORMAT:
        raise StateError(
            f"states of weights {version!r} are of format {header['format']!r}, this version of the "
            f"package reads {FORMAT!r}; build them anew"
        )
    return header


def _version_id(version: str) -> bytes:
    return hashlib.sha256(version.encode()).digest()[:8]


def _utc(time: int) -> str:
    return str(np.datetime64(time, "us")) + "Z"


def _pieces(records: np.ndarray) -> list[bytes]:
    whole, size = records.tobytes(), records.dtype.itemsize
    return [whole[first : first + size] for first in range(0, len(whole), size)]


def _weight_and_mean(sums: torch.Tensor, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*, F] and means [*, F, d], 0 where there is no weight, in float64."""
    weight, total = sums.detach().double().numpy(), totals.detach().double().numpy()
    weighed = weight[..., None] > 0
    return weight, np.divide(total, weight[..., None], out=np.zeros_like(total), where=weighed)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
