"""What every sequence interaction shares: the call, the identity heads, the masses, the output.

IFA and the peers it is compared with differ in their dense heads alone, so that a comparison
changes one word, and what is credited to an attention is that attention's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules.user_state import UserState, distinct_keys
from ifa_torchrec.ops.jagged import request_of_row


@dataclass(frozen=True)
class IFAConfig:
    """How candidates meet a history.

    Args:
        embedding_dim: D, width of the tokens and of the output.
        num_heads: H, dense heads.
        head_dim: d, width of a head; None means embedding_dim / num_heads.
        feature_map: phi of the dense heads: "elu", "relu" or "hedgehog".
        half_lives: for each dense head, the age at which an event counts half, in the unit of
            the ages; math.inf for a head that never forgets. None means that no head does.
        interest_mass: give the model log(1 + matched / mass_scale) of each head, which the
            normalisation would take away. Our own addition.
        mass_scale: how much matching history makes the mass log 2.
        identity_features: names of the id features that get identity heads, one column of
            history_ids and candidate_ids each. Our own addition.
        identity_buckets: R, buckets of an identity feature: an id falls into bucket id mod R,
            in training as in a cached state. A feature with at most R ids never collides.
            Nothing of that size is built: a state holds L (d + 1) floats for each bucket that an
            event of the user fell into.
        identity_half_lives: L half-lives; each identity feature has a head for each.
        eps: keeps the division defined where nothing matched.
        backend: one of ops.BACKENDS.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        >>> from ifa_torchrec import IFAConfig
        >>> IFAConfig(embedding_dim=64, num_heads=4).head_width
        16
    """

    embedding_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    feature_map: Literal["elu", "relu", "hedgehog"] = "elu"
    half_lives: tuple[float, ...] | None = None
    interest_mass: bool = True
    mass_scale: float = 1.0
    identity_features: tuple[str, ...] = ()
    identity_buckets: int = 4096
    identity_half_lives: tuple[float, ...] = (math.inf,)
    eps: float = 1e-6
    backend: ops.Backend = "auto"

    def __post_init__(self) -> None:
        def check(good: bool, message: str) -> None:
            if not good:
                raise ConfigError(f"IFAConfig: {message}")

        check(self.embedding_dim > 0, f"embedding_dim must be positive, got {self.embedding_dim}")
        check(self.num_heads > 0, f"num_heads must be positive, got {self.num_heads}")
        check(
            self.head_dim is not None or self.embedding_dim % self.num_heads == 0,
            f"embedding_dim {self.embedding_dim} is no multiple of num_heads {self.num_heads}; "
            "give head_dim",
        )
        check(
            self.head_dim is None or self.head_dim > 0, f"head_dim must be positive, got {self.head_dim}"
        )
        check(
            self.feature_map in ops.FEATURE_MAPS,
            f"feature_map {self.feature_map!r} is none of {sorted(ops.FEATURE_MAPS)}",
        )
        check(
            self.half_lives is None or len(self.half_lives) == self.num_heads,
            f"half_lives {self.half_lives} must be one for each of the {self.num_heads} heads",
        )
        for name in ("half_lives", "identity_half_lives"):
            values = getattr(self, name) or ()
            check(all(v > 0 for v in values), f"{name} must be positive, got {values}")
        check(
            not isinstance(self.identity_features, str),
            f"identity_features must be a tuple of names, got {self.identity_features!r}",
        )
        check(
            len(self.identity_half_lives) > 0 or not self.identity_features,
            "identity_half_lives is empty; (math.inf,) means no decay",
        )
        check(self.mass_scale > 0, f"mass_scale must be positive, got {self.mass_scale}")
        check(self.eps > 0, f"eps must be positive, got {self.eps}")
        check(
            self.identity_buckets > 0, f"identity_buckets must be positive, got {self.identity_buckets}"
        )
        check(self.backend in ops.BACKENDS, f"backend {self.backend!r} is none of {list(ops.BACKENDS)}")

    @property
    def head_width(self) -> int:
        """d, the width of a head."""
        return self.head_dim or self.embedding_dim // self.num_heads

    @property
    def feature_width(self) -> int:
        """d_phi, the features that the feature map makes of a head's vector."""
        return self.head_width * ops.FEATURE_MAPS[self.feature_map].expansion

    @property
    def num_identity_heads(self) -> int:
        """Identity heads in all: features times half-lives."""
        return len(self.identity_features) * len(self.identity_half_lives)

    @property
    def identity_key_range(self) -> int:
        """K R; a state's identity keys are below it. 0 without identity features."""
        return len(self.identity_features) * self.identity_buckets


def at_least_one(name: str, value: int) -> int:
    """The value of a constructor's argument.

    Raises:
        ValueError: it is less than 1; the message names it.

    Example:
        >>> from ifa_torchrec.modules.interaction import at_least_one
        >>> at_least_one("rank", 32)
        32
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def decay_rates(half_lives: tuple[float, ...]) -> Tensor:
    """lambda = ln 2 / half-life, [len(half_lives)] float32; 0 for an infinite half-life.

    Example:
        >>> import math
        >>> from ifa_torchrec.modules.interaction import decay_rates
        >>> decay_rates((math.inf, math.log(2))).tolist()
        [0.0, 1.0]
    """
    return torch.tensor([math.log(2.0) / h for h in half_lives])


class SequenceInteraction(nn.Module):
    """Base of IFA and its peers: dense heads (of the subclass), identity heads, masses, output.

    ``output_proj`` maps [dense head outputs | identity head outputs | masses] to D. The mass of a
    head is log(1 + matched / mass_scale), where matched is the head's normaliser: for IFA
    phi(q)^T z, for softmax the sum of w_i exp(q k_i), for mean pooling the sum of w_i. The
    projections start by likeness, see ``_projection``.

    Args:
        config: IFAConfig; peers leave feature_map, eps and backend unused in their dense heads.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.modules import SequenceInteraction
        >>> class LatestEvent(SequenceInteraction):  # a peer is its dense heads
        ...     def dense_heads(self, candidates, history, history_age, *ids):
        ...         latest = self.value_proj(history.values()[history.offsets()[1:] - 1])
        ...         heads = latest.repeat_interleave(candidates.lengths(), dim=0)
        ...         return heads.unflatten(1, (self.config.num_heads, -1)), None
        >>> peer = LatestEvent(IFAConfig(embedding_dim=8, num_heads=2, interest_mass=False))
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 2]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    decay: Tensor

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_width
        self.value_proj = self._projection()
        self.register_buffer(
            "decay",
            decay_rates(config.half_lives or (math.inf,) * config.num_heads),
            persistent=False,
        )
        self.identity = IdentityHeads(config) if config.identity_features else None
        features = width + config.num_identity_heads * config.head_width
        if config.interest_mass:
            features += config.num_heads + config.num_identity_heads
        self.output_proj = nn.Linear(features, config.embedding_dim)
        copies, rest = divmod(width, config.embedding_dim)
        if rest == 0:
            with torch.no_grad():
                start = torch.eye(config.embedding_dim).repeat(1, copies) / copies
                self.output_proj.weight[:, :width] = start
                self.output_proj.bias.zero_()

    def _projection(self, gain: float = 1.0) -> nn.Linear:
        """A projection of tokens to the dense heads; where their width H d is D, or a multiple of
        it, it starts as ``gain`` times the identity, or as many of them.

        So, before any training, an event counts as it resembles the candidate, and the answer
        lies in the tokens' own space, where comparing it with the candidate means something.
        From a random start neither softmax nor linear attention finds that in a million rows.
        """
        width = self.config.num_heads * self.config.head_width
        projection = nn.Linear(self.config.embedding_dim, width, bias=False)
        copies, rest = divmod(width, self.config.embedding_dim)
        if rest == 0:
            with torch.no_grad():
                projection.weight.copy_(gain * torch.eye(self.config.embedding_dim).repeat(copies, 1))
        return projection

    def forward(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
    ) -> JaggedTensor:
        """
        Args:
            candidates: B requests' candidate tokens, values [M, D].
            history: B requests' event tokens, values [N, D], oldest first; its weights, if it
                has any, are the event weights a_i >= 0.
            history_age: [N] >= 0, or None for 0.
            history_ids: [N, K] int64 and candidate_ids: [M, K] int64, a column for each of
                id_features (the config's identity_features, but for a peer that searches by one
                more); needed where there are any.

        Returns:
            JaggedTensor with the candidates' offsets and values [M, D].

        Raises:
            ValueError: shapes do not fit, lengths do not sum to the number of rows, an age or
                an event weight is negative.
        """
        self._check(history, history_age, history_ids, "history")
        self._check(candidates, None, candidate_ids, "candidates")
        self._check_same_requests(candidates, len(history.offsets()) - 1)
        arguments = (candidates, history, history_age, history_ids, candidate_ids)
        heads, mass = self.dense_heads(*arguments)
        identity = None
        if self.identity is not None:
            identity = self.identity(*arguments)
        return self._output(candidates, heads, mass, identity)

    @property
    def id_features(self) -> tuple[str, ...]:
        """The id features whose ids ``forward`` takes, a column each; the identity features first."""
        return self.config.identity_features

    def dense_heads(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None,
        history_ids: Tensor | None,
        candidate_ids: Tensor | None,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [M, H, d] and masses [M, H] of the dense heads; None is allowed for the latter
        where the config asks for no masses."""
        raise NotImplementedError

    def heads(self, projection: nn.Linear) -> Tensor:
        """A projection's weight as [H, d, D]."""
        return projection.weight.unflatten(0, (self.config.num_heads, self.config.head_width))

    def _output(
        self,
        candidates: JaggedTensor,
        heads: Tensor,
        mass: Tensor | None,
        identity: tuple[Tensor, Tensor] | None,
    ) -> JaggedTensor:
        parts = [heads.flatten(1)]
        if identity is not None:
            parts.append(identity[0].flatten(1))
        if self.config.interest_mass:
            if mass is None:
                raise ValueError(
                    f"{type(self).__name__}.dense_heads gave no masses; interest_mass asks for them"
                )
            parts.append(mass)
            if identity is not None:
                parts.append(self._mass(identity[1]))
        dtype = self.output_proj.weight.dtype
        values = self.output_proj(torch.cat([part.to(dtype) for part in parts], dim=1))
        # A batch without events still gives every parameter a gradient: DDP waits for all of them.
        values = values + sum(parameter.flatten()[:0].sum() for parameter in self.parameters())
        return JaggedTensor(values, lengths=candidates.lengths(), offsets=candidates.offsets())

    def _mass(self, matched: Tensor) -> Tensor:
        return torch.log1p(matched / self.config.mass_scale)

    def _mass_of_log(self, log_matched: Tensor) -> Tensor:
        """The same of a logarithm, which may be far beyond what exp can give."""
        log_ratio = log_matched - math.log(self.config.mass_scale)
        return torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))

    def _log_weights(self, weights: Tensor | None, age: Tensor | None, tokens: Tensor) -> Tensor | None:
        """log w_hi, [H, n]; None where every weight is 1. A weight of 0 becomes 1e-30."""
        if weights is None and (age is None or self.config.half_lives is None):
            return None
        bias = tokens.new_zeros(self.config.num_heads, tokens.shape[0])
        if age is not None:
            bias = bias - self.decay[:, None].to(tokens.dtype) * age.to(tokens.dtype)
        return bias if weights is None else bias + weights.to(tokens.dtype).clamp(min=1e-30).log()

    def _check(self, tokens: JaggedTensor, age: Tensor | None, ids: Tensor | None, name: str) -> None:
        if not isinstance(tokens, JaggedTensor):
            raise ValueError(f"{name} must be a JaggedTensor, got {type(tokens).__name__}")
        values = tokens.values()
        if values.dim() != 2 or values.shape[1] != self.config.embedding_dim:
            raise ValueError(
                f"{name}: values must be [rows, {self.config.embedding_dim}], got {list(values.shape)}"
            )
        if age is not None and age.shape != values.shape[:1]:
            raise ValueError(
                f"history_age must be [{len(values)}], one age an event, got {list(age.shape)}"
            )
        id_features = self.id_features
        if id_features:
            wanted = (values.shape[0], len(id_features))  # len() would fix it in an exported graph
            which = "history_ids" if name == "history" else "candidate_ids"
            if ids is None or tuple(ids.shape) != wanted:
                got = "None" if ids is None else list(ids.shape)
                raise ValueError(
                    f"{which} must be {list(wanted)}, one for each of {id_features}, got {got}"
                )
        # On a GPU, and in a compiled graph, looking at values would wait for the device.
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            total = int(tokens.offsets()[-1])
            if total != len(values):
                raise ValueError(f"{name}: lengths sum to {total}, but there are {len(values)} rows")
            weights = tokens.weights_or_none()
            if age is not None and not bool((age >= 0).all()):
                event = int((~(age >= 0)).nonzero()[0])
                raise ValueError(
                    f"history_age: event {event} has a negative age or NaN; an event after the request "
                    "must not be in its history"
                )
            if name == "history" and weights is not None and not bool((weights >= 0).all()):
                raise ValueError(
                    f"history: event {int((~(weights >= 0)).nonzero()[0])} has a negative weight or NaN"
                )

    def _check_same_requests(self, candidates: JaggedTensor, requests: int) -> None:
        found = len(candidates.offsets()) - 1
        if found != requests:
            raise ValueError(f"candidates are of {found} requests, the histories of {requests}")


class IdentityHeads(nn.Module):
    """Linear attention whose phi is the one-hot of an id's bucket: "the same item?".

    For each identity feature and half-life: how much of the history has the candidate's id, and
    the mean value of those events. Our own addition to the paper's algebra.

    Args:
        config: IFAConfig with identity_features.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.modules.interaction import IdentityHeads
        >>> heads = IdentityHeads(IFAConfig(embedding_dim=8, num_heads=2, identity_features=("item",)))
        >>> history = JaggedTensor(torch.randn(3, 8), lengths=torch.tensor([3]))
        >>> candidates = JaggedTensor(torch.randn(2, 8), lengths=torch.tensor([2]))
        >>> items, asked = torch.tensor([[7], [7], [9]]), torch.tensor([[7], [8]])
        >>> outputs, matched = heads(candidates, history, None, items, asked)
        >>> outputs.shape, matched.flatten().tolist()
        (torch.Size([2, 1, 4]), [2.0, 0.0])
    """

    decay: Tensor

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.config = config
        width = len(config.identity_features) * config.head_width
        self.value_proj = nn.Linear(config.embedding_dim, width, bias=False)
        self.register_buffer("decay", decay_rates(config.identity_half_lives), persistent=False)

    def forward(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None,
        history_ids: Tensor,
        candidate_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, K * L, d] and matched weights [M, K * L], by joining ids.

        Nothing of the size of the buckets is built.
        """
        outputs, matched = [], []
        for k, weight in enumerate(self._value_weights()):
            token_sum, weight_sum = ops.match(
                self.bucket(candidate_ids[:, k]),
                candidates.offsets(),
                history.values(),
                self.bucket(history_ids[:, k]),
                history.offsets(),
                history.weights_or_none(),
                history_age,
                self.decay,
                self.config.backend,
            )
            mean = token_sum / (weight_sum[..., None] + self.config.eps)
            outputs.append(mean @ weight.to(mean.dtype).T)
            matched.append(weight_sum)
        return torch.cat(outputs, dim=1), torch.cat(matched, dim=1)

    def encode(
        self, history: JaggedTensor, history_age: Tensor | None, history_ids: Tensor
    ) -> dict[str, Any]:
        """The state's tables: UserState's fields whose names begin with identity."""
        values = history.values()
        dtype = torch.promote_types(values.dtype, torch.float32)
        weight = ops.reference.event_weights(
            history.weights_or_none(), history_age, self.decay, values.to(dtype)
        )
        keys = self.keys(history_ids)
        offsets, key, row = distinct_keys(
            request_of_row(history.offsets())[:, None].expand_as(keys).flatten(),
            keys.flatten(),
            len(history.offsets()) - 1,
            self.config.identity_key_range,
        )
        value_sum = values.new_zeros(key.shape[0], len(self.decay), self.config.head_width, dtype=dtype)
        weight_sum = values.new_zeros(key.shape[0], len(self.decay), dtype=dtype)
        for k, projection in enumerate(self._value_weights()):
            value = values.to(dtype) @ projection.to(dtype).T
            mine = row.view_as(keys)[:, k]
            value_sum = value_sum.index_add(0, mine, weight[..., None] * value[:, None])
            weight_sum = weight_sum.index_add(0, mine, weight)
        return {
            "identity_offsets": offsets,
            "identity_key": key,
            "identity_value": value_sum,
            "identity_sum": weight_sum,
            "identity_key_range": self.config.identity_key_range,
        }

    def attend(
        self, candidates: JaggedTensor, state: UserState, candidate_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs [M, K * L, d] and matched weights [M, K * L], read from the state's tables."""
        offsets, key, values, weights = state.identity_tables()
        key_range = self.config.identity_key_range
        there = request_of_row(offsets, key.shape[0]) * key_range + key
        wanted = request_of_row(candidates.offsets(), candidate_ids.shape[0])[:, None] * key_range
        wanted = wanted + self.keys(candidate_ids)  # [M, K]
        row = torch.searchsorted(there, wanted)
        # what is not there reads one more row, of zeros
        found = F.pad(there, (0, 1), value=-1)[row] == wanted
        row = torch.where(found, row, there.shape[0])
        total = F.pad(weights, (0, 0, 0, 1))[row]  # [M, K, L]
        value = F.pad(values, (0, 0, 0, 0, 0, 1))[row]  # [M, K, L, d]
        outputs = value / (total[..., None] + self.config.eps)
        return outputs.flatten(1, 2), total.flatten(1)

    def keys(self, ids: Tensor) -> Tensor:
        """The key of each id in a state's tables: feature number times R plus bucket; [n, K]."""
        config = self.config
        first = torch.arange(0, config.identity_key_range, config.identity_buckets, device=ids.device)
        return first + self.bucket(ids)

    def bucket(self, ids: Tensor) -> Tensor:
        """The bucket of each id, in 0..R-1."""
        return ids % self.config.identity_buckets

    def _value_weights(self) -> Tensor:
        return self.value_proj.weight.unflatten(0, (-1, self.config.head_width))
