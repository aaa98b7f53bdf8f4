"""Compare several trainings side by side.

    ifa compare runs/ifa runs/softmax --picture curves.png

Prints one row per run: its steps, its last training loss, and its best checkpoint's metric on the split
`valid`. Works while the trainings still run. `tensorboard --logdir runs` shows these and more curves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ifa_torchrec.commands.command_line import check_picture
from ifa_torchrec.errors import ConfigError, require, writing
from ifa_torchrec.training.validations import LAST, read_validations

_LOSS, _SMOOTH = "train/loss", 5  # each point is the mean of ten steps; five points are averaged


@dataclass(frozen=True)
class CompareConfig:
    """Options of ``ifa compare``."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of training runs (their --out)."""
    metric: str | None = None
    """Metric of the split `valid` to compare by, e.g. gauc or ne; by default the metric by which the
    first run keeps its best checkpoint."""
    picture: Path | None = None
    """Draw the training loss and the metric of all runs by step, to this .png, .svg or .pdf file. Needs
    the extra `demo`."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("give the folders of one or more runs, e.g. ifa compare runs/a runs/b")
        check_picture(self.picture)


def compare(config: CompareConfig) -> pd.DataFrame:
    """One row per run: "steps", "loss" (the last), and if it was validated, "best step" and the metric
    of that step; drawn as curves if asked.

    Raises:
        ConfigError: a folder is not a training run, or none of the runs measured the metric.
        ModuleNotFoundError: matplotlib is not installed (extra `demo`), for a picture.
        WriteError: the picture cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.compare import CompareConfig, compare
        >>> from ifa_torchrec.training.curves import Curves
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, loss in {"a": 0.5, "b": 0.25}.items():
        ...     curves = Curves(folder / name / "tensorboard", 0)
        ...     curves.show({"train/loss": loss}, 10)
        ...     curves.close()
        >>> compare(CompareConfig((folder / "a", folder / "b")))[["steps", "loss"]].values.tolist()
        [[10.0, 0.5], [10.0, 0.25]]
    """
    kept = {run: read_validations(run) for run in config.runs}
    deciding = [v.metric for v in kept.values() if v.validations and v.metric != LAST]
    metric = config.metric or next(iter(deciding), None)
    losses: dict[str, pd.Series] = {}
    measured: dict[str, pd.Series] = {}
    rows: dict[str, dict[str, Any]] = {}
    for run, name in _names(config.runs).items():
        losses[name] = _losses(run)
        row: dict[str, Any] = {"steps": losses[name].index[-1], "loss": losses[name].iloc[-1]}
        by_step = {v.step: v.metrics.get(metric) for v in kept[run].validations} if metric else {}
        measured[name] = pd.Series(by_step, dtype=float).dropna()
        if len(measured[name]):
            best = kept[run].best
            best = measured[name].index[-1] if best is None else best
            row |= {"best step": best, f"valid {metric}": measured[name].get(best)}
        rows[name] = row
    if config.metric is not None and not any(map(len, measured.values())):
        there = sorted({m for v in kept.values() for of in v.validations for m in of.metrics})
        raise ConfigError(
            f"--metric {config.metric}: none of the runs measured it; the metrics are {there}"
        )
    if config.picture is not None:
        _draw(config.picture, losses, measured, metric)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def _names(runs: tuple[Path, ...]) -> dict[Path, str]:
    """The name of each run: its folder's name, or its path if two folders have the same name."""
    last = [run.resolve().name for run in runs]
    return {
        run: name if last.count(name) == 1 else str(run) for run, name in zip(runs, last, strict=True)
    }


def _losses(run: Path) -> pd.Series:
    """The smoothed training loss by step."""
    curves = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    if (run / "tensorboard").is_dir():
        curves.Reload()
    try:
        points = pd.Series({p.step: p.value for p in curves.Scalars(_LOSS)})
    except KeyError as error:
        raise ConfigError(
            f"{run} is not a training run with at least ten steps; give its --out"
        ) from error
    return pd.Series(points.rolling(_SMOOTH, min_periods=1).mean())


def _draw(
    file: Path, losses: dict[str, pd.Series], measured: dict[str, pd.Series], metric: str | None
) -> None:
    """Draw the losses and, if any run was validated, the metric; one line per run."""
    require("demo", "matplotlib")
    from matplotlib.figure import Figure

    panels = {"training loss, mean of 50 steps": losses}
    if any(map(len, measured.values())):
        panels[f"{metric} of the split valid"] = measured
    figure = Figure(figsize=(1 + 5 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, curve in curves.items():
            marker = None if curves is losses else "o"
            axes.plot(curve.index, curve.to_numpy(), label=name, marker=marker)
        axes.set_xlabel("step")
        axes.set_title(title, parse_math=False)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for text in figure.legend(handles, labels, loc="outside lower center", ncols=3).get_texts():
        text.set_parse_math(False)
    with writing(file):
        figure.savefig(file, dpi=110)


def main(config: Annotated[CompareConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    whole: dict[str | int, Callable[..., str]] = {"best step": "{:.0f}".format}
    print(compare(config).to_string(float_format="{:.4f}".format, formatters=whole, na_rep="-"))


main.__doc__ = __doc__
