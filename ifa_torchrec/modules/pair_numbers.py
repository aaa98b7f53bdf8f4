"""A learnt number for each pair of ids, without materialising a vector of them per candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUCKETS = 64
"""Buckets of a feature's ids; with fewer ids than this, each has its own."""
_SCALE = 3.0
"""Factor from parameters to numbers, so that these are learnt as fast as products of tokens."""


class PairNumbers(nn.Module):
    """A learnt number for each pair of ids of a feature, taken modulo ``BUCKETS``.

    The cross-product transformation of Wide & Deep learning (Cheng et al. 2016, arXiv 1606.07792) of
    one feature with itself. Id 0 is "unknown" and has no pairs. All numbers start at 0.

    Args:
        features: F.
        outputs: T, numbers per pair.
        device: of the weight.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.pair_numbers import PairNumbers
        >>> numbers = PairNumbers(2, 1)
        >>> ids = torch.tensor([[5, 6], [5, 0]])
        >>> numbers.both(numbers.table(), ids, torch.tensor([[7, 7]]))[0].shape
        torch.Size([2, 1])
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.features, self.outputs = features, outputs
        self.weight = nn.Parameter(torch.empty(features * BUCKETS, outputs * BUCKETS, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``."""
        nn.init.zeros_(self.weight)

    def _numbers(self) -> Tensor:
        """[F, BUCKETS, T, BUCKETS]: feature, bucket of an id, output, bucket of the other id."""
        return self.weight.view(self.features, BUCKETS, self.outputs, BUCKETS)

    def table(self) -> Tensor:
        """The table that ``both`` looks up, [F BUCKETS^2, T]; computed once for many calls."""
        return _SCALE * self._numbers().transpose(2, 3).reshape(-1, self.outputs)

    def both(self, table: Tensor, ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            table: the result of ``table``.
            ids: [M, F] integers, and others: [..., M, F], or a shape that broadcasts to it.

        Returns:
            What the others add to the terms of each, and what each adds to those of the others, summed
            over the features; both [..., M, T].
        """
        first = torch.arange(0, self.features * BUCKETS**2, BUCKETS**2, device=ids.device)
        one, other = ids % BUCKETS, others % BUCKETS
        row = torch.stack([first + one * BUCKETS + other, first + other * BUCKETS + one])
        number = table.index_select(0, row.flatten()).unflatten(0, row.shape)
        known = ((ids != 0) & (others != 0)).to(number.dtype)
        to, back = (number * known[..., None]).sum(-2).unbind(0)
        return to, back

    def of_taken(self, ids: Tensor, taken: Tensor, request: Tensor, requests: int) -> Tensor:
        """What the taken candidates add to the terms of the other candidates of their request.

        Each request's taken candidates are counted by bucket, and the counts are multiplied by the
        numbers once per request.

        Args:
            ids: [M, F] integers.
            taken: [M] bool.
            request: [M] int64, the request of each candidate.
            requests: B.

        Returns:
            [M, T].
        """
        numbers, known, bucket = self._numbers(), ids != 0, ids % BUCKETS
        feature = torch.arange(self.features, device=ids.device)
        place = ((request[:, None] * self.features + feature) * BUCKETS + bucket).flatten()
        counted = (taken[:, None] & known).to(numbers.dtype)
        count = counted.new_zeros(requests * self.features * BUCKETS)
        count = count.scatter_add(0, place, counted.flatten()).view(requests, self.features, BUCKETS)
        total = torch.einsum("rfj,fitj->rfit", count, numbers).flatten(0, 2)
        each = total.index_select(0, place).unflatten(0, ids.shape)
        of_itself = numbers.diagonal(dim1=1, dim2=3).transpose(1, 2).flatten(0, 1)
        itself = of_itself.index_select(0, (feature * BUCKETS + bucket).flatten()).unflatten(
            0, ids.shape
        )
        known = known.to(each.dtype)[..., None]
        return _SCALE * (each * known - itself * counted[..., None]).sum(1)
