"""The identity heads: how much of a history has the candidate's own id."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.modules.config import InteractionConfig
from ifa_torchrec.modules.gates import EventGates
from ifa_torchrec.modules.history import History, counted, decay_rates, normalised
from ifa_torchrec.modules.user_state import UserState, distinct_keys
from ifa_torchrec.ops.autocast import without_autocast
from ifa_torchrec.ops.jagged import request_of_row


class IdentityHeads(nn.Module):
    """Linear attention whose phi is the one-hot encoding of an id's bucket: "is it the same item?".

    For each identity feature and half-life: how much of the history has the candidate's id and, unless
    identity_head_dim is 0, the mean value of those events. Id 0 is "unknown": two unknown ids do not
    match, and a state has no row for them. Bucket 0 is a normal bucket, for the ids R, 2 R, ... Our own
    addition to the paper's algebra.

    Args:
        config: InteractionConfig with identity_features.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import History, InteractionConfig
        >>> from ifa_torchrec.modules.identity import IdentityHeads
        >>> heads = IdentityHeads(InteractionConfig(8, num_heads=2, identity_features=("item",)))
        >>> items = torch.tensor([[7], [7], [9]])
        >>> history = History(torch.randn(3, 8), offsets=torch.tensor([0, 3]), ids=items)
        >>> candidates = JaggedTensor(torch.randn(2, 8), lengths=torch.tensor([2]))
        >>> outputs, matched = heads(candidates, history, torch.tensor([[7], [8]]))
        >>> outputs.shape, matched.flatten().tolist()
        (torch.Size([2, 1, 4]), [2.0, 0.0])
    """

    def __init__(self, config: InteractionConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        width = len(config.identity_features) * config.identity_width
        values = nn.Linear(config.embedding_dim, width, bias=False, device=device) if width else None
        self.value_proj = values
        heads = (len(config.identity_features), len(config.identity_head_half_lives))
        self.gates = EventGates(config.gates, heads, device) if config.gates else None

    @property
    def decay(self) -> Tensor:
        """The decay rates for the half-lives, [L] float32 on the CPU."""
        return decay_rates(self.config.identity_head_half_lives)

    def forward(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Join the candidates' ids with those of their history's events.

        Nothing of the size of the bucket range is allocated.

        Args:
            candidates: B sets with M rows of width D.
            history: History of B requests, with ids [N, K].
            candidate_ids: [M, K] integers.

        Returns:
            Outputs [M, K * L, d] with d = identity_width, and matched weights [M, K * L].
        """
        outputs, matched, buckets = [], [], self.config.num_identity_buckets
        rates = decay_rates(self.config.identity_head_half_lives, history.tokens)
        ids, tokens = _given(history), history.tokens
        if self.value_proj is None:  # the sums of tokens are not used
            tokens = tokens.new_zeros(len(tokens), 1)
        for k, (weight, events) in enumerate(
            zip(self._value_weights(), self._gated(history), strict=True)
        ):
            token_sum, weight_sum = ops.match(
                # unknown ids of either side get a bucket of their own, beyond all others
                self.bucket(candidate_ids[:, k], unknown=buckets),
                candidates.offsets(),
                tokens,
                self.bucket(ids[:, k], unknown=buckets + 1),
                history.offsets,
                events.weights,
                history.ages,
                rates,
                self.config.backend,
            )
            if weight is None:
                outputs.append(token_sum[..., :0])
            else:
                mean = normalised(token_sum, weight_sum)
                with without_autocast(mean):
                    outputs.append(mean @ weight.to(mean.dtype).T)
            matched.append(weight_sum)
        return torch.cat(outputs, dim=1), torch.cat(matched, dim=1)

    def encode(self, history: History) -> dict[str, Any]:
        """The state's tables: UserState's fields whose names begin with ``identity_``."""
        history = history.widened()
        tokens, half_lives = history.tokens, self.config.identity_head_half_lives
        key_range = self.config.identity_key_range
        keys = self.keys(_given(history))
        keys = torch.where(keys < 0, key_range, keys)  # unknown ids, whose row is dropped below
        offsets, key, row = distinct_keys(
            request_of_row(history.offsets, tokens.shape[0])[:, None].expand_as(keys).flatten(),
            keys.flatten(),
            len(history),
            key_range + 1,
        )
        value_sum = tokens.new_zeros(key.shape[0], len(half_lives), self.config.identity_width)
        weight_sum = tokens.new_zeros(key.shape[0], len(half_lives))
        for k, (projection, events) in enumerate(
            zip(self._value_weights(), self._gated(history), strict=True)
        ):
            weight = events.event_weights(half_lives)
            mine = row.view_as(keys)[:, k]
            if projection is not None:
                value = tokens @ projection.to(tokens.dtype).T
                value_sum = value_sum.index_add(0, mine, weight[..., None] * value[:, None])
            weight_sum = weight_sum.index_add(0, mine, weight)
        known = key < key_range
        rows = known.nonzero()[:, 0]
        return {
            "identity_offsets": counted(known, offsets),
            "identity_key": key[rows],
            "identity_value": value_sum[rows],
            "identity_sum": weight_sum[rows],
            "identity_key_range": key_range,
        }

    def attend(
        self, candidates: JaggedTensor, state: UserState, candidate_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``forward`` returns, computed from the state's tables instead of the history.

        Args:
            candidates, candidate_ids: as for ``forward``.
            state: UserState of B requests.
        """
        offsets, key, values, weights = state.identity_tables()
        key_range = self.config.identity_key_range
        there = request_of_row(offsets, key.shape[0]) * key_range + key
        wanted = request_of_row(candidates.offsets(), candidate_ids.shape[0])[:, None] * key_range
        keys = self.keys(candidate_ids)
        wanted = torch.where(keys < 0, -1, wanted + keys)  # [M, K]
        row = torch.searchsorted(there, wanted)
        # ids that are not in the table read an extra row of zeros
        found = F.pad(there, (0, 1), value=-1)[row] == wanted
        row = torch.where(found, row, there.shape[0])
        total = F.pad(weights, (0, 0, 0, 1))[row]  # [M, K, L]
        value = F.pad(values, (0, 0, 0, 0, 0, 1))[row]  # [M, K, L, d]
        return normalised(value, total).flatten(1, 2), total.flatten(1)

    def attention_weights(self, history: History, candidate_ids: Tensor) -> list[Tensor]:
        """The weight of each event of one request, [m, n, L] for each identity feature."""
        result = []
        buckets = self.bucket(candidate_ids).T, self.bucket(_given(history)).T
        for asked, had, events in zip(*buckets, self._gated(history), strict=True):
            same = (asked[:, None] == had) & (asked >= 0)[:, None]
            matching = same[..., None] * events.event_weights(self.config.identity_head_half_lives)
            result.append(normalised(matching.mT, matching.sum(1)).mT)
        return result

    def keys(self, ids: Tensor) -> Tensor:
        """The key of each id in a state's tables: feature number times R plus bucket, or -1 for an
        unknown id; [n, K]."""
        config = self.config
        first = torch.arange(
            0, config.identity_key_range, config.num_identity_buckets, device=ids.device
        )
        bucket = self.bucket(ids)
        return torch.where(bucket < 0, -1, first + bucket)

    def bucket(self, ids: Tensor, unknown: int = -1) -> Tensor:
        """The bucket of each id, in 0..R-1, int64; ``unknown`` for id 0."""
        return torch.where(ids == 0, unknown, ids.to(torch.int64) % self.config.num_identity_buckets)

    def _gated(self, history: History) -> list[History]:
        """The history for each identity feature; with gates, its weights are [N, L]."""
        if self.gates is None:
            return [history] * len(self.config.identity_features)
        weights: Any = self.gates(history).weights  # [N, K, L]
        return [dataclasses.replace(history, weights=w) for w in weights.unbind(1)]

    def _value_weights(self) -> Sequence[Tensor | None]:
        """The value projection of each identity feature, [d, D]; None without values."""
        if self.value_proj is None:
            return [None] * len(self.config.identity_features)
        return self.value_proj.weight.unflatten(0, (-1, self.config.identity_width)).unbind()


def _given(history: History) -> Tensor:
    if history.ids is None:
        raise ValueError("history has no ids, which the identity heads compare")
    return history.ids
