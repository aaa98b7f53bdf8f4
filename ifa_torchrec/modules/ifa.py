"""Interaction Fidelity Attention: linear cross attention of candidates over a whole history."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.checks import check_tokens
from ifa_torchrec.modules.config import FORGOTTEN, IFAConfig
from ifa_torchrec.modules.gates import EventGates
from ifa_torchrec.modules.history import History, decay_rates
from ifa_torchrec.modules.user_state import UserState
from ifa_torchrec.ops.autocast import as_autocast
from ifa_torchrec.ops.jagged import request_of_row

_GAINS = {"elu": 1.5, "relu": 1.5, "hedgehog": 3.0}
"""Initial gain: queries and keys start as this times the (normed) tokens. A larger gain is more
selective; one that is too large learns more slowly."""
_SOFT = 1.2
"""The initial gain of keys under the softmax read-out, where the softmax provides the selectivity and
features can be soft."""


class InteractionFidelityAttention(SequenceInteraction):
    """Every candidate attends to every event, at a cost linear in both (arXiv 2406.09742, idea 2).

        out_hc = phi(q_hc)^T S_h / (phi(q_hc)^T z_h + eps s_h)

    with the user state S_h = sum_i w_hi phi(k_hi) v_hi^T and z_h = sum_i w_hi phi(k_hi), event
    weights w_hi = a_i g_h(e_i) exp(-lambda_h t_i), and s_h = sum_f z_hf. The gate g_h(e_i) of the
    event's kind is 1 if the config has no gates. The result equals that of the quadratic form; no event
    is dropped. ``forward(candidates, history)`` equals ``attend(candidates, encode(history))``. Interest
    masses, identity heads and gates are our own additions.

    With ``readout="softmax"`` the same state is read differently: a candidate attends by softmax to the
    d_phi summaries mu_hr = S_hr / z_hr of a head, each the mean value of the events that have feature r,

        out_hc = sum_r E_hcr S_hr / sum_r E_hcr z_hr        E_hcr = exp(q_hc^T mu_hr / sqrt(d))

    This is the linear read-out with candidate features E that depend on the history. In both cases the
    mass is computed from the denominator.

    As numerator and denominator decay together, the output does not depend on the age of the history as
    a whole; only the mass does. After 80 half-lives a head's output is that of an empty history.

    Args:
        config: IFAConfig.
        device: of the parameters. If "meta", call ``to_empty`` and ``reset_parameters`` later.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> ifa = InteractionFidelityAttention(IFAConfig(embedding_dim=64, num_heads=4))
        >>> history = JaggedTensor(torch.randn(1000, 64), lengths=torch.tensor([990, 0, 10]))
        >>> candidates = JaggedTensor(torch.randn(6, 64), lengths=torch.tensor([3, 2, 1]))
        >>> out = ifa(candidates, history)
        >>> out.values().shape
        torch.Size([6, 64])
        >>> state = ifa.encode(history)
        >>> torch.allclose(ifa.attend(candidates, state).values(), out.values(), atol=1e-5)
        True
    """

    config: IFAConfig
    reaches_every_parameter = True  # the operators return zero gradients for empty inputs

    def __init__(self, config: IFAConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        gain = _GAINS[config.feature_map]
        self.query_proj = self._projection(gain, device)
        self.key_proj = self._projection(gain if config.readout == "linear" else _SOFT, device)
        self.gates = EventGates(config.gates, (config.num_heads,), device) if config.gates else None

    @overload
    def encode(
        self,
        history: JaggedTensor,
        history_age: Tensor | None = None,
        history_ids: Tensor | None = None,
        history_gates: Tensor | None = None,
    ) -> UserState: ...

    @overload
    def encode(
        self,
        history: Iterable[JaggedTensor],
        history_age: Iterable[Tensor] | None = None,
        history_ids: Iterable[Tensor] | None = None,
        history_gates: Iterable[Tensor] | None = None,
    ) -> UserState: ...

    def encode(
        self,
        history: JaggedTensor | Iterable[JaggedTensor],
        history_age: Any = None,
        history_ids: Any = None,
        history_gates: Any = None,
    ) -> UserState:
        """Sum B histories into a user state.

        Histories that do not fit into memory at once can be passed in parts: every argument is then an
        iterable, and each part has some of the events of all B requests.

        Args:
            history: event tokens, values [N, D]; or an iterable of one JaggedTensor per part.
            history_age: [N]; or an iterable of one tensor per part.
            history_ids: [N, K] integers; or an iterable of one tensor per part.
            history_gates: [N, G] integers; or an iterable of one tensor per part.

        Returns:
            UserState of B requests.

        Raises:
            ValueError: as ``forward``; or there are no parts, or the arguments differ in their number.
        """
        if not isinstance(history, (JaggedTensor, Tensor, str)):
            return self._encode_parts(
                history,
                history_age=history_age,
                history_ids=history_ids,
                history_gates=history_gates,
            )
        events = self._history(history, history_age, history_ids, history_gates)
        key_value, key_sum = self._encode_dense(events)
        tables = {} if self.identity is None else self.identity.encode(events)
        count = events.lengths.to(torch.int64)
        return UserState(key_value, key_sum, count, **tables)

    def update(
        self,
        state: UserState,
        new_history: JaggedTensor,
        elapsed: Tensor | None = None,
        history_age: Tensor | None = None,
        history_ids: Tensor | None = None,
        history_gates: Tensor | None = None,
    ) -> UserState:
        """Decay a state by the elapsed time and add new events, at a cost independent of the old events.

        Args:
            state: the state of B users at some time.
            new_history: the events since then, values [N, D].
            elapsed: [B] >= 0, the time passed since then; None for 0.
            history_age: [N], ages of the new events at the new time; None for 0.
            history_ids: [N, K] integers.
            history_gates: [N, G] integers.

        Returns:
            The state at the new time.

        Example:
            >>> import torch
            >>> from torchrec.sparse.jagged_tensor import JaggedTensor
            >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
            >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2, half_lives=(7.0, 90.0)))
            >>> day_one = JaggedTensor(torch.randn(4, 8), lengths=torch.tensor([4]))
            >>> day_nine = JaggedTensor(torch.randn(2, 8), lengths=torch.tensor([2]))
            >>> state = ifa.update(ifa.encode(day_one), day_nine, elapsed=torch.tensor([8.0]))
            >>> state.count.tolist()
            [6]

        Raises:
            ValueError: as ``forward``; or ``elapsed`` has another shape or is negative.
        """
        self._check_state(state)
        check_tokens(new_history, self.config.embedding_dim, "new_history")
        new = self.encode(new_history, history_age, history_ids, history_gates)
        if len(new) != len(state):
            raise ValueError(f"new_history has {len(new)} requests, the state has {len(state)}")
        return (state if elapsed is None else self._decayed(state, elapsed)) + new

    def attend(
        self, candidates: JaggedTensor, state: UserState, candidate_ids: Tensor | None = None
    ) -> JaggedTensor:
        """What ``forward`` returns, computed from the state instead of the history.

        Args:
            candidates: candidate tokens of B requests, values [M, D].
            state: UserState of B requests.
            candidate_ids: [M, K] integers; required if the config has identity features.

        Returns:
            JaggedTensor with values [M, D].

        Raises:
            ValueError: as ``forward``; or the state does not fit the configuration.
        """
        self._check_state(state)
        self._check_candidates(candidates, candidate_ids, len(state))
        identity = None
        if self.identity is not None and candidate_ids is not None:
            identity = self.identity.attend(candidates, state, candidate_ids)
        heads, mass = self._attend_dense(candidates, state.key_value, state.key_sum)
        return self._output(candidates, heads, mass, identity)

    def attention_weights(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        history_gates: Tensor | None = None,
    ) -> list[Tensor]:
        """The weight of each event in each head's output for each candidate.

        For explanations and tests: it is the quadratic form, O(n m) per request, so pass only the
        candidates of interest.

        Args:
            candidates, history, history_age, history_ids, candidate_ids, history_gates: as for
                ``forward``.

        Raises:
            ValueError: as ``forward``.

        Returns:
            For each request, [m, n, H + K * L]: the weights with which a head (first the dense heads,
            then the identity heads) averages the events' values. They sum to 1 over the events
            if anything matched, and are 0 if nothing did.

        Example:
            >>> import torch
            >>> from torchrec.sparse.jagged_tensor import JaggedTensor
            >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
            >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2))
            >>> history = JaggedTensor(torch.randn(4, 8), lengths=torch.tensor([4, 0]))
            >>> candidates = JaggedTensor(torch.randn(3, 8), lengths=torch.tensor([2, 1]))
            >>> [list(w.shape) for w in ifa.attention_weights(candidates, history)]
            [[2, 4, 2], [1, 0, 2]]
        """
        events = self._history(history, history_age, history_ids, history_gates)
        self._check_candidates(candidates, candidate_ids, len(events))
        ends = candidates.offsets().tolist()
        result = []
        for b, asking in enumerate(slice(*span) for span in pairwise(ends)):
            event = events.request(b)
            parts = [self._dense_weights(candidates.values()[asking], event)]
            if self.identity is not None and candidate_ids is not None:
                parts += self.identity.attention_weights(event, candidate_ids[asking])
            result.append(torch.cat(parts, dim=2))
        return result

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, H, d] and masses [M, H] of the dense heads."""
        return self._attend_dense(candidates, *self._encode_dense(history))

    def _history(
        self, tokens: JaggedTensor, ages: Tensor | None, ids: Tensor | None, gates: Tensor | None
    ) -> History:
        # cast once here instead of in each operator
        events = super()._history(tokens, ages, ids, gates)
        return dataclasses.replace(events, tokens=as_autocast(events.tokens))

    def _gated(self, history: History) -> History:
        """The history for the dense heads; with gates, its weights are [N, H]."""
        return history if self.gates is None else self.gates(history)

    def _encode_dense(self, history: History) -> tuple[Tensor, Tensor]:
        return ops.encode(
            history.tokens,
            history.offsets,
            self.heads(self.key_proj),
            self.heads(self.value_proj),
            self._gated(history).weights,
            history.ages,
            decay_rates(self.half_lives, history.tokens),
            self.config.feature_map,
            self.config.backend,
        )

    def _attend_dense(
        self, candidates: JaggedTensor, key_value: Tensor, key_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.config.readout == "softmax":
            heads, log_matched = ops.attend_softmax(
                candidates.values(),
                candidates.offsets(),
                self.heads(self.query_proj),
                *summaries(key_value, key_sum),
                self.config.backend,
            )
            return heads, self._mass_of_log(log_matched)
        # the operator's eps is absolute: after scaling to 1, the age of a state does not matter
        scale = _scale(key_sum)
        heads, matched = ops.attend(
            candidates.values(),
            candidates.offsets(),
            self.heads(self.query_proj),
            key_value / scale[..., None, None],
            key_sum / scale[..., None],
            self.config.feature_map,
            self.config.eps,
            self.config.backend,
        )
        request = request_of_row(candidates.offsets(), candidates.values().shape[0])
        return heads, self._mass(matched * scale[request])

    def _dense_weights(self, asking: Tensor, event: History) -> Tensor:
        """The weight of each event of one request for the candidates ``asking`` [m, D]: [m, n, H]."""
        config, reference = self.config, ops.reference
        weight = self._gated(event).event_weights(self.half_lives)
        projections = [self.heads(p) for p in (self.query_proj, self.key_proj, self.value_proj)]
        dtype = torch.promote_types(event.tokens.dtype, projections[0].dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        asking, weight, *projections = (x.to(dtype) for x in (asking, weight, *projections))
        event = dataclasses.replace(event, tokens=event.tokens.to(dtype))
        key = reference.features(event.tokens, projections[1], config.feature_map)
        key_sum = torch.einsum("nhf,nh->hf", key, weight)
        if config.readout == "linear":
            given = (weight / _scale(key_sum), config.feature_map, config.eps)
            return reference.quadratic(asking, event.tokens, *projections, *given)[2]
        value = torch.einsum("nD,hdD->nhd", event.tokens, projections[2])
        key_value = torch.einsum("nhf,nhd,nh->hfd", key, value, weight)
        query = torch.einsum("mD,hdD->mhd", asking, projections[0])
        mean, log_weight = summaries(key_value, key_sum)
        share = reference.shares(query, mean[None], log_weight[None])[0]
        of_event = key * weight[..., None] * (-log_weight).masked_fill(log_weight.isinf(), 0.0).exp()
        return torch.einsum("mhf,nhf->mnh", share, of_event)

    def _encode_parts(
        self, history: Iterable[JaggedTensor], **given: Iterable[Tensor] | None
    ) -> UserState:
        """The sum of the parts' states; holds one part at a time."""
        state = None
        end: Any = object()
        parts = {name: iter(x) for name, x in given.items() if x is not None}
        for tokens in history:
            part = {name: next(rest, end) for name, rest in parts.items()}
            for name, x in part.items():
                if x is end:
                    raise ValueError(f"{name}: fewer parts than history has")
            new = self.encode(tokens, **part)
            state = new if state is None else state + new
        for name, rest in parts.items():
            if next(rest, end) is not end:
                raise ValueError(f"{name}: more parts than history has")
        if state is None:
            raise ValueError("history: no parts given; an empty history is a JaggedTensor of length 0")
        return state

    def _check_state(self, state: UserState) -> None:
        if not isinstance(state, UserState):
            raise ValueError(f"state must be a UserState, got {type(state).__name__}")
        config = self.config
        wanted = (config.num_heads, config.feature_width, config.head_width)
        shapes = (tuple(state.key_value.shape[1:]), tuple(state.key_sum.shape[1:]))
        if shapes != (wanted, wanted[:2]):
            raise ValueError(
                f"state: key_value must be [B, *{list(wanted)}] for this configuration, got "
                f"[B, *{list(state.key_value.shape[1:])}]; encode the histories with this module"
            )
        if self.identity is not None:
            tables = (len(config.identity_head_half_lives), config.identity_width)
            found = None if state.identity_value is None else tuple(state.identity_value.shape[1:])
            if (found, state.identity_key_range) != (tables, config.identity_key_range):
                raise ValueError(
                    f"state: identity tables must have [L, d] = {tables} and keys below "
                    f"{config.identity_key_range} for this configuration, got {found} and "
                    f"{state.identity_key_range}; encode the histories with this module"
                )

    def _decayed(self, state: UserState, elapsed: Tensor) -> UserState:
        if not isinstance(elapsed, Tensor) or elapsed.shape != (len(state),):
            found = list(elapsed.shape) if isinstance(elapsed, Tensor) else repr(elapsed)
            raise ValueError(f"elapsed must be a tensor [{len(state)}], got {found}")
        if elapsed.device.type == "cpu" and not bool((elapsed >= 0).all()):
            raise ValueError("elapsed must not be negative: a state cannot go back in time")

        def factor(half_lives: tuple[float, ...]) -> Tensor:  # [B, number of them]
            rates = decay_rates(half_lives, state.key_sum)
            return ops.reference.event_weights(None, elapsed, rates, state.key_sum[:, 0])

        dense = factor(self.half_lives)
        tensors = state.state_dict()
        tensors["key_value"] = state.key_value * dense[..., None, None]
        tensors["key_sum"] = state.key_sum * dense[..., None]
        if self.identity is not None:
            offsets, _, value, weight = state.identity_tables()
            identity = factor(self.config.identity_head_half_lives)[request_of_row(offsets)]
            tensors["identity_sum"] = weight * identity
            tensors["identity_value"] = value * identity[..., None]
        return UserState(**tensors)


def summaries(key_value: Tensor, key_sum: Tensor) -> tuple[Tensor, Tensor]:
    """A state's features as summaries of the history, to which the softmax read-out attends.

    Args:
        key_value: S [..., H, d_phi, d]; key_sum: z [..., H, d_phi].

    Returns:
        The means S / z [..., H, d_phi, d], and log z [..., H, d_phi]; zeros and -inf for a feature that
        no event has, or that is at most 2^-80 of its head's sum.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.ifa import summaries
        >>> mean, log_weight = summaries(torch.tensor([[[6.0], [0.0]]]), torch.tensor([[2.0, 0.0]]))
        >>> mean.flatten().tolist(), log_weight.exp().flatten().tolist()
        ([3.0, 0.0], [2.0, 0.0])
    """
    total = key_sum.sum(-1, keepdim=True)
    # these comparisons are False for NaN, which so stays NaN
    none = (total <= FORGOTTEN) | (key_sum / _scale(key_sum)[..., None] <= FORGOTTEN)
    weight = key_sum.masked_fill(none, 1.0)
    mean = key_value.masked_fill(none[..., None], 0.0) / weight[..., None]
    return mean, weight.log().masked_fill(none, -torch.inf)


def _scale(key_sum: Tensor) -> Tensor:
    """s_h = sum_f z_hf [..., H] for z [..., H, d_phi]: the sum of a history's features, or 1 if that is
    negligible (FORGOTTEN)."""
    total = key_sum.sum(-1)
    return torch.where(total > FORGOTTEN, total, 1.0)
