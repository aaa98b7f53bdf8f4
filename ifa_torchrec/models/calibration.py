"""Calibration: an affine map of the logits per task, folded into the model's last layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.models.dlrm_ifa import DLRM_IFA


@torch.no_grad()
def calibrate(model: DLRM_IFA, scale: Tensor, shift: Tensor) -> None:
    """Replace a model's logits z by scale z + shift, in place: from histories and from states, with the
    other candidates of the set and given taken candidates.

    The map is folded into the last layers, which are linear, so it adds nothing to the cost of scoring
    or to an exported graph. With one task and a positive scale the order does not change.

    Args:
        model: a model with its dense part on one device.
        scale: [T] floating point, positive; shift: [T].

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import Candidates
        >>> from ifa_torchrec.models.calibration import calibrate
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> last = model.set_arch.over_arch.model[-1]
        >>> before = last(torch.ones(1, 32))
        >>> calibrate(model, torch.tensor([2.0]), torch.tensor([-1.0]))
        >>> torch.allclose(last(torch.ones(1, 32)), 2 * before - 1)
        True
    """
    set_arch, taken_arch = model.set_arch, model.taken_arch
    last: Any = next(reversed(list(set_arch.over_arch.modules())))  # an nn.Linear
    scale, shift = scale.to(last.bias), shift.to(last.bias)
    last.weight.mul_(scale[:, None])
    last.bias.mul_(scale).add_(shift)
    if set_arch.relation_arch is not None:
        set_arch.relation_arch.output_proj.weight.mul_(scale[:, None])
    if taken_arch is not None:
        query = taken_arch.relation.query_proj.weight  # D rows per task
        query.mul_(scale.repeat_interleave(len(query) // len(scale))[:, None])
        if taken_arch.relation.same_proj is not None:
            taken_arch.relation.same_proj.weight.mul_(scale[:, None])
        if taken_arch.relation.pair_queries is not None:
            pairs = taken_arch.relation.pair_queries.weight  # BUCKETS columns per task
            pairs.mul_(scale.repeat_interleave(pairs.shape[1] // len(scale)))
