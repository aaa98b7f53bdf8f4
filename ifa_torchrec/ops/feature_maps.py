"""Feature maps phi >= 0, each with the derivative that the backends' backward uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class FeatureMap(NamedTuple):
    """A map from head vectors [..., d] to features [..., expansion * d], all >= 0.

    ``forward(x)`` gives phi(x); ``backward(grad, x, phi)`` gives the gradient of x.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    expansion: int


def _hedgehog(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


def _hedgehog_backward(grad: torch.Tensor, x: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    (g1, g2), (p1, p2) = grad.chunk(2, -1), phi.chunk(2, -1)
    positive = p1 * (g1 - (g1 * p1).sum(-1, keepdim=True))
    negative = p2 * (g2 - (g2 * p2).sum(-1, keepdim=True))
    return positive - negative


FEATURE_MAPS: dict[str, FeatureMap] = {
    # Katharopoulos et al. 2020: elu(x) + 1, which is exp(x) below zero and x + 1 above
    "elu": FeatureMap(
        lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
        lambda grad, x, phi: grad * torch.where(x > 0, 1.0, phi),
        1,
    ),
    "relu": FeatureMap(lambda x: x.relu(), lambda grad, x, phi: grad * (x > 0), 1),
    # Zhang et al. 2024 (Hedgehog): softmax over the features of x and of -x. Its learned linear
    # map precedes the softmax; here the learned projections of queries and keys are that map.
    "hedgehog": FeatureMap(_hedgehog, _hedgehog_backward, 2),
}
