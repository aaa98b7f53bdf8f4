"""The dense heads of a user, and their bytes.

Sums are stored as mean and weight: S = mean * z. Then decay changes only the weights, and a mean fits
float16 however long the history is.

The events at a user's last time are kept separate from those before, since a request at that time must
not see them. There are usually few of them. An event has one value for all features of a head, so the
means of a few events are the product of two small matrices.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.serving.states.layout import StateLayout
from ifa_torchrec.serving.states.pages import check_sums, quotient, rounded, together

_SIZES = struct.Struct("<qqqqI")  # time and count of the events before and of the latest; rank
_NEVER = -(2**63)


@dataclass(frozen=True)
class Sums:
    """Sums of dense heads at a time: weight [H, F] and mean [H, F, d], float64, or float32 if read."""

    time: int
    weight: np.ndarray
    mean: np.ndarray

    def at(self, time: int, decay: np.ndarray) -> np.ndarray:
        """The weights at a later time, float64."""
        return _aged(self.weight, time - self.time, decay)

    def put(self, weight: np.ndarray, total: np.ndarray, time: int, decay: np.ndarray) -> None:
        """Write the sums at a later time into z [H, F] and S [H, F, d], float32."""
        weight[:] = self.at(time, decay)
        np.multiply(self.mean, weight[..., None], out=total)

    def plus(self, other: Sums, decay: np.ndarray) -> Sums:
        """The sums of both, as of the later of their times."""
        time = max(self.time, other.time)
        mine, theirs = self.at(time, decay), other.at(time, decay)
        return Sums(time, *together(mine, self.mean, theirs, other.mean))


@dataclass(frozen=True)
class Head:
    """The dense heads of ``count`` events, the last of which is at the sums' time."""

    sums: Sums
    count: int

    def plus(self, other: Head, decay: np.ndarray) -> Head:
        """The head of both heads' events."""
        if not (self.count and other.count):
            return self if self.count else other
        return Head(self.sums.plus(other.sums, decay), self.count + other.count)


@dataclass(frozen=True)
class Latest:
    """The dense heads of ``count`` events at one time, whose means are left @ right.

    Args:
        time: microseconds.
        count: number of events.
        weight: [H, F]; this and the others are float64, or float32 if read from a store.
        left: [H, F, r].
        right: [H, r, d].

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving.states.dense import Latest
        >>> event = Latest(5, 1, np.ones((1, 4)), np.ones((1, 4, 1)), np.full((1, 1, 2), 3.0))
        >>> both = event.plus(event)
        >>> both.count, both.left.shape, both.head.sums.mean[0, 0].tolist()
        (2, (1, 4, 2), [3.0, 3.0])
    """

    time: int
    count: int
    weight: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @staticmethod
    def of(head: Head) -> Latest:
        """Convert a head whose events are all at its time."""
        sums, count = head.sums, head.count
        if count > _most_pairs(sums.mean.shape):
            whole = np.broadcast_to(
                np.eye(sums.mean.shape[-1]), (len(sums.mean), *sums.mean.shape[-1:] * 2)
            )
            return Latest(sums.time, count, sums.weight, sums.mean, whole)
        # the means' rank is at most the number of events
        basis = np.linalg.eigh(sums.mean.transpose(0, 2, 1) @ sums.mean)[1][..., -count:]
        return Latest(sums.time, count, sums.weight, sums.mean @ basis, basis.transpose(0, 2, 1))

    @property
    def head(self) -> Head:
        """The same events as a Head, with the means multiplied out."""
        mean = self.left.astype(np.float64) @ self.right
        return Head(Sums(self.time, self.weight, mean), self.count)

    @property
    def most(self) -> float:
        """An upper bound of the absolute value of these events' sums."""
        return _most(self.weight, self.left, self.right) * max(1, self.left.shape[2])

    def add_to(self, weight: np.ndarray, total: np.ndarray, time: int, decay: np.ndarray) -> None:
        """Add the sums at a later time to z [H, F] and S [H, F, d], float32."""
        mine = _aged(self.weight, time - self.time, decay).astype(np.float32)
        weight += mine
        total += (self.left * mine[..., None]) @ self.right

    def plus(self, other: Latest) -> Latest:
        """The events of both, which are at the same time."""
        if not (self.count and other.count):
            return self if self.count else other
        weight = self.weight + other.weight
        share = quotient(other.weight, weight)[..., None]
        left = np.concatenate([self.left * (1 - share), other.left * share], axis=2)
        right = np.concatenate([self.right, other.right], axis=1)
        return Latest(self.time, self.count + other.count, weight, left, right)


class DenseCodec:
    """Encodes a user's dense heads as bytes: those of the events at the last time, and those before.

    Args:
        layout: the version's layout.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.serving import StateLayout
        >>> from ifa_torchrec.serving.states.dense import DenseCodec, Latest
        >>> codec = DenseCodec(StateLayout(1, 4, 2, 0, (0.0,), ()))
        >>> latest = Latest(5, 1, np.ones((1, 4)), np.ones((1, 4, 1)), np.full((1, 1, 2), 3.0))
        >>> body = codec.pack(codec.no_head, latest)
        >>> before, found = codec.unpack(body)
        >>> before.count, found.time, found.right.tolist(), len(body) == codec.size(body)
        (0, 5, [[[3.0, 3.0]]], True)
    """

    def __init__(self, layout: StateLayout) -> None:
        self._dtype = np.dtype(layout.dtype)
        self._weights = (layout.num_heads, layout.feature_dim)
        self._means = (*self._weights, layout.head_dim)
        weight, mean = np.zeros(self._weights), np.zeros(self._means)
        self.no_head = Head(Sums(0, weight, mean), 0)
        self.no_latest = Latest(_NEVER, 0, weight, mean[..., :0], mean[:, :0])

    def pack(self, before: Head, latest: Latest, seed: np.random.Generator | None = None) -> bytes:
        """Encode both.

        Args:
            before: heads of the events before the last time, if any.
            latest: heads of the events at the last time.
            seed: round float16 stochastically, without bias; None rounds to nearest.

        Raises:
            StateError: a mean overflows float16, or a sum overflows float32.
        """
        # a request sees the sum of both
        check_sums(_most(before.sums.weight, before.sums.mean) + latest.most)
        rank = latest.left.shape[2]
        if rank > _most_pairs(self._means):
            rank, means = 0, [latest.left @ latest.right]
        else:
            means = [latest.left, latest.right]
        sizes = _SIZES.pack(before.sums.time, before.count, latest.time, latest.count, rank)
        parts = [before.sums.weight.astype(np.float32)] if before.count else []
        parts += [rounded(before.sums.mean, self._dtype, seed)] if before.count else []
        parts += [latest.weight.astype(np.float32)]
        parts += [rounded(mean, self._dtype, seed) for mean in means]
        return sizes + b"".join([part.tobytes() for part in parts])

    def unpack(self, body: bytes) -> tuple[Head, Latest]:
        """Decode what ``pack`` encoded, as float32; the body may be longer."""
        time, count, last, of_last, rank = _SIZES.unpack_from(body)
        place = _SIZES.size

        def numbers(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            nonlocal place
            found = np.frombuffer(body, dtype, math.prod(shape), place)
            place += found.nbytes
            return found.reshape(shape).astype(np.float32, copy=False)

        weight_type = np.dtype(np.float32)
        before = self.no_head
        if count:
            weight = numbers(self._weights, weight_type)
            before = Head(Sums(time, weight, numbers(self._means, self._dtype)), count)
        weight = numbers(self._weights, weight_type)
        heads, features, width = self._means
        if not rank:
            whole = Head(Sums(last, weight, numbers(self._means, self._dtype)), of_last)
            return before, Latest.of(whole)
        left = numbers((heads, features, rank), self._dtype)
        return before, Latest(last, of_last, weight, left, numbers((heads, rank, width), self._dtype))

    def size(self, body: bytes) -> int:
        """How many of a body's bytes ``pack`` made."""
        _, count, _, _, rank = _SIZES.unpack_from(body)
        heads, features, width = self._means
        whole = heads * features * width
        of_last = heads * rank * (features + width) if rank else whole
        weights = 4 * heads * features * (1 + (count > 0))
        return _SIZES.size + weights + (whole * (count > 0) + of_last) * self._dtype.itemsize


def _aged(weight: np.ndarray, time: int, decay: np.ndarray) -> np.ndarray:
    """Weights [H, F] some microseconds later, float64."""
    return weight * np.exp(-decay * (time / MICROSECONDS_PER_DAY))[:, None]


def _most(*factors: np.ndarray) -> float:
    """An upper bound of the absolute value of products with at most one number from each array."""
    return math.prod(float(np.abs(factor).max(initial=1)) for factor in factors)


def _most_pairs(shape: tuple[int, ...]) -> int:
    """The highest rank at which the two factors are smaller than their product, of shape [H, F, d]."""
    _, features, width = shape
    return (features * width - 1) // (features + width)
