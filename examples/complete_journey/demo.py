"""Train, evaluate and compare models on a year of real grocery purchases; `make demo` runs this.

Prepares The Complete Journey once (ifa_torchrec/data/public/complete_journey.py has the recipe), scores
the test requests by recency of purchase and with LightGBM, and trains a DLRM with each of four
interactions between candidates and history. Writes to runs/demo/: metrics.json, quality_cost.png,
loss.png, and one folder per model (checkpoint, TensorBoard curves).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.public.complete_journey import BASKET, BUY_AGAIN, CompleteJourneyConfig, prepare
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import time_per_request
from ifa_torchrec.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from baselines import measured

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASELINES = ("recency_count", "lightgbm")
"""Scorers of examples/baselines.py: the first learns nothing."""

IFA = TrainConfig(Path(), Path()).ifa
"""The default configuration of `ifa train`."""
PEER = IFAConfig(embedding_dim=64, num_heads=2, half_lives=(math.inf, 30.0), interest_mass=False)
"""The peers: only their attention, with one head of half-life 30 days."""
MODELS: dict[str, tuple[str, IFAConfig, bool]] = {
    "ifa": ("ifa", IFA, True),
    "no_history": ("none", PEER, False),
    "softmax": ("softmax", PEER, False),
    "sim_identity": ("sim", replace(PEER, interest_mass=True, identity_head_dim=0), True),
}
"""Each trained model: its sequence interaction, that interaction's configuration, and whether it has
IFA's identity heads on every id feature of the item."""


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo."""

    data: Path = Path("runs/data/complete_journey_demo")
    """Folder of the prepared event log; prepared if it does not exist."""
    out: Path = Path("runs/demo")
    """Folder of the results; an earlier demo's results there are replaced."""
    requests: CompleteJourneyConfig = field(
        default_factory=lambda: CompleteJourneyConfig(train=6000, valid=1000, test=2000)
    )
    """How many requests to draw when the log is prepared."""
    models: tuple[str, ...] = tuple(MODELS)
    """Models to train."""
    seed: int = 0
    """Seed of the training runs."""


def baselines(log: EventLog) -> dict[str, dict]:
    """Measure the scorers without a neural net on the test requests."""
    results = {}
    for name in BASELINES:
        results[name] = measured(log, name, by=("surface",))
        print(f"  {name}: test GAUC {results[name]['gauc']:.4f}", flush=True)
    return results


def trained(config: DemoConfig, name: str) -> dict:
    """Train one model and measure it on the test requests."""
    interaction, ifa, identity = MODELS[name]
    run = config.out / name
    shutil.rmtree(run, ignore_errors=True)
    training = train(
        TrainConfig(
            data=config.data,
            out=run,
            interaction=interaction,
            ifa=ifa,
            identity=identity,
            search_feature="category",  # for sim
            seed=config.seed,
        )
    )
    metrics = evaluate(EvaluateConfig(run=run, by=("surface",)))
    print(f"  {name}: trained {training['seconds']:.0f} s, test GAUC {metrics['gauc']:.4f}", flush=True)
    return metrics | {
        "train_events_per_second": training["events_per_second"],
        "train_seconds": training["seconds"],
    }


def milliseconds_per_request(config: DemoConfig) -> dict[str, float]:
    """The time per test request of each model."""
    runs = {name: load_run(config.out / name) for name in config.models}
    run = next(iter(runs.values()))
    models: dict[str, torch.nn.Module] = {name: run.model for name, run in runs.items()}
    return time_per_request(models, run.dataset("test"), run.device)


def table(models: dict[str, dict]) -> str:
    """The comparison as text."""
    columns = {
        "auc": "AUC",
        "gauc": "GAUC",
        "gauc_buy_again": "buy again",
        "gauc_popular": "popular",
        "gauc_promoted": "promoted",
        "ndcg@10": "NDCG@10",
        "ne": "NE",
        "calibration": "calibr.",
        "train_events_per_second": "events/s",
        "ms_per_request": "ms/request",
    }
    frame = pd.DataFrame.from_dict(models, orient="index").reindex(columns=list(columns))
    formats = {"events/s": "{:,.0f}".format, "ms/request": "{:.2f}".format, "calibr.": "{:.3f}".format}
    frame = frame.rename(columns=columns)
    return frame.to_string(
        na_rep="-",
        float_format="{:.4f}".format,
        formatters={k: (lambda v, f=f: "-" if pd.isna(v) else f(v)) for k, f in formats.items()},
    )


def draw_quality_cost(models: dict[str, dict], file: Path) -> None:
    """Plot GAUC against milliseconds per test request."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for (name, metrics), marker in zip(models.items(), "vv^os<D*P>", strict=False):
        if "train_seconds" in metrics:
            x, y = metrics["ms_per_request"], metrics["gauc"]
            axes.scatter(x, y, s=90, marker=marker, label=name)
        else:
            axes.axhline(metrics["gauc"], linestyle=":", color="gray")
            axes.annotate(
                name if name == "lightgbm" else f"{name}, no learning",
                (0.99, metrics["gauc"]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color="gray",
            )
    axes.set(
        xlabel="milliseconds per test request (lookup, attention, dense layers; median, CPU)",
        ylabel="GAUC, all test requests",
        title="Quality against cost: The Complete Journey",
    )
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_losses(out: Path, names: list[str], file: Path) -> None:
    """Plot the training loss of each model, from its TensorBoard log."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in names:
        events = EventAccumulator(str(out / name / "tensorboard"))
        events.Reload()
        points = pd.Series({p.step: p.value for p in events.Scalars("train/loss")})
        axes.plot(points.rolling(5, min_periods=1).mean(), label=name)
    axes.set(
        xlabel="step",
        ylabel="loss, listwise term included (mean of 50 steps)",
        title="Training loss",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    config = tyro.cli(DemoConfig, description=__doc__)
    unknown = set(config.models) - set(MODELS)
    if unknown:
        raise SystemExit(f"--models: {sorted(unknown)} are none of {list(MODELS)}")
    start = time.perf_counter()
    print(f"The Complete Journey -> {config.data} (prepared once, about a minute)", flush=True)
    log = prepare(config.data, config.requests)
    test = RankingDataset(log, "test")
    surface = np.asarray(test.requests["surface"])
    print(
        f"  {len(log.users):,} households, {log.user_offsets[-1]:,} events; test: "
        f"{(surface == BASKET).sum():,} basket and {(surface == BUY_AGAIN).sum():,} buy-again requests, "
        f"history mean {test.history_lengths.mean():.0f}, longest {test.history_lengths.max():,}",
        flush=True,
    )
    print("Scorers without a neural net", flush=True)
    models = baselines(log)
    print(f"Training {len(config.models)} models", flush=True)
    for number, name in enumerate(config.models):
        models[name] = trained(config, name)
        if number == 0:
            print(f"\nThe first model, after {time.perf_counter() - start:.0f} s:\n{table(models)}\n")
    print("Timing the models, taking turns", flush=True)
    for name, milliseconds in milliseconds_per_request(config).items():
        models[name]["ms_per_request"] = milliseconds

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps({"models": models}, indent=2))
    draw_quality_cost(models, config.out / "quality_cost.png")
    draw_losses(config.out, list(config.models), config.out / "loss.png")
    print("\nTest requests (GAUC of all; of buy-again; of positives against popular, promoted):")
    print(table(models))
    if "ifa" in config.models:
        print("\nWhat weighed most for the top candidate of one buy-again request:")
        print(
            explain(ExplainConfig(run=config.out / "ifa", request=int(np.argmax(surface == BUY_AGAIN))))
        )
    print(
        f"\nWrote {config.out}/metrics.json, quality_cost.png, loss.png; curves: "
        f".venv/bin/tensorboard --logdir {config.out}. {time.perf_counter() - start:.0f} s in all."
    )


if __name__ == "__main__":
    main()
