"""The configuration of a DLRM_IFA."""

from __future__ import annotations

from dataclasses import dataclass, field

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

    Raises:
        ConfigError: a name is unknown, or the tasks are not T that a model can be trained on.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> DLRM_IFAConfig(item_features=("item",), ifa=IFAConfig(embedding_dim=8)).interaction
        'ifa'
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

    def __post_init__(self) -> None:
        if self.interaction not in INTERACTIONS:
            raise ConfigError(
                f"DLRM_IFAConfig: interaction {self.interaction!r} is none of {list(INTERACTIONS)}"
            )
        if self.search_feature not in (None, *self.item_features):
            raise ConfigError(
                f"DLRM_IFAConfig: search_feature {self.search_feature!r} is none of item_features "
                f"{list(self.item_features)}"
            )
        unknown = set(self.ifa.identity_features) - set(self.item_features)
        if unknown:
            raise ConfigError(
                f"DLRM_IFAConfig: identity_features {sorted(unknown)} are no item_features; "
                f"there are {list(self.item_features)}"
            )
        object.__setattr__(self, "tasks", tuple(self.tasks) or binary_tasks(self.num_tasks))
        check_tasks(self.tasks)
        if len(self.tasks) != self.num_tasks:
            names = [task.name for task in self.tasks]
            raise ConfigError(
                f"DLRM_IFAConfig: num_tasks is {self.num_tasks}, but the tasks are {names}; give "
                f"num_tasks={len(names)}"
            )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What stands before an item feature's name in the sequence features that are looked up."""
        return ("candidate_",) if self.interaction == "none" else ("history_", "candidate_")
