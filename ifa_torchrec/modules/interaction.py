"""What every sequence interaction shares: the call, the identity heads, the masses, the output.

IFA and the peers it is compared with differ in their dense heads alone, so that a comparison
changes one word, and what is credited to an attention is that attention's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import ops
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules.user_state import UserState, distinct_keys
from ifa_torchrec.ops.jagged import request_of_row

FORGOTTEN = 2.0**-80
"""A sum of weights that is no larger counts as none: what is left of an event after 80 half-lives. Well
above what float32 can hold, so that a mean's gradient, 1 / sum of it, is finite."""
_SMALLEST, _LARGEST = 1e-12, 1e12
"""Of eps and mass_scale; beyond, float32 has infinities where there should be numbers."""
_KEYS = 2**36
"""Most identity keys K R; times 2^26 requests they still are int64."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        mass_scale: how much matching history makes the mass log 2; 1e-12 to 1e12.
        identity_features: names of the id features that get identity heads, one column of
            history_ids and candidate_ids each. Id 0 is "unknown" and matches nothing, itself
            neither. Our own addition.
        identity_buckets: R, buckets of an identity feature: an id falls into bucket id mod R,
            in training as in a cached state. A feature with at most R ids never collides.
            Nothing of that size is built: a state holds L (d + 1) floats for each bucket that an
            event of the user fell into. K R is at most 2^36.
        identity_half_lives: L half-lives; each identity feature has a head for each.
        eps: keeps the division of the dense heads defined where nothing matched: it is added to
            what matched, in units of the features that the history holds in all, sum_f z_hf. So an
            old history answers as a young one does; 1e-12 to 1e12.
        backend: one of ops.BACKENDS.

    Raises:
        ConfigError: a value is out of range; the message names it.

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
            check(
                all(v >= 1e-30 for v in values),
                f"{name} must be positive, 1e-30 or more (math.inf: no decay), got {values}",
            )
        check(
            not isinstance(self.identity_features, str),
            f"identity_features must be a tuple of names, got {self.identity_features!r}",
        )
        check(
            len(self.identity_half_lives) > 0 or not self.identity_features,
            "identity_half_lives is empty; (math.inf,) means no decay",
        )
        for name in ("mass_scale", "eps"):
            value = getattr(self, name)
            check(
                _SMALLEST <= value <= _LARGEST,
                f"{name} must be positive, {_SMALLEST} to {_LARGEST}, got {value}",
            )
        check(
            self.identity_buckets > 0, f"identity_buckets must be positive, got {self.identity_buckets}"
        )
        check(
            self.identity_key_range <= _KEYS,
            f"identity_buckets {self.identity_buckets} of {len(self.identity_features)} features are "
            f"{self.identity_key_range} keys; there can be 2^36",
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


def decay_rates(half_lives: tuple[float, ...], tokens: Tensor | None = None) -> Tensor:
    """lambda = ln 2 / half-life; 0 for an infinite half-life.

    They are made where they are used, and are no buffer: casting a module would round them, and a
    module built on the meta device would lose them.

    Args:
        half_lives: positive.
        tokens: what they are used with; None for float32 on the CPU.

    Returns:
        [len(half_lives)] float32 (float64 for float64 tokens), on the tokens' device.

    Example:
        >>> import math
        >>> from ifa_torchrec.modules.interaction import decay_rates
        >>> decay_rates((math.inf, math.log(2))).tolist()
        [0.0, 1.0]
    """
    double = tokens is not None and tokens.dtype == torch.float64
    device = torch.device("cpu") if tokens is None else tokens.device
    dtype = torch.float64 if double else torch.float32
    # filled in on the device: to copy them from the host would make it wait for a GPU
    return torch.stack(
        [torch.full((), math.log(2.0) / h, dtype=dtype, device=device) for h in half_lives]
    )


def event_weights(
    history: JaggedTensor, age: Tensor | None, half_lives: tuple[float, ...], tokens: Tensor
) -> Tensor:
    """w_hi = a_i exp(-lambda_h t_i) of a history's events, [n, len(half_lives)].

    Args:
        history: for its weights.
        age: [n] or None.
        half_lives: positive.
        tokens: [n, D], of the dtype that the weights shall have.

    Example:
        >>> import math, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules.interaction import event_weights
        >>> history = JaggedTensor(torch.zeros(2, 4), lengths=torch.tensor([2]))
        >>> event_weights(history, torch.tensor([7.0, 0.0]), (math.inf, 7.0), history.values()).tolist()
        [[1.0, 0.5], [1.0, 1.0]]
    """
    rates = decay_rates(half_lives, tokens)
    weight = ops.reference.event_weights(history.weights_or_none(), age, rates, tokens)
    return weight.to(tokens.dtype)


def normalised(sums: Tensor, weight: Tensor) -> Tensor:
    """Means [..., d] of sums [..., d] of weighted rows, 0 where the weight [...] is none.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.interaction import normalised
        >>> normalised(torch.tensor([[3.0], [0.0]]), torch.tensor([1.5, 0.0])).tolist()
        [[2.0], [0.0]]
    """
    return sums / torch.where(weight > FORGOTTEN, weight, 1.0)[..., None]


def hyperplanes(dim: int, bits: int, device: torch.device | str | None) -> Tensor:
    """Random ones of a frozen hash, [dim, bits].

    They are made on the CPU where the device, or torch's default device, is meta:
    DistributedModelParallel fills buffers that it finds there with zeros.

    Example:
        >>> from ifa_torchrec.modules.interaction import hyperplanes
        >>> hyperplanes(8, 16, "meta").device
        device(type='cpu')
    """
    wanted = torch.get_default_device() if device is None else torch.device(device)
    return torch.randn(dim, bits, device="cpu" if wanted.type == "meta" else wanted)


def reset_all(module: nn.Module) -> None:
    """Call ``reset_parameters`` of all modules in a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ifa_torchrec.modules.interaction import reset_all
        >>> norms = nn.Sequential(nn.LayerNorm(2, device="meta")).to_empty(device="cpu")
        >>> reset_all(norms)
        >>> norms[0].weight.tolist()
        [1.0, 1.0]
    """
    for child in reversed(list(module.modules())):  # a collection initialises the tables in it
        reset: Any = getattr(child, "reset_parameters", None)
        if child is not module and reset is not None:
            reset()


class _TokenProjection(nn.Linear):
    """Tokens to heads; where the heads' width is D, or a multiple of it, it starts as ``gain`` times
    the identity, or as many of them."""

    def __init__(self, dim: int, width: int, gain: float, device: torch.device | str | None) -> None:
        self.gain = gain  # nn.Linear resets as it is built
        super().__init__(dim, width, bias=False, device=device)

    def reset_parameters(self) -> None:
        """Start anew; also after ``to_empty``."""
        super().reset_parameters()  # drawn in any case: what is drawn next depends on no width
        copies, rest = divmod(self.out_features, self.in_features)
        if rest == 0:
            with torch.no_grad():
                start = torch.eye(self.in_features, device=self.weight.device)
                self.weight.copy_(self.gain * start.repeat(copies, 1))


class _OutputProjection(nn.Linear):
    """Heads and masses to D; starts as the mean of the dense heads' outputs, the first ``width``
    columns, where that is D or a multiple of it."""

    def __init__(self, features: int, dim: int, width: int, device: torch.device | str | None) -> None:
        self.width = width
        super().__init__(features, dim, device=device)

    def reset_parameters(self) -> None:
        """Start anew; also after ``to_empty``."""
        super().reset_parameters()
        copies, rest = divmod(self.width, self.out_features)
        if rest == 0:
            with torch.no_grad():
                start = torch.eye(self.out_features, device=self.weight.device)
                self.weight[:, : self.width] = start.repeat(1, copies) / copies
                self.bias.zero_()


class SequenceInteraction(nn.Module):
    """Base of IFA and its peers: dense heads (of the subclass), identity heads, masses, output.

    ``output_proj`` maps [dense head outputs | identity head outputs | masses] to D. The mass of a
    head is log(1 + matched / mass_scale), where matched is the head's normaliser: for IFA
    phi(q)^T z, for softmax the sum of w_i exp(q k_i), for mean pooling the sum of w_i. The
    projections start by likeness, see ``_projection``.

    An event of weight 0 is as good as not there. A state_dict holds the configuration too (as
    ``_extra_state``, JSON in a uint8 tensor): one of another configuration is refused, where the weights
    would fit and mean something else.

    Args:
        config: IFAConfig; peers leave feature_map, eps and backend unused in their dense heads.
        device: of the parameters; after the meta device, ``to_empty`` and ``reset_parameters``.

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

    def __init__(self, config: IFAConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_width
        self.value_proj = self._projection(device=device)
        self.identity = IdentityHeads(config, device) if config.identity_features else None
        features = width + config.num_identity_heads * config.head_width
        if config.interest_mass:
            features += config.num_heads + config.num_identity_heads
        self.output_proj = _OutputProjection(features, config.embedding_dim, width, device)

    @property
    def half_lives(self) -> tuple[float, ...]:
        """Of the dense heads, [H]."""
        return self.config.half_lives or (math.inf,) * self.config.num_heads

    @property
    def decay(self) -> Tensor:
        """The dense heads' rates, [H] float32 on the CPU."""
        return decay_rates(self.half_lives)

    def reset_parameters(self) -> None:
        """Give all parameters their start again; also after ``to_empty``."""
        reset_all(self)

    def get_extra_state(self) -> Tensor:
        """The configuration, for a state_dict."""
        text = json.dumps(_meaning(self.config)).encode()
        text += b" " * (-len(text) % 1024)  # so that a loader that compares shapes lets it come here
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Compare a state_dict's configuration with this one.

        Raises:
            ConfigError: they differ; the message names the fields with both values.
        """
        saved = json.loads(bytes(state.to("cpu", torch.uint8).tolist()))
        mine = _meaning(self.config)
        if len(saved["identity_features"]) != len(mine["identity_features"]):
            # of other shapes: without them the rest may be loaded (strict=False)
            saved, mine = ({n: v for n, v in c.items() if "identity" not in n} for c in (saved, mine))
        differing = [f"{n} was {saved.get(n)}, is {mine[n]}" for n in mine if saved.get(n) != mine[n]]
        if differing:
            raise ConfigError(
                f"{type(self).__name__}: the state_dict is of another IFAConfig: "
                f"{'; '.join(differing)}; build the module with the configuration it was trained with"
            )

    def _projection(self, gain: float = 1.0, device: torch.device | str | None = None) -> nn.Linear:
        """A projection of tokens to the dense heads; where their width H d is D, or a multiple of
        it, it starts as ``gain`` times the identity, or as many of them.

        So, before any training, an event counts as it resembles the candidate, and the answer
        lies in the tokens' own space, where comparing it with the candidate means something.
        From a random start neither softmax nor linear attention finds that in a million rows.
        """
        width = self.config.num_heads * self.config.head_width
        return _TokenProjection(self.config.embedding_dim, width, gain, device)

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
                has any, are the event weights a_i >= 0, [N] floating point.
            history_age: [N] >= 0, or None for 0.
            history_ids: [N, K] and candidate_ids: [M, K], integers of any width to int64, a
                column for each of id_features (the config's identity_features, but for a peer that
                searches by one more); needed where there are any. Id 0 is "unknown".

        Returns:
            JaggedTensor with the candidates' offsets and values [M, D].

        Raises:
            ValueError: shapes, dtypes or devices do not fit, lengths do not sum to the number of
                rows, an age or an event weight is negative, or weights are ids.
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
        """log w_hi, [H, n]; None where every weight is 1. No weight is 0, see ``_present``."""
        if weights is None and (age is None or self.config.half_lives is None):
            return None
        bias = tokens.new_zeros(self.config.num_heads, tokens.shape[0])
        if age is not None:
            rates = decay_rates(self.half_lives, tokens)[:, None]
            bias = bias - torch.where(rates > 0, rates * age, 0.0).to(tokens.dtype)
        if weights is None:
            return bias
        smallest = torch.finfo(weights.dtype).tiny  # below, the gradient 1 / w would be infinite
        return bias + weights.clamp(min=smallest).log().to(tokens.dtype)

    def _check(self, tokens: JaggedTensor, age: Tensor | None, ids: Tensor | None, name: str) -> None:
        if not isinstance(tokens, JaggedTensor):
            raise ValueError(f"{name} must be a JaggedTensor, got {type(tokens).__name__}")
        values, weights = tokens.values(), tokens.weights_or_none()
        if values.dim() != 2 or values.shape[1] != self.config.embedding_dim:
            raise ValueError(
                f"{name}: values must be [rows, {self.config.embedding_dim}], got {list(values.shape)}"
            )
        if not values.is_floating_point():
            raise ValueError(f"{name}: values must be floating point, got {values.dtype}")
        if weights is not None:
            _check_weights(weights, values, name)
        if age is not None and age.shape != values.shape[:1]:
            raise ValueError(
                f"history_age must be [{len(values)}], one age an event, got {list(age.shape)}"
            )
        if age is not None and (age.dtype == torch.bool or age.is_complex()):
            raise ValueError(f"history_age must be numbers, got {age.dtype}")
        which = "history_ids" if name == "history" else "candidate_ids"
        id_features = self.id_features
        if id_features:
            wanted = (values.shape[0], len(id_features))  # len() would fix it in an exported graph
            if ids is None or tuple(ids.shape) != wanted:
                got = "None" if ids is None else list(ids.shape)
                raise ValueError(
                    f"{which} must be {list(wanted)}, one for each of {id_features}, got {got}"
                )
            if ids.dtype not in _INTEGERS:
                raise ValueError(f"{which} must be integers, int64 or narrower, got {ids.dtype}")
        for what, given in (("history_age", age), (which, ids if id_features else None)):
            if given is not None and given.device != values.device:
                raise ValueError(f"{what} is on {given.device}, the tokens on {values.device}")
        # On a GPU, and in a compiled graph, looking at values would wait for the device.
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            total = int(tokens.offsets()[-1])
            if total != len(values):
                raise ValueError(f"{name}: lengths sum to {total}, but there are {len(values)} rows")
            if age is not None and not bool((age >= 0).all()):
                event = int((~(age >= 0)).nonzero()[0])
                raise ValueError(
                    f"history_age: event {event} has a negative age or NaN; an event after the request "
                    "must not be in its history"
                )
            if weights is not None and not bool(((weights >= 0) & weights.isfinite()).all()):
                event = int((~((weights >= 0) & weights.isfinite())).nonzero()[0])
                raise ValueError(
                    f"history: event {event} has a weight that is negative, infinite or NaN"
                )

    def _check_same_requests(self, candidates: JaggedTensor, requests: int) -> None:
        found = len(candidates.offsets()) - 1
        if found != requests:
            raise ValueError(f"candidates are of {found} requests, the histories of {requests}")


def _check_weights(weights: Tensor, values: Tensor, name: str) -> None:
    if not weights.is_floating_point():
        raise ValueError(
            f"{name}: its weights are {weights.dtype}, ids it seems, as of an EmbeddingCollection with "
            "need_indices=True; weights must be floating point, or none"
        )
    if name != "history":
        raise ValueError(f"{name}: candidates have no weights; make a JaggedTensor without them")
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{name}: weights must be [{len(values)}], one an event, got {list(weights.shape)}"
        )
    if weights.device != values.device:
        raise ValueError(f"{name}: weights are on {weights.device}, the values on {values.device}")


def _meaning(config: IFAConfig) -> dict[str, Any]:
    """What the weights mean, in JSON's types, where their shapes do not say it. Two ways to say the same
    are one."""
    fields = asdict(config) | {
        "head_dim": config.head_width,
        "half_lives": config.half_lives or (math.inf,) * config.num_heads,
    }
    del fields["backend"], fields["interest_mass"]
    return json.loads(json.dumps(fields))


def present(
    history: JaggedTensor, *columns: Tensor | None
) -> tuple[JaggedTensor, tuple[Tensor | None, ...]]:
    """The history, and columns beside it, without the events of weight 0, which softmax has no logarithm
    for.

    Args:
        history: N events of B requests.
        columns: [N, ...] each, or None.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules.interaction import present
        >>> history = JaggedTensor(torch.zeros(3, 4), lengths=torch.tensor([1, 2]),
        ...     weights=torch.tensor([1.0, 0.0, 0.5]))
        >>> there, (age,) = present(history, torch.tensor([3.0, 2.0, 1.0]))
        >>> there.lengths().tolist(), age.tolist()
        ([1, 1], [3.0, 1.0])
    """
    weights = history.weights_or_none()
    if weights is None:
        return history, columns
    there = weights > 0
    rows, offsets = there.nonzero()[:, 0], counted(there, history.offsets())
    kept = JaggedTensor(history.values()[rows], weights=weights[rows], offsets=offsets)
    return kept, tuple(None if column is None else column[rows] for column in columns)


def counted(kept: Tensor, offsets: Tensor) -> Tensor:
    """The offsets [B + 1] of the rows that are kept, [rows] bool.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.interaction import counted
        >>> counted(torch.tensor([True, False, True]), torch.tensor([0, 2, 3])).tolist()
        [0, 1, 2]
    """
    return torch.cat([offsets.new_zeros(1), kept.cumsum(0).to(offsets.dtype)])[offsets]


class IdentityHeads(nn.Module):
    """Linear attention whose phi is the one-hot of an id's bucket: "the same item?".

    For each identity feature and half-life: how much of the history has the candidate's id, and
    the mean value of those events. Id 0 is "unknown": two unknown ids are not the same, and a state has
    no row for them. Bucket 0 is a bucket as the others, of the ids R, 2 R, ... Our own addition to the
    paper's algebra.

    Args:
        config: IFAConfig with identity_features.
        device: of the parameters.

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

    def __init__(self, config: IFAConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        width = len(config.identity_features) * config.head_width
        self.value_proj = nn.Linear(config.embedding_dim, width, bias=False, device=device)

    @property
    def decay(self) -> Tensor:
        """The rates of the half-lives, [L] float32 on the CPU."""
        return decay_rates(self.config.identity_half_lives)

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
        outputs, matched, buckets = [], [], self.config.identity_buckets
        rates = decay_rates(self.config.identity_half_lives, history.values())
        for k, weight in enumerate(self._value_weights()):
            token_sum, weight_sum = ops.match(
                # the unknown of either side fall into buckets of their own, beyond all others
                self.bucket(candidate_ids[:, k], unknown=buckets),
                candidates.offsets(),
                history.values(),
                self.bucket(history_ids[:, k], unknown=buckets + 1),
                history.offsets(),
                history.weights_or_none(),
                history_age,
                rates,
                self.config.backend,
            )
            mean = normalised(token_sum, weight_sum)
            outputs.append(mean @ weight.to(mean.dtype).T)
            matched.append(weight_sum)
        return torch.cat(outputs, dim=1), torch.cat(matched, dim=1)

    def encode(
        self, history: JaggedTensor, history_age: Tensor | None, history_ids: Tensor
    ) -> dict[str, Any]:
        """The state's tables: UserState's fields whose names begin with identity."""
        values = history.values()
        dtype = torch.promote_types(values.dtype, torch.float32)
        half_lives = self.config.identity_half_lives
        weight = event_weights(history, history_age, half_lives, values.to(dtype))
        key_range = self.config.identity_key_range
        keys = self.keys(history_ids)
        keys = torch.where(keys < 0, key_range, keys)  # the unknown, whose row is left out below
        offsets, key, row = distinct_keys(
            request_of_row(history.offsets())[:, None].expand_as(keys).flatten(),
            keys.flatten(),
            len(history.offsets()) - 1,
            key_range + 1,
        )
        value_sum = values.new_zeros(key.shape[0], len(half_lives), self.config.head_width, dtype=dtype)
        weight_sum = values.new_zeros(key.shape[0], len(half_lives), dtype=dtype)
        for k, projection in enumerate(self._value_weights()):
            value = values.to(dtype) @ projection.to(dtype).T
            mine = row.view_as(keys)[:, k]
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
        """Outputs [M, K * L, d] and matched weights [M, K * L], read from the state's tables."""
        offsets, key, values, weights = state.identity_tables()
        key_range = self.config.identity_key_range
        there = request_of_row(offsets, key.shape[0]) * key_range + key
        wanted = request_of_row(candidates.offsets(), candidate_ids.shape[0])[:, None] * key_range
        keys = self.keys(candidate_ids)
        wanted = torch.where(keys < 0, -1, wanted + keys)  # [M, K]
        row = torch.searchsorted(there, wanted)
        # what is not there reads one more row, of zeros
        found = F.pad(there, (0, 1), value=-1)[row] == wanted
        row = torch.where(found, row, there.shape[0])
        total = F.pad(weights, (0, 0, 0, 1))[row]  # [M, K, L]
        value = F.pad(values, (0, 0, 0, 0, 0, 1))[row]  # [M, K, L, d]
        return normalised(value, total).flatten(1, 2), total.flatten(1)

    def keys(self, ids: Tensor) -> Tensor:
        """The key of each id in a state's tables: feature number times R plus bucket, and -1 for the
        unknown; [n, K]."""
        config = self.config
        first = torch.arange(0, config.identity_key_range, config.identity_buckets, device=ids.device)
        bucket = self.bucket(ids)
        return torch.where(bucket < 0, -1, first + bucket)

    def bucket(self, ids: Tensor, unknown: int = -1) -> Tensor:
        """The bucket of each id, in 0..R-1, int64; ``unknown`` for id 0."""
        return torch.where(ids == 0, unknown, ids.to(torch.int64) % self.config.identity_buckets)

    def _value_weights(self) -> Tensor:
        return self.value_proj.weight.unflatten(0, (-1, self.config.head_width))
