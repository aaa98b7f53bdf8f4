"""Compares a set of the products with the best scores with a set chosen one by one, and draws both.

    python examples/complete_journey/sets.py                # about 10 minutes on 2 cores
    python examples/complete_journey/sets.py --run RUN      # with an existing run

Trains a model that scores products given those already taken, on a few thousand requests of The Complete
Journey, measures both kinds of sets, and draws those of one test request: the one whose two sets have
least in common, unless --request names another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import tyro

from ifa_torchrec import IFAConfig
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig, prepare
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import predict
from ifa_torchrec.training.sets import best_by_score, chosen_one_by_one, measure_sets
from ifa_torchrec.training.trainer import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IFA = IFAConfig(
    embedding_dim=32,
    num_heads=2,
    identity_features=("item", "type"),
    identity_half_lives=(float("inf"), 30.0),
    identity_buckets=131072,
)


@dataclass(frozen=True)
class Options:
    """What to train and to draw."""

    data: Path = Path("runs/data/complete_journey_sets")
    """Folder of the prepared event log; prepared if it does not exist."""
    run: Path = Path("runs/complete_journey_sets")
    """Folder of the run; trained if it does not exist."""
    requests: CompleteJourneyConfig = field(
        default_factory=lambda: CompleteJourneyConfig(train=4000, valid=200, test=1000)
    )
    """How many requests to draw when the log is prepared."""
    size: int = 10
    """Products per set."""
    request: int | None = None
    """Number of the test request to draw."""
    picture: Path = Path("runs/sets.png")
    """File of the picture."""


def chosen(options: Options) -> tuple[RankingDataset, dict[str, np.ndarray]]:
    """The test requests, and each candidate's position in both kinds of sets."""
    run = load_run(options.run)
    dataset, model = run.dataset("test"), run.dlrm.eval()
    budget = run.config.max_events, run.config.scored_requests
    logits, _ = predict(run.model, dataset, run.device, *budget)
    return dataset, {
        "the best by their own scores": best_by_score(dataset, logits, model.config.tasks, options.size),
        "chosen one by one": chosen_one_by_one(model, dataset, run.device, budget, options.size),
    }


def least_in_common(dataset: RankingDataset, places: dict[str, np.ndarray]) -> int:
    """The first request whose sets share the fewest products."""
    one, other = places.values()
    shared = np.add.reduceat((one > 0) & (other > 0), dataset.requests["candidate_offsets"][:-1])
    return int(np.argmin(shared))


def table(dataset: RankingDataset, place: np.ndarray, number: int) -> pd.DataFrame:
    """The products of one set, in its order, with their types and whether they were bought."""
    rows = dataset.candidate_rows([number])[0]
    rows = rows[place[rows] > 0]
    rows = rows[np.argsort(place[rows])]
    items = np.asarray(dataset.requests["candidates"])[rows]
    names, types = dataset.log.item_names(), np.asarray(dataset.log.items["type"])[items]
    return pd.DataFrame(
        {
            "item": items,
            "name": [names[item] for item in items.tolist()],
            "type": types,
            "again": pd.Series(types).duplicated().to_numpy() & (types > 0),
            "bought": np.asarray(dataset.requests["bought"])[rows] > 0,
        }
    )


def draw(tables: dict[str, pd.DataFrame], number: int, file: Path) -> None:
    """Draw the sets side by side; products in only one of them are bold."""
    figure, panels = plt.subplots(1, len(tables), figsize=(12, 0.42 * 10 + 1.4), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    types = list(dict.fromkeys(t for one in tables.values() for t in one["type"]))
    shared = set.intersection(*(set(one["item"]) for one in tables.values()))
    for axes, (title, one) in zip(panels, tables.items(), strict=True):
        for place, row in enumerate(one.itertuples()):
            axes.barh(place, 0.03, color=colours[types.index(row.type) % len(colours)])
            weight = "normal" if row.item in shared else "bold"
            text = f"{place + 1}  {row.name[:44]}" + "  (bought)" * row.bought + "  again" * row.again
            axes.text(0.05, place, text, va="center", fontsize=10, weight=weight)
        axes.set(xlim=(0, 1), ylim=(len(one) - 0.5, -0.5), title=f"{title}: {one['again'].sum()} again")
        axes.axis("off")
    figure.suptitle(
        f"Test request {number} of The Complete Journey. Colour: type of product; again: same type as "
        "one before it; bold: only in this set",
        fontsize=9,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(options: Options) -> dict[str, Any]:
    """Train, measure and draw; returns the metrics of the sets."""
    prepare(options.data, options.requests)
    if not options.run.exists():
        train(
            TrainConfig(
                options.data,
                options.run,
                ifa=IFA,
                candidate_set=CandidateSetConfig(generate=True),
            )
        )
    dataset, places = chosen(options)
    sets = {title: measure_sets(dataset, place, options.size) for title, place in places.items()}
    number = least_in_common(dataset, places) if options.request is None else options.request
    tables = {title: table(dataset, place, number) for title, place in places.items()}
    for title, one in tables.items():
        print(f"\n{title}\n{one.to_string()}")
    draw(tables, number, options.picture)
    print(f"\nwrote {options.picture}")
    return sets


if __name__ == "__main__":
    print(pd.json_normalize(list(main(tyro.cli(Options, description=__doc__)).values())).T.to_string())
