"""What the features of a request and its history say of each candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch


class PairInteractionArch(InteractionArch):
    """TorchRec's, with its table of pairs made anew where the meta device or ``to_empty`` lose it: of
    zeros, as DistributedModelParallel makes it, each product would be that of the first vector with
    itself.

    Args:
        num_sparse_features: F vectors that meet each other and the first one.

    Example:
        >>> from ifa_torchrec.models.parts import PairInteractionArch
        >>> PairInteractionArch(3).num_products
        6
    """

    def __init__(self, num_sparse_features: int) -> None:
        device = torch.get_default_device()
        with torch.device("cpu") if device.type == "meta" else device:
            super().__init__(num_sparse_features)

    @property
    def num_products(self) -> int:
        """Columns that ``forward`` puts behind the first vector: a product for each pair."""
        return self.F * (self.F + 1) // 2

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PairInteractionArch:
        super()._apply(fn, recurse)
        size, device = self.F + 1, self.triu_indices.device
        self.triu_indices = torch.triu_indices(size, size, offset=1, device=device)
        return self


class Part(NamedTuple):
    """What one arch says of each candidate.

    Attributes:
        vectors: [M, D] each, to be crossed with the token and with each other.
        beside: [M, *] each, to be put beside the products.
    """

    vectors: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]


class RequestArch(nn.Module):
    """What is known of a request, for each of its candidates.

    Args:
        dense_in_features: F.
        num_context_features: Fs.
        layer_sizes: of the dense arch, the last of width D.

    Attributes:
        num_vectors: vectors of its Part.
        out_features: width of what its Part puts beside.

    Example:
        >>> from ifa_torchrec.models.parts import RequestArch
        >>> arch = RequestArch(dense_in_features=3, num_context_features=2, layer_sizes=[4, 8])
        >>> arch.num_vectors, arch.out_features  # 8, 3 products among the three and 2 with the token
        (1, 13)
    """

    def __init__(
        self, dense_in_features: int, num_context_features: int, layer_sizes: list[int]
    ) -> None:
        super().__init__()
        self.dense_arch = DenseArch(dense_in_features, layer_sizes) if dense_in_features else None
        self.num_vectors = int(dense_in_features > 0)
        self.interaction_arch = PairInteractionArch(num_context_features + self.num_vectors - 1)
        self.out_features = (
            layer_sizes[-1] * self.num_vectors
            + self.interaction_arch.num_products
            + num_context_features
        )

    def forward(
        self, dense_features: Tensor, context: Tensor | None, tokens: Tensor, request: Tensor
    ) -> Part:
        """
        Args:
            dense_features: [B, F].
            context: [B, Fs, D] or None.
            tokens: [M, D], and request: [M] int64, which one's they are.
        """
        vectors, beside = [], []
        dense = None if self.dense_arch is None else self.dense_arch(dense_features)
        if dense is not None:
            vectors.append(dense[request])
            beside.append(vectors[-1])
        if context is not None:
            first, others = (context[:, 0], context[:, 1:]) if dense is None else (dense, context)
            crossed = self.interaction_arch(first, others)
            beside.append(crossed[:, tokens.shape[1] :][request])  # behind `first` itself
            beside.append(torch.einsum("mfd,md->mf", context[request], tokens))
        return Part(tuple(vectors), tuple(beside))


class InterestArch(nn.Module):
    """What a candidate found in the history, beside the candidate.

    Args:
        dim: D.

    Attributes:
        num_vectors, out_features: as RequestArch's.

    Example:
        >>> import torch
        >>> from ifa_torchrec.models.parts import InterestArch
        >>> arch, rows = InterestArch(8), torch.randn(3, 8)
        >>> part = arch(rows, rows, torch.tensor([4.0, 0.0]), torch.tensor([0, 0, 1]))
        >>> sum(columns.shape[1] for columns in part.beside) == arch.out_features
        True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.num_vectors, self.out_features = 1, 2 * dim + 1

    def forward(self, tokens: Tensor, interest: Tensor, events: Tensor, request: Tensor) -> Part:
        """
        Args:
            tokens: [M, D], interest: [M, D], and request: [M] int64, which one's they are.
            events: [B] floating point, how many each request's history has.
        """
        interest = self.norm(interest)
        return Part((interest,), (interest, tokens * interest, torch.log1p(events)[request, None]))
