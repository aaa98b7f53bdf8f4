"""The configuration of a DLRM_IFA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ifa_torchrec.batch import Scale
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import INTERACTIONS, CandidateSetConfig, IFAConfig, Task
from ifa_torchrec.modules.tasks import binary_tasks, check_tasks


@dataclass(frozen=True)
class DLRM_IFAConfig:
    """The configuration of a DLRM_IFA's dense part; the embedding collections define the tables.

    Args:
        item_features: names f of the item's id features, whose keys in the sequence features are
            ``history_f`` and ``candidate_f``, sharing one table; or a map from each name to its two
            keys, if these are named differently. The first is the item itself.
        dense_in_features: F, numbers per request.
        candidate_dense_in_features: Fc, numbers per candidate.
        item_dense_in_features: Fi, numbers per item.
        event_dense_in_features: Fe, numbers per event.
        event_features: names of the events' own id features, whose keys in the sequence features are
            ``history_NAME``; or a map from each name to its key.
        candidate_features: names of the candidates' own id features, with keys ``candidate_NAME``; or a
            map from each name to its key.
        item_vectors: width of each of the items' frozen vectors, by name, in the order of the batch's
            columns.
        scales: how the columns of ``dense_features``, ``candidate_dense``, ``item_dense`` and
            ``history_dense`` are standardised, one Scale per column; fields without scales are used as
            they are.
        interaction: how candidates attend to the history, a key of INTERACTIONS.
        ifa: IFAConfig, shared by all interactions; its identity_features are names of
            item_features, and its embedding_dim is D, the model's width; rows of tables of another width
            are projected to it.
        recent_length: the number of events that a candidate attends to, if not all: the latest for
            "softmax_recent" and "din", those found for "sim", "eta" and "twin".
        search_feature: the item feature that "sim" searches by; None for the last.
        candidate_set: CandidateSetConfig, whether and how candidates attend to each other.
        dense_arch_layer_sizes: hidden layers of the dense archs; a last one of width D is added.
        over_arch_layer_sizes: hidden layers of the over arch; a last one of width T is added.
        num_tasks: T.
        tasks: the T Tasks; () for binary ones called "label", or "label_0" and so on, of which the first
            ranks.
        dropout: probability of zeroing an input of the over arch in training, 0 to below 1.

    Raises:
        ConfigError: a name is unknown or used twice, a number is out of range, scales are not one per
            column, or the tasks cannot be trained or are not T; the message names the field.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> config = DLRM_IFAConfig(item_features={"item": ("hist_iid", "cand_iid")},
        ...     event_features=("action",), ifa=IFAConfig(embedding_dim=8))
        >>> config.history_keys, config.candidate_keys
        ({'item': 'hist_iid', 'action': 'history_action'}, {'item': 'cand_iid'})
    """

    item_features: tuple[str, ...] | dict[str, tuple[str, str]]
    dense_in_features: int = 0
    candidate_dense_in_features: int = 0
    interaction: str = "ifa"
    ifa: IFAConfig = field(default_factory=lambda: IFAConfig(embedding_dim=32))
    recent_length: int = 50
    search_feature: str | None = None
    candidate_set: CandidateSetConfig = field(default_factory=CandidateSetConfig)
    dense_arch_layer_sizes: tuple[int, ...] = (32,)
    over_arch_layer_sizes: tuple[int, ...] = (64, 32)
    num_tasks: int = 1
    item_dense_in_features: int = field(default=0, kw_only=True)
    event_dense_in_features: int = field(default=0, kw_only=True)
    event_features: tuple[str, ...] | dict[str, str] = field(default=(), kw_only=True)
    candidate_features: tuple[str, ...] | dict[str, str] = field(default=(), kw_only=True)
    item_vectors: dict[str, int] = field(default_factory=dict, kw_only=True)
    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict, kw_only=True)
    tasks: tuple[Task, ...] = field(default=(), kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.interaction not in INTERACTIONS:
            raise ConfigError(
                f"DLRM_IFAConfig: interaction must be one of {list(INTERACTIONS)}, got "
                f"{self.interaction!r}"
            )
        self._check_keys()
        self._check_names()
        self._check_numbers()
        object.__setattr__(self, "tasks", tuple(self.tasks) or binary_tasks(self.num_tasks))
        check_tasks(self.tasks)
        if len(self.tasks) != self.num_tasks:
            names = [task.name for task in self.tasks]
            raise ConfigError(
                f"DLRM_IFAConfig: num_tasks is {self.num_tasks}, but the tasks are {names}; set "
                f"num_tasks={len(names)}"
            )

    @property
    def item_names(self) -> tuple[str, ...]:
        """Names of the item features, the item itself first."""
        return tuple(self.item_features)

    @property
    def history_keys(self) -> dict[str, str]:
        """Key of each feature of an event, its item's and its own; empty if no history is looked up."""
        if self.interaction == "none":
            return {}
        return self._item_keys(0) | _keys("event_features", self.event_features)

    @property
    def candidate_keys(self) -> dict[str, str]:
        """Key of each feature of a candidate, its item's and its own."""
        return self._item_keys(1) | _keys("candidate_features", self.candidate_features)

    @property
    def gates(self) -> tuple[str, ...]:
        """The event features that gate the interaction's heads, in the order of their columns."""
        return tuple(self.ifa.gates)

    @property
    def vector_columns(self) -> int:
        """V, total columns of an item's frozen vectors."""
        return sum(self.item_vectors.values())

    def columns(self, field_name: str) -> int:
        """Number of columns of a field of RankingFeatures: "dense_features", "candidate_dense",
        "item_dense" or "history_dense"."""
        return getattr(self, _COLUMNS[field_name])

    def scales_of(self, field_name: str) -> tuple[Scale, ...]:
        """The Scale of each column of the field."""
        return self.scales.get(field_name) or (Scale(),) * self.columns(field_name)

    def _item_keys(self, side: int) -> dict[str, str]:
        given = self.item_features
        if isinstance(given, dict):
            return {name: keys[side] for name, keys in given.items()}
        return {name: ("history_", "candidate_")[side] + name for name in given}

    def _check_names(self) -> None:
        searched = () if self.search_feature is None else (self.search_feature,)
        items, events = self.item_names, list(_keys("event_features", self.event_features))
        for name, given, known, where in (
            ("search_feature", searched, items, "item_features"),
            ("identity_features", self.ifa.identity_features, items, "item_features"),
            ("gates", self.gates, events, "event_features"),
        ):
            if unknown := set(given) - set(known):
                raise ConfigError(
                    f"DLRM_IFAConfig: {name} {sorted(unknown)} must be among the {where} {list(known)}"
                )

    def _check_numbers(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"DLRM_IFAConfig: dropout must be at least 0 and below 1, got {self.dropout}"
            )
        numbers = {f"item_vectors[{name!r}]": width for name, width in self.item_vectors.items()}
        numbers |= {"num_tasks": self.num_tasks, "recent_length": self.recent_length}
        least = dict.fromkeys(numbers, 1) | dict.fromkeys(_COLUMNS.values(), 0)
        for name, bound in least.items():
            value: Any = numbers[name] if name in numbers else getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ConfigError(f"DLRM_IFAConfig: {name} must be {bound} or more, got {value!r}")
        for name in ("dense_arch_layer_sizes", "over_arch_layer_sizes"):
            sizes: Any = getattr(self, name)
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise ConfigError(f"DLRM_IFAConfig: {name} must be positive sizes, got {sizes!r}")
        for name, scales in self.scales.items():
            if name not in _COLUMNS:
                raise ConfigError(
                    f"DLRM_IFAConfig: scales are for the fields {list(_COLUMNS)}, got {name!r}"
                )
            if len(scales) != self.columns(name):
                raise ConfigError(
                    f"DLRM_IFAConfig: {name} has {len(scales)} scales, but {_COLUMNS[name]} is "
                    f"{self.columns(name)}; give one per column"
                )

    def _check_keys(self) -> None:
        if isinstance(self.item_features, str) or not self.item_features:
            raise ConfigError(
                "DLRM_IFAConfig: item_features must be a tuple of names, or map them to their two keys, "
                f"and include at least the item's own id; got {self.item_features!r}"
            )
        pairs = self.item_features.values() if isinstance(self.item_features, dict) else ()
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ConfigError(
                    "DLRM_IFAConfig: item_features must map each name to a pair of keys, of history and "
                    f"candidates, got {pair!r}"
                )
        keys = [*self._item_keys(0).values(), *self._item_keys(1).values()]
        keys += _keys("event_features", self.event_features).values()
        keys += _keys("candidate_features", self.candidate_features).values()
        _once("the key", keys)
        _once("the name", (*self.item_features, *self.event_features, *self.candidate_features))


_COLUMNS = {
    "dense_features": "dense_in_features",
    "candidate_dense": "candidate_dense_in_features",
    "item_dense": "item_dense_in_features",
    "history_dense": "event_dense_in_features",
}
"""The fields of RankingFeatures that contain numbers, and the fields here that count their columns."""
_PREFIXES = {"event_features": "history_", "candidate_features": "candidate_"}


def _keys(where: str, given: tuple[str, ...] | dict[str, str]) -> dict[str, str]:
    if isinstance(given, str):
        raise ConfigError(f"DLRM_IFAConfig: {where} must be a tuple of names, got {given!r}")
    return given if isinstance(given, dict) else {name: _PREFIXES[where] + name for name in given}


def _once(what: str, names: Iterable[Any]) -> None:
    seen = set[str]()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise ConfigError(f"DLRM_IFAConfig: {what} {name!r} is given twice, or is not a string")
        seen.add(name)
