"""What all sequence interactions share: the call, the identity heads, the masses, the output.

IFA and the peers it is compared with differ only in their dense heads. So a comparison changes one
option, and a difference in quality is due to the attention.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules.checks import (
    check_ages,
    check_gates,
    check_ids,
    check_tokens,
    check_weights,
)
from ifa_torchrec.modules.config import InteractionConfig
from ifa_torchrec.modules.history import History, decay_rates
from ifa_torchrec.modules.identity import IdentityHeads
from ifa_torchrec.modules.projections import OutputProjection, TokenProjection, reset_all
from ifa_torchrec.ops.autocast import without_autocast


class SequenceInteraction(nn.Module):
    """Base of IFA and its peers: dense heads (defined by the subclass), identity heads, masses, output.

    ``output_proj`` maps [dense head outputs | identity head outputs | masses] to D. The mass of a
    head is log(1 + matched / mass_scale), where matched is the head's normaliser: for IFA
    phi(q)^T z, for softmax the sum of w_i exp(q k_i), for mean pooling the sum of w_i. The
    projections are initialised so that similar tokens attend to each other, see TokenProjection.

    An event of weight 0 is treated as absent. A state_dict also contains the configuration (as
    ``_extra_state``, JSON in a uint8 tensor). Loading one of another configuration raises an error,
    since its weights may fit but mean something else.

    Args:
        config: InteractionConfig.
        device: of the parameters. If "meta", call ``to_empty`` and ``reset_parameters`` later.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.modules import InteractionConfig, SequenceInteraction
        >>> class LatestEvent(SequenceInteraction):  # a peer only defines its dense heads
        ...     def dense_heads(self, candidates, history, candidate_ids):
        ...         latest = self.value_proj(history.tokens[history.offsets[1:] - 1])
        ...         heads = latest.repeat_interleave(candidates.lengths(), dim=0)
        ...         return heads.unflatten(1, (self.config.num_heads, -1)), None
        >>> peer = LatestEvent(InteractionConfig(8, num_heads=2, interest_mass=False))
        >>> tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 2]))
        >>> peer(tokens, tokens).values().shape
        torch.Size([5, 8])
    """

    reaches_every_parameter = False
    """Whether every parameter gets a gradient even from a batch without events. If not, missing
    gradients are set to 0, because DistributedDataParallel waits for all of them; this costs a small
    kernel per parameter."""

    reads_sizes = False
    """Whether it reads sizes from the batch, which causes a graph break in torch.compile."""

    def __init__(self, config: InteractionConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_width
        self.value_proj = self._projection(device=device)
        self.identity = IdentityHeads(config, device) if config.identity_features else None
        features = width + config.num_identity_heads * config.identity_width
        if config.interest_mass:
            features += config.num_heads + config.num_identity_heads
        self.output_proj = OutputProjection(features, config.embedding_dim, width, device)

    @property
    def half_lives(self) -> tuple[float, ...]:
        """The half-lives of the dense heads, [H]."""
        return self.config.half_lives or (math.inf,) * self.config.num_heads

    @property
    def decay(self) -> Tensor:
        """The dense heads' decay rates, [H] float32 on the CPU."""
        return decay_rates(self.half_lives)

    def reset_parameters(self) -> None:
        """(Re)initialise all parameters; call after ``to_empty``."""
        reset_all(self)

    def get_extra_state(self) -> Tensor:
        """The configuration, for a state_dict."""
        text = json.dumps(_meaning(self.config)).encode()
        text += b" " * (
            -len(text) % 1024
        )  # so that shapes agree and loaders that compare them pass it on
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state_dict's configuration is this module's.

        Raises:
            ConfigError: they differ; the message lists the fields with both values.
        """
        saved = json.loads(bytes(state.to("cpu", torch.uint8).tolist()))
        mine = _meaning(self.config)
        if len(saved["identity_features"]) != len(mine["identity_features"]):
            # their shapes differ: the rest may still be loaded (strict=False)
            saved, mine = ({n: v for n, v in c.items() if "identity" not in n} for c in (saved, mine))
        differing = [f"{n} was {saved.get(n)}, is {mine[n]}" for n in mine if saved.get(n) != mine[n]]
        if differing:
            raise ConfigError(
                f"{type(self).__name__}: the state_dict has another {type(self.config).__name__}: "
                f"{'; '.join(differing)}; build the module with the configuration it was trained with"
            )

    def _projection(self, gain: float = 1.0, device: torch.device | str | None = None) -> nn.Linear:
        """A projection of tokens to the dense heads."""
        width = self.config.num_heads * self.config.head_width
        return TokenProjection(self.config.embedding_dim, width, gain, device)

    def forward(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        history_gates: Tensor | None = None,
    ) -> JaggedTensor:
        """
        Args:
            candidates: candidate tokens of B requests, values [M, D].
            history: event tokens of B requests, values [N, D], oldest first; its weights, if any, are
                the event weights a_i >= 0, [N] floating point.
            history_age: [N] >= 0, or None for 0.
            history_ids: [N, K] and candidate_ids: [M, K], uint8 or signed integers, one column for each
                of id_features (the config's identity_features, plus one more for some peers that search
                by it); required if there are any. Id 0 is "unknown".
            history_gates: [N, G], integers of the same dtypes, one column for each of the config's
                gates, in their order; required if there are any. Value 0 is "unknown".

        Returns:
            JaggedTensor with the candidates' offsets and values [M, D].

        Raises:
            ValueError: shapes, dtypes or devices do not fit, lengths do not sum to the number of
                rows, an age or an event weight is negative, weights are ids, or a gate value is out of
                range.
        """
        events = self._history(history, history_age, history_ids, history_gates)
        self._check_candidates(candidates, candidate_ids, len(events))
        heads, mass = self.dense_heads(candidates, events, candidate_ids)
        identity = None
        if self.identity is not None and candidate_ids is not None:
            identity = self.identity(candidates, events, candidate_ids)
        return self._output(candidates, heads, mass, identity)

    @property
    def id_features(self) -> tuple[str, ...]:
        """The id features whose ids ``forward`` takes, one column each; the identity features first."""
        return self.config.identity_features

    def dense_heads(
        self, candidates: JaggedTensor, history: History, candidate_ids: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the dense heads for each candidate; the one method that a subclass must define.

        Args:
            candidates: B sets with M rows of width D.
            history: the checked History of B requests, N events of width D. It includes events of weight
                0; ``history.present()`` drops them.
            candidate_ids: [M, K] integers if there are id features; else None.

        Returns:
            Outputs [M, H, d], and masses [M, H], which may be None if the config has
            interest_mass=False.
        """
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
                    f"{type(self).__name__}.dense_heads returned no masses, which interest_mass requires"
                )
            parts.append(mass)
            if identity is not None:
                parts.append(self._mass(identity[1]))
        dtype = self.output_proj.weight.dtype
        with without_autocast(heads):  # candidates are few: bfloat16 would add error and save nothing
            values = self.output_proj(torch.cat([part.to(dtype) for part in parts], dim=1))
        if torch.is_grad_enabled() and not self.reaches_every_parameter:
            values = _Reached.apply(values, *self.parameters())
        lengths, offsets = candidates.lengths_or_none(), candidates.offsets()
        return JaggedTensor(values, lengths=lengths, offsets=offsets)

    def _mass(self, matched: Tensor) -> Tensor:
        return torch.log1p(matched / self.config.mass_scale)

    def _mass_of_log(self, log_matched: Tensor) -> Tensor:
        """``_mass`` of the exponential of ``log_matched``, which exp may not be able to represent."""
        log_ratio = log_matched - math.log(self.config.mass_scale)
        return torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))

    def _log_weights(self, history: History) -> Tensor | None:
        """log w_hi, [H, N]; None if every weight is 1. No weight may be 0, see ``History.present``."""
        tokens, weights, age = history.tokens, history.weights, history.ages
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

    def _history(
        self, tokens: JaggedTensor, ages: Tensor | None, ids: Tensor | None, gates: Tensor | None
    ) -> History:
        """Check the arguments of ``forward`` and combine them."""
        check_tokens(tokens, self.config.embedding_dim, "history")
        check_weights(tokens, "history")
        check_ages(ages, tokens)
        check_ids(ids, self.id_features, tokens, "history_ids")
        check_gates(gates, self.config.gates, tokens)
        return History.of(tokens, ages, ids if self.id_features else None, gates)

    def _check_candidates(self, candidates: JaggedTensor, ids: Tensor | None, requests: int) -> None:
        check_tokens(candidates, self.config.embedding_dim, "candidates")
        check_weights(candidates, "candidates")
        check_ids(ids, self.id_features, candidates, "candidate_ids")
        found = len(candidates.offsets()) - 1
        if found != requests:
            raise ValueError(f"candidates have {found} requests, the histories have {requests}")


class _Reached(torch.autograd.Function):
    """Passes values through and gives every parameter a gradient, 0 where there is no other: without
    events most parameters have none, and DDP waits for all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        zeros = (torch.zeros(shape, dtype=dtype, device=to) for shape, dtype, to in ctx.like)
        return gradients[0], *zeros


def _meaning(config: InteractionConfig) -> dict[str, Any]:
    """The fields that determine what the weights mean, beyond their shapes, as JSON types. Equivalent
    settings become equal."""
    fields = asdict(config) | {
        "head_dim": config.head_width,
        "identity_head_dim": config.identity_width,
        "identity_buckets": config.num_identity_buckets,
        "identity_half_lives": config.identity_head_half_lives,
        "half_lives": config.half_lives or (math.inf,) * config.num_heads,
        "gates": list(config.gates.items()),  # in the order of their columns
    }
    del fields["backend"], fields["interest_mass"]
    return json.loads(json.dumps(fields))
