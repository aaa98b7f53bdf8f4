"""What is known of requests, items, events and candidates beside ids: numbers, vectors, what histories
say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch

from ifa_torchrec.batch import RankingFeatures, Scale
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.ops.jagged import checkable


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


class NumberArch(nn.Module):
    """Standardises columns of numbers; where one is missing stands a learnt number of its column.

    The scales are of the configuration, not of a state_dict: no cast rounds them.

    Args:
        name: of the RankingFeatures' field, for messages.
        scales: a Scale a column.

    Example:
        >>> import math, torch
        >>> from ifa_torchrec.batch import Scale
        >>> from ifa_torchrec.models.parts import NumberArch
        >>> arch = NumberArch("item_dense", (Scale(10.0, 2.0), Scale(log=True)))
        >>> arch(torch.tensor([[14.0, math.e - 1], [math.nan, 0.0]])).tolist()
        [[2.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, name: str, scales: tuple[Scale, ...]) -> None:
        super().__init__()
        self.name, self.scales = name, scales
        self.missing = nn.Parameter(torch.zeros(len(scales)))
        self._figures = self._made()  # no buffer: the meta device, and what empties it, would lose it

    def reset_parameters(self) -> None:
        """Start anew: what is missing is as the mean."""
        nn.init.zeros_(self.missing)

    def forward(self, numbers: Tensor) -> Tensor:
        """
        Args:
            numbers: [n, columns], NaN where one is missing.

        Returns:
            [n, columns] of the parameters' dtype.

        Raises:
            ValueError: on the CPU, where there is no log(1 + x) of a number.
        """
        mean, deviation, logarithmic = self._figures
        missing, scaled = numbers.isnan(), numbers.to(mean.dtype)
        if any(scale.log for scale in self.scales):
            self._check(scaled, logarithmic > 0)
            scaled = torch.where(logarithmic > 0, scaled.log1p(), scaled)
        return torch.where(missing, self.missing, ((scaled - mean) / deviation).to(self.missing.dtype))

    def _check(self, numbers: Tensor, logarithmic: Tensor) -> None:
        if not checkable(numbers):
            return
        wrong = (numbers <= -1) & logarithmic
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"batch: {self.name}: row {row}, column {column} is {numbers[row, column].item():g}, of "
                "which there is no log(1 + x); numbers that are scaled by it are above -1"
            )

    def _made(self) -> Tensor:
        """Mean, deviation and whether it is of the logarithm, of each column: [3, columns]."""
        rows = [(scale.mean, scale.deviation, float(scale.log)) for scale in self.scales]
        device = "cpu" if self.missing.is_meta else self.missing.device
        return torch.tensor(rows, dtype=torch.float64, device=device).T

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NumberArch:
        super()._apply(fn, recurse)
        self._figures = self._made()
        return self


class ItemArch(nn.Module):
    """What describes an item beyond its ids, once for each distinct item of a batch.

    Args:
        config: DLRM_IFAConfig.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.batch import RankingFeatures
        >>> from ifa_torchrec.models.parts import ItemArch
        >>> from torchrec import KeyedJaggedTensor
        >>> none = KeyedJaggedTensor.empty()
        >>> features = RankingFeatures(torch.zeros(1, 0), none, none, torch.zeros(0, 0), torch.zeros(0),
        ...     item_vectors=torch.randn(5, 3))
        >>> arch = ItemArch(DLRM_IFAConfig(("item",), ifa=IFAConfig(8), item_vectors={"text": 3}))
        >>> arch(None, features).shape
        torch.Size([5, 8])
    """

    def __init__(self, config: DLRM_IFAConfig) -> None:
        super().__init__()
        self.number_arch = token_numbers(config, "item_dense")
        columns, dim = config.vector_columns, config.ifa.embedding_dim
        self.vector_proj = nn.Linear(columns, dim, bias=False) if columns else None

    def forward(self, lists: Tensor | None, features: RankingFeatures) -> Tensor | None:
        """
        Args:
            lists: [U, lists, D], what the tables of the items' lists have; None without any.
            features: for the items' numbers and vectors.

        Returns:
            [U, D]; None where nothing describes an item.
        """
        parts: list[Tensor] = []
        if lists is not None:
            parts.append(lists.sum(1))
        if self.number_arch is not None and features.item_dense is not None:
            parts.append(self.number_arch(features.item_dense))
        if self.vector_proj is not None and features.item_vectors is not None:
            parts.append(self.vector_proj(features.item_vectors.to(self.vector_proj.weight.dtype)))
        return torch.stack(parts).sum(0) if parts else None


def token_numbers(config: DLRM_IFAConfig, name: str) -> nn.Sequential | None:
    """Numbers to a part of a token, [n, columns] to [n, D]; None where there are none.

    Args:
        config: DLRM_IFAConfig.
        name: of the RankingFeatures' field.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.parts import token_numbers
        >>> config = DLRM_IFAConfig(("item",), event_dense_in_features=2, ifa=IFAConfig(8))
        >>> token_numbers(config, "history_dense")(torch.randn(5, 2)).shape
        torch.Size([5, 8])
    """
    columns, hidden = config.columns(name), list(config.dense_arch_layer_sizes)
    if not columns:
        return None
    return nn.Sequential(
        NumberArch(name, config.scales_of(name)),
        DenseArch(columns, hidden),
        nn.Linear([columns, *hidden][-1], config.ifa.embedding_dim),  # also below 0
    )


def vector_numbers(config: DLRM_IFAConfig, name: str) -> nn.Sequential | None:
    """Numbers to a vector that is crossed with others, [n, columns] to [n, D], by a DLRM's dense arch;
    None where there are none.

    Args:
        config: DLRM_IFAConfig.
        name: of the RankingFeatures' field.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.parts import vector_numbers
        >>> config = DLRM_IFAConfig(("item",), dense_in_features=2, ifa=IFAConfig(8))
        >>> vector_numbers(config, "dense_features")(torch.randn(5, 2)).shape
        torch.Size([5, 8])
    """
    columns = config.columns(name)
    if not columns:
        return None
    layers = [*config.dense_arch_layer_sizes, config.ifa.embedding_dim]
    return nn.Sequential(NumberArch(name, config.scales_of(name)), DenseArch(columns, layers))


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
        config: DLRM_IFAConfig.
        num_context_features: Fs.

    Attributes:
        num_vectors: vectors of its Part.
        out_features: width of what its Part puts beside.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.parts import RequestArch
        >>> config = DLRM_IFAConfig(("item",), dense_in_features=3, ifa=IFAConfig(8))
        >>> arch = RequestArch(config, num_context_features=2)
        >>> arch.num_vectors, arch.out_features  # 8, 3 products among the three and 2 with the token
        (1, 13)
    """

    def __init__(self, config: DLRM_IFAConfig, num_context_features: int) -> None:
        super().__init__()
        self.dense_arch = vector_numbers(config, "dense_features")
        self.num_vectors = int(self.dense_arch is not None)
        self.interaction_arch = PairInteractionArch(num_context_features + self.num_vectors - 1)
        self.out_features = (
            config.ifa.embedding_dim * self.num_vectors
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


SHRINKAGE = 10.0
"""Events of a history at which what it says counts half: that of fewer is mostly chance, which a model
learns to fit (docs/quality.md, "Where the history tells little")."""
SMALL_START = 0.3
"""The scale at which training starts where identity heads stand beside the attention. An attention alone
learns too slowly behind it and starts at 1 (same page)."""
SCALE_RATE = 10.0
"""How much faster than other parameters the scale's logarithm learns: as Adam moves a parameter by the
learning rate or so in a step, the scale would otherwise hardly move in a short training."""


class InterestArch(nn.Module):
    """What a candidate found in the history, beside the candidate.

    It is normed, and so of one size however little was found; then times a learnt scale, and shrunk to
    n / (n + 10) of it, n being the number of events. Without events it is 0, whatever the
    interaction's bias has learnt.

    Args:
        dim: D.
        start: the scale at the start of training.

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

    def __init__(self, dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.start = start
        self.log_scale = nn.Parameter(torch.empty(1))
        self.num_vectors, self.out_features = 1, 2 * dim + 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``."""
        nn.init.constant_(self.log_scale, math.log(self.start) / SCALE_RATE)

    def forward(self, tokens: Tensor, interest: Tensor, events: Tensor, request: Tensor) -> Part:
        """
        Args:
            tokens: [M, D], interest: [M, D], and request: [M] int64, which one's they are.
            events: [B] floating point, how many each request's history has.
        """
        scale = torch.exp(SCALE_RATE * self.log_scale) * events / (events + SHRINKAGE)
        interest = self.norm(interest) * scale[request, None]
        return Part((interest,), (interest, tokens * interest, torch.log1p(events)[request, None]))
