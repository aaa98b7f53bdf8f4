"""RankingFeatures, what a model scores, and RankingBatch, which adds what it learns from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable
from typing_extensions import Self


@dataclass
class RankingFeatures(Pipelineable):
    """B ranking requests with M candidates and N history events in all.

    The request is the unit: a history stands once in the batch, however many candidates its
    request has.

    Args:
        dense_features: [B, F] float, numbers that describe the request.
        context_features: KJT of stride B, ids that describe the request; pooled.
        sequence_features: KJT of stride B; its keys are the history features (N values each)
            and the candidate features (M values each). All history features have the same
            lengths, and so have all candidate features. It has no weights.
        candidate_dense: [M, Fc] float, numbers that describe a candidate.
        history_age: [N] float >= 0, age of each event when the request was made, in the unit
            of the model's half-lives (the loader's is days).

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

    @property
    def num_requests(self) -> int:
        """B, the number of requests."""
        return self.dense_features.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """A copy of the batch on ``device``."""
        return type(self)(
            **{
                name: field.to(device=device, non_blocking=non_blocking)
                for name, field in self._fields()
            }
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the batch's memory."""
        for _, field in self._fields():
            field.record_stream(stream)

    def pin_memory(self) -> Self:
        """A copy of the batch in page-locked memory."""
        return type(self)(**{name: field.pin_memory() for name, field in self._fields()})

    def _fields(self) -> list[tuple[str, Any]]:
        """Names and values, tensors and KJTs, which have the methods above in common."""
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]


@dataclass
class RankingBatch(RankingFeatures):
    """RankingFeatures with what happened: what the loader gives and DLRM_IFATrain takes.

    Args:
        labels: [M, T] float, 0 or 1, one column a task.
        exposed: [M] bool, whether the user was shown the candidate; CandidateSetLoss can tell the
            two apart.

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
