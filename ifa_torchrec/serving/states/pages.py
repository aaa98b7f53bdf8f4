"""Rows of identity tables, and the pages that store them.

A page contains the rows of a range of a user's identity keys in ascending order. Each row has its own
time that its weights are as of, so that a row is rounded again only when an event adds to it. Repeated
values, mostly times of events that came together and weights of single events, compress well; for that,
keys and times are stored as byte planes: the first byte of every row, then the second, and so on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.layout import StateLayout

PAGE_ROWS = 256
"""Most rows per page; a longer page is split."""
_SAME = 1e-6
"""A bucket's means that differ by at most this share of their size are stored once."""
_LARGEST_SUM = float(np.finfo(np.float32).max) / 2
_PAGE = struct.Struct("<II")  # rows, means
_STEP_BYTES = _MEANS = 5
"""Number of bytes with a row's key, and the index of the byte with its number of means."""
_DROPPED_BITS = 13
"""Bits of a float32's 23-bit fraction that float16 states drop, to keep float16's 10."""
# pyarrow has no type stubs; one object serves all threads
zstd: Any = pa.Codec("zstd", 3)  # pyright: ignore
lz4: Any = pa.Codec("lz4_raw")  # pyright: ignore


@dataclass(frozen=True)
class Rows:
    """Rows of one user's identity tables, or of several users' one after the other.

    Args:
        key: [n] int64, ascending within a user.
        time: [n] int64, microseconds, the time that each row's weights are as of.
        weight: [n, L] float64.
        mean: [n, L, d] float64.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving.states.pages import Rows
        >>> event = Rows(np.array([7]), np.array([0]), np.ones((1, 1)), np.ones((1, 1, 0)))
        >>> Rows.cat([event, event]).by_key(np.zeros(1)).weight.tolist()
        [[2.0]]
    """

    key: np.ndarray
    time: np.ndarray
    weight: np.ndarray
    mean: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, rows: np.ndarray | slice) -> Rows:
        return Rows(self.key[rows], self.time[rows], self.weight[rows], self.mean[rows])

    @staticmethod
    def none(layout: StateLayout) -> Rows:
        """No rows."""
        half_lives, numbers = len(layout.identity_decay), np.empty(0, np.int64)
        weight = np.empty((0, half_lives))
        return Rows(numbers, numbers, weight, np.empty((0, half_lives, layout.identity_width)))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The rows of each part, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*((p.key, p.time, p.weight, p.mean) for p in parts), strict=True)
        return Rows(*(np.concatenate(field) for field in fields))

    def by_key(self, decay: np.ndarray) -> Rows:
        """One row per key: the sum of the key's rows, as of the latest of their times."""
        if (self.key[1:] > self.key[:-1]).all():
            return self
        key, place = np.unique(self.key, return_inverse=True)
        time = np.full(len(key), np.iinfo(np.int64).min)
        np.maximum.at(time, place, self.time)
        weight = self.at(time[place], decay)
        total, summed = (
            np.zeros((len(key), *weight.shape[1:])),
            np.zeros((len(key), *self.mean.shape[1:])),
        )
        np.add.at(total, place, weight)
        np.add.at(summed, place, weight[..., None] * self.mean)
        return Rows(key, time, total, quotient(summed, total[..., None]))

    def plus(self, other: Rows, decay: np.ndarray) -> Rows:
        """The sum of both; each has distinct, ascending keys, and ``other`` should be the shorter."""
        if not (len(self) and len(other)):
            return self if len(self) else other
        place = self.find(other.key)
        there = place < len(self)
        mine, new = place[there], other[~there]
        both = self[mine]._and(other[there], decay)
        before = np.searchsorted(self.key, new.key)

        def merged(of_self: np.ndarray, of_both: np.ndarray, of_new: np.ndarray) -> np.ndarray:
            whole = of_self.copy()
            whole[mine] = of_both
            return np.insert(whole, before, of_new, axis=0) if len(before) else whole

        return Rows(
            merged(self.key, both.key, new.key),
            merged(self.time, both.time, new.time),
            merged(self.weight, both.weight, new.weight),
            merged(self.mean, both.mean, new.mean),
        )

    def _and(self, other: Rows, decay: np.ndarray) -> Rows:
        """The sums of rows with the same keys."""
        time = np.maximum(self.time, other.time)
        mine, theirs = self.at(time, decay), other.at(time, decay)
        return Rows(self.key, time, *together(mine, self.mean, theirs, other.mean))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The index of each key's row [m], n if it has none; the rows' keys must be ascending."""
        place = np.searchsorted(self.key, keys)
        padded = np.append(self.key, -1)
        return np.where(padded[place] == keys, place, len(self.key))

    def at(self, time: np.ndarray, decay: np.ndarray) -> np.ndarray:
        """The weights [n, L] at later times [n]."""
        days = (time - self.time) / MICROSECONDS_PER_DAY
        return self.weight * np.exp(-days[:, None] * decay)


class _Opened(NamedTuple):
    """The contents of some pages: the stored bytes [size, n] of n rows, their keys [n] int64 and weights
    [n, L], all means [m, d], and the number of rows of each page."""

    planes: np.ndarray
    key: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    counts: np.ndarray


class RowCodec:
    """Encodes pages as bytes.

    Args:
        layout: the version's layout.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving import StateLayout
        >>> from ifa_torchrec.serving.states.pages import RowCodec, Rows
        >>> codec = RowCodec(StateLayout(1, 4, 4, 100, (0.0,), (0.0,), identity_head_dim=0))
        >>> rows = Rows(np.array([3, 9]), np.array([5, 5]), np.ones((2, 1)), np.ones((2, 1, 0)))
        >>> found, counts = codec.unpack(codec.pack(rows, [0, 2], [0]), [0])
        >>> found.key.tolist(), counts.tolist()
        ([3, 9], [2])
    """

    def __init__(self, layout: StateLayout) -> None:
        self._half_lives, self._width = len(layout.identity_decay), layout.identity_width
        self._dtype = np.dtype(layout.dtype)
        self._row = np.dtype(
            [
                ("step", "<u4"),  # from the previous row's key, or the page's first key
                ("steps", "u1"),  # the same step's higher byte, in units of 2^32
                ("means", "u1"),  # number of means: one, or one per half-life
                ("time", "<i8"),
            ]
        )

    def pack(
        self,
        rows: Rows,
        bounds: Sequence[int] | np.ndarray,
        first: Sequence[int] | np.ndarray,
        seed: np.random.Generator | None = None,
    ) -> list[bytes]:
        """Encode pages.

        Args:
            rows: the rows of P pages, one page after the other.
            bounds: [P + 1]; page p has the rows bounds[p] up to bounds[p + 1].
            first: [P], each page's first key.
            seed: round float16 stochastically, without bias; None rounds to nearest.

        Raises:
            StateError: a mean overflows float16, or a sum overflows float32.
        """
        check_sums(rows.weight * np.abs(rows.mean).max(2, initial=1))
        bounds, first = np.asarray(bounds), np.asarray(first)
        step = rows.key.copy()
        step[1:] -= rows.key[:-1]
        there = bounds[1:] > bounds[:-1]
        step[bounds[:-1][there]] = rows.key[bounds[:-1][there]] - first[there]
        packed = np.empty(len(rows), self._row)
        packed["step"], packed["steps"] = step & 0xFFFFFFFF, step >> 32
        packed["time"] = rows.time
        weight = self._weight(rows.weight, seed)
        means, one = self._means(rows)
        packed["means"] = np.where(one, 1, self._half_lives)
        planes = packed.view(np.uint8).reshape(len(rows), self._row.itemsize).T
        ends = np.concatenate([[0], np.cumsum(packed["means"], dtype=np.int64)])[bounds]
        means = rounded(means, self._dtype, seed)
        pages: list[bytes] = []
        for p in range(len(first)):
            mine, own = slice(*bounds[p : p + 2]), slice(*ends[p : p + 2])
            of_page = planes[:, mine].tobytes() + weight[mine].tobytes() + means[own].tobytes()
            sizes = _PAGE.pack(bounds[p + 1] - bounds[p], ends[p + 1] - ends[p])
            pages.append(sizes + lz4.compress(of_page, asbytes=True))
        return pages

    def unpack(
        self, pages: Sequence[bytes], first: Sequence[int] | np.ndarray
    ) -> tuple[Rows, np.ndarray]:
        """The rows of P pages, one page after the other, and each page's number of rows [P].

        Args:
            pages: from ``pack``.
            first: [P], each page's first key.
        """
        opened = self._open(pages, first)
        return self._rows(opened, slice(None)), opened.counts

    def find(self, pages: Sequence[bytes], first: np.ndarray, keys: np.ndarray) -> Rows:
        """The rows of P pages that have one of some keys.

        Args:
            pages: from ``pack``.
            first: [P], each page's first key, ascending.
            keys: distinct and ascending.
        """
        opened = self._open(pages, first)
        place = opened.key.searchsorted(keys)
        there = place < len(opened.key)
        there[there] = opened.key[place[there]] == keys[there]
        return self._rows(opened, place[there])

    def _open(self, pages: Sequence[bytes], first: Sequence[int] | np.ndarray) -> _Opened:
        size, of_weight = self._row.itemsize, 4 * self._half_lives
        planes, counts = [np.empty((size, 0), np.uint8)], np.empty(len(pages), np.int64)
        weights: list[bytes] = []
        means: list[bytes] = []
        for p, page in enumerate(pages):
            n, m = _PAGE.unpack_from(page)
            numbers, end = n * size, n * (size + of_weight)
            whole = end + m * self._width * self._dtype.itemsize
            of_page: bytes = lz4.decompress(memoryview(page)[_PAGE.size :], whole, asbytes=True)
            planes.append(np.frombuffer(of_page, np.uint8, numbers).reshape(size, n))
            weights.append(of_page[numbers:end])
            means.append(of_page[end:])
            counts[p] = n
        stored = np.concatenate(planes, axis=1)
        step = np.zeros((stored.shape[1], 8), np.uint8)
        step[:, :_STEP_BYTES] = stored[:_STEP_BYTES].T
        step = step.view("<i8")[:, 0]
        there = counts > 0
        begins = (counts.cumsum() - counts)[there]
        # each page's first row is a step from the page's first key
        key = step.cumsum()
        shift = np.asarray(first, np.int64)[there] - key[begins] + step[begins]
        key += shift.repeat(counts[there])
        weight = np.frombuffer(b"".join(weights), np.float32).reshape(len(key), self._half_lives)
        mean = np.frombuffer(b"".join(means), self._dtype).reshape(-1, self._width or 1)
        return _Opened(stored, key, weight, mean, counts)

    def _rows(self, opened: _Opened, places: np.ndarray | slice) -> Rows:
        """The rows at some indices."""
        packed = np.ascontiguousarray(opened.planes[:, places].T).view(self._row)[:, 0]
        weight, time = opened.weight[places].astype(np.float64), packed["time"].astype(np.int64)
        mean = np.empty((len(packed), self._half_lives, self._width))
        if self._width:
            number = opened.planes[_MEANS].astype(np.int64)
            begin = (np.cumsum(number) - number)[places, None]
            mean[:] = opened.mean[begin + np.arange(self._half_lives) * (number[places, None] > 1)]
        return Rows(opened.key[places], time, weight, mean)

    def _means(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The means [m, d] to store, and for each row [n] whether it stores one, of its heaviest
        half-life."""
        if not rows.mean.size:
            return np.empty((len(rows), self._width)), np.ones(len(rows), bool)
        heaviest = rows.mean[np.arange(len(rows)), rows.weight.argmax(1)]  # [n, d]
        differs = (np.abs(rows.mean - heaviest[:, None]).max(2) * (rows.weight > 0)).max(1)
        one = differs <= _SAME * np.abs(heaviest).max(1)
        kept = np.ones((len(rows), self._half_lives), bool)
        kept[one, 1:] = False
        mean = np.where(one[:, None, None], heaviest[:, None], rows.mean)
        return mean[kept], one

    def _weight(self, weight: np.ndarray, seed: np.random.Generator | None) -> np.ndarray:
        """Weights as stored, in float32. For float16 states they are rounded to float16's precision but
        keep float32's range; the dropped bits are zeros, which compress to nothing."""
        bits = weight.astype(np.float32)
        if self._dtype != np.float16:
            return bits
        bits = bits.view(np.uint32)
        dropped = np.uint32(1 << _DROPPED_BITS)
        up: Any = dropped >> 1 if seed is None else seed.integers(0, dropped, bits.shape, np.uint32)
        return ((bits + up) & ~(dropped - np.uint32(1))).view(np.float32)


def quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where whole is 0; ``whole`` is broadcast to the part's shape."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def together(
    weight: np.ndarray, mean: np.ndarray, other_weight: np.ndarray, other_mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The combined weight [*] and mean [*, d] of two sums as of the same time; the second is float64."""
    total = weight + other_weight
    step = other_mean - mean
    step *= quotient(other_weight, total)[..., None]
    step += mean
    return total, step


def check_sums(sums: np.ndarray | float) -> None:
    """Refuse sums that could overflow float32 when they are read, with a margin for rounding.

    Args:
        sums: sums of weights and of weights times values, or upper bounds of them.

    Raises:
        StateError: one is beyond half of float32's range.

    Example:
        >>> from ifa_torchrec.serving.states.pages import check_sums
        >>> check_sums(1e38)
        >>> check_sums(1e39)
        Traceback (most recent call last):
        ifa_torchrec.serving.errors.StateError: the user's events add up to 1e+39, beyond float32; ...
    """
    largest = np.max(sums, initial=0)
    if not largest <= _LARGEST_SUM:
        raise StateError(
            f"the user's events add up to {largest:g}, beyond float32; give smaller weights and numbers"
        )


def rounded(mean: np.ndarray, dtype: np.dtype[Any], seed: np.random.Generator | None) -> np.ndarray:
    """Means as stored. With a seed, float16 is rounded stochastically, so that many small steps add up;
    rounding to nearest could lose every one of them.

    Raises:
        StateError: a mean overflows float16.
    """
    with np.errstate(over="ignore"):
        near = mean.astype(dtype)
    if not np.isfinite(near).all():
        largest = np.abs(mean).max()
        raise StateError(f"a mean of {largest:g} is beyond {dtype}; build states with --dtype float32")
    if seed is None or dtype != np.float16:
        return near
    beyond = np.nextafter(near, np.where(mean > near, np.inf, -np.inf).astype(np.float16))
    gap = np.abs(beyond.astype(np.float64) - near)
    distance = np.abs(mean - near.astype(np.float64))
    return np.where(seed.random(mean.shape) * gap < distance, beyond, near)


def pages_of(first: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The pages that contain some keys.

    Args:
        first: each page's first key, ascending; first[0] is 0.
        keys: ascending; a key below 0, of an unknown id, is in no page.

    Returns:
        The pages' first keys, distinct and ascending.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving.states.pages import pages_of
        >>> pages_of(np.array([0, 50, 70]), np.array([-1, 3, 80, 99])).tolist()
        [0, 70]
    """
    page = distinct(first.searchsorted(keys, side="right"))  # 0 for a key below 0
    return first[page[page > 0] - 1]


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values of an ascending array, several times as fast as np.unique, which would sort.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving.states.pages import distinct
        >>> distinct(np.array([2, 2, 5])).tolist()
        [2, 5]
    """
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def page_parts(begin: int, end: int) -> list[slice]:
    """Split the rows begin up to end into parts that each fit into a page.

    Example:
        >>> from ifa_torchrec.serving.states.pages import page_parts
        >>> page_parts(0, 300)
        [slice(0, 150, None), slice(150, 300, None)]
    """
    parts = -(-(end - begin) // PAGE_ROWS)
    bounds = [begin + (end - begin) * part // max(parts, 1) for part in range(parts + 1)]
    return [slice(*of_part) for of_part in pairwise(bounds)]
