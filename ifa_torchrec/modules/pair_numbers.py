"""A number for each pair of ids, without a vector of them for each candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUCKETS = 64
"""Of the ids of a feature whose pairs are told apart; of a feature of fewer values each has its own."""
_SCALE = 3.0
"""Of the numbers over the parameters, so that they are learnt as fast as products of tokens."""


class PairNumbers(nn.Module):
    """A number for each pair of an id feature's ids, by their remainders of ``BUCKETS``.

    The cross-product transformation of Wide & Deep learning (Cheng et al. 2016, arXiv 1606.07792), of
    one feature with itself. Id 0 is "unknown", and has no pairs. All start at 0.

    Args:
        features: F.
        outputs: T, numbers of a pair.
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
        """Start anew; also after ``to_empty``."""
        nn.init.zeros_(self.weight)

    def _numbers(self) -> Tensor:
        """[F, BUCKETS, T, BUCKETS], of an id and of the other one."""
        return self.weight.view(self.features, BUCKETS, self.outputs, BUCKETS)

    def table(self) -> Tensor:
        """What ``both`` looks up, [F BUCKETS^2, T]: made once for many calls."""
        return _SCALE * self._numbers().transpose(2, 3).reshape(-1, self.outputs)

    def both(self, table: Tensor, ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            table: what ``table`` gave.
            ids: [M, F] integers, and others: [..., M, F], or of a shape that fits it.

        Returns:
            What the others add to the terms of each, and each to those of the others, summed over the
            features; [..., M, T] both.
        """
        first = torch.arange(0, self.features * BUCKETS**2, BUCKETS**2, device=ids.device)
        one, other = ids % BUCKETS, others % BUCKETS
        row = torch.stack([first + one * BUCKETS + other, first + other * BUCKETS + one])
        number = table.index_select(0, row.flatten()).unflatten(0, row.shape)
        known = ((ids != 0) & (others != 0)).to(number.dtype)
        to, back = (number * known[..., None]).sum(-2).unbind(0)
        return to, back

    def of_taken(self, ids: Tensor, taken: Tensor, request: Tensor, requests: int) -> Tensor:
        """What those that are taken add to the terms of the other candidates of their request.

        Each request's taken are counted by bucket, and the counts multiplied by the numbers once a
        request.

        Args:
            ids: [M, F] integers.
            taken: [M] bool.
            request: [M] int64, which of the requests a candidate is of.
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
