"""MovieLens as an event log: the value of the history, and of each kind of data in it.

    python examples/movielens/compare.py                           # ml-100k, downloaded
    python examples/movielens/compare.py --folder ml-25m           # an unpacked archive of GroupLens

A request is a page of films that a user rated: which of them are liked (4 stars or more)? The readers'
docstrings (ifa_torchrec/data/public/movielens.py, recbole.py) say which of these choices are ours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import tyro

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data.prepare import PrepareSchema, prepare
from ifa_torchrec.data.public import movielens, recbole
from ifa_torchrec.distributed import OptimizerConfig
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from ml100k import fetch

STEPS = OptimizerConfig(dense_lr=1e-3, table_lr=0.01, weight_decay=0.05)
"""Small learning rates and weight decay, since there are few ratings."""
METRICS = ["auc", "gauc", "ndcg@10", "ne", "calibration", "requests_ranked"]


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    folder: Path | None = None
    """An unpacked MovieLens archive; by default ml-100k is downloaded, in RecBole's format."""
    out: Path = Path("runs/movielens")
    """Folder of all results; must not exist yet."""
    epochs: int = 3
    """Passes over the training requests."""


def steps(whole: PrepareSchema) -> Iterator[tuple[str, PrepareSchema]]:
    """Schemas with more and more of the data, up to all of it."""
    assert whole.items is not None
    label = whole.requests.labels["liked"]
    assert isinstance(label, str)
    features, lists = whole.items.features, whole.items.lists
    sets = {name: column if isinstance(column, str) else column.column for name, column in lists.items()}
    items = replace(whole.items, features={**features, **sets}, lists={})  # a set of genres is one id
    events = replace(whole.events, features={}, dense={})
    yield "liked films alone", replace(whole, items=items, events=replace(events, where=label))
    yield "+ all films rated", replace(whole, items=items, events=events)
    events = replace(events, features=whole.events.features)
    yield "+ liked or not", replace(whole, items=items, events=events)
    yield "+ the stars, a number", replace(whole, items=items)
    yield "+ genres as a list", whole


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with as_command():
        if options.folder is None:
            whole = recbole.schema_of(fetch(options.out / "recbole"))
        else:
            whole = movielens.schema_of(options.folder)
        ifa = IFAConfig(32, num_heads=2, half_lives=(math.inf, 30.0))
        rows: dict[str, dict[str, float]] = {}

        def measure(name: str, log: Path, interaction: str) -> None:
            out = options.out / f"run {len(rows)}"
            options_of_run = {"epochs": options.epochs, "optimizers": STEPS, "identity": False}
            train(TrainConfig(log, out, interaction, ifa, **options_of_run))
            measured = evaluate(EvaluateConfig(out))
            rows[name] = {metric: measured[metric] for metric in METRICS}

        log = options.out
        for number, (name, schema) in enumerate(steps(whole)):
            log = prepare(schema, options.out / f"log {number}").path
            measure(f"IFA, {name}", log, "ifa")
        print((log / "report.json").read_text())
        for interaction in ("softmax", "none"):
            measure(f"{interaction}, all of it", log, interaction)
        print("\nTest requests:")
        print(pd.DataFrame(rows).T.to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
