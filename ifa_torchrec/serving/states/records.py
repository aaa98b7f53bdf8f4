"""What a record holds, and its bytes.

Sums are kept as mean and weight: S = mean * z. Decay then touches the weights alone, a mean fits
float16 whatever the length of the history, and a bucket whose events all have one value (every item,
unless two collide) needs that value once, not once a half-life.

Nothing is read that could be wrong in silence. A record ends with a checksum of itself, its key and the
header's mark, so that damage, and what is left of another building, are seen. A row that is lost is
missed by the bit of its key, and its block by the head.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.serving.errors import BUILD_COMMAND, DROP_COMMAND, StateError, StoreError
from ifa_torchrec.serving.states.layout import BLOCK, Keys, StateLayout, pieces, user_of

_SAME = 1e-6
"""Means of a bucket that differ by no more than this share of their size are stored once."""
_HEAD = struct.Struct("<qq")  # time, count
_ROW = struct.Struct("<qI")  # identity key, size
_CHECKSUM = struct.Struct("<I")
_RESIDUE = zlib.crc32(_CHECKSUM.pack(zlib.crc32(b"")))
"""The CRC of whatever ends with its own CRC."""


@dataclass(frozen=True)
class Sums:
    """Sums of one head or row at a time: weight [*, F] and mean [*, F, d], float64."""

    time: int
    weight: np.ndarray
    mean: np.ndarray

    def at(self, time: int, decay: np.ndarray) -> np.ndarray:
        """The weights at a later time."""
        days = (time - self.time) / MICROSECONDS_PER_DAY
        return self.weight * np.exp(-decay * days).reshape(-1, *[1] * (self.weight.ndim - 1))

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

    def plus(self, event: Sums, decay: np.ndarray) -> Head:
        """The head with one more event."""
        return Head(self.sums.plus(event, decay) if self.count else event, self.count + 1)


def weight_and_mean(sums: torch.Tensor, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*, F] and means [*, F, d], 0 where there is no weight, in float64.

    Args:
        sums: z, [*, F].
        totals: S, [*, F, d].
    """
    weight, total = sums.detach().double().numpy(), totals.detach().double().numpy()
    weighed = weight[..., None] > 0
    return weight, np.divide(total, weight[..., None], out=np.zeros_like(total), where=weighed)


class RecordCodec:
    """The records of one building of a version's states as bytes.

    Args:
        store: its name, for messages.
        header: of the version.

    Attributes:
        keys: Keys.
        layout, position, latest, vocabulary: as in StateStore.
        decay, identity_decay: the layout's, as arrays.
        no_bits: of a block without members or positions.
        no_blocks: of a head without blocks.
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
        self.no_blocks = bytes(-(-self.layout.identity_key_range // (8 * BLOCK)))
        self._mark = zlib.crc32(bytes.fromhex(header["mark"]))
        self._dtype = np.dtype(self.layout.dtype)
        # a row holds one mean, or one for each half-life
        self._row_record = {
            means: np.dtype(
                [
                    ("time", "<i8"),
                    ("weight", "<f4", len(self.identity_decay)),
                    ("mean", self._dtype, (means, self.layout.identity_width)),
                ]
            )
            for means in {1, len(self.identity_decay)}
        }

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
        if key[:1] in b"suik":
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

    def pack_head(self, head: Head, seed: np.random.Generator | None = None) -> bytes:
        """A head; ``seed`` as in ``pack_rows``."""
        weight, mean = head.sums.weight.astype(np.float32), self._rounded(head.sums.mean, seed)
        return _HEAD.pack(head.sums.time, head.count) + weight.tobytes() + mean.tobytes()

    def unpack_head(self, body: bytes) -> tuple[Head, bytes]:
        """A head, and the bytes after it."""
        last, count = _HEAD.unpack_from(body)
        shape = (self.layout.num_heads, self.layout.feature_dim)
        size = math.prod(shape)
        middle = _HEAD.size + 4 * size
        means = size * self.layout.head_dim
        weight = np.frombuffer(body, np.float32, size, _HEAD.size).reshape(shape)
        mean = np.frombuffer(body, self._dtype, means, middle).reshape(*shape, self.layout.head_dim)
        sums = Sums(last, weight.astype(np.float64), mean.astype(np.float64))
        return Head(sums, count), body[middle + means * self._dtype.itemsize :]

    def no_head(self) -> Head:
        """The head of a user without events."""
        shape = (self.layout.num_heads, self.layout.feature_dim)
        return Head(Sums(0, np.zeros(shape), np.zeros((*shape, self.layout.head_dim))), 0)

    @staticmethod
    def pack_row_list(rows: Mapping[int, bytes]) -> bytes:
        """Rows by key, as they follow the head in a record u; no bytes where there was no row."""
        return b"".join(_ROW.pack(key, len(row)) + row for key, row in rows.items())

    def unpack_before(self, body: bytes) -> tuple[Head, dict[int, bytes]]:
        """What a record u holds: a head, and rows by key, without bytes where there was none."""
        head, rest = self.unpack_head(body)
        rows: dict[int, bytes] = {}
        while rest:
            key, size = _ROW.unpack_from(rest)
            rows[key] = rest[_ROW.size : _ROW.size + size]
            rest = rest[_ROW.size + size :]
        return head, rows

    # ------------------------------------------------------------------------------- rows

    def pack_rows(
        self,
        time: np.ndarray,
        weight: np.ndarray,
        mean: np.ndarray,
        seed: np.random.Generator | None = None,
    ) -> list[bytes]:
        """Rows of identity tables.

        Args:
            time: [n].
            weight: [n, L].
            mean: [n, L, d].
            seed: round means to float16 at random, without bias; else to the nearest.
        """
        heaviest = mean[np.arange(len(mean)), weight.argmax(1)]  # [n, d]
        differs = (np.abs(mean - heaviest[:, None]).max(2, initial=0.0) * (weight > 0)).max(1)
        one = differs <= _SAME * np.abs(heaviest).max(1, initial=0.0)
        mean = self._rounded(mean, seed)
        packed: list[bytes] = [b""] * len(time)
        for means, chosen in (1, np.flatnonzero(one)), (weight.shape[1], np.flatnonzero(~one)):
            rows = np.empty(len(chosen), self._row_record[means])
            rows["time"], rows["weight"] = time[chosen], weight[chosen]
            # of one mean alone, the heaviest half-life's
            first = weight[chosen].argmax(1)[:, None] if means == 1 else np.arange(means)[None]
            rows["mean"] = mean[chosen[:, None], first]
            for row, piece in zip(chosen, pieces(rows), strict=True):
                packed[row] = piece
        return packed

    def unpack_rows(self, rows: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """time [n] int64, weight [n, L] float64 and mean [n, L, d], as it is stored, of rows."""
        half_lives = len(self.identity_decay)
        size = self._row_record[1].itemsize
        one_mean = size - self._dtype.itemsize * self.layout.identity_width
        # the one mean is repeated, so that all are of one size and decoded at once
        whole = [r + r[one_mean:] * (half_lives - 1) if len(r) == size else r for r in rows]
        found = np.frombuffer(b"".join(whole), self._row_record[half_lives])
        return found["time"], found["weight"].astype(np.float64), found["mean"]

    def unpack_row(self, row: bytes) -> Sums | None:
        """A row; None of no bytes."""
        if not row:
            return None
        time, weight, mean = self.unpack_rows([row])
        return Sums(int(time[0]), weight[0], mean[0].astype(np.float64))

    @staticmethod
    def pack_members(bits: bytes | bytearray) -> bytes:
        """Which identity keys of a block have a row."""
        return zlib.compress(bits)

    def unpack_members(self, body: bytes | None) -> bytes:
        """The bits of a block; of none where there is no record."""
        return self.no_bits if body is None else zlib.decompress(body)

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
