"""The configuration of the interactions and its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ifa_torchrec import ops
from ifa_torchrec.errors import ConfigError

FORGOTTEN = 2.0**-80
"""A sum of weights up to this, the remainder of one event after 80 half-lives, counts as 0. Well above
the smallest float32, so that the gradient of a mean, 1 / sum, is finite."""
_SMALLEST, _LARGEST = 1e-12, 1e12
"""Bounds of eps and mass_scale; beyond them float32 overflows."""
MOST_IDENTITY_KEYS = 2**36
"""Largest number of identity keys K R; multiplied by 2^26 requests they still fit into int64."""


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """The configuration that all interactions of candidates with a history share.

    Args:
        embedding_dim: D, width of the tokens and of the output.
        num_heads: H, dense heads.
        head_dim: d, width of a head; None means embedding_dim / num_heads.
        half_lives: for each dense head, the age at which an event counts half, in the unit of
            the ages; math.inf for a head without decay. None: no head decays.
        interest_mass: also output the mass log(1 + matched / mass_scale) of each head, which the
            normalisation removes. Our own addition.
        mass_scale: the amount of matching history for which the mass is log 2; 1e-12 to 1e12.
        identity_features: names of the id features that get identity heads, one column of
            history_ids and candidate_ids each. Id 0 is "unknown" and matches nothing, not even
            itself. Our own addition.
        identity_buckets: R, buckets per identity feature: an id falls into bucket id mod R, both in
            training and in a cached state. A feature with at most R ids never collides.
            Nothing of that size is allocated: a state has L (d + 1) floats for each bucket that an
            event of the user fell into (d: identity_head_dim). K R is at most 2^36. None means
            4,096, and in ``ifa train`` the number of ids of the log's largest feature.
        identity_half_lives: L half-lives; each identity feature has one head per half-life. None means
            one head without decay, and in ``ifa train`` infinity, 30 and 7 days.
        identity_head_dim: width of the mean values that an identity head returns besides its mass; 0
            for only the mass ("how often?"), which requires interest_mass; None for head_dim.
        gates: the event features (such as the kind of event: shown, clicked, bought) whose values
            determine a learnt event weight in every head, identity heads included; a map from each name
            to the number of its values, of which 0 is "unknown". One column of history_gates each, in
            this order. IFA has gates in its dense heads too, a peer only in its identity heads. Our own
            addition.
        backend: one of ops.BACKENDS.

    Raises:
        ConfigError: a value is out of range; the message names it.

    Example:
        >>> from ifa_torchrec.modules import InteractionConfig
        >>> InteractionConfig(embedding_dim=64, num_heads=4).head_width
        16
    """

    # only these three are positional, so that the next positional field is the subclass's first
    embedding_dim: int = field(kw_only=False)
    num_heads: int = field(default=4, kw_only=False)
    head_dim: int | None = field(default=None, kw_only=False)
    half_lives: tuple[float, ...] | None = None
    interest_mass: bool = True
    mass_scale: float = 1.0
    identity_features: tuple[str, ...] = ()
    identity_buckets: int | None = None
    identity_half_lives: tuple[float, ...] | None = None
    identity_head_dim: int | None = None
    gates: dict[str, int] = field(default_factory=dict[str, int], hash=False)
    backend: ops.Backend = "auto"

    def __post_init__(self) -> None:
        check = self._check
        check(self.embedding_dim > 0, f"embedding_dim must be positive, got {self.embedding_dim}")
        check(self.num_heads > 0, f"num_heads must be positive, got {self.num_heads}")
        check(
            self.head_dim is not None or self.embedding_dim % self.num_heads == 0,
            f"embedding_dim {self.embedding_dim} is not a multiple of num_heads {self.num_heads}; "
            "set head_dim",
        )
        check(
            self.head_dim is None or self.head_dim > 0, f"head_dim must be positive, got {self.head_dim}"
        )
        check(
            self.half_lives is None or len(self.half_lives) == self.num_heads,
            f"half_lives must have one value for each of the {self.num_heads} heads, got "
            f"{self.half_lives}",
        )
        for name in ("half_lives", "identity_half_lives"):
            values = getattr(self, name) or ()
            check(
                all(v >= 1e-30 for v in values),
                f"{name} must be at least 1e-30 (math.inf: no decay), got {values}",
            )
        check(
            not isinstance(self.identity_features, str),
            f"identity_features must be a tuple of names, got {self.identity_features!r}",
        )
        check(
            len(self.identity_head_half_lives) > 0 or not self.identity_features,
            "identity_half_lives is empty; use (math.inf,) for no decay",
        )
        check(
            self.identity_width >= 0,
            f"identity_head_dim must be 0 or more, got {self.identity_head_dim}",
        )
        check(
            self.interest_mass or self.identity_width > 0 or not self.identity_features,
            "identity heads with identity_head_dim 0 have only masses; set interest_mass, or an "
            "identity_head_dim above 0",
        )
        self._check_scale("mass_scale")
        check(
            self.num_identity_buckets > 0,
            f"identity_buckets must be positive, got {self.identity_buckets}",
        )
        check(
            self.identity_key_range <= MOST_IDENTITY_KEYS,
            f"identity_buckets {self.num_identity_buckets} for {len(self.identity_features)} features "
            f"are {self.identity_key_range} keys; there can be at most 2^36",
        )
        self._check_gates()
        check(
            self.backend in ops.BACKENDS,
            f"backend must be one of {list(ops.BACKENDS)}, got {self.backend!r}",
        )

    @property
    def head_width(self) -> int:
        """d, the width of a head."""
        return self.head_dim or self.embedding_dim // self.num_heads

    @property
    def identity_width(self) -> int:
        """Width of an identity head's values; 0 if it has none."""
        return self.head_width if self.identity_head_dim is None else self.identity_head_dim

    @property
    def num_identity_buckets(self) -> int:
        """R, buckets per identity feature."""
        return 4096 if self.identity_buckets is None else self.identity_buckets

    @property
    def identity_head_half_lives(self) -> tuple[float, ...]:
        """The half-lives of each identity feature's heads, [L]."""
        return (math.inf,) if self.identity_half_lives is None else self.identity_half_lives

    @property
    def num_identity_heads(self) -> int:
        """Total number of identity heads: features times half-lives."""
        return len(self.identity_features) * len(self.identity_head_half_lives)

    @property
    def identity_key_range(self) -> int:
        """K R, the exclusive bound of a state's identity keys; 0 without identity features."""
        return len(self.identity_features) * self.num_identity_buckets

    def _check(self, good: bool, message: str) -> None:
        if not good:
            raise ConfigError(f"{type(self).__name__}: {message}")

    def _check_gates(self) -> None:
        for name, values in self.gates.items():
            self._check(
                isinstance(name, str) and name != "",
                f"gates: a name must be a non-empty string, got {name!r}",
            )
            self._check(
                type(values) is int and values > 0,
                f"gates: the number of values of {name!r} must be 1 or more, got {values!r}",
            )

    def _check_scale(self, name: str) -> None:
        value = getattr(self, name)
        message = f"{name} must be {_SMALLEST} to {_LARGEST}, got {value}"
        self._check(_SMALLEST <= value <= _LARGEST, message)


@dataclass(frozen=True)
class IFAConfig(InteractionConfig):
    """The configuration of IFA: InteractionConfig's fields and these.

    Args:
        feature_map: phi of the dense heads: "elu", "relu" or "hedgehog"; the fourth positional argument.
        eps: keeps the division of the dense heads defined if nothing matches: eps sum_f z_hf, a share of
            all features of the history, is added to what matched. So an old history gives the same
            output as a young one. 1e-12 to 1e12. Only for the linear read-out.
        readout: how candidates read the user state, which is the same for both. "linear": by phi(q), the
            paper's linear attention. "softmax": by softmax attention to the state's d_phi summaries, the
            means S_r / z_r, according to similarity and to the share of the history that each
            represents. Our own addition.

    Raises:
        ConfigError: a value is out of range; the message names it.

    Example:
        >>> from ifa_torchrec import IFAConfig
        >>> IFAConfig(embedding_dim=64, num_heads=4, feature_map="hedgehog").feature_width
        32
    """

    feature_map: Literal["elu", "relu", "hedgehog"] = "elu"
    eps: float = field(default=1e-6, kw_only=True)
    readout: Literal["linear", "softmax"] = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            self.feature_map in ops.FEATURE_MAPS,
            f"feature_map must be one of {sorted(ops.FEATURE_MAPS)}, got {self.feature_map!r}",
        )
        self._check_scale("eps")
        self._check(
            self.readout in ("linear", "softmax"),
            f'readout must be "linear" or "softmax", got {self.readout!r}',
        )

    @property
    def feature_width(self) -> int:
        """d_phi, the number of features of the feature map for one head."""
        return self.head_width * ops.FEATURE_MAPS[self.feature_map].expansion


def at_least_one(name: str, value: int) -> int:
    """Check a constructor's argument and return it.

    Raises:
        ValueError: it is less than 1; the message names it.

    Example:
        >>> from ifa_torchrec.modules.config import at_least_one
        >>> at_least_one("rank", 32)
        32
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
