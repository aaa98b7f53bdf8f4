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
    """The dense part of a DLRM_IFA; the tables come with the embedding collections.

    Args:
        item_features: names f of the item's id features, whose keys in the sequence features are
            ``history_f`` and ``candidate_f``, sharing one table; or a map from each name to its two
            keys, where they are called otherwise. The first is the item itself.
        dense_in_features: F, numbers a request.
        candidate_dense_in_features: Fc, numbers a candidate.
        item_dense_in_features: Fi, numbers an item.
        event_dense_in_features: Fe, numbers an event.
        event_features: names of the events' own id features, whose keys in the sequence features are
            ``history_NAME``; or a map from each name to its key.
        candidate_features: of the candidates' own, ``candidate_NAME``; likewise.
        item_vectors: names of the items' frozen vectors, in the order of the batch's columns, each with
            its width.
        scales: how the columns of ``dense_features``, ``candidate_dense``, ``item_dense`` and
            ``history_dense`` are standardised, a Scale a column; a name that is not there is taken as it
            is.
        interaction: how candidates meet the history, a key of INTERACTIONS.
        ifa: IFAConfig, shared by all interactions; its identity_features are names of
            item_features, and its embedding_dim is that of the tables.
        recent_length: events that a candidate attends to, where not to all: of "softmax_recent" and
            "din" the latest, of "sim", "eta" and "twin" those found.
        search_feature: the item feature that "sim" searches by; None for the last.
        candidate_set: CandidateSetConfig, whether and how candidates see each other.
        dense_arch_layer_sizes: hidden layers of both dense archs; a last one of width D is added.
        over_arch_layer_sizes: hidden layers of the over arch; a last one of width T is added.
        num_tasks: T.
        tasks: the T Tasks; () for binary ones called "label", or "label_0" and so on, of which the first
            ranks.
        dropout: share of the over arch's inputs that are 0 in a step of the training, 0 to 1.

    Raises:
        ConfigError: a name is unknown or used twice, a number is out of range, scales are not one a
            column, or the tasks are not T that a model can be trained on; the message names the field.

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
                f"DLRM_IFAConfig: interaction {self.interaction!r} is none of {list(INTERACTIONS)}"
            )
        self._check_keys()
        self._check_names()
        self._check_numbers()
        object.__setattr__(self, "tasks", tuple(self.tasks) or binary_tasks(self.num_tasks))
        check_tasks(self.tasks)
        if len(self.tasks) != self.num_tasks:
            names = [task.name for task in self.tasks]
            raise ConfigError(
                f"DLRM_IFAConfig: num_tasks is {self.num_tasks}, but the tasks are {names}; give "
                f"num_tasks={len(names)}"
            )

    @property
    def item_names(self) -> tuple[str, ...]:
        """Names of the item features, the item itself first."""
        return tuple(self.item_features)

    @property
    def history_keys(self) -> dict[str, str]:
        """Key of each feature of an event: of its item's and of its own. None where no history is looked
        up."""
        if self.interaction == "none":
            return {}
        return self._item_keys(0) | _keys("event_features", self.event_features)

    @property
    def candidate_keys(self) -> dict[str, str]:
        """Key of each feature of a candidate: of its item's and of its own."""
        return self._item_keys(1) | _keys("candidate_features", self.candidate_features)

    @property
    def gates(self) -> tuple[str, ...]:
        """The event features that gate the interaction's heads, in the order of their columns."""
        return tuple(self.ifa.gates)

    @property
    def vector_columns(self) -> int:
        """V, columns of all frozen vectors of an item together."""
        return sum(self.item_vectors.values())

    def columns(self, field_name: str) -> int:
        """Numbers of a RankingFeatures' field: "dense_features", "candidate_dense", "item_dense" or
        "history_dense"."""
        return getattr(self, _COLUMNS[field_name])

    def scales_of(self, field_name: str) -> tuple[Scale, ...]:
        """A Scale for each of these columns."""
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
                    f"DLRM_IFAConfig: {name} {sorted(unknown)} are no {where}; there are {list(known)}"
                )

    def _check_numbers(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"DLRM_IFAConfig: dropout must be 0 to below 1, got {self.dropout}")
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
                raise ConfigError(f"DLRM_IFAConfig: scales of {name!r}; there are {list(_COLUMNS)}")
            if len(scales) != self.columns(name):
                raise ConfigError(
                    f"DLRM_IFAConfig: {len(scales)} scales of {name}, but {_COLUMNS[name]} is "
                    f"{self.columns(name)}; give one a column"
                )

    def _check_keys(self) -> None:
        if isinstance(self.item_features, str) or not self.item_features:
            raise ConfigError(
                "DLRM_IFAConfig: item_features must be a tuple of names, or map them to their two keys; "
                f"the item's own id at least; got {self.item_features!r}"
            )
        pairs = self.item_features.values() if isinstance(self.item_features, dict) else ()
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ConfigError(
                    "DLRM_IFAConfig: item_features must map each name to the keys of history and "
                    f"candidates, a pair, got {pair!r}"
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
"""The fields of RankingFeatures that hold numbers, and those here that count them."""
_PREFIXES = {"event_features": "history_", "candidate_features": "candidate_"}


def _keys(where: str, given: tuple[str, ...] | dict[str, str]) -> dict[str, str]:
    if isinstance(given, str):
        raise ConfigError(f"DLRM_IFAConfig: {where} must be a tuple of names, got {given!r}")
    return given if isinstance(given, dict) else {name: _PREFIXES[where] + name for name in given}


def _once(what: str, names: Iterable[Any]) -> None:
    seen = set[str]()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise ConfigError(f"DLRM_IFAConfig: {what} {name!r} is given twice, or is no string")
        seen.add(name)
