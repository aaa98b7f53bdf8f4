"""The cost of a request other than time: FLOP per candidate, and bytes of the history to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ifa_torchrec import DLRM_IFA, InteractionFidelityAttention
from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.modules import (
    DINAttention,
    ETAAttention,
    HSTUAttention,
    LowRankAttention,
    MeanPooling,
    SDIMAttention,
    SequenceInteraction,
    SIMAttention,
    SoftmaxAttention,
    SOLARAttention,
)


@dataclass(frozen=True)
class Cost:
    """The cost of a request.

    Args:
        flop: FLOP per candidate: of all products that rank the request, divided by its candidates.
        read: bytes of the user's history that must be read.
    """

    flop: float
    read: float


@torch.no_grad()
def cost_of(model: DLRM_IFA, requests: list[RankingFeatures], from_state: bool = False) -> Cost:
    """The mean cost of requests.

    FLOP are those of matrix products, two per multiplication, computed from the shapes: by
    torch.utils.flop_counter, and for this package's operators by the formulas below. An
    eigendecomposition of n rows counts as 9 n^3; lookups, sums, exponentials and sorting as 0.

    Args:
        model: with any interaction.
        requests: batches of one request each.
        from_state: rank from precomputed user states; only for an "ifa" model.

    Returns:
        The mean Cost.
    """
    interaction = model.candidate_arch.sequence_interaction
    flop, read = 0.0, 0.0
    for request in requests:
        events, candidates = len(request.history_age), len(request.candidate_dense)
        state = model.encode(request) if from_state else None
        asked: list[dict[str, Any]] = []
        hook = None
        if interaction is not None and state is None:
            hook = interaction.register_forward_pre_hook(
                lambda _, given, named, asked=asked: asked.append(_named(given) | named),
                with_kwargs=True,
            )
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            model(request) if state is None else model.attend(request, state)
        if hook is not None:
            hook.remove()
        ids = asked[0].get("history_ids") if asked else None
        if state is not None and state.identity_key is not None:
            ids = state.identity_key[:, None] + 1
        flop += counter.get_total_flops() / max(candidates, 1) / len(requests)
        read += history_bytes(interaction, events, candidates, ids) / len(requests)
    return Cost(flop, read)


def history_bytes(
    interaction: SequenceInteraction | None, events: int, candidates: int, ids: Tensor | None
) -> float:
    """Bytes of a user's history that must be read to rank a request, from the module's sizes.

    If an interaction can be computed from a summary of fixed size, this is that summary, whether or not
    this package stores one; otherwise the events that it attends to, each a token of D numbers and its
    age (for a search, at most its number per candidate). Identity heads add one row per distinct id of
    the user. A number is 4 bytes, a key 8. Item tables, ids and the candidates' data are not counted.

    Args:
        interaction: None for no history.
        events: n, the request's events.
        candidates: m, the request's candidates.
        ids: [n, K], the history's ids that the interaction compares, 0 for none; None if it compares
            none.
    """
    if interaction is None:
        return 0.0
    numbers = next(count for kind, count in _DENSE if isinstance(interaction, kind))
    config, total = interaction.config, 4 * numbers(interaction, events, candidates)
    if ids is not None and config.identity_features:
        columns = ids[:, : len(config.identity_features)].T
        rows = sum(len(column[column != 0].unique()) for column in columns)
        total += rows * (8 + 4 * len(config.identity_head_half_lives) * (config.identity_width + 1))
    return float(total)


def _width(peer: SequenceInteraction) -> int:
    """H d"""
    return peer.config.num_heads * peer.config.head_width


def _weightings(peer: SequenceInteraction) -> int:
    return peer.config.num_heads if peer.config.half_lives else 1


def _event(peer: SequenceInteraction) -> int:
    """Numbers per event: its token and, if it is used, its age."""
    return peer.config.embedding_dim + (peer.config.half_lives is not None)


def _ifa(peer: Any, n: int, m: int) -> float:
    return peer.config.num_heads * peer.config.feature_width * (peer.config.head_width + 1)


def _mean(peer: Any, n: int, m: int) -> float:
    return _weightings(peer) * (peer.config.embedding_dim + 1)


def _low_rank(peer: Any, n: int, m: int) -> float:
    return _width(peer) * 2 * peer.latents.shape[1] + peer.config.num_heads


def _solar(peer: Any, n: int, m: int) -> float:
    rank = min(peer.rank, peer.config.embedding_dim)
    return _weightings(peer) * (rank * peer.config.embedding_dim + 1)


def _sdim(peer: Any, n: int, m: int) -> float:
    buckets = peer.num_groups << peer.group_bits
    return buckets * _weightings(peer) * (peer.config.embedding_dim + 1)


def _hstu(peer: Any, n: int, m: int) -> float:
    # keys and values after the first layer, and the age for the time bias
    return min(n, peer.recent_length) * (2 * _width(peer) + 1)


def _recent(peer: Any, n: int, m: int) -> float:
    return min(n, peer.recent_length) * _event(peer)


def _sim(peer: Any, n: int, m: int) -> float:
    return min(n, m * peer.search_length) * _event(peer)


def _eta(peer: Any, n: int, m: int) -> float:
    heads, bits = peer.config.num_heads, peer.hyperplanes.shape[1]
    return n * heads * bits / 32 + min(n, m * heads * peer.search_length) * _event(peer)


def _softmax(peer: Any, n: int, m: int) -> float:
    recent = peer.recent_length
    return (n if recent is None else min(n, recent)) * _event(peer)


_DENSE: list[tuple[type, Callable[[Any, int, int], float]]] = [
    (InteractionFidelityAttention, _ifa),
    (MeanPooling, _mean),
    (SDIMAttention, _sdim),
    (SOLARAttention, _solar),
    (HSTUAttention, _hstu),
    (DINAttention, _recent),
    (SIMAttention, _sim),
    (LowRankAttention, _low_rank),
    (ETAAttention, _eta),
    (SoftmaxAttention, _softmax),  # also TWIN, a subclass, which must score all events
]
"""For each type, the numbers that its dense heads read from a history; subclasses before their bases."""


def _named(given: tuple[Any, ...]) -> dict[str, Any]:
    names = ("candidates", "history", "history_age", "history_ids", "candidate_ids", "history_gates")
    return dict(zip(names, given, strict=False))


def _product(*sizes: int) -> int:
    return 2 * math.prod(sizes)


def _encode(history: Any, offsets: Any, key_weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    heads, width, dim = key_weight
    features = out_shape[0][2]  # of key_value [B, H, d_phi, d]
    return _product(history[0], heads, width, 2 * dim + features)


def _attend(candidates: Any, offsets: Any, query_weight: Any, key_value: Any, *_: Any, **__: Any) -> int:
    heads, width, dim = query_weight
    features = key_value[2]
    return _product(candidates[0], heads, width * dim + features * (width + 1))


def _attend_softmax(
    candidates: Any, offsets: Any, query_weight: Any, summaries: Any, *_: Any, **__: Any
) -> int:
    heads, width, dim = query_weight
    return _product(candidates[0], heads, width, dim + 2 * summaries[2])


def _eigh(matrices: Any, *_: Any, **__: Any) -> int:
    *batch, _n, n = matrices
    return 9 * n**3 * math.prod(batch)


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    *batch, m, d = query
    return _product(*batch, m, key[-2], d + value[-1])


_FORMULAS: dict[Any, Any] = {
    torch.ops.ifa.encode: _encode,
    torch.ops.ifa.attend: _attend,
    torch.ops.ifa.attend_softmax: _attend_softmax,
    torch.ops.aten._linalg_eigh: _eigh,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
}
