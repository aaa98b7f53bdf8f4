"""The candidate set as a set: relations between its candidates, for finding the best k together.

The paper states the goal, the best set instead of m independent scores. Its construction was not
available (only the abstract and the introduction), so this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules.config import IFAConfig
from ifa_torchrec.modules.history import counted
from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.pair_numbers import PairNumbers
from ifa_torchrec.modules.projections import ZeroLinear, reset_all
from ifa_torchrec.modules.softmax import SoftmaxAttention
from ifa_torchrec.ops.jagged import request_of_row

ATTENTIONS = {"softmax": SoftmaxAttention, "linear": InteractionFidelityAttention}


@dataclass(frozen=True)
class CandidateSetConfig:
    """How the candidates of a request see each other.

    Args:
        attention: how a candidate attends to the other candidates: "softmax", O(m^2), for sets of some
            hundreds; "linear", O(m), for larger ones, by the same operator as for the history; "none":
            not at all.
        num_heads: heads of this attention; they divide the width of its input. In a DLRM_IFA that is
            D / 2, rounded down to a multiple of the heads, but at least 1 per head.
        generate: whether a candidate is also scored given the candidates already taken, so that a set
            can be generated greedily; works with any attention, also "none".

    Raises:
        ConfigError: attention is not one of these, or num_heads is less than 1.

    Example:
        >>> from ifa_torchrec.modules import CandidateSetConfig
        >>> CandidateSetConfig(attention="linear").num_heads
        2
    """

    attention: Literal["none", "softmax", "linear"] = "none"
    num_heads: int = 2
    generate: bool = False

    def __post_init__(self) -> None:
        known = ["none", *ATTENTIONS]
        if self.attention not in known:
            raise ConfigError(
                f"CandidateSetConfig: attention must be one of {known}, got {self.attention!r}"
            )
        if self.num_heads < 1:
            raise ConfigError(f"CandidateSetConfig: num_heads must be at least 1, got {self.num_heads}")


class CandidateSetEncoder(nn.Module):
    """Self-attention among the candidates of a request.

    Jagged, for sets of 0 to 10^4 candidates; independent of other requests and of the order of the
    candidates. It is user-aware if the tokens are: DLRM_IFA passes each candidate's token plus what the
    candidate found in the user's history.

    Args:
        embedding_dim: D.
        config: CandidateSetConfig with an attention other than "none".
        backend: of the linear attention, one of ops.BACKENDS.
        device: of the parameters. If "meta", call ``to_empty`` and ``reset_parameters`` later.

    Raises:
        ValueError: config.attention is "none".
        ConfigError: embedding_dim is not a multiple of config.num_heads.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import CandidateSetEncoder
        >>> from ifa_torchrec.modules import CandidateSetConfig
        >>> encoder = CandidateSetEncoder(8, CandidateSetConfig("softmax"))
        >>> candidates = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 0, 2]))
        >>> encoder(candidates).values().shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        embedding_dim: int,
        config: CandidateSetConfig,
        backend: ops.Backend = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.attention == "none":
            raise ValueError("CandidateSetEncoder: attention 'none' needs no encoder")
        if embedding_dim % config.num_heads:
            raise ConfigError(
                f"CandidateSetEncoder: embedding_dim {embedding_dim} is not a multiple of num_heads "
                f"{config.num_heads}"
            )
        # softmax has no masses, which would need the matrix of scores
        masses = config.attention == "linear"
        self.attention = ATTENTIONS[config.attention](
            IFAConfig(embedding_dim, num_heads=config.num_heads, backend=backend, interest_mass=masses),
            device=device,
        )

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters; call after ``to_empty``."""
        reset_all(self)

    def forward(self, candidates: JaggedTensor, context: JaggedTensor | None = None) -> JaggedTensor:
        """
        Args:
            candidates: tokens [M, D] of B requests.
            context: tokens that the candidates attend to, of the same requests; None for the candidates
                themselves.

        Returns:
            JaggedTensor with the candidates' offsets and values [M, D], what each candidate finds in its
            set; to be used with the tokens, not instead of them.
        """
        return self.attention(candidates, candidates if context is None else context)


class Related(NamedTuple):
    """What TakenRelation computes for M candidates of B requests before it knows which are taken.

    Attributes:
        query: [M, T, D]; key: [M, D].
        offsets: [B + 1]; request: [M].
        ids: [M, F]; None if there are none.
        numbers: the ``table`` of PairNumbers; None if there is none, or to compute it when needed.
    """

    query: Tensor
    key: Tensor
    offsets: Tensor
    request: Tensor
    ids: Tensor | None
    numbers: Tensor | None = None


class TakenRelation(nn.Module):
    """How the candidates already taken into the set change the logits of a request's candidates.

    There is a term for each pair, summed over the taken candidates, so that two near-duplicates count
    twice:

        term_it = sum_{j taken, j != i} q_it . k_j + sum_f u_tf [id_f of i = id_f of j]
                                        + sum_{f > 0} p_tf [id_f of i, id_f of j]
        with q_it = W_t x_i and k_j = V x_j + b

    p is a number for each pair of ids, taken modulo ``BUCKETS``: the cross-product transformation of
    Wide & Deep learning (Cheng et al. 2016, arXiv 1606.07792) of one feature with itself. Tokens mix all
    that is known of a candidate and do not tell one complement from another; p does once a pair of
    categories was shown a few hundred times. The first feature, the item itself, has no such numbers:
    its pairs are too rare to be anything but noise.

    A candidate that is taken gets the terms of the other taken ones. The cost is linear in the number of
    candidates and of taken ones, and the terms are exactly 0 if nothing is taken. Id 0 is "unknown",
    equals no other id, and has no pairs. The construction is our own; W, u and p start at 0.

    Args:
        embedding_dim: D.
        num_outputs: T, terms per candidate.
        num_ids: F, id features that are compared; the first is the item itself.
        device: of the parameters.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import TakenRelation
        >>> relation = TakenRelation(8, num_outputs=2, num_ids=1)
        >>> candidates = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 2]))
        >>> category = torch.tensor([[7], [8], [7], [7], [9]])
        >>> relation(candidates, torch.tensor([True, False, False, True, False]), category).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        embedding_dim: int,
        num_outputs: int,
        num_ids: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.query_proj = ZeroLinear(embedding_dim, num_outputs * embedding_dim, device)
        self.key_proj = nn.Linear(embedding_dim, embedding_dim, device=device)
        self.same_proj = ZeroLinear(num_ids, num_outputs, device) if num_ids else None
        self.pair_queries = None
        if num_ids > 1:
            self.pair_queries = PairNumbers(num_ids - 1, num_outputs, device)

    def forward(self, candidates: JaggedTensor, taken: Tensor, ids: Tensor | None = None) -> Tensor:
        """
        Args:
            candidates: tokens [M, D] of B requests.
            taken: [M] bool.
            ids: [M, F] integers; required if there are id features.

        Returns:
            [M, T].

        Raises:
            ValueError: ``taken`` is not one bool per candidate, or ids does not have F columns.
        """
        return self.terms(self.related(candidates, ids), taken)

    def related(self, candidates: JaggedTensor, ids: Tensor | None = None) -> Related:
        """What ``terms`` and ``pairs`` need, whatever is taken; arguments as for ``forward``."""
        tokens, offsets = candidates.values(), candidates.offsets()
        wanted = 0 if self.same_proj is None else self.same_proj.in_features
        found = 0 if ids is None else ids.shape[1]
        if found != wanted:
            raise ValueError(f"ids must have {wanted} features, got {found}")
        query = self.query_proj(tokens).unflatten(1, (self.num_outputs, tokens.shape[1]))
        # no len(), which would fix a size in an exported graph
        request = request_of_row(offsets, tokens.shape[0])
        return Related(query, self.key_proj(tokens), offsets, request, ids)

    def terms(self, related: Related, taken: Tensor) -> Tensor:
        """What ``forward`` returns, [M, T], for ``taken`` [M] bool."""
        query, key, offsets, request, ids, _ = related
        check_taken(taken, request)
        given = key * taken[:, None]
        total = key.new_zeros(offsets.shape[0] - 1, key.shape[1]).index_add(0, request, given)
        others = total.index_select(0, request) - given
        term = (query * others[:, None]).sum(-1)
        if self.same_proj is None or ids is None:
            return term
        term = term + self.same_proj(_alike(ids, taken, request, key.dtype))
        if self.pair_queries is None:
            return term
        return term + self.pair_queries.of_taken(ids[:, 1:], taken, request, offsets.shape[0] - 1)

    def pairs(self, related: Related, other: Tensor) -> tuple[Tensor, Tensor]:
        """The terms between each of M candidates and one other candidate.

        Args:
            related: of M candidates.
            other: [M], the row of the other candidate for each.

        Returns:
            What the other one adds to the terms of each candidate, and what each adds to those of the
            other; both [M, T]. Meaningless for a candidate paired with itself.
        """
        query, key, ids = related.query, related.key, related.ids
        to = (query * key[other].unsqueeze(1)).sum(-1)
        back = (query[other] * key.unsqueeze(1)).sum(-1)
        return self._with_ids(to, back, related, None if ids is None else ids[other])

    def all_pairs(self, related: Related, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What ``pairs`` returns for each of ``rows`` [K] paired with all M, by matrix products; both
        [K, M, T]."""
        query, key, ids = related.query, related.key, related.ids
        tasks = self.num_outputs
        to = (key[rows] @ query.flatten(0, 1).T).unflatten(1, (-1, tasks))
        back = (query[rows].flatten(0, 1) @ key.T).unflatten(0, (-1, tasks)).transpose(1, 2)
        return self._with_ids(to, back, related, None if ids is None else ids[rows][:, None])

    def _with_ids(
        self, to: Tensor, back: Tensor, related: Related, others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add to the terms of pairs those of their ids, [M, F] and, of the other ones, [..., M, F]."""
        ids = related.ids
        if self.same_proj is None or ids is None or others is None:
            return to, back
        same = self.same_proj(((ids == others) & (ids != 0)).to(to.dtype))
        to, back = to + same, back + same
        if self.pair_queries is None:
            return to, back
        numbers = self.pair_queries.table() if related.numbers is None else related.numbers
        more, more_back = self.pair_queries.both(numbers, ids[:, 1:], others[..., 1:])
        return to + more, back + more_back


def check_taken(taken: Tensor, rows: Tensor) -> None:
    """Raise a ValueError unless ``taken`` is one bool for each of the rows [M]."""
    if taken.shape != rows.shape or taken.dtype != torch.bool:
        raise ValueError(
            f"taken must be [{rows.shape[0]}] bool, one per candidate, got {list(taken.shape)} "
            f"{taken.dtype}"
        )


def _alike(ids: Tensor, taken: Tensor, request: Tensor, dtype: torch.dtype) -> Tensor:
    """For each id [M, F] of a candidate, how many other taken candidates of its request share it,
    [M, F]. No size depends on values."""
    order = ids.argsort(dim=0, stable=True)
    order = order.gather(0, request[order].argsort(dim=0, stable=True))  # by request, then by id
    ranked, of = ids.gather(0, order), request[order]
    first = torch.zeros_like(ranked[:1], dtype=torch.bool)
    group = torch.cat([first, (ranked[1:] != ranked[:-1]) | (of[1:] != of[:-1])]).cumsum(0)
    counted = taken[:, None] & (ids != 0)
    weight = counted.to(dtype)
    total = torch.zeros_like(weight).scatter_add(0, group, weight.gather(0, order)).gather(0, group)
    found = torch.empty_like(total).scatter(0, order, total)
    return (found - weight).masked_fill(ids == 0, 0.0)


_WHOLE = 0.75
"""Share of the requests for which TakenSample takes all exposed candidates."""


class TakenSample(nn.Module):
    """Draws which of the exposed candidates are taken while training. For three requests in four these
    are all E exposed candidates, so that each is scored with what it was shown with, which is the most
    informative. For the others it is a random subset of uniform size 0 to E - 1, as in a growing set.

    It is a module so that tracing a model for a pipeline treats it as a leaf.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.candidate_set import TakenSample
        >>> exposed, offsets = torch.tensor([True, True, False, True]), torch.tensor([0, 3, 4])
        >>> taken = TakenSample()(exposed, offsets)
        >>> bool(taken[2]), int(taken.sum()) <= 3
        (False, True)
    """

    def forward(self, exposed: Tensor, offsets: Tensor) -> Tensor:
        """
        Args:
            exposed: [M] bool.
            offsets: [B + 1], request b has the candidates offsets[b]:offsets[b + 1].

        Returns:
            [M] bool.
        """
        request = request_of_row(offsets, exposed.shape[0])
        shown = counted(exposed, offsets).diff()
        share, whole = torch.rand(2, shown.shape[0], device=offsets.device)
        wanted = torch.where(whole < _WHOLE, shown, (share * shown).to(shown.dtype))
        # the exposed candidates of each request in random order, the others behind them
        lot = torch.rand(exposed.shape[0], device=offsets.device, dtype=torch.float64)
        order = (request + torch.where(exposed, lot / 2, 0.5)).argsort(stable=True)
        place = torch.arange(exposed.shape[0], device=offsets.device) - offsets[:-1][request]
        return torch.zeros_like(exposed).index_copy(0, order, place < wanted[request])
