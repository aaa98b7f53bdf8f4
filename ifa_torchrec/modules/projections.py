"""The linear maps of an interaction, with their initialisations, and random hashes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def hyperplanes(dim: int, bits: int, device: torch.device | str | None) -> Tensor:
    """Random hyperplanes of a frozen hash, [dim, bits].

    They are created on the CPU if the device, or torch's default device, is meta:
    DistributedModelParallel fills meta buffers with zeros.

    Example:
        >>> from ifa_torchrec.modules.projections import hyperplanes
        >>> hyperplanes(8, 16, "meta").device
        device(type='cpu')
    """
    wanted = torch.get_default_device() if device is None else torch.device(device)
    return torch.randn(dim, bits, device="cpu" if wanted.type == "meta" else wanted)


def reset_all(module: nn.Module) -> None:
    """Call ``reset_parameters`` of all submodules of a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ifa_torchrec.modules.projections import reset_all
        >>> norms = nn.Sequential(nn.LayerNorm(2, device="meta")).to_empty(device="cpu")
        >>> reset_all(norms)
        >>> norms[0].weight.tolist()
        [1.0, 1.0]
    """
    for child in reversed(list(module.modules())):  # a collection initialises the tables in it
        reset: Any = getattr(child, "reset_parameters", None)
        if child is not module and reset is not None:
            reset()


class TokenProjection(nn.Linear):
    """Projects tokens to heads. If the heads' total width is a multiple of D, the weight starts as
    ``gain`` times stacked identity matrices.

    So before any training an event's weight reflects its similarity to the candidate, and the output is
    in the tokens' own space, where it can be compared with the candidate. From a random start, neither
    softmax nor linear attention learns that in a million rows.

    Args:
        dim: D, width of the tokens.
        width: H d, total width of the heads.
        gain: factor of the identity.
        device: of the weight.

    Example:
        >>> from ifa_torchrec.modules.projections import TokenProjection
        >>> TokenProjection(2, 4, gain=3.0).weight.tolist()
        [[3.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 3.0]]
    """

    def __init__(
        self, dim: int, width: int, gain: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        self.gain = gain  # nn.Linear resets as it is built
        super().__init__(dim, width, bias=False, device=device)

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``."""
        super().reset_parameters()  # always drawn, so that later random draws do not depend on widths
        copies, rest = divmod(self.out_features, self.in_features)
        if rest == 0:
            with torch.no_grad():
                start = torch.eye(self.in_features, device=self.weight.device)
                self.weight.copy_(self.gain * start.repeat(copies, 1))


class OutputProjection(nn.Linear):
    """Projects heads and masses to D. If the first ``width`` columns, the dense heads' outputs, are a
    multiple of D, it starts as their mean.

    Args:
        features: total width of heads and masses.
        dim: D.
        width: H d, total width of the dense heads.
        device: of the parameters.

    Example:
        >>> from ifa_torchrec.modules.projections import OutputProjection
        >>> OutputProjection(5, 2, width=4).weight[:, :4].tolist()
        [[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]]
    """

    def __init__(
        self, features: int, dim: int, width: int, device: torch.device | str | None = None
    ) -> None:
        self.width = width
        super().__init__(features, dim, device=device)

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``."""
        super().reset_parameters()
        copies, rest = divmod(self.width, self.out_features)
        if rest == 0:
            with torch.no_grad():
                start = torch.eye(self.out_features, device=self.weight.device)
                self.weight[:, : self.width] = start.repeat(1, copies) / copies
                self.bias.zero_()


class ZeroLinear(nn.Linear):
    """A linear layer without bias that starts at 0, so that it adds nothing before training.

    The initialisation of ReZero (Bachlechner et al. 2020, arXiv 2003.04887) for a matrix.

    Args:
        features: width of the input.
        outputs: width of the output.
        device: of the weight.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.projections import ZeroLinear
        >>> ZeroLinear(3, 1)(torch.ones(1, 3)).tolist()
        [[0.0]]
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__(features, outputs, bias=False, device=device)

    def reset_parameters(self) -> None:
        """(Re)initialise the parameters; call after ``to_empty``."""
        nn.init.zeros_(self.weight)
