"""The candidate set as a set: relations between its candidates, and the best k of them together.

The paper names the goal, the best set and not m independent scores; its construction was not at
hand (only the abstract and the introduction), so this one is ours.
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
        attention: how each is seen beside all others: "softmax", O(m^2), for sets of some hundreds;
            "linear", O(m), for larger ones, the same op that meets the history; "none": not.
        num_heads: heads of this attention; they share the width of what it is given. In a DLRM_IFA
            this is D / 2, rounded down to a multiple of the heads, but at least 1 a head.
        generate: whether each is also seen beside those that are taken already, so that a set can be
            generated greedily; with any attention, "none" too.

    Raises:
        ConfigError: attention is none of these, or there is no head.

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
            raise ConfigError(f"CandidateSetConfig: attention {self.attention!r} is none of {known}")
        if self.num_heads < 1:
            raise ConfigError(f"CandidateSetConfig: num_heads must be at least 1, got {self.num_heads}")


class CandidateSetEncoder(nn.Module):
    """Self-attention among the candidates of a request: each is seen beside the others.

    Jagged, for sets of 0 to 10^4; independent of other requests and of the order of the
    candidates. It is user-aware where the tokens are: DLRM_IFA hands it each candidate's token
    plus what the user's history answered to it.

    Args:
        embedding_dim: D.
        config: CandidateSetConfig, with an attention.
        backend: of the linear attention, one of ops.BACKENDS.
        device: of the parameters; after the meta device, ``to_empty`` and ``reset_parameters``.

    Raises:
        ValueError: config.attention is "none".
        ConfigError: embedding_dim is no multiple of config.num_heads.

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
                f"CandidateSetEncoder: embedding_dim {embedding_dim} is no multiple of num_heads "
                f"{config.num_heads}"
            )
        # by softmax without masses, for which a matrix of scores would have to be kept
        masses = config.attention == "linear"
        self.attention = ATTENTIONS[config.attention](
            IFAConfig(embedding_dim, num_heads=config.num_heads, backend=backend, interest_mass=masses),
            device=device,
        )

    def reset_parameters(self) -> None:
        """Give all parameters their start again; also after ``to_empty``."""
        reset_all(self)

    def forward(self, candidates: JaggedTensor, context: JaggedTensor | None = None) -> JaggedTensor:
        """
        Args:
            candidates: tokens [M, D] of B requests.
            context: tokens that the candidates are seen beside, of the same requests; None for
                the candidates themselves. To build a set item by item, those taken so far.

        Returns:
            JaggedTensor with the candidates' offsets and values [M, D], what each finds in its
            context; to be put beside the tokens, not in their place.
        """
        return self.attention(candidates, candidates if context is None else context)


class Related(NamedTuple):
    """What TakenRelation makes of M candidates of B requests before it knows which are taken.

    Attributes:
        query: [M, T, D]; key: [M, D].
        offsets: [B + 1]; request: [M].
        ids: [M, F]; None without any.
        numbers: of pairs of ids, their ``table``; None without, or to be made where it is needed.
    """

    query: Tensor
    key: Tensor
    offsets: Tensor
    request: Tensor
    ids: Tensor | None
    numbers: Tensor | None = None


class TakenRelation(nn.Module):
    """What those already taken into the set do to the logits of a request's candidates.

    A term for each pair, summed over what is taken, so that two near-duplicates count twice:

        term_it = sum_{j taken, j != i} q_it . k_j + sum_f u_tf [id_f of i = id_f of j]
                                        + sum_{f > 0} p_tf [id_f of i, id_f of j]
        with q_it = W_t x_i and k_j = V x_j + b

    p is a number for each pair of ids, by their remainders of ``BUCKETS``: the cross-product
    transformation of Wide & Deep learning (Cheng et al. 2016, arXiv 1606.07792), of one feature with
    itself. What tokens say of a pair, a mixture of all that they hold, does not tell one complement from
    another; p does as soon as a pair of categories was shown some hundred times. Not of the first
    feature, the item itself, whose pairs are too rare to be anything but noise.

    A candidate that is taken itself is seen beside the other ones. Linear in candidates and in what is
    taken, and exactly 0 where nothing is. Id 0 is "unknown", is like no other, and has no pairs. The
    whole is our own; W, u and p start at 0.

    Args:
        embedding_dim: D.
        num_outputs: T, terms of a candidate.
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
            ids: [M, F] integers; needed where there are id features.

        Returns:
            [M, T].

        Raises:
            ValueError: ``taken`` is not one bool a candidate, or the ids are not F.
        """
        return self.terms(self.related(candidates, ids), taken)

    def related(self, candidates: JaggedTensor, ids: Tensor | None = None) -> Related:
        """What ``terms`` and ``pairs`` need of the candidates, whatever is taken; as ``forward``'s."""
        tokens, offsets = candidates.values(), candidates.offsets()
        wanted = 0 if self.same_proj is None else self.same_proj.in_features
        found = 0 if ids is None else ids.shape[1]
        if found != wanted:
            raise ValueError(f"ids must be of {wanted} features, got {found}")
        query = self.query_proj(tokens).unflatten(1, (self.num_outputs, tokens.shape[1]))
        # no len(), which would fix a size in an exported graph
        request = request_of_row(offsets, tokens.shape[0])
        return Related(query, self.key_proj(tokens), offsets, request, ids)

    def terms(self, related: Related, taken: Tensor) -> Tensor:
        """What ``forward`` gives, [M, T], of ``taken`` [M] bool."""
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
        """What each of M candidates and one other do to each other.

        Args:
            related: of M candidates.
            other: [M] rows of them, which one stands beside each.

        Returns:
            What the other one adds to the terms of each, and each to those of the other; [M, T] both. Of
            a candidate beside itself that means nothing.
        """
        query, key, ids = related.query, related.key, related.ids
        to = (query * key[other].unsqueeze(1)).sum(-1)
        back = (query[other] * key.unsqueeze(1)).sum(-1)
        return self._with_ids(to, back, related, None if ids is None else ids[other])

    def all_pairs(self, related: Related, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What ``pairs`` gives with each of ``rows`` [K] beside all M, by products of matrices;
        [K, M, T] both."""
        query, key, ids = related.query, related.key, related.ids
        tasks = self.num_outputs
        to = (key[rows] @ query.flatten(0, 1).T).unflatten(1, (-1, tasks))
        back = (query[rows].flatten(0, 1) @ key.T).unflatten(0, (-1, tasks)).transpose(1, 2)
        return self._with_ids(to, back, related, None if ids is None else ids[rows][:, None])

    def _with_ids(
        self, to: Tensor, back: Tensor, related: Related, others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The terms of pairs, with those of their ids, [M, F], and the other ones', [..., M, F]."""
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
            f"taken must be [{rows.shape[0]}] bool, one a candidate; got {list(taken.shape)} "
            f"{taken.dtype}"
        )


def _alike(ids: Tensor, taken: Tensor, request: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of those of a candidate's request that are taken, other than itself, have its id, of
    ids [M, F]; [M, F]. No size depends on what is in a tensor."""
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
"""Share of the requests of which TakenSample takes all that were exposed."""


class TakenSample(nn.Module):
    """Draws which of the exposed candidates are taken while training: of three requests of four all E of
    them, so that each is seen beside what it was shown with, which says most; and of the rest a number
    between 0 and E - 1, each as likely, and any of them, as in a set that grows.

    A module, so that tracing a model for a pipeline meets it as a leaf.

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
            offsets: [B + 1], the requests' candidates.

        Returns:
            [M] bool.
        """
        request = request_of_row(offsets, exposed.shape[0])
        shown = counted(exposed, offsets).diff()
        share, whole = torch.rand(2, shown.shape[0], device=offsets.device)
        wanted = torch.where(whole < _WHOLE, shown, (share * shown).to(shown.dtype))
        # the exposed of each request in an order of their own, the others behind them
        lot = torch.rand(exposed.shape[0], device=offsets.device, dtype=torch.float64)
        order = (request + torch.where(exposed, lot / 2, 0.5)).argsort(stable=True)
        place = torch.arange(exposed.shape[0], device=offsets.device) - offsets[:-1][request]
        return torch.zeros_like(exposed).index_copy(0, order, place < wanted[request])
