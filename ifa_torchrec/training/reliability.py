"""The reliability of binary tasks, predictions against labels, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ifa_torchrec.errors import require, writing
from ifa_torchrec.training.metrics import Total, bins_of, decile_cuts, local_sum


def reliability(
    logit: np.ndarray, label: np.ndarray, total: Total = local_sum
) -> list[dict[str, float]]:
    """Mean predictions and labels of up to ten groups of candidates of equal size, by prediction.

    Args:
        logit: [M]; label: [M] 0 or 1.
        total: sums over ranks. Over several ranks, predictions are equal if the first 22 bits of their
            float32 logits are.

    Returns:
        For each group, in ascending order of prediction, the number of "candidates" and their mean
        "prediction" and "label". Equal predictions share a group, so there may be fewer than ten.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.reliability import reliability
        >>> groups = reliability(np.repeat([-2.0, 0.0], 50), np.tile([0, 1], 50))
        >>> [(g["candidates"], round(g["prediction"], 2), g["label"]) for g in groups]
        [(50, 0.12, 0.5), (50, 0.5, 0.5)]
    """
    bins, places = bins_of(logit, total)
    counts = np.cumsum(total(np.bincount(bins, minlength=places).astype(np.float64)))
    if not places:
        return []
    cuts = decile_cuts(counts)
    group = np.searchsorted(cuts, bins, side="right")
    probability = torch.from_numpy(logit.astype(np.float64)).sigmoid().numpy()
    count, predicted, true = total(
        np.stack(
            [
                np.bincount(group, weights, len(cuts) + 1)
                for weights in (np.ones(len(logit)), probability, label.astype(np.float64))
            ]
        )
    )
    return [
        {"candidates": int(n), "prediction": float(p / n), "label": float(y / n)}
        for n, p, y in zip(count, predicted, true, strict=True)
        if n
    ]


def draw(tasks: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Plot mean labels against mean predictions for each task's groups.

    Args:
        tasks: the result of ``reliability`` by task name.
        file: the picture, a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `demo`).
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.reliability import draw
        >>> file = Path(tempfile.mkdtemp()) / "reliability.png"
        >>> draw({"click": [{"candidates": 9, "prediction": 0.2, "label": 0.25}]}, file)
        >>> file.exists()
        True
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for name, groups in tasks.items():
        predicted, true = ([g[part] for g in groups] for part in ("prediction", "label"))
        axes.plot(predicted, true, marker="o", label=name)
    every = [g for groups in tasks.values() for g in groups]
    most = max((max(g["prediction"], g["label"]) for g in every), default=1)
    axes.plot([0, most], [0, most], linestyle=":", color="gray", label="perfect calibration")
    axes.set(
        xlabel="mean prediction of a tenth of the candidates",
        ylabel="mean label",
        title="Reliability",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(file):
        figure.savefig(file, dpi=110)
