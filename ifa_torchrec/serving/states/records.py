"""What a record holds, and its bytes.

Sums are kept as mean and weight: S = mean * z. Decay then touches the weights alone, a mean fits
float16 whatever the length of the history, and a bucket whose events all have one value (every item,
unless two collide) needs that value once, not once a half-life.

Nothing is read that could be wrong in silence. A record ends with a checksum of itself, its key and the
header's mark, so that damage, and what is left of another building, are seen. The head names the pages
of the rows that there are: one that is lost is missed.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.serving.errors import BUILD_COMMAND, DROP_COMMAND, StoreError
from ifa_torchrec.serving.states.layout import BLOCK, Keys, StateLayout, user_of
from ifa_torchrec.serving.states.pages import RowCodec, Rows, rounded, zstd

_HEAD = struct.Struct("<qq")  # time, count
_BEFORE = struct.Struct(
    "<III"
)  # CRC of the head that it differs from, bytes of the difference, absent keys
_CHECKSUM = struct.Struct("<I")
_RESIDUE = zlib.crc32(_CHECKSUM.pack(zlib.crc32(b"")))
"""The CRC of whatever ends with its own CRC."""


@dataclass(frozen=True)
class Sums:
    """Sums of dense heads at a time: weight [H, F] and mean [H, F, d], float64."""

    time: int
    weight: np.ndarray
    mean: np.ndarray

    def at(self, time: int, decay: np.ndarray) -> np.ndarray:
        """The weights at a later time."""
        days = (time - self.time) / MICROSECONDS_PER_DAY
        return self.weight * np.exp(-decay * days)[:, None]

    def plus(self, other: Sums, decay: np.ndarray) -> Sums:
        """The sums of both, as of the later time of the two."""
        time = max(self.time, other.time)
        mine, theirs = self.at(time, decay), other.at(time, decay)
        weight = mine + theirs
        share = np.divide(theirs, weight, out=np.zeros_like(weight), where=weight > 0)
        return Sums(time, weight, self.mean + (other.mean - self.mean) * share[..., None])


@dataclass(frozen=True)
class Head:
    """The dense heads of ``count`` events, of which the last was at the sums' time."""

    sums: Sums
    count: int

    def plus(self, other: Head, decay: np.ndarray) -> Head:
        """The head of the events of both."""
        if not (self.count and other.count):
            return self if self.count else other
        return Head(self.sums.plus(other.sums, decay), self.count + other.count)


@dataclass(frozen=True)
class Before:
    """What was before the events of a user's last time: the head, and the rows that these changed.

    Args:
        head: Head.
        rows: those that there were then.
        absent: keys, ascending, of those that there were not.
    """

    head: Head
    rows: Rows
    absent: np.ndarray


def weight_and_mean(sums: torch.Tensor, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*, F] and means [*, F, d], 0 where there is no weight, in float64.

    Args:
        sums: z, [*, F].
        totals: S, [*, F, d].
    """
    weight, total = sums.detach().double().numpy(), totals.detach().double().numpy()
    weighed = weight[..., None] > 0
    return weight, np.divide(total, weight[..., None], out=np.zeros_like(total), where=weighed)


def _less(number: np.ndarray, other: np.ndarray) -> bytes:
    """number - other, of integers as near as the floats whose bits they are: small ones have few bits
    set, and bytes of one place lie together."""
    difference = number - other
    difference = (difference << 1) ^ (difference >> (8 * difference.itemsize - 1))
    return difference.view(np.uint8).reshape(-1, difference.itemsize).T.tobytes()


def _more(difference: bytes, other: np.ndarray) -> bytes:
    """The number whose ``_less`` this is."""
    planes = np.frombuffer(difference, np.uint8).reshape(other.itemsize, -1)
    bits = np.ascontiguousarray(planes.T).view(f"<u{other.itemsize}")[:, 0]
    return (other + ((bits >> 1).astype(other.dtype) ^ -(bits & 1).astype(other.dtype))).tobytes()


class RecordCodec:
    """The records of one building of a version's states as bytes.

    Args:
        store: its name, for messages.
        header: of the version.

    Attributes:
        keys: Keys.
        layout, position, latest, vocabulary: as in StateStore.
        decay, identity_decay: the layout's, as arrays.
        rows: RowCodec.
        no_bits: of a block without positions.
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
        self.vocabulary: str = header["vocabulary"]
        self.keys = Keys(self.version)
        self.decay = np.array(self.layout.decay)
        self.identity_decay = np.array(self.layout.identity_decay)
        self.no_bits = bytes(BLOCK // 8)
        self._mark = zlib.crc32(bytes.fromhex(header["mark"]))
        self._dtype = np.dtype(self.layout.dtype)
        self.rows = RowCodec(self.layout)

    # ------------------------------------------------------------------------------- checksums

    def seal(self, key: bytes, body: bytes) -> bytes:
        """A record's body with its checksum."""
        return body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key, self._start(key))))

    def open(self, key: bytes, value: bytes) -> bytes:
        """The body of the record under a key.

        Raises:
            StoreError: its checksum is not that of its bytes.
        """
        if zlib.crc32(value, zlib.crc32(key, self._start(key))) != _RESIDUE:
            raise self._damaged(key)
        return value[: -_CHECKSUM.size]

    def open_all(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> list[bytes | None]:
        """As ``open``, of many records of states (not of the journal); None stays None."""
        crc32, mark = zlib.crc32, self._mark
        opened: list[bytes | None] = []
        for key, value in zip(keys, values, strict=True):
            if value is None:
                opened.append(None)
                continue
            if crc32(value, crc32(key, mark)) != _RESIDUE:
                raise self._damaged(key)
            opened.append(value[:-4])
        return opened

    def lost(self, user: int | str) -> StoreError:
        """What is raised where one of a user's records is not there."""
        return StoreError(
            f"{self.store}: a part of the state of user {user!r} is gone; something deleted it "
            f"or damaged its key. {self._advice()}"
        )

    def _start(self, key: bytes) -> int:
        # the journal is of all versions
        return 0 if key[:1] == b"j" else self._mark

    def _damaged(self, key: bytes) -> StoreError:
        what = ""
        if key[:1] in b"sui":
            user = user_of(key)
            what = "of a user " if user is None else f"of user {user} "
        return StoreError(
            f"{self.store}: a record {what}(key {key.hex()}) is damaged, or of another "
            f"building: its checksum is not that of its bytes. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"Bring the store back from a copy, or drop the states ({DROP_COMMAND} {self.version}) and "
            f"build them anew ({BUILD_COMMAND})"
        )

    # ------------------------------------------------------------------------------- heads

    def pack_head(self, head: Head, pages: np.ndarray, seed: np.random.Generator | None = None) -> bytes:
        """A record s: a head, and the first keys of the user's pages; ``seed`` as there."""
        return self._pack_head(head, seed) + pages.astype("<i8").tobytes()

    def unpack_head(self, body: bytes) -> tuple[Head, np.ndarray]:
        """What a record s holds: a head, and the first keys of the user's pages."""
        return self._unpack_head(body), self.unpack_pages(body)

    def unpack_pages(self, body: bytes) -> np.ndarray:
        """Of what a record s holds, the first keys of the user's pages."""
        return np.frombuffer(body, "<i8", offset=self._head_size)

    def pack_before(self, before: Before, head: bytes, seed: np.random.Generator | None = None) -> bytes:
        """A record u, whose head is stored as what it differs in from the record s of the same user.

        Args:
            before: what it holds.
            head: the body of the record s.
            seed: as in ``RowCodec.pack``.
        """
        own, head = self._pack_head(before.head, seed), head[: self._head_size]
        difference = zstd.compress(
            b"".join(map(_less, self._numbers(own), self._numbers(head))), asbytes=True
        )
        sizes = _BEFORE.pack(zlib.crc32(head), len(difference), len(before.absent))
        (rows,) = self.rows.pack(before.rows, [0, len(before.rows)], [0], seed)
        absent = before.absent.astype("<i8").tobytes()
        return own[: _HEAD.size] + sizes + difference + absent + rows

    def unpack_before(self, user: int | str, body: bytes, head: bytes) -> Before:
        """What a record u holds; ``head`` is the body of the record s.

        Raises:
            StoreError: they are not of one moment.
        """
        head, end = head[: self._head_size], _HEAD.size + _BEFORE.size
        crc, size, absent = _BEFORE.unpack_from(body, _HEAD.size)
        if crc != zlib.crc32(head):
            raise self.lost(user)
        planes: bytes = zstd.decompress(
            body[end : end + size], self._head_size - _HEAD.size, asbytes=True
        )
        weight, mean = self._numbers(head)
        own = _more(planes[: weight.nbytes], weight) + _more(planes[weight.nbytes :], mean)
        keys = np.frombuffer(body, "<i8", absent, end + size)
        rows = self.rows.unpack([body[end + size + 8 * absent :]], [0])[0]
        return Before(self._unpack_head(body[: _HEAD.size] + own), rows, keys)

    def no_head(self) -> Head:
        """The head of a user without events."""
        shape = (self.layout.num_heads, self.layout.feature_dim)
        return Head(Sums(0, np.zeros(shape), np.zeros((*shape, self.layout.head_dim))), 0)

    def _pack_head(self, head: Head, seed: np.random.Generator | None) -> bytes:
        mean = rounded(head.sums.mean, self._dtype, seed)
        weight = head.sums.weight.astype(np.float32)
        return _HEAD.pack(head.sums.time, head.count) + weight.tobytes() + mean.tobytes()

    def _numbers(self, head: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The bits of a head's weights and means, as integers."""
        weights = self.layout.num_heads * self.layout.feature_dim
        means = np.dtype(f"<i{self._dtype.itemsize}")
        return (
            np.frombuffer(head, "<i4", weights, _HEAD.size),
            np.frombuffer(head, means, offset=_HEAD.size + 4 * weights),
        )

    @property
    def _head_size(self) -> int:
        """Bytes of a head."""
        weights = self.layout.num_heads * self.layout.feature_dim
        return _HEAD.size + weights * (4 + self.layout.head_dim * self._dtype.itemsize)

    def _unpack_head(self, body: bytes) -> Head:
        last, count = _HEAD.unpack_from(body)
        shape = (self.layout.num_heads, self.layout.feature_dim)
        size = math.prod(shape)
        middle = _HEAD.size + 4 * size
        means = size * self.layout.head_dim
        weight = np.frombuffer(body, np.float32, size, _HEAD.size).reshape(shape)
        mean = np.frombuffer(body, self._dtype, means, middle).reshape(*shape, self.layout.head_dim)
        sums = Sums(last, weight.astype(np.float64), mean.astype(np.float64))
        return Head(sums, count)
