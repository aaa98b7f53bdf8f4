"""Figures and plots of an event log in one HTML page, to look at before training."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.schema import EXPOSED, OFFSETS, TIME, LogError
from ifa_torchrec.errors import require, writing

_STYLE = (
    "body { font: 15px sans-serif; max-width: 60em; margin: 2em auto } "
    "td, th { text-align: left; vertical-align: top; padding: 0.1em 1em 0.1em 0 } "
    "svg { max-width: 100%; height: auto }"
)
_BINS = 30


def write_report(log: EventLog, file: Path) -> None:
    """Write the page: the requests, histories, candidates and label rates of each split, and the report
    written with the log (LOG/report.json), its warnings first.

    Args:
        log: the event log.
        file: the page; it is self-contained.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `demo`).
        LogError: LOG/report.json is damaged.
        WriteError: the file cannot be written.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.data_report import write_report
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> folder = Path(tempfile.mkdtemp())
        >>> days = pd.date_range("2024-01-01", periods=3)
        >>> requests = pd.DataFrame({"user": [1], "time": days[2:], "candidates": [[0, 2]],
        ...     "exposed": [[True, True]], "label": [[1, 0]]})
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 3}),
        ...     events=pd.DataFrame({"user": 1, "item": [0, 1], "time": days[:2]}),
        ...     requests={"train": requests})
        >>> write_report(log, folder / "log.html")
        >>> "<h2>train</h2>" in (folder / "log.html").read_text()
        True
    """
    require("demo", "matplotlib")
    found = log.path / "report.json"
    try:
        report = json.loads(found.read_text()) if found.exists() else {}
    except ValueError as error:
        raise LogError(
            f"{found}: not valid JSON ({error}); delete it, or write the log again"
        ) from error
    warnings = report.pop("warnings", [])
    parts = [f"<h1>{escape(log.path.name)}</h1>"]
    if warnings:
        parts.append("<h2>Warnings</h2><ul>" + "".join(f"<li>{escape(w)}" for w in warnings) + "</ul>")
    for split in log.splits:
        numbers, picture = _of_split(log, split)
        parts.append(f"<h2>{escape(split)}</h2>{_table(numbers)}{picture}")
    if report:
        parts.append(f"<h2>Report written with the log</h2>{_table(report)}")
    title = f"<!doctype html><meta charset='utf-8'><title>{escape(log.path.name)}</title>"
    with writing(file):
        file.write_text(f"{title}<style>{_STYLE}</style>" + "\n".join(parts), encoding="utf-8")


def _of_split(log: EventLog, split: str) -> tuple[dict[str, Any], str]:
    """The numbers of a split, and its plots as SVG."""
    from matplotlib.figure import Figure

    dataset = RankingDataset(log, split)
    requests, histories = dataset.requests, np.asarray(dataset.history_lengths)
    time, sizes = np.asarray(requests[TIME]), np.diff(requests[OFFSETS])
    exposed = np.asarray(requests[EXPOSED])
    tasks = log.schema.tasks
    rates = {task: _rates(np.asarray(requests[task])[exposed], sizes, exposed, time) for task in tasks}
    numbers: dict[str, Any] = {
        "requests": len(dataset),
        "from": str(np.datetime64(int(time.min()), "us")),
        "to": str(np.datetime64(int(time.max()), "us")),
        "without a history": int((histories == 0).sum()),
        "events per history (mean, median, max)": _spread(histories),
        "candidates per request (mean, median, max)": _spread(sizes),
        "share exposed": f"{exposed.mean():.3g}",
    }
    for task in tasks:
        numbers[f"mean {task} of exposed candidates"] = (
            f"{np.asarray(requests[task])[exposed].mean():.4g}"
        )
    figure = Figure(figsize=(12, 3), layout="constrained")
    lengths, candidates, labels = figure.subplots(1, 3)
    lengths.hist(np.log10(1 + histories), _BINS)
    lengths.set(xlabel="events per history, log10(1 + n)", ylabel="requests")
    candidates.hist(sizes, _BINS)
    candidates.set(xlabel="candidates per request")
    for task, rate in rates.items():
        labels.plot(rate, marker=".", label=task)
    labels.set(xlabel="tenths of the requests, by time", ylabel="mean label of exposed candidates")
    if set(tasks.values()) <= {"binary"}:  # the mean of a regression may be negative
        labels.set(ylim=0)
    labels.legend()
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    text = svg.getvalue()
    return numbers, text[text.index("<svg") :]


def _rates(labels: np.ndarray, sizes: np.ndarray, exposed: np.ndarray, time: np.ndarray) -> list[float]:
    """The mean label of exposed candidates, by tenths of the requests in order of time."""
    tenth = np.empty(len(time), np.int64)
    tenth[time.argsort(kind="stable")] = np.arange(len(time)) * 10 // len(time)
    tenth = np.repeat(tenth, sizes)[exposed]
    count, total = np.bincount(tenth, minlength=10), np.bincount(tenth, labels, 10)
    return [float(t / c) if c else float("nan") for t, c in zip(total, count, strict=True)]


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():,.1f}, {np.median(values):,.0f}, {values.max():,}"


def _table(of: Any) -> str:
    """A dict as an HTML table with two columns; nested dicts become nested tables."""
    if not isinstance(of, Mapping):
        text = f"{of:,}" if isinstance(of, int) and not isinstance(of, bool) else str(of)
        return escape(text)
    rows = (f"<tr><th>{escape(str(name))}<td>{_table(value)}" for name, value in of.items())
    return f"<table>{''.join(rows)}</table>"
