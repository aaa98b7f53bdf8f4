"""RankingFeatures, the inputs of a model, and RankingBatch, which adds labels and exposure."""

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
    """How a column of numbers is standardised: (x - mean) / deviation, after log(1 + x) if ``log``.

    Args:
        mean, deviation: statistics of the column in the training split, after the logarithm.
        log: take log(1 + x) first.

    Raises:
        ConfigError: mean or deviation is not finite, or the deviation is not positive.

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
                f"Scale: mean and deviation must be finite and the deviation above 0, got mean "
                f"{self.mean} and deviation {self.deviation}"
            )


@dataclass(eq=False)
class RankingFeatures(Pipelineable):
    """B ranking requests with M candidates and N history events in all.

    The batch is organised by request: each history is stored once, however many candidates its
    request has.

    Numbers are raw, with NaN for a missing one; the model standardises them. Item features other than
    ids are stored once for each of the U distinct items of the batch; events and candidates refer to
    them by row.

    Args:
        dense_features: [B, F] float, numbers that describe the request.
        context_features: KJT of stride B, ids that describe the request, any number per feature;
            pooled.
        sequence_features: KJT of stride B; its keys are the history features (N values each, ids of
            the events' items and of the events themselves) and the candidate features (M values each,
            ids of the candidates' items and of the candidates themselves). All history features have
            the same lengths, and so do all candidate features. It has no weights.
        candidate_dense: [M, Fc] float, numbers that describe a candidate.
        history_age: [N] float >= 0, age of each event at the time of the request, in the unit
            of the model's half-lives (days, if the batch comes from the loader).
        history_weight: [N] float >= 0, event weights a_i; None for 1.
        history_dense: [N, Fe] float, numbers that describe an event; None if there are none.
        item_lists: KJT of stride U >= 1, any number of ids per item and feature; pooled. This field and
            those that follow are None if the model's items have no features of that kind.
        item_dense: [U, Fi] float, numbers that describe an item.
        item_vectors: [U, V] float, the frozen vectors of an item, concatenated.
        history_items: [N] int64, row of each event's item among the U items.
        candidate_items: [M] int64, row of each candidate's item among the U items.
        history_item_ids: [N] int64, numbers that identify the events' items, for the identity heads to
            compare. Unlike table rows they also distinguish new items, which all have row 0, "unknown".
            None to compare the table rows.
        candidate_item_ids: [M] int64, the same for the candidates.

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
        """Names and values of the fields that are set: tensors and KJTs, which share those methods."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return [(name, value) for name, value in fields if value is not None]


@dataclass(eq=False)
class RankingBatch(RankingFeatures):
    """RankingFeatures with labels and exposure: what the loader yields and DLRM_IFATrain takes.

    Args:
        labels: [M, T] float, one column per task: 0 or 1, or the raw number of a regression task.
        exposed: [M] bool, whether the user was shown the candidate; CandidateSetLoss can treat
            exposed and unexposed candidates differently.
        exposed_rows: [E] int64, the rows of the exposed candidates, in order; the loader provides them.
            Their number is then known without reading ``exposed``, which on a GPU waits for the
            device. If None, they are computed where they are needed.

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
