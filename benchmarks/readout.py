"""Compares the two read-outs of the user state with softmax over all events and low-rank attention.

    python benchmarks/readout.py             # about 40 minutes on 2 cores
    python benchmarks/readout.py --smoke     # every run once, tiny

Uses small logs, for a first estimate before the full study (benchmarks/quality.py). Prints the table of
docs/howto/options.md. Runs are stored under --out and not trained again.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from report import markdown, measured_by

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import RankingDataset, synthetic
from ifa_torchrec.data.public import complete_journey
from ifa_torchrec.training.metrics import gauc
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train

SYNTHETIC_LOG = synthetic.SyntheticConfig(train=6000, test=1000, mean_events=220, distance=100)
JOURNEY_LOG = complete_journey.CompleteJourneyConfig(train=4000, valid=200, test=1500)
EPOCHS = {"synthetic": 2, "journey": 1}
DENSE = IFAConfig(64, num_heads=1, feature_map="hedgehog", interest_mass=False)
"""Dense heads only: one head of 128 features, no masses, no identity heads."""
IDENTITY: dict[str, Any] = dict(
    interest_mass=True,
    identity_features=("item", "category"),
    identity_half_lives=(math.inf, 30.0, 7.0),
    identity_buckets=131072,
)


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/readout")
    """Folder of the logs and results."""
    seeds: int = 1
    """Seeds per run; the table has their mean."""
    smoke: bool = False
    """Tiny logs, to check that all runs work."""
    only: tuple[str, ...] = ()
    """Names of the variants to run; all by default."""
    logs: tuple[str, ...] = tuple(EPOCHS)
    """Logs to use."""


def variants() -> dict[str, tuple[str, IFAConfig]]:
    """Each variant's interaction and its configuration, by name."""
    softmax = replace(DENSE, readout="softmax")
    two = dict(num_heads=2, head_dim=64)
    return {
        "linear": ("ifa", DENSE),
        "softmax": ("ifa", softmax),
        "linear, 2 heads": ("ifa", replace(DENSE, **two)),
        "softmax, 2 heads": ("ifa", replace(softmax, **two)),
        "softmax over everything": ("softmax", DENSE),
        "LREA-style, rank 32": ("low_rank", DENSE),
        "linear, with masses": ("ifa", replace(DENSE, interest_mass=True)),
        "softmax, with masses": ("ifa", replace(softmax, interest_mass=True)),
        "linear, elu, 2 heads of 32": ("ifa", replace(DENSE, feature_map="elu", num_heads=2)),
        "softmax, elu, 2 heads of 32": ("ifa", replace(softmax, feature_map="elu", num_heads=2)),
        "softmax, elu": ("ifa", replace(softmax, feature_map="elu")),
        "softmax, relu": ("ifa", replace(softmax, feature_map="relu")),
        "linear, with identity heads": ("ifa", replace(DENSE, **IDENTITY)),
        "softmax, with identity heads": ("ifa", replace(softmax, **IDENTITY)),
    }


def prepare(options: Options) -> None:
    """Write the logs, unless done before."""
    generated, journey = SYNTHETIC_LOG, JOURNEY_LOG
    if options.smoke:
        generated, journey = (
            replace(generated, train=64, test=32),
            replace(journey, train=64, valid=32, test=64),
        )
    log = synthetic.prepare(options.out / "data" / "synthetic", generated)
    complete_journey.prepare(options.out / "data" / "journey", journey)
    test = RankingDataset(log, "test")
    rows, counts = test.candidate_rows(np.arange(len(test)))
    request, label = np.repeat(np.arange(len(test)), counts), np.asarray(test.requests["label"][rows])
    truth = gauc(request, synthetic.best_scores(test, generated), label)
    print(f"The synthetic log's true scores: GAUC {truth:.4f}", flush=True)


def run(options: Options, data: str, name: str, seed: int) -> dict[str, float]:
    """Train and measure, or read the stored result."""
    folder = options.out / data / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}"
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    interaction, ifa = variants()[name]
    training = train(
        TrainConfig(
            data=options.out / "data" / data,
            out=folder,
            interaction=interaction,
            ifa=ifa,
            identity=bool(ifa.identity_features),
            epochs=EPOCHS[data],
            validate=False,
            checkpoint_every=10**9,
            seed=seed,
        )
    )
    metrics = evaluate(EvaluateConfig(run=folder)) | {"train_seconds": training["seconds"]}
    kept.write_text(json.dumps(metrics))
    return metrics


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    prepare(options)
    table = []
    for name in options.only or variants():
        row = {"dense heads": name}
        for data in options.logs:
            runs = [run(options, data, name, seed) for seed in range(options.seeds)]
            print(f"{name}, {data}: GAUC {[round(m['gauc'], 4) for m in runs]}", flush=True)
            for metric in ("gauc", "ndcg@10"):
                row[f"{data}, {metric}"] = f"{statistics.mean(m[metric] for m in runs):.4f}"
        table.append(row)
    print(measured_by())
    print(markdown(pd.DataFrame(table)))


if __name__ == "__main__":
    main()
