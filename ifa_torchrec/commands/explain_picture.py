"""The picture of ``ifa explain``: events on a time line, and their weights in each head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ifa_torchrec.errors import require, writing
from ifa_torchrec.modules import IFAConfig

_LONGEST = 40  # maximum number of characters of an event's name


def head_names(config: IFAConfig) -> list[str]:
    """The names of ``attention_weights``'s H + K * L heads.

    Example:
        >>> import math
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.commands.explain_picture import head_names
        >>> head_names(IFAConfig(8, num_heads=1, identity_features=("item",),
        ...     identity_half_lives=(math.inf, 7.0)))
        ['dense', 'item', 'item, halved in 7 days']
    """
    dense = [(f"dense {h + 1}", math.inf) for h in range(config.num_heads)]
    if config.num_heads == 1:
        dense = [("dense", math.inf)]
    if config.half_lives is not None:
        dense = [(name, half) for (name, _), half in zip(dense, config.half_lives, strict=True)]
    same = [(f, half) for f in config.identity_features for half in config.identity_head_half_lives]
    return [
        name if math.isinf(half) else f"{name}, halved in {half:g} days" for name, half in dense + same
    ]


def draw_explanation(
    file: Path, title: str, heads: Sequence[str], events: Sequence[str], ages: Tensor, weights: Tensor
) -> None:
    """Draw the weights of the events in each head.

    Args:
        file: the picture; its suffix sets the format: .png, .svg or .pdf.
        title: title of the picture.
        heads: names of S heads.
        events: names of the events with the largest weights, in descending order.
        ages: [n], days before the request, of all events; those of ``events`` come first.
        weights: [n, S], each head's shares.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `demo`).
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.explain_picture import draw_explanation
        >>> file = Path(tempfile.mkdtemp()) / "why.png"
        >>> draw_explanation(file, "$ {milk $", ["dense"], ["$ {milk $", "bread"],
        ...     torch.tensor([1.0, 9.0]), torch.tensor([[0.7], [0.3]]))
        >>> file.exists()
        True
    """
    require("demo", "matplotlib")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    heights = [1 + 0.3 * len(heads), 1 + 0.3 * len(events)]
    figure = Figure(figsize=(10, sum(heights) + 1), layout="constrained")
    line, bars = figure.subplots(2, 1, height_ratios=heights)
    colours = [colormaps["tab20"](s % 20) for s in range(len(heads))]
    days, left = ages.tolist(), [0.0] * len(events)
    for s, (head, colour) in enumerate(zip(heads, colours, strict=True)):
        shares = weights[:, s].tolist()
        line.scatter(days, [s] * len(days), [400 * share for share in shares], [colour], alpha=0.6)
        mean = [share / len(heads) for share in shares[: len(events)]]
        bars.barh(range(len(events)), mean, left=left, color=colour, label=head)
        left = [a + b for a, b in zip(left, mean, strict=True)]
    # a name with two dollar signs is not a formula
    figure.suptitle(title.replace("; ", "\n"), parse_math=False)
    line.set_xlabel("days before the request; area: the event's share in the head")
    line.set_yticks(range(len(heads)), heads, parse_math=False)
    line.set_ylim(len(heads) - 0.5, -0.5)
    line.invert_xaxis()
    names = [n if len(n) <= _LONGEST else n[: _LONGEST - 1] + "…" for n in events]
    called = [f"{name}, {age:.1f} days" for name, age in zip(names, days[: len(events)], strict=True)]
    bars.set_yticks(range(len(events)), called, parse_math=False)
    bars.invert_yaxis()
    bars.set_xlabel("weight: mean share over the heads")
    bars.legend(loc="lower right", fontsize="small")
    with writing(file):
        figure.savefig(file, dpi=110)
