"""Feature maps phi >= 0, each with the derivative that the backends' backward passes use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class FeatureMap(NamedTuple):
    """A map from head vectors of width d to expansion * d features, all >= 0.

    ``forward(x, dim)`` returns phi(x) along ``dim``; ``backward(grad, x, phi, dim)`` returns the
    gradient of x.
    """

    forward: Callable[[torch.Tensor, int], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    expansion: int


def _hedgehog(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([x.softmax(dim), (-x).softmax(dim)], dim=dim)


def _hedgehog_backward(grad: torch.Tensor, x: torch.Tensor, phi: torch.Tensor, dim: int) -> torch.Tensor:
    (g1, g2), (p1, p2) = (grad * phi).chunk(2, dim), phi.chunk(2, dim)
    return g1 - p1 * g1.sum(dim, keepdim=True) - g2 + p2 * g2.sum(dim, keepdim=True)


FEATURE_MAPS: dict[str, FeatureMap] = {
    # Katharopoulos et al. 2020: elu(x) + 1, which is exp(x) below zero and x + 1 above
    "elu": FeatureMap(
        lambda x, dim: x.clamp(max=0).exp() + x.relu(),
        lambda grad, x, phi, dim: grad * phi.clamp(max=1),
        1,
    ),
    "relu": FeatureMap(lambda x, dim: x.relu(), lambda grad, x, phi, dim: grad * (x > 0), 1),
    # Zhang et al. 2024 (Hedgehog): softmax over the features of x and of -x, after a learned linear
    # map. Here the learned projections of queries and keys are that map.
    "hedgehog": FeatureMap(_hedgehog, _hedgehog_backward, 2),
}
