"""The histories of a batch in the form that the heads take, and the weights of their events."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.modules.config import FORGOTTEN


@dataclass(frozen=True)
class History:
    """The histories of B requests, with N events in total.

    Args:
        tokens: [N, D].
        offsets: [B + 1]; request b has the events offsets[b]:offsets[b + 1], oldest first.
        weights: event weights a_i >= 0, [N]; None for 1. [N, H] once gates have multiplied them.
        ages: [N] >= 0; None for 0.
        ids: [N, K] integers, one column for each of the interaction's id_features; None if there are
            none.
        gates: [N, G] integers, one column for each of the configuration's gates; None if there are none.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.history import History
        >>> history = History(torch.zeros(3, 4), torch.tensor([0, 1, 3]), torch.tensor([1.0, 0.0, 0.5]))
        >>> len(history), history.lengths.tolist(), history.present().lengths.tolist()
        (2, [1, 2], [1, 1])
    """

    tokens: Tensor
    offsets: Tensor
    weights: Tensor | None = None
    ages: Tensor | None = None
    ids: Tensor | None = None
    gates: Tensor | None = None

    @staticmethod
    def of(
        tokens: JaggedTensor, ages: Tensor | None, ids: Tensor | None, gates: Tensor | None
    ) -> History:
        """From the arguments of ``SequenceInteraction.forward``."""
        if ages is not None and not ages.is_floating_point():
            ages = ages.to(torch.float32)  # whole days or seconds
        return History(tokens.values(), tokens.offsets(), tokens.weights_or_none(), ages, ids, gates)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Events of each request, [B]."""
        return self.offsets.diff()

    def request(self, number: int) -> History:
        """One request's history."""
        rows = slice(*self.offsets[number : number + 2].tolist())
        return self._of_rows(rows, self.offsets[number : number + 2] - self.offsets[number])

    def present(self) -> History:
        """The history without the events of weight 0, which has no logarithm for softmax."""
        return self if self.weights is None else self._only(self.weights > 0)

    def latest(self, length: int) -> History:
        """The last ``length`` events of each request.

        Example:
            >>> import torch
            >>> from ifa_torchrec.modules.history import History
            >>> history = History(torch.arange(5)[:, None], torch.tensor([0, 4, 5]))
            >>> history.latest(2).tokens.flatten().tolist()
            [2, 3, 4]
        """
        rows = self.tokens.shape[0]
        end = self.offsets[1:].repeat_interleave(
            self.lengths, output_size=rows
        )  # of the event's request
        row = torch.arange(rows, device=end.device)
        return self._only(row >= end - length)

    def _only(self, kept: Tensor) -> History:
        return self._of_rows(kept.nonzero()[:, 0], counted(kept, self.offsets))

    def _of_rows(self, rows: slice | Tensor, offsets: Tensor) -> History:
        columns = (self.weights, self.ages, self.ids, self.gates)
        return History(
            self.tokens[rows], offsets, *(None if column is None else column[rows] for column in columns)
        )

    def widened(self) -> History:
        """The history with tokens in at least float32, for sums over many of them."""
        dtype = torch.promote_types(self.tokens.dtype, torch.float32)
        return dataclasses.replace(self, tokens=self.tokens.to(dtype))

    def event_weights(self, half_lives: tuple[float, ...]) -> Tensor:
        """w_hi = a_i exp(-lambda_h t_i), [N, len(half_lives)], in the tokens' dtype.

        Example:
            >>> import math, torch
            >>> from ifa_torchrec.modules.history import History
            >>> history = History(torch.zeros(2, 4), torch.tensor([0, 2]), ages=torch.tensor([7.0, 0.0]))
            >>> history.event_weights((math.inf, 7.0)).tolist()
            [[1.0, 0.5], [1.0, 1.0]]
        """
        rates = decay_rates(half_lives, self.tokens)
        weight = ops.reference.event_weights(self.weights, self.ages, rates, self.tokens)
        return weight.to(self.tokens.dtype)


def decay_rates(half_lives: tuple[float, ...], tokens: Tensor | None = None) -> Tensor:
    """lambda = ln 2 / half-life; 0 for an infinite half-life.

    They are computed where they are used instead of kept in a buffer: casting a module would round a
    buffer, and a module built on the meta device would lose it.

    Args:
        half_lives: positive.
        tokens: the tokens that they are used with; None for float32 on the CPU.

    Returns:
        [len(half_lives)] float32 (float64 for float64 tokens), on the tokens' device.

    Example:
        >>> import math
        >>> from ifa_torchrec.modules.history import decay_rates
        >>> decay_rates((math.inf, math.log(2))).tolist()
        [0.0, 1.0]
    """
    double = tokens is not None and tokens.dtype == torch.float64
    device = torch.device("cpu") if tokens is None else tokens.device
    dtype = torch.float64 if double else torch.float32
    # filled on the device: copying them from the host would wait for a GPU
    return torch.stack(
        [torch.full((), math.log(2.0) / h, dtype=dtype, device=device) for h in half_lives]
    )


def normalised(sums: Tensor, weight: Tensor) -> Tensor:
    """Means [..., d] from weighted sums [..., d] and their total weights [...]; 0 where these are
    negligible (FORGOTTEN).

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.history import normalised
        >>> normalised(torch.tensor([[3.0], [0.0]]), torch.tensor([1.5, 0.0])).tolist()
        [[2.0], [0.0]]
    """
    return sums / torch.where(weight > FORGOTTEN, weight, 1.0)[..., None]


def counted(kept: Tensor, offsets: Tensor) -> Tensor:
    """The offsets [B + 1] of the kept rows; ``kept`` is [rows] bool.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.history import counted
        >>> counted(torch.tensor([True, False, True]), torch.tensor([0, 2, 3])).tolist()
        [0, 1, 2]
    """
    return torch.cat([offsets.new_zeros(1), kept.cumsum(0).to(offsets.dtype)])[offsets]
