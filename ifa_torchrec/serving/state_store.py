"""States in a key-value store: one record a user, one an identity bucket that the user has.

Keys, of one version of the weights (VVVVVVVV, the first 8 bytes of the version's hash):

    v VVVVVVVV                header: the version, its layout and a mark of this building of it, JSON
    s VVVVVVVV user           head: time of the last event, count, dense heads, which blocks k there are
    u VVVVVVVV user           what the last event changed as it was before: the head, and rows
    i VVVVVVVV user key       one row of the identity tables, with its own time
    k VVVVVVVV user block     which of a block of keys have a row, a bit each
    a VVVVVVVV block          which positions of the event stream are in the states, a bit each
    j position                the event itself, for versions that are built later

An event touches its user's records but the other rows, one block and one journal entry, in one
transaction. So the cost does not depend on the history, and an event is in the states exactly if its bit
is set. Numbers are big endian, so that keys sort by them.

A request sees the events strictly before its time, as in training. The last event may not be before it:
therefore the records u, which take back all events of the last one's time, and so serve every time after
the event before those.

Nothing is read that could be wrong in silence. A record ends with a checksum of itself, its key and the
header's mark, so that damage, and what is left of another building, are seen. The header is read with
every record: a store that was emptied, or dropped and built anew, is no longer the one that was opened.
A row that is lost is missed by the bit of its key, and its block by the head.

Sums are kept as mean and weight: S = mean * z. Decay then touches the weights alone, a mean fits
float16 whatever the length of the history, and a bucket whose events all have one value (every item,
unless two collide) needs that value once, not once a half-life.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import InteractionFidelityAttention, UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.errors import StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.key_value import KeyValueStore

FORMAT = "ifa-states/2"
_BLOCK = 4096  # positions, or identity keys, a block
_SAME = 1e-6
"""Means of a bucket that differ by no more than this share of their size are stored once."""
_HEAD = struct.Struct("<qq")  # time, count
_EVENT = struct.Struct(">qqq")  # user, item, time
_ROW = struct.Struct("<qI")  # identity key, size
_CHECKSUM = struct.Struct("<I")
_BUILD = "python -m ifa_torchrec.build_states"
_DROP = "python -m ifa_torchrec.states --drop"
_Place = TypeVar("_Place")


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


@dataclass
class _Head:
    """The dense heads of ``count`` events, of which the last was at the sums' time."""

    sums: _Sums
    count: int

    def add(self, event: _Sums, decay: np.ndarray) -> None:
        """Add an event."""
        if self.count:
            self.sums.add(event, decay)
        else:
            self.sums = dataclasses.replace(event)
        self.count += 1


class _Format:
    """The keys and records of one building of a version's states, as bytes.

    Args:
        store: its name, for messages.
        header: of the version.
    """

    def __init__(self, store: str, header: dict[str, Any]) -> None:
        self.store = store
        layout = dict(header["layout"])
        for name in ("decay", "identity_decay"):
            layout[name] = tuple(layout[name])
        self.layout = StateLayout(**layout)
        self.version: str = header["version"]
        self.position: int = header["position"]
        self.latest: int | None = header["latest"]
        self.id = _version_id(self.version)
        self.decay = np.array(self.layout.decay)
        self.identity_decay = np.array(self.layout.identity_decay)
        self.no_bits = bytes(_BLOCK // 8)
        self.no_blocks = bytes(-(-self.layout.identity_key_range // (8 * _BLOCK)))
        self._mark = zlib.crc32(bytes.fromhex(header["mark"]))
        self._dtype = np.dtype(self.layout.dtype)
        # a row holds one mean, or one for each half-life
        self._row_record = {
            means: np.dtype(
                [
                    ("time", "<i8"),
                    ("weight", "<f4", len(self.identity_decay)),
                    ("mean", self._dtype, (means, self.layout.head_dim)),
                ]
            )
            for means in {1, len(self.identity_decay)}
        }

    def sealed(self, key: bytes, body: bytes) -> bytes:
        return body + _CHECKSUM.pack(self._checksum(key, body))

    def opened(self, key: bytes, value: bytes) -> bytes:
        body = value[: -_CHECKSUM.size]
        if _CHECKSUM.pack(self._checksum(key, body)) == value[-_CHECKSUM.size :]:
            return body
        what = f"of user {_user_of(key)} " if key[:1] in b"suik" else ""
        raise StoreError(
            f"{self.store}: a record {what}(key {key.hex()}) is damaged, or of another "
            f"building: its checksum is not that of its bytes. {self._advice()}"
        )

    def _checksum(self, key: bytes, body: bytes) -> int:
        # the journal is of all versions
        return zlib.crc32(body, zlib.crc32(key, 0 if key[:1] == b"j" else self._mark))

    def lost(self, user: int) -> StoreError:
        return StoreError(
            f"{self.store}: a part of the state of user {user} is gone; something deleted it "
            f"or damaged its key. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"Bring the store back from a copy, or drop the states ({_DROP} {self.version}) and "
            f"build them anew ({_BUILD})"
        )

    def user_key(self, kind: bytes, user: int) -> bytes:
        return kind + self.id + struct.pack(">q", user)

    def row_key(self, user: int, key: int) -> bytes:
        return b"i" + self.id + struct.pack(">qq", user, key)

    def member_key(self, user: int, block: int) -> bytes:
        return b"k" + self.id + struct.pack(">qq", user, block)

    def block_key(self, position: int) -> bytes:
        return b"a" + self.id + struct.pack(">q", position // _BLOCK)

    def pack_head(self, head: _Head, seed: np.random.Generator | None = None) -> bytes:
        weight, mean = head.sums.weight.astype(np.float32), self._rounded(head.sums.mean, seed)
        return _HEAD.pack(head.sums.time, head.count) + weight.tobytes() + mean.tobytes()

    def unpack_head(self, body: bytes) -> tuple[_Head, bytes]:
        """A head, and the bytes after it."""
        last, count = _HEAD.unpack_from(body)
        shape = (self.layout.num_heads, self.layout.feature_dim)
        middle = _HEAD.size + 4 * math.prod(shape)
        end = middle + self._dtype.itemsize * math.prod(shape) * self.layout.head_dim
        weight = np.frombuffer(body[_HEAD.size : middle], np.float32).reshape(shape)
        mean = np.frombuffer(body[middle:end], self._dtype).reshape(*shape, self.layout.head_dim)
        sums = _Sums(last, weight.astype(np.float64), mean.astype(np.float64))
        return _Head(sums, count), body[end:]

    def unpack_before(self, body: bytes) -> tuple[_Head, dict[int, bytes]]:
        """What a record u holds: a head, and rows by key, without bytes where there was none."""
        head, rest = self.unpack_head(body)
        rows: dict[int, bytes] = {}
        while rest:
            key, size = _ROW.unpack_from(rest)
            rows[key] = rest[_ROW.size : _ROW.size + size]
            rest = rest[_ROW.size + size :]
        return head, rows

    def row_keys(self, user: np.ndarray, key: np.ndarray) -> list[bytes]:
        """The keys of many rows at once; user and key are [n] int64."""
        record = np.dtype([("prefix", "S9"), ("user", ">i8"), ("key", ">i8")])
        keys = np.empty(len(user), record)
        keys["prefix"], keys["user"], keys["key"] = b"i" + self.id, user, key
        return _pieces(keys)

    def pack_rows(
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

    def unpack_rows(self, values: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """time [n] int64, weight [n, L] and mean [n, L, d] of rows, all at once."""
        half_lives, width = len(self.identity_decay), self.layout.head_dim
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
        latest: time of the last event of that log; None if it is not known.

    Example:
        >>> import tempfile, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout, StateStore, open_key_value_store
        >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2, half_lives=(7.0, 90.0)))
        >>> lmdb = open_key_value_store(tempfile.mkdtemp())
        >>> store = StateStore.begin(lmdb, "weights-1", StateLayout.of(ifa), position=0)
        >>> earlier = JaggedTensor(torch.randn(3, 8), lengths=torch.tensor([2, 1]))
        >>> last = JaggedTensor(torch.randn(2, 8), lengths=torch.tensor([1, 1]))
        >>> _ = store.write([70, 71], ifa.encode(earlier), [0, 0], ifa.encode(last), [5, 5])
        >>> store.finish()
        >>> store = StateStore(lmdb, "weights-1")
        >>> [store.read([70], times=[time])[0].count.tolist() for time in (5, 6)]
        [[2], [3]]
    """

    def __init__(self, key_values: KeyValueStore, version: str) -> None:
        key_values.check()
        self.key_values, self.version = key_values, version
        header = _header(key_values, version)
        if header is None or not header["complete"]:
            ready = [v for v, found in versions(key_values).items() if found["complete"]]
            missing = "there are none" if header is None else "they were not built to the end"
            raise StateError(
                f"states of weights {version!r}: {missing}; build them with {_BUILD}. The store "
                f"{key_values.name} has those of {ready or 'no weights'}"
            )
        self._configure(header)

    def _configure(self, header: dict[str, Any]) -> None:
        self._header = _packed_header(header)
        self._format = _Format(self.key_values.name, header)
        self.layout, self.position, self.latest = (
            self._format.layout,
            self._format.position,
            self._format.latest,
        )

    # -------------------------------------------------------------------------------- building

    @classmethod
    def begin(
        cls,
        key_values: KeyValueStore,
        version: str,
        layout: StateLayout,
        position: int,
        source: str = "",
        latest: int | None = None,
    ) -> StateStore:
        """Begin to build a version's states, or go on; none can be read before ``finish``.

        Args:
            key_values: where they go.
            version: of the weights.
            layout: StateLayout.
            position: the first position of the event stream that is not in the log they are built
                from.
            source: says which log; going on must say the same.
            latest: time of that log's last event, if it is known: an event before ``position`` and
                after this time is refused, since the log cannot have it.

        Raises:
            StateError: they are finished, or were begun with another layout, position or source.
            StoreError: the store may lose keys.
        """
        key_values.check()
        header = {
            "format": FORMAT,
            "version": version,
            "layout": dataclasses.asdict(layout),
            "position": position,
            "source": source,
            "latest": latest,
            "mark": secrets.token_hex(8),
            "complete": False,
        }
        header = json.loads(json.dumps(header))  # tuples become lists
        key = b"v" + _version_id(version)
        # of several ranks the first one's mark stays
        key_values.update([key], lambda found: {} if found[0] else {key: _packed_header(header)})
        found = _header(key_values, version)
        if found is None:
            raise StoreError(f"{key_values.name}: what is written here is not kept")
        if found["complete"]:
            raise StateError(
                f"states of weights {version!r} are built; new events are added to them as they "
                "come. To build them anew, drop them first (python -m ifa_torchrec.states)"
            )
        differing = [name for name in header if header[name] != found.get(name) and name != "mark"]
        if differing:
            raise StateError(
                f"states of weights {version!r} were begun with another {' and '.join(differing)}; "
                "go on with the same, or drop them first (python -m ifa_torchrec.states)"
            )
        store = cls.__new__(cls)
        store.key_values, store.version = key_values, version
        store._configure(found)
        return store

    def finish(self) -> None:
        """Say that every state is written.

        Raises:
            StoreError: what was begun is no longer there.
        """
        whole = {**_unpacked_header(self.key_values, self._header), "complete": True}
        self._update([], lambda _: {b"v" + self._format.id: _packed_header(whole)})
        self._header = _packed_header(whole)

    def write(
        self,
        users: Sequence[int],
        earlier: UserState,
        earlier_times: Sequence[int],
        last: UserState,
        last_times: Sequence[int],
    ) -> int:
        """Write whole states, in one transaction.

        Args:
            users: B ids.
            earlier: their states of all events but those of the last event's time.
            earlier_times: B, microseconds, of the last event in these; of any value where there is none.
            last: their states of the events of the last event's time.
            last_times: B, microseconds, of these.

        Returns:
            The bytes written, keys included.

        Raises:
            StoreError: what was begun is no longer there, or the store fails.
        """
        written: dict[bytes, bytes] = {}
        early, late = np.asarray(earlier_times, np.int64), np.asarray(last_times, np.int64)
        days = torch.from_numpy((late - early) / MICROSECONDS_PER_DAY * (earlier.count.numpy() > 0))
        whole = self._aged(earlier, days) + self._aged(last, 0 * days)
        rows_before: list[dict[int, bytes]] = [{} for _ in users]
        blocks = [self._format.no_blocks] * len(users)
        if whole.identity_offsets is not None:
            touched = _request_and_key(last)
            before = self._row_table(earlier, early, set(touched))
            for b, key in touched:
                rows_before[b][key] = before.get((b, key), b"")
            table = self._row_table(whole, late)
            member: dict[int, dict[int, bytearray]] = {}
            for (b, key), row in table.items():
                place = self._format.row_key(users[b], key)
                written[place] = self._format.sealed(place, row)
                bits = member.setdefault(b, {}).setdefault(key // _BLOCK, bytearray(_BLOCK // 8))
                _set_bit(bits, key % _BLOCK)
            for b, of_user in member.items():
                for block, bits in of_user.items():
                    place = self._format.member_key(users[b], block)
                    written[place] = self._format.sealed(place, zlib.compress(bits))
                there = bytearray(self._format.no_blocks)
                for block in of_user:
                    _set_bit(there, block)
                blocks[b] = bytes(there)
        for state, times, kind in (whole, late, b"s"), (earlier, early, b"u"):
            weight, mean = _weight_and_mean(state.key_sum, state.key_value)
            for b, user in enumerate(users):
                head = _Head(_Sums(int(times[b]), weight[b], mean[b]), int(state.count[b]))
                body = self._format.pack_head(head)
                body += blocks[b] if kind == b"s" else _packed_before(rows_before[b])
                key = self._format.user_key(kind, user)
                written[key] = self._format.sealed(key, body)
        self._update([], lambda _: written)
        return sum(len(key) + len(value) for key, value in written.items())

    def _aged(self, state: UserState, days: torch.Tensor) -> UserState:
        """A state some days [B] later, in float64."""
        decay = torch.from_numpy(self._format.decay)
        factor = torch.exp(-days[:, None] * decay)[..., None]
        aged = dataclasses.replace(
            state,
            key_sum=state.key_sum.double() * factor,
            key_value=state.key_value.double() * factor[..., None],
        )
        if state.identity_offsets is None:
            return aged
        offsets, _, value, total = state.identity_tables()
        factor = torch.exp(
            -days[request_of_row(offsets)][:, None] * torch.tensor(self._format.identity_decay)
        )
        return dataclasses.replace(
            aged,
            identity_sum=total.double() * factor,
            identity_value=value.double() * factor[..., None],
        )

    def _row_table(
        self, state: UserState, times: np.ndarray, among: set[tuple[int, int]] | None = None
    ) -> dict[tuple[int, int], bytes]:
        """A state's identity rows, packed, by request and key; all, or those ``among`` some."""
        offsets, _, value, total = state.identity_tables()
        place = _request_and_key(state)
        rows = [n for n, of_row in enumerate(place) if among is None or of_row in among]
        weight, mean = _weight_and_mean(total[rows], value[rows])
        time = times[request_of_row(offsets).numpy()[rows]]
        packed = self._format.pack_rows(time, weight, mean)
        return {place[n]: row for n, row in zip(rows, packed, strict=True)}

    def known(self, users: Sequence[int]) -> np.ndarray:
        """Which users have a state; [B] bool."""
        found = self._read([self._format.user_key(b"s", user) for user in users])
        return np.array([value is not None for value in found], dtype=bool)

    # --------------------------------------------------------------------------------- reading

    def check(self) -> None:
        """See that the states which this object was opened for are there.

        Raises:
            StoreError: they are not, or the store is out of reach or may lose keys.
        """
        self.key_values.check()
        self._read([])

    def read(
        self,
        users: Sequence[int],
        times: Sequence[int | None],
        keys: Sequence[np.ndarray] | None = None,
        new_users: Sequence[bool] | None = None,
        strict: bool = False,
    ) -> tuple[UserState, np.ndarray]:
        """The states at some times, of the events before these, with the identity rows asked for.

        A state can leave out the events of its last event's time, no more: it serves any time after the
        event before those. An earlier time is answered as of the first moment after that event.

        Args:
            users: B ids.
            times: B, microseconds; elapsed time decays each state. None is now, or just after the
                user's last event where the clock that stamped it is ahead.
            keys: B arrays of identity keys (IdentityHeads.keys of the candidates), in any order.
            new_users: B, whether a user may have no state, and then has had no event.
            strict: refuse an earlier time.

        Returns:
            UserState of B requests, float32; and the times [B] int64 that they are as of.

        Raises:
            UnknownUserError: a user has no state.
            StateError: ``strict``, and a state cannot go back to the time.
            StoreError: states are lost or damaged, or the store fails.
        """
        layout = self.layout
        none = np.empty(0, np.int64)
        asked = [none] * len(users) if keys is None else [np.unique(of_user) for of_user in keys]
        records = self._records(users, asked, with_before=False)
        # where more is needed it is all read again, at one moment
        again = [
            b
            for b, (of_user, at) in enumerate(zip(records, times, strict=True))
            if of_user.head is None or (at is not None and at <= of_user.head.sums.time)
        ]
        if again:
            found = self._records([users[b] for b in again], [asked[b] for b in again], with_before=True)
            for b, of_user in zip(again, found, strict=True):
                records[b] = of_user
        weight = np.zeros((len(users), layout.num_heads, layout.feature_dim))
        mean = np.zeros((*weight.shape, layout.head_dim))
        count = np.zeros(len(users), np.int64)
        now = time.time_ns() // 1000
        as_of = np.array([now if at is None else at for at in times], np.int64)
        for b, (user, of_user) in enumerate(zip(users, records, strict=True)):
            if of_user.head is None:
                if new_users is not None and new_users[b]:
                    continue
                raise UnknownUserError(
                    f"user {user} has no state; for one who is new and has had no event give new_user"
                )
            head, last = of_user.head, of_user.head.sums.time
            if times[b] is None:
                as_of[b] = max(now, last + 1)
            if as_of[b] <= last:
                head = of_user.go_back()
                if head.count and as_of[b] <= head.sums.time:
                    if strict:
                        raise StateError(
                            f"user {user} has events at {utc(head.sums.time)} and {utc(last)}, "
                            f"neither before the request's time {utc(int(as_of[b]))}; a state can go "
                            "back behind the last of them alone"
                        )
                    as_of[b] = head.sums.time + 1
            if head.count:
                weight[b], mean[b] = head.sums.at(int(as_of[b]), self._format.decay), head.sums.mean
                count[b] = head.count
        dense = (_tensor(mean * weight[..., None]), _tensor(weight), torch.from_numpy(count))
        if not layout.identity_key_range:
            return UserState(*dense), as_of
        request = np.repeat(np.arange(len(users)), [len(of_user.rows) for of_user in records])
        key = np.concatenate([none, *(list(of_user.rows) for of_user in records)]).astype(np.int64)
        row_time, sums, means = self._format.unpack_rows(
            [r for of_user in records for r in of_user.rows.values()]
        )
        days = (as_of[request] - row_time) / MICROSECONDS_PER_DAY
        sums = sums * np.exp(-days[:, None] * self._format.identity_decay)
        state = UserState(
            *dense,
            torch.from_numpy(np.searchsorted(request, np.arange(len(users) + 1))),
            torch.from_numpy(key),
            _tensor(means * sums[..., None]),
            _tensor(sums),
            layout.identity_key_range,
        )
        return state, as_of

    def _records(
        self, users: Sequence[int], asked: Sequence[np.ndarray], with_before: bool
    ) -> list[_Records]:
        """The users' records, of the identity rows those asked for (sorted, without repetition)."""
        heads = [self._format.user_key(b"s", user) for user in users]
        befores = [self._format.user_key(b"u", user) for user in users if with_before]
        blocks = [np.unique(of_user // _BLOCK).tolist() for of_user in asked]
        members = [
            [self._format.member_key(u, block) for block in bs]
            for u, bs in zip(users, blocks, strict=True)
        ]
        user_of_row = np.repeat(np.asarray(users, np.int64), [len(of_user) for of_user in asked])
        rows = self._format.row_keys(user_of_row, np.concatenate([np.empty(0, np.int64), *asked]))
        wanted = [*heads, *befores, *(key for of_user in members for key in of_user), *rows]
        found = zip(wanted, self._read(wanted), strict=True)
        opened = iter(
            [None if value is None else self._format.opened(key, value) for key, value in found]
        )
        head_values = [next(opened) for _ in heads]
        before_values = [next(opened) for _ in befores] or [None] * len(users)
        member_values = [[next(opened) for _ in of_user] for of_user in members]
        records: list[_Records] = []
        for b, user in enumerate(users):
            head, there = None, self._format.no_blocks
            if (value := head_values[b]) is not None:
                head, there = self._format.unpack_head(value)
            if with_before and (before_values[b] is None) != (head is None):
                raise self._format.lost(user)
            if [value is not None for value in member_values[b]] != [_bit(there, n) for n in blocks[b]]:
                raise self._format.lost(user)
            keys = asked[b].tolist()
            rows_of_user = [next(opened) for _ in keys]
            bits = [self._format.no_bits if v is None else zlib.decompress(v) for v in member_values[b]]
            table = np.frombuffer(b"".join(bits), np.uint8).reshape(-1, _BLOCK // 8)
            block = np.searchsorted(blocks[b], asked[b] // _BLOCK)
            wanted_rows = table[block, asked[b] % _BLOCK // 8] >> (asked[b] % 8).astype(np.uint8) & 1
            if [row is not None for row in rows_of_user] != wanted_rows.astype(bool).tolist():
                raise self._format.lost(user)
            of_key = {key: row for key, row in zip(keys, rows_of_user, strict=True) if row is not None}
            value = before_values[b]
            before = None if value is None else self._format.unpack_before(value)
            records.append(_Records(head, of_key, before))
        return records

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

        Raises:
            StateError: an event's position was another event's, or is one of the log's, which cannot
                have it. None of the events is added.
            StoreError: states are lost or damaged, or the store fails.
        """
        if not events:
            return []
        state = encode(events)
        weight, mean = _weight_and_mean(state.key_sum, state.key_value)
        heads = [_Sums(event.time, weight[e], mean[e]) for e, event in enumerate(events)]
        rows: list[list[tuple[int, _Sums]]] = [[] for _ in events]
        if state.identity_offsets is not None:
            *_, value, total = state.identity_tables()
            weight, mean = _weight_and_mean(total, value)
            for row, (e, key) in enumerate(_request_and_key(state)):
                rows[e].append((key, _Sums(events[e].time, weight[row], mean[row])))
        keys: dict[bytes, None] = {}  # in order, each once
        for event, of_event in zip(events, rows, strict=True):
            user = event.user
            keys |= dict.fromkeys([self._format.block_key(event.position), _journal_key(event.position)])
            keys |= dict.fromkeys([self._format.user_key(b"s", user), self._format.user_key(b"u", user)])
            keys |= dict.fromkeys(self._format.row_key(user, key) for key, _ in of_event)
            keys |= dict.fromkeys(self._format.member_key(user, key // _BLOCK) for key, _ in of_event)
        new: list[bool] = []

        def change(values: list[bytes | None]) -> dict[bytes, bytes]:
            new.clear()
            found = {
                key: self._format.opened(key, value)
                for key, value in zip(keys, values, strict=True)
                if value is not None
            }
            draft = _Draft(self._format, found)
            for event, head, of_event in zip(events, heads, rows, strict=True):
                new.append(draft.take(event))
                if new[-1]:
                    draft.add(event.user, head, of_event)
            return draft.written(np.random.default_rng(events[0].position))

        self._update(list(keys), change)
        return new

    def missed(self) -> Iterator[list[Event]]:
        """Events that this store's journal has and these states have not, some at a time."""
        found: list[bytes] = []
        for key in self.key_values.scan(b"j", _journal_key(self.position)[1:]):
            found.append(key)
            if len(found) == 1024:
                yield self._not_applied(found)
                found = []
        yield self._not_applied(found)

    def _not_applied(self, journal_keys: list[bytes]) -> list[Event]:
        positions = [struct.unpack(">q", key[1:])[0] for key in journal_keys]
        block_keys = [self._format.block_key(position) for position in positions]
        blocks, events = self._read(block_keys), self._read(journal_keys)
        result: list[Event] = []
        for n, (position, block, value) in enumerate(zip(positions, blocks, events, strict=True)):
            bits = self._format.no_bits if block is None else self._format.opened(block_keys[n], block)
            if value is not None and not _bit(bits, position % _BLOCK):
                result.append(
                    Event(position, *_EVENT.unpack(self._format.opened(journal_keys[n], value)))
                )
        return result

    # --------------------------------------------------------------------------------- records

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What lies under the keys, if these are still the states that were opened."""
        header, *found = self.key_values.read([b"v" + self._format.id, *keys])
        self._check_header(header)
        return found

    def _update(
        self, keys: Sequence[bytes], change: Callable[[list[bytes | None]], Mapping[bytes, bytes]]
    ) -> None:
        def checked(found: list[bytes | None]) -> Mapping[bytes, bytes]:
            self._check_header(found[0])
            return change(found[1:])

        self.key_values.update([b"v" + self._format.id, *keys], checked)

    def _check_header(self, found: bytes | None) -> None:
        if found == self._header:
            return
        states = f"{self.key_values.name}: the states of weights {self.version!r}"
        if found is None:
            raise StoreError(
                f"{states} are gone: the store was emptied, or restarted without its data, or they were "
                f"dropped. Build them anew ({_BUILD}), send the events from position {self.position} on "
                "again, and start again what served them"
            )
        header = _unpacked_header(self.key_values, found)
        if header.get("dropped"):
            raise StoreError(f"{states} are being dropped; build them anew ({_BUILD}) when they are")
        raise StoreError(
            f"{states} were dropped and built anew since this process opened them; start it again, or "
            "send it SIGHUP, when they are whole"
        )


@dataclass
class _Records:
    """A user's records, opened: the head, the rows asked for, and what they were before the last event
    (the rows without bytes where there was none)."""

    head: _Head | None
    rows: dict[int, bytes]
    before: tuple[_Head, dict[int, bytes]] | None

    def go_back(self) -> _Head:
        """Put the rows back to what they were; the head as it was."""
        assert self.before is not None
        head, rows = self.before
        changed = {key: rows.get(key, row) for key, row in self.rows.items()}
        self.rows = {key: row for key, row in changed.items() if row}
        return head


class _Draft:
    """What a transaction makes of the records it found, each decoded once."""

    def __init__(self, form: _Format, found: Mapping[bytes, bytes]) -> None:
        self._format, self._found = form, found
        self._journal: dict[int, Event] = {}
        self._positions: dict[bytes, bytearray] = {}
        self._heads: dict[int, _Head] = {}
        self._before: dict[int, tuple[_Head, dict[int, _Sums | None]]] = {}
        self._blocks: dict[int, bytearray] = {}
        self._members: dict[tuple[int, int], bytearray] = {}
        self._rows: dict[tuple[int, int], _Sums | None] = {}

    def take(self, event: Event) -> bool:
        """Whether an event is new; its position is then taken.

        Raises:
            StateError: its position is another event's.
        """
        form, position = self._format, event.position
        first = self._journal.get(position)
        if first is None and (value := self._found.get(_journal_key(position))) is not None:
            first = Event(position, *_EVENT.unpack(value))
        if first is not None and first != event:
            raise StateError(
                f"position {position} is of user {first.user}, item {first.item} at {utc(first.time)}, "
                f"and comes again with user {event.user}, item {event.item} at {utc(event.time)}. Each "
                "event has a position of its own; for a stream that was made anew build states in an "
                "empty store"
            )
        if position < form.position:
            if first is None and form.latest is not None and event.time > form.latest:
                raise StateError(
                    f"position {position} is before {form.position}, where the stream goes on from the "
                    f"log, but its event at {utc(event.time)} is after the log's last one at "
                    f"{utc(form.latest)}. Was --position of {_BUILD} too high, or are there several "
                    "streams (then it can only be 0)?"
                )
            return False
        key = form.block_key(position)
        if key not in self._positions:
            self._positions[key] = bytearray(self._found.get(key, form.no_bits))
        if _bit(self._positions[key], position % _BLOCK):
            return False
        _set_bit(self._positions[key], position % _BLOCK)
        self._journal[position] = event
        return True

    def add(self, user: int, event: _Sums, rows: Sequence[tuple[int, _Sums]]) -> None:
        """Add an event, its dense heads and its rows, to a user's state."""
        head = self._open(user)
        before, rows_before = self._before[user]
        there = [self._row(user, key) for key, _ in rows]
        if event.time > head.sums.time or not head.count:
            before, rows_before = self._before[user] = dataclasses.replace(head), {}
            before.sums = dataclasses.replace(head.sums)
        elif event.time < head.sums.time:
            before.add(event, self._format.decay)
        for (key, row), found in zip(rows, there, strict=True):
            if event.time >= head.sums.time or not head.count:
                rows_before.setdefault(key, None if found is None else dataclasses.replace(found))
            elif key in rows_before:
                rows_before[key] = self._sum(rows_before[key], row)
            self._rows[user, key] = self._sum(found, row)
            _set_bit(self._member(user, key // _BLOCK), key % _BLOCK)
            _set_bit(self._blocks[user], key // _BLOCK)
        head.add(event, self._format.decay)

    def written(self, seed: np.random.Generator) -> dict[bytes, bytes]:
        """The records that are new or changed, by their keys."""
        form = self._format
        bodies = {_journal_key(p): _EVENT.pack(e.user, e.item, e.time) for p, e in self._journal.items()}
        bodies |= {key: bytes(bits) for key, bits in self._positions.items()}
        for user, head in self._heads.items():
            bodies[form.user_key(b"s", user)] = form.pack_head(head, seed) + self._blocks[user]
            before, rows = self._before[user]
            packed = self._packed(rows, seed)
            places = _packed_before({key: packed.get(key, b"") for key in rows})
            bodies[form.user_key(b"u", user)] = form.pack_head(before, seed) + places
        for (user, block), bits in self._members.items():
            bodies[form.member_key(user, block)] = zlib.compress(bits)
        packed = self._packed(self._rows, seed)
        bodies |= {form.row_key(*place): row for place, row in packed.items()}
        return {key: form.sealed(key, body) for key, body in bodies.items()}

    def _open(self, user: int) -> _Head:
        """The user's head; what was before and which blocks there are beside it."""
        if user not in self._heads:
            form = self._format
            value, before = (self._found.get(form.user_key(kind, user)) for kind in (b"s", b"u"))
            if (value is None) != (before is None):
                raise form.lost(user)
            if value is None or before is None:
                shape = (form.layout.num_heads, form.layout.feature_dim)
                empty = _Sums(0, np.zeros(shape), np.zeros((*shape, form.layout.head_dim)))
                self._heads[user], blocks = _Head(empty, 0), form.no_blocks
                self._before[user] = _Head(empty, 0), {}
            else:
                self._heads[user], blocks = form.unpack_head(value)
                head, rows = form.unpack_before(before)
                self._before[user] = head, {key: self._unpacked(row) for key, row in rows.items()}
            self._blocks[user] = bytearray(blocks)
        return self._heads[user]

    def _member(self, user: int, block: int) -> bytearray:
        """Which keys of a block have a row."""
        if (user, block) not in self._members:
            value = self._found.get(self._format.member_key(user, block))
            if (value is not None) != _bit(self._blocks[user], block):
                raise self._format.lost(user)
            bits = self._format.no_bits if value is None else zlib.decompress(value)
            self._members[user, block] = bytearray(bits)
        return self._members[user, block]

    def _row(self, user: int, key: int) -> _Sums | None:
        if (user, key) not in self._rows:
            value = self._found.get(self._format.row_key(user, key))
            if (value is not None) != _bit(self._member(user, key // _BLOCK), key % _BLOCK):
                raise self._format.lost(user)
            self._rows[user, key] = self._unpacked(value or b"")
        return self._rows[user, key]

    def _sum(self, row: _Sums | None, event: _Sums) -> _Sums:
        result = dataclasses.replace(event if row is None else row)
        if row is not None:
            result.add(event, self._format.identity_decay)
        return result

    def _unpacked(self, row: bytes) -> _Sums | None:
        if not row:
            return None
        time, *sums = self._format.unpack_rows([row])
        return _Sums(int(time[0]), *(column[0] for column in sums))

    def _packed(
        self, rows: Mapping[_Place, _Sums | None], seed: np.random.Generator
    ) -> dict[_Place, bytes]:
        there = {place: row for place, row in rows.items() if row is not None}
        if not there:
            return {}
        time = np.array([row.time for row in there.values()])
        weight = np.stack([row.weight for row in there.values()])
        mean = np.stack([row.mean for row in there.values()])
        return dict(zip(there, self._format.pack_rows(time, weight, mean, seed), strict=True))


def versions(key_values: KeyValueStore) -> dict[str, dict[str, Any]]:
    """The versions whose states a store holds, each with its header.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store, versions
        >>> versions(open_key_value_store(tempfile.mkdtemp()))
        {}
    """
    values = key_values.read(list(key_values.scan(b"v")))
    headers = [_unpacked_header(key_values, value) for value in values if value is not None]
    return {header["version"]: header for header in headers}


def drop(key_values: KeyValueStore, version: str) -> None:
    """Delete a version's states, and what of the journal no other version can want.

    Raises:
        StateError: there are none of this version.
    """
    there = versions(key_values)
    if version not in there:
        raise StateError(f"no states of weights {version!r} here; there are {sorted(there)}")
    # the header first says so, since half a version must not look whole, and is deleted last, since what
    # it leaves must not be built upon
    header = b"v" + _version_id(version)
    dropped = _packed_header({**there[version], "complete": False, "dropped": True})
    key_values.update([], lambda _: {header: dropped})
    for kind in (b"s", b"u", b"i", b"k", b"a"):
        _delete_all(key_values, kind + _version_id(version))
    key_values.delete([header])
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
    header = _unpacked_header(key_values, value)
    if header.get("format") != FORMAT:
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are of format {header.get('format')!r}, "
            f"this version of the package reads {FORMAT!r}; drop them ({_DROP} {version}) and "
            f"build them anew ({_BUILD})"
        )
    if header.get("dropped"):
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are half dropped; drop them to the end "
            f"({_DROP} {version}) and build them anew ({_BUILD})"
        )
    return header


def _packed_header(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return text + b"\n%08x" % zlib.crc32(text)


def _unpacked_header(key_values: KeyValueStore, value: bytes) -> dict[str, Any]:
    text, _, checksum = value.rpartition(b"\n")
    try:
        # that of format 1 had no checksum
        header = json.loads(text or value)
        if (text and b"%08x" % zlib.crc32(text) != checksum) or not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise StoreError(
            f"{key_values.name}: the header of a version's states is damaged. Bring the store back "
            f"from a copy, or build the states in an empty one ({_BUILD})"
        ) from None
    return header


def _version_id(version: str) -> bytes:
    return hashlib.sha256(version.encode()).digest()[:8]


def _journal_key(position: int) -> bytes:
    return b"j" + struct.pack(">q", position)


def _packed_before(rows: Mapping[int, bytes]) -> bytes:
    return b"".join(_ROW.pack(key, len(row)) + row for key, row in rows.items())


def _user_of(key: bytes) -> int:
    return struct.unpack_from(">q", key, 9)[0]


def _request_and_key(state: UserState) -> list[tuple[int, int]]:
    """Of each identity row, in order."""
    offsets, key, *_ = state.identity_tables()
    return list(zip(request_of_row(offsets).tolist(), key.tolist(), strict=True))


def _bit(bits: bytes | bytearray, number: int) -> bool:
    return bool(bits[number // 8] >> number % 8 & 1)


def _set_bit(bits: bytearray, number: int) -> None:
    bits[number // 8] |= 1 << number % 8


def utc(time: int) -> str:
    """A time in microseconds as ISO 8601 has it."""
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
