"""The registry of interactions: add a new one here to make it available to models and commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.config import IFAConfig
from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.peers import (
    DINAttention,
    ETAAttention,
    HSTUAttention,
    LowRankAttention,
    MeanPooling,
    SDIMAttention,
    SIMAttention,
    SOLARAttention,
    TWINAttention,
)
from ifa_torchrec.modules.softmax import SoftmaxAttention

INTERACTIONS: dict[str, Callable[[IFAConfig, int, str | None], SequenceInteraction | None]] = {
    "ifa": lambda config, *_: InteractionFidelityAttention(config),
    "none": lambda *_: None,
    "mean": lambda config, *_: MeanPooling(config),
    "softmax": lambda config, *_: SoftmaxAttention(config),
    "softmax_recent": lambda config, recent, _: SoftmaxAttention(config, recent),
    "din": lambda config, recent, _: DINAttention(config, recent),
    "sim": lambda config, found, feature: SIMAttention(config, feature, found),
    "eta": lambda config, found, _: ETAAttention(config, found),
    "twin": lambda config, found, _: TWINAttention(config, found),
    "sdim": lambda config, *_: SDIMAttention(config),
    "low_rank": lambda config, *_: LowRankAttention(config),
    "solar": lambda config, *_: SOLARAttention(config),
    "hstu": lambda config, *_: HSTUAttention(config),
}
"""Constructors by name. Arguments: the shared configuration, the number of events that a candidate
attends to (if not all), and the id feature to search by."""

if TYPE_CHECKING:
    InteractionName = str
else:
    InteractionName = Literal[tuple(INTERACTIONS)]
    """The names as a type, from which a command line lists the choices."""
