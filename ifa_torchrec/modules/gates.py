"""Event gates: how much an event of each kind weighs in each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from ifa_torchrec.modules.history import History

LEAN, SPREAD = 0.5, 0.2
"""Initialisation of the log gates: a head has LEAN for its own values and -LEAN for the others, plus
normal noise of standard deviation SPREAD, since heads that start equal would stay equal."""


class EventGates(nn.Module):
    """A learnt positive weight for each value of some event features, for each head.

    If a history has events of several kinds (shown, clicked, bought), one head can count the purchases
    and another the clicks. A gate is exp of a table's row; several gates of an event are multiplied.
    Row 0, "unknown", has a gate like the others. The gates multiply the event weights, so sums over
    events stay additive and decay as before. Our own addition to the paper's algebra.

    Args:
        gates: the number of values of each gating event feature, by name.
        heads: the shape of the heads: (H,), or (K, L) for K features with L heads each.
        device: of the tables.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules import History
        >>> from ifa_torchrec.modules.gates import EventGates
        >>> gates = EventGates({"action": 3}, heads=(2,))
        >>> _ = gates.log_gates[0].data.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, 0.5]]).log())
        >>> history = History(torch.zeros(2, 4), torch.tensor([0, 2]), gates=torch.tensor([[2], [1]]))
        >>> gates(history).weights.tolist()
        [[2.0, 0.5], [1.0, 0.0]]
    """

    def __init__(
        self,
        gates: Mapping[str, int],
        heads: tuple[int, ...],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for column, values in enumerate(gates.values()):
            # not in a ParameterList: DistributedModelParallel would allocate its meta tensors without
            # initialising them
            table = nn.Parameter(torch.empty(values, *heads, device=device))
            self.register_parameter(f"log_gate_{column}", table)
        self.reset_parameters()

    @property
    def log_gates(self) -> list[nn.Parameter]:
        """The tables [values, *heads], in the gates' order."""
        return list(self.parameters())

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``. The values are distributed over the
        heads, or the heads over the values if there are fewer values; a single head has no values of its
        own."""
        for table in self.log_gates:
            nn.init.normal_(table, std=SPREAD)
            values, heads = table.shape[0], table.shape[-1]
            groups = min(values, heads)
            if groups > 1:
                value, head = (torch.arange(n, device=table.device) for n in (values, heads))
                own = (value[:, None] - head) % groups == 0
                table.data.view(values, -1, heads).add_(torch.where(own, LEAN, -LEAN)[:, None])

    def forward(self, history: History) -> History:
        """The history with weights a_i g_h(e_i) for each head, [N, *heads] float32 (or float64)."""
        if history.gates is None:
            raise ValueError("history has no gates, but the configuration has; pass history_gates")
        tables = self.log_gates
        weights: float | torch.Tensor = 1.0
        if history.weights is not None:
            weights = history.weights.view(-1, *[1] * (tables[0].ndim - 1))
        for ids, table in zip(history.gates.T, tables, strict=True):
            gate = table.to(torch.promote_types(table.dtype, torch.float32)).exp()
            weights = weights * gate.index_select(0, ids.to(torch.int64))
        return dataclasses.replace(history, weights=weights)
