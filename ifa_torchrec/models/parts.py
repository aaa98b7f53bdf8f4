"""Features of requests, items, events and candidates other than ids: numbers, vectors, interests."""

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
    """TorchRec's InteractionArch, but its table of pairs is rebuilt after the meta device or
    ``to_empty`` lose it. DistributedModelParallel would fill it with zeros, and each product would be
    that of the first vector with itself.

    Args:
        num_sparse_features: F, the vectors that are crossed with each other and with the first one.

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
        """Columns that ``forward`` appends to the first vector: a product for each pair."""
        return self.F * (self.F + 1) // 2

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PairInteractionArch:
        super()._apply(fn, recurse)
        size, device = self.F + 1, self.triu_indices.device
        self.triu_indices = torch.triu_indices(size, size, offset=1, device=device)
        return self


class NumberArch(nn.Module):
    """Standardises columns of numbers and replaces missing ones by a learnt number per column.

    The scales come from the configuration, not from a state_dict, so that no cast rounds them.

    Args:
        name: of the field of RankingFeatures, for messages.
        scales: one Scale per column.

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
        self._figures = self._made()  # not a buffer: the meta device and ``to_empty`` would lose it

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters: a missing number counts as the mean."""
        nn.init.zeros_(self.missing)

    def forward(self, numbers: Tensor) -> Tensor:
        """
        Args:
            numbers: [n, columns], NaN for a missing number.

        Returns:
            [n, columns] in the parameters' dtype.

        Raises:
            ValueError: on the CPU, if log(1 + x) of a number does not exist.
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
                f"batch: {self.name}: row {row}, column {column} is {numbers[row, column].item():g}; "
                "numbers scaled by log(1 + x) must be above -1"
            )

    def _made(self) -> Tensor:
        """Mean, deviation and log flag of each column: [3, columns]."""
        rows = [(scale.mean, scale.deviation, float(scale.log)) for scale in self.scales]
        device = "cpu" if self.missing.is_meta else self.missing.device
        return torch.tensor(rows, dtype=torch.float64, device=device).T

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NumberArch:
        super()._apply(fn, recurse)
        self._figures = self._made()
        return self


class ItemArch(nn.Module):
    """Item features other than ids, computed once for each distinct item of a batch.

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
            lists: [U, lists, D], the pooled embeddings of the items' lists; None if there are none.
            features: provides the items' numbers and vectors.

        Returns:
            [U, D]; None if the model has no such item features.
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
    """A module from numbers [n, columns] to a part of a token [n, D]; None without such numbers.

    Args:
        config: DLRM_IFAConfig.
        name: of the field of RankingFeatures.

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
        nn.Linear([columns, *hidden][-1], config.ifa.embedding_dim),  # can be negative, unlike DenseArch
    )


def vector_numbers(config: DLRM_IFAConfig, name: str) -> nn.Sequential | None:
    """A DLRM's dense arch from numbers [n, columns] to a vector [n, D] that is crossed with others; None
    without such numbers.

    Args:
        config: DLRM_IFAConfig.
        name: of the field of RankingFeatures.

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
    """One arch's description of each candidate.

    Attributes:
        interaction_vectors: [M, D] each, to be crossed with the token and with each other.
        concat_features: [M, *] each, to be concatenated with the products.
    """

    interaction_vectors: tuple[Tensor, ...]
    concat_features: tuple[Tensor, ...]


class RequestArch(nn.Module):
    """The features of a request, for each of its candidates.

    Args:
        config: DLRM_IFAConfig.
        num_context_features: Fs.

    Attributes:
        num_vectors: number of ``interaction_vectors`` in its Part.
        out_features: total width of ``concat_features`` in its Part.

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
            tokens: [M, D], and request: [M] int64, the request of each.
        """
        vectors, concat = [], []
        dense = None if self.dense_arch is None else self.dense_arch(dense_features)
        if dense is not None:
            vectors.append(dense[request])
            concat.append(vectors[-1])
        if context is not None:
            first, others = (context[:, 0], context[:, 1:]) if dense is None else (dense, context)
            crossed = self.interaction_arch(first, others)
            concat.append(crossed[:, tokens.shape[1] :][request])  # without `first` itself
            concat.append(torch.einsum("mfd,md->mf", context[request], tokens))
        return Part(tuple(vectors), tuple(concat))


SHRINKAGE = 10.0
"""Number of events at which the interest counts half: with fewer it is mostly chance, which a model
would fit (docs/quality.md, "Where the history tells little")."""
SMALL_START = 0.3
"""Initial scale if there are identity heads. An attention without them learns too slowly with it and
starts at 1 (same page)."""
SCALE_RATE = 10.0
"""How much faster the scale's logarithm learns than other parameters: Adam changes a parameter by about
the learning rate per step, so the scale would otherwise hardly change in a short training."""


class InterestArch(nn.Module):
    """The interest: what a candidate found in the history.

    It is normed, so its size does not depend on how much was found, then multiplied by a learnt scale
    and shrunk by n / (n + 10), where n is the number of events. Without events it is 0, whatever bias
    the interaction has learnt.

    Args:
        dim: D.
        start: the initial scale.

    Attributes:
        num_vectors, out_features: as for RequestArch.

    Example:
        >>> import torch
        >>> from ifa_torchrec.models.parts import InterestArch
        >>> arch, rows = InterestArch(8), torch.randn(3, 8)
        >>> part = arch(rows, rows, torch.tensor([4.0, 0.0]), torch.tensor([0, 0, 1]))
        >>> sum(columns.shape[1] for columns in part.concat_features) == arch.out_features
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
            tokens: [M, D], interest: [M, D], and request: [M] int64, the request of each.
            events: [B] floating point, the number of events in each request's history.
        """
        scale = torch.exp(SCALE_RATE * self.log_scale) * events / (events + SHRINKAGE)
        interest = self.norm(interest) * scale[request, None]
        return Part((interest,), (interest, tokens * interest, torch.log1p(events)[request, None]))
