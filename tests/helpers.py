"""What several test files need: jagged inputs, and a module's forward written out in plain loops."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig
from ifa_torchrec.modules import History
from ifa_torchrec.modules.identity import IdentityHeads

LN2 = math.log(2.0)
"""A half-life of LN2 * 2**k is a decay rate of 2**-k, which float32 holds exactly."""


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def jagged(values: Tensor, lengths: Sequence[int], weights: Tensor | None = None) -> JaggedTensor:
    return JaggedTensor(values, lengths=torch.tensor(lengths, dtype=torch.int64), weights=weights)


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for it; of a busy machine, too."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@dataclass
class Inputs:
    """The arguments of a sequence interaction's forward."""

    candidates: JaggedTensor
    history: JaggedTensor
    history_age: Tensor | None
    history_ids: Tensor | None
    candidate_ids: Tensor | None
    history_gates: Tensor | None = None

    @staticmethod
    def random(
        config: IFAConfig,
        history_lengths: Sequence[int],
        candidate_lengths: Sequence[int],
        *,
        seed: int = 0,
        weighted: bool = True,
        aged: bool = True,
        dtype: torch.dtype = torch.float64,
        id_features: int | None = None,
    ) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        n, m = sum(history_lengths), sum(candidate_lengths)
        k = len(config.identity_features) if id_features is None else id_features
        history = torch.randn(n, config.embedding_dim, generator=g, dtype=dtype)
        candidates = torch.randn(m, config.embedding_dim, generator=g, dtype=dtype)
        weights = 2 * torch.rand(n, generator=g, dtype=dtype)
        weights[::4] = 0.0  # the lowest weight allowed
        ages = 5 * torch.rand(n, generator=g, dtype=dtype)
        # few ids, so that many match, some of them negative, as a hash may be
        history_ids = torch.randint(-3, 9, (n, k), generator=g)
        candidate_ids = torch.randint(-3, 9, (m, k), generator=g)
        return Inputs(
            jagged(candidates, candidate_lengths),
            jagged(history, history_lengths, weights if weighted else None),
            ages if aged else None,
            history_ids if k else None,
            candidate_ids if k else None,
            random_gates(config, n, g),
        )

    @property
    def forward(self) -> tuple:
        """The arguments of ``forward`` and ``attention_weights``."""
        *events, gates = self.encode
        return self.candidates, *events, self.candidate_ids, gates

    @property
    def encode(self) -> tuple:
        """The arguments of ``encode``."""
        return self.history, self.history_age, self.history_ids, self.history_gates

    @property
    def events(self) -> History:
        """What ``dense_heads`` and the identity heads take."""
        return History.of(*self.encode)

    def __len__(self) -> int:
        return len(self.history.lengths())

    def event_rows(self, b: int) -> list[int]:
        return list(range(self.history.offsets()[b], self.history.offsets()[b + 1]))

    def candidate_rows(self, b: int) -> list[int]:
        return list(range(self.candidates.offsets()[b], self.candidates.offsets()[b + 1]))

    def with_events(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """The same candidates, with these events in this order, a list of rows a request."""
        history, flat = _take(self.history, rows)
        return Inputs(
            self.candidates,
            history,
            None if self.history_age is None else self.history_age[flat],
            None if self.history_ids is None else self.history_ids[flat],
            self.candidate_ids,
            None if self.history_gates is None else self.history_gates[flat],
        )

    def with_candidates(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """The same histories, with these candidates in this order, a list of rows a request."""
        candidates, flat = _take(self.candidates, rows)
        ids = None if self.candidate_ids is None else self.candidate_ids[flat]
        return dataclasses.replace(self, candidates=candidates, candidate_ids=ids)

    def requests(self, numbers: Sequence[int]) -> Inputs:
        """Only these requests, in this order."""
        return self.with_events([self.event_rows(b) for b in numbers]).with_candidates(
            [self.candidate_rows(b) for b in numbers]
        )


def random_gates(config: IFAConfig, rows: int, generator: torch.Generator) -> Tensor | None:
    """[rows, G], a value of each of the configuration's gates; None without."""
    values = [torch.randint(0, v, (rows,), generator=generator) for v in config.gates.values()]
    return torch.stack(values, dim=1) if values else None


def _take(tokens: JaggedTensor, rows: Sequence[Sequence[int]]) -> tuple[JaggedTensor, Tensor]:
    flat = torch.tensor([row for request in rows for row in request], dtype=torch.int64)
    weights = tokens.weights_or_none()
    lengths = [len(request) for request in rows]
    return jagged(tokens.values()[flat], lengths, None if weights is None else weights[flat]), flat


def naive_event_weights(
    inputs: Inputs,
    half_lives: Sequence[float],
    events: list[int],
    gates: torch.nn.Module | None = None,
    first_head: int = 0,
) -> Tensor:
    """[n, number of half-lives]: a_i halved once in every half-life of the event's age, times the gates
    of the heads from ``first_head`` on."""
    weights, ages = inputs.history.weights_or_none(), inputs.history_age
    columns = []
    for h, half_life in enumerate(half_lives, first_head):
        column = inputs.history.values().new_ones(len(events))
        if ages is not None:
            column = column * 0.5 ** (ages[events] / half_life)
        for g, table in enumerate(() if gates is None else gates.log_gates):
            kinds = inputs.history_gates[events, g].tolist()
            logs = [table.flatten(1)[kind, h] for kind in kinds]
            column = column * torch.exp(torch.stack(logs) if logs else column)
        columns.append(column if weights is None else column * weights[events])
    return torch.stack(columns, dim=1)


def naive_forward(
    module: torch.nn.Module,
    inputs: Inputs,
    dense_head: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> Tensor:
    """A sequence interaction's output [M, D], a request and a head at a time.

    ``dense_head(candidates [m, D], events [n, D], weights [n], h)`` gives head h's outputs [m, d]
    and matched [m] for one request; the rest is the same for IFA and its peers.
    """
    config = module.config
    half_lives = config.half_lives or (math.inf,) * config.num_heads
    result = []
    for b in range(len(inputs)):
        candidates, events = inputs.candidate_rows(b), inputs.event_rows(b)
        asking, tokens = inputs.candidates.values()[candidates], inputs.history.values()[events]
        weight = naive_event_weights(inputs, half_lives, events, getattr(module, "gates", None))
        outputs, matched = [], []
        for h in range(config.num_heads):
            output, total = dense_head(asking, tokens, weight[:, h], h)
            outputs.append(output)
            matched.append(total)
        for k in range(len(config.identity_features)):
            rates = config.identity_head_half_lives
            weight = naive_event_weights(inputs, rates, events, module.identity.gates, k * len(rates))
            asked, bought = inputs.candidate_ids[candidates, k], inputs.history_ids[events, k]
            known = (asked != 0)[:, None] & (bought != 0)[None, :]
            same = (asked[:, None] - bought[None, :]) % config.num_identity_buckets == 0
            same = (same & known).to(tokens.dtype)
            value = identity_values(module.identity, tokens, k)
            for rate in range(len(config.identity_head_half_lives)):
                total = same @ weight[:, rate]
                mean = same @ (weight[:, rate, None] * value)
                outputs.append(mean / torch.where(total > 0, total, 1.0)[:, None])
                matched.append(total)
        if config.interest_mass:
            outputs += [torch.log(1 + total / config.mass_scale)[:, None] for total in matched]
        result.append(torch.cat(outputs, dim=1))
    return module.output_proj(torch.cat(result))


def head_of(tokens: Tensor, projection: torch.nn.Linear, h: int, config: IFAConfig) -> Tensor:
    """[rows, d]: head h of the tokens' projection."""
    d = config.head_dim or config.embedding_dim // config.num_heads
    return tokens @ projection.weight[h * d : (h + 1) * d].T


def identity_values(identity: IdentityHeads, tokens: Tensor, k: int) -> Tensor:
    """[rows, d]: what the identity heads of feature k average; d is 0 where they have masses alone."""
    if identity.value_proj is None:
        return tokens[:, :0]
    return tokens @ identity.value_proj.weight.chunk(len(identity.config.identity_features))[k].T


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """The largest error is at most ``tolerance`` times the largest value expected."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    # not error > ..., which a NaN would pass
    assert error <= tolerance * scale, f"{what}: error {error:.2e} at scale {scale:.2e}"


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """The module with random weights: its own start is the identity, which hides transpositions; what
    a history says at full size, so that nothing of it is lost in rounding."""
    for name, parameter in module.named_parameters():
        if name.endswith("log_scale"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.4)
    return module


def flattened(figures: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The figures of nested dicts and lists by their whole names, parts of them after a dot."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        found |= (
            flattened(value, f"{before}{name}.")
            if isinstance(value, dict)
            else {f"{before}{name}": value}
        )
    return found
