"""RankingFeatures, what a model scores, and RankingBatch, which adds what it learns from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable
from typing_extensions import Self

from ifa_torchrec.errors import ConfigError


@dataclass(frozen=True)
class Scale:
    """How a column of numbers is standardised: (x - mean) / deviation, of log(1 + x) where it says so.

    Args:
        mean, deviation: of the training split's numbers, after the logarithm.
        log: take log(1 + x) first.

    Raises:
        ConfigError: a figure is not finite, or the deviation is not positive.

    Example:
        >>> from ifa_torchrec.batch import Scale
        >>> Scale(mean=10.0, deviation=2.0).log
        False
    """

    mean: float = 0.0
    deviation: float = 1.0
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise ConfigError(
                f"Scale: mean {self.mean} and deviation {self.deviation} must be finite, the deviation "
                "above 0"
            )


@dataclass
class RankingFeatures(Pipelineable):
    """B ranking requests with M candidates and N history events in all.

    The request is the unit: a history stands once in the batch, however many candidates its
    request has.

    Numbers are as they were found, and NaN where one is missing; the model standardises them. What
    describes an item beyond its ids stands once for each of the U distinct items of the batch, and
    events and candidates name their item's row.

    Args:
        dense_features: [B, F] float, numbers that describe the request.
        context_features: KJT of stride B, ids that describe the request, any number of a feature;
            pooled.
        sequence_features: KJT of stride B; its keys are the history features (N values each: of the
            events' items and of the events themselves) and the candidate features (M values each: of
            the candidates' items and of the candidates themselves). All history features have the
            same lengths, and so have all candidate features. It has no weights.
        candidate_dense: [M, Fc] float, numbers that describe a candidate.
        history_age: [N] float >= 0, age of each event when the request was made, in the unit
            of the model's half-lives (the loader's is days).
        history_weight: [N] float >= 0, event weights a_i; None for 1.
        history_dense: [N, Fe] float, numbers that describe an event; None without any.
        item_lists: KJT of stride U >= 1, several ids of an item a feature; pooled. None, as the fields
            that follow, where the model's items have nothing of the kind.
        item_dense: [U, Fi] float, numbers that describe an item.
        item_vectors: [U, V] float, frozen vectors of an item, one kind after the other.
        history_items: [N] int64, which of the U items each event is of.
        candidate_items: [M] int64, which of the U items each candidate is.
        history_item_ids: [N] int64, the events' items by numbers that tell them apart also where the
            table has row 0 for them, "unknown", since they are new; what identity heads compare. None
            where the table's rows do.
        candidate_item_ids: [M] int64, likewise of the candidates.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from ifa_torchrec.batch import RankingFeatures
        >>> features = RankingFeatures(
        ...     dense_features=torch.zeros(1, 0),
        ...     context_features=KeyedJaggedTensor.empty(),
        ...     sequence_features=KeyedJaggedTensor.from_lengths_sync(
        ...         keys=["history_item", "candidate_item"],
        ...         values=torch.tensor([5, 6, 7, 8]), lengths=torch.tensor([3, 1])),
        ...     candidate_dense=torch.zeros(1, 0),
        ...     history_age=torch.tensor([3.0, 2.0, 0.5]))
        >>> features.num_requests
        1
    """

    dense_features: torch.Tensor
    context_features: KeyedJaggedTensor
    sequence_features: KeyedJaggedTensor
    candidate_dense: torch.Tensor
    history_age: torch.Tensor
    history_weight: torch.Tensor | None = field(default=None, kw_only=True)
    history_dense: torch.Tensor | None = field(default=None, kw_only=True)
    item_lists: KeyedJaggedTensor | None = field(default=None, kw_only=True)
    item_dense: torch.Tensor | None = field(default=None, kw_only=True)
    item_vectors: torch.Tensor | None = field(default=None, kw_only=True)
    history_items: torch.Tensor | None = field(default=None, kw_only=True)
    candidate_items: torch.Tensor | None = field(default=None, kw_only=True)
    history_item_ids: torch.Tensor | None = field(default=None, kw_only=True)
    candidate_item_ids: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def num_requests(self) -> int:
        """B, the number of requests."""
        return self.dense_features.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """A copy of the batch on ``device``."""
        return type(self)(
            **{
                name: value.to(device=device, non_blocking=non_blocking)
                for name, value in self._fields()
            }
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the batch's memory."""
        for _, value in self._fields():
            value.record_stream(stream)

    def pin_memory(self) -> Self:
        """A copy of the batch in page-locked memory."""
        return type(self)(**{name: value.pin_memory() for name, value in self._fields()})

    def _fields(self) -> list[tuple[str, Any]]:
        """Names and values that are there: tensors and KJTs, which have the methods above in common."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [(name, value) for name, value in fields if value is not None]


@dataclass
class RankingBatch(RankingFeatures):
    """RankingFeatures with what happened: what the loader gives and DLRM_IFATrain takes.

    Args:
        labels: [M, T] float, one column a task: 0 or 1, or the number of a regression task as it was
            found.
        exposed: [M] bool, whether the user was shown the candidate; CandidateSetLoss can tell the
            two apart.
        exposed_rows: [E] int64, the rows of those that were, in order, which the loader gives: so their
            number is known without a look at ``exposed``, which on a GPU waits for the device. None,
            and they are found where they are needed.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from ifa_torchrec import RankingBatch
        >>> batch = RankingBatch(
        ...     dense_features=torch.zeros(2, 1),
        ...     context_features=KeyedJaggedTensor.from_lengths_sync(
        ...         keys=["store"], values=torch.tensor([4, 7]), lengths=torch.tensor([1, 1])),
        ...     sequence_features=KeyedJaggedTensor.from_lengths_sync(
        ...         keys=["history_item", "candidate_item"],
        ...         values=torch.tensor([5, 6, 7, 5, 8, 9]),
        ...         lengths=torch.tensor([3, 0, 1, 2])),
        ...     candidate_dense=torch.zeros(3, 1),
        ...     history_age=torch.tensor([3.0, 2.0, 0.5]),
        ...     labels=torch.tensor([[1.0], [0.0], [1.0]]),
        ...     exposed=torch.tensor([True, True, False]),
        ... )
        >>> batch.to(torch.device("cpu")).num_requests
        2
    """

    labels: torch.Tensor
    exposed: torch.Tensor
    exposed_rows: torch.Tensor | None = field(default=None, kw_only=True)
