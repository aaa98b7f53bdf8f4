"""The configuration of the interactions, with its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ifa_torchrec import ops
from ifa_torchrec.errors import ConfigError

FORGOTTEN = 2.0**-80
"""A sum of weights that is no larger counts as none: what is left of an event after 80 half-lives. Well
above what float32 can hold, so that a mean's gradient, 1 / sum of it, is finite."""
_SMALLEST, _LARGEST = 1e-12, 1e12
"""Of eps and mass_scale; beyond, float32 has infinities where there should be numbers."""
MOST_IDENTITY_KEYS = 2**36
"""Most identity keys K R; times 2^26 requests they still are int64."""


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """What all interactions of candidates with a history have in common.

    Args:
        embedding_dim: D, width of the tokens and of the output.
        num_heads: H, dense heads.
        head_dim: d, width of a head; None means embedding_dim / num_heads.
        half_lives: for each dense head, the age at which an event counts half, in the unit of
            the ages; math.inf for a head that never forgets. None means that no head does.
        interest_mass: give the model log(1 + matched / mass_scale) of each head, which the
            normalisation would take away. Our own addition.
        mass_scale: how much matching history makes the mass log 2; 1e-12 to 1e12.
        identity_features: names of the id features that get identity heads, one column of
            history_ids and candidate_ids each. Id 0 is "unknown" and matches nothing, itself
            neither. Our own addition.
        identity_buckets: R, buckets of an identity feature: an id falls into bucket id mod R,
            in training as in a cached state. A feature with at most R ids never collides.
            Nothing of that size is built: a state holds L (d + 1) floats for each bucket that an
            event of the user fell into (d: identity_head_dim). K R is at most 2^36. None means
            4,096, and in ``ifa train`` as many as the log's largest feature has ids.
        identity_half_lives: L half-lives; each identity feature has a head for each. None means one
            head that never forgets, and in ``ifa train`` infinity, 30 and 7 days.
        identity_head_dim: width of the mean values that an identity head has beside its mass; 0 for the
            mass alone, "how often?", which needs interest_mass; None for head_dim.
        gates: names of the event features (the kind of event: shown, clicked, bought) by whose value
            every head, the identity heads too, learns what an event weighs; each with the number of
            its values, of which 0 is "unknown". One column of history_gates each, in this order. Of
            IFA's dense heads; a peer has them in the identity heads alone. Our own addition.
        backend: one of ops.BACKENDS.

    Raises:
        ConfigError: a value is out of range; the message names it.

    Example:
        >>> from ifa_torchrec.modules import InteractionConfig
        >>> InteractionConfig(embedding_dim=64, num_heads=4).head_width
        16
    """

    # positional, and the others not, so that what a subclass adds comes fourth and not last
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
            f"embedding_dim {self.embedding_dim} is no multiple of num_heads {self.num_heads}; "
            "give head_dim",
        )
        check(
            self.head_dim is None or self.head_dim > 0, f"head_dim must be positive, got {self.head_dim}"
        )
        check(
            self.half_lives is None or len(self.half_lives) == self.num_heads,
            f"half_lives {self.half_lives} must be one for each of the {self.num_heads} heads",
        )
        for name in ("half_lives", "identity_half_lives"):
            values = getattr(self, name) or ()
            check(
                all(v >= 1e-30 for v in values),
                f"{name} must be positive, 1e-30 or more (math.inf: no decay), got {values}",
            )
        check(
            not isinstance(self.identity_features, str),
            f"identity_features must be a tuple of names, got {self.identity_features!r}",
        )
        check(
            len(self.identity_head_half_lives) > 0 or not self.identity_features,
            "identity_half_lives is empty; (math.inf,) means no decay",
        )
        check(
            self.identity_width >= 0,
            f"identity_head_dim must be 0 or more, got {self.identity_head_dim}",
        )
        check(
            self.interest_mass or self.identity_width > 0 or not self.identity_features,
            "identity heads of identity_head_dim 0 have their masses alone; set interest_mass, or give "
            "them a width",
        )
        self._check_scale("mass_scale")
        check(
            self.num_identity_buckets > 0,
            f"identity_buckets must be positive, got {self.identity_buckets}",
        )
        check(
            self.identity_key_range <= MOST_IDENTITY_KEYS,
            f"identity_buckets {self.num_identity_buckets} of {len(self.identity_features)} features "
            f"are {self.identity_key_range} keys; there can be 2^36",
        )
        for name, values in self.gates.items():
            check(isinstance(name, str) and name != "", f"gates: a name must be text, got {name!r}")
            check(
                type(values) is int and values > 0,
                f"gates: {name!r} must have a number of values, 1 or more, got {values!r}",
            )
        check(self.backend in ops.BACKENDS, f"backend {self.backend!r} is none of {list(ops.BACKENDS)}")

    @property
    def head_width(self) -> int:
        """d, the width of a head."""
        return self.head_dim or self.embedding_dim // self.num_heads

    @property
    def identity_width(self) -> int:
        """Width of an identity head's values; 0 for none."""
        return self.head_width if self.identity_head_dim is None else self.identity_head_dim

    @property
    def num_identity_buckets(self) -> int:
        """R."""
        return 4096 if self.identity_buckets is None else self.identity_buckets

    @property
    def identity_head_half_lives(self) -> tuple[float, ...]:
        """[L], of each identity feature's heads."""
        return (math.inf,) if self.identity_half_lives is None else self.identity_half_lives

    @property
    def num_identity_heads(self) -> int:
        """Identity heads in all: features times half-lives."""
        return len(self.identity_features) * len(self.identity_head_half_lives)

    @property
    def identity_key_range(self) -> int:
        """K R; a state's identity keys are below it. 0 without identity features."""
        return len(self.identity_features) * self.num_identity_buckets

    def _check(self, good: bool, message: str) -> None:
        if not good:
            raise ConfigError(f"{type(self).__name__}: {message}")

    def _check_scale(self, name: str) -> None:
        value = getattr(self, name)
        wanted = f"must be positive, {_SMALLEST} to {_LARGEST}"
        self._check(_SMALLEST <= value <= _LARGEST, f"{name} {wanted}, got {value}")


@dataclass(frozen=True)
class IFAConfig(InteractionConfig):
    """How IFA lets candidates meet a history: InteractionConfig's fields and these.

    Args:
        feature_map: phi of the dense heads: "elu", "relu" or "hedgehog"; the fourth positional.
        eps: keeps the division of the dense heads defined where nothing matched: it is added to
            what matched, in units of the features that the history holds in all, sum_f z_hf. So an
            old history answers as a young one does; 1e-12 to 1e12. Of the linear read-out alone.
        readout: how candidates read the user state, which is the same either way. "linear": by
            phi(q), the paper's linear attention. "softmax": they attend by softmax to its d_phi
            summaries, the means S_r / z_r, by likeness and by how much of the history each stands for.
            Our own addition.

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
            f"feature_map {self.feature_map!r} is none of {sorted(ops.FEATURE_MAPS)}",
        )
        self._check_scale("eps")
        self._check(
            self.readout in ("linear", "softmax"),
            f'readout {self.readout!r} is neither "linear" nor "softmax"',
        )

    @property
    def feature_width(self) -> int:
        """d_phi, the features that the feature map makes of a head's vector."""
        return self.head_width * ops.FEATURE_MAPS[self.feature_map].expansion


def at_least_one(name: str, value: int) -> int:
    """The value of a constructor's argument.

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
