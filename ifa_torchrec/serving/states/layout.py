""""""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from ifa_torchrec.modules import InteractionFidelityAttention
from ifa_torchrec.serving.errors import StateError

_Place = TypeVar("_Place")


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
