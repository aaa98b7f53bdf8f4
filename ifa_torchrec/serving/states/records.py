""""""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.errors import StateError, StoreError
from ifa_torchrec.serving.states.layout import StateLayout

FORMAT = "ifa-states/2"
_BLOCK = 4096  # positions, or identity keys, a block
_SAME = 1e-6
"""Means of a bucket that differ by no more than this share of their size are stored once."""
_HEAD = struct.Struct("<qq")  # time, count
_EVENT = struct.Struct(">qqq")  # user, item, time
_ROW = struct.Struct("<qI")  # identity key, size
_CHECKSUM = struct.Struct("<I")
_BUILD = "ifa build-states"
_DROP = "ifa states --drop"


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
