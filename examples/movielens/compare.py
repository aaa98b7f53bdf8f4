"""MovieLens as an event log, and IFA beside softmax and no history on it.

    python examples/movielens/compare.py                           # ml-100k, fetched; 2 to 3 minutes
    python examples/movielens/compare.py --folder ml-25m           # an unpacked archive of GroupLens

A request is a page of films that a user rated; which of them are liked (4 stars or more)? The readers'
docstrings (ifa_torchrec/data/public/movielens.py, recbole.py) say what of this is ours.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog
from ifa_torchrec.data.public import movielens, recbole
from ifa_torchrec.distributed import OptimizerConfig
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from ml100k import fetch

STEPS = OptimizerConfig(dense_lr=1e-3, table_lr=0.01, weight_decay=0.05)
"""Few ratings: small steps, and weights that shrink."""
METRICS = ["auc", "gauc", "ndcg@10", "ne", "calibration", "requests_ranked"]


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    folder: Path | None = None
    """An unpacked MovieLens archive; by default ml-100k is fetched, in RecBole's files."""
    out: Path = Path("runs/movielens")
    """Where everything goes; must not be there yet."""
    epochs: int = 3
    """Passes over the training requests."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with as_command():
        path = options.out / "log"
        if options.folder is None:
            log: EventLog = recbole.prepare(fetch(options.out / "recbole"), path)
        else:
            log = movielens.prepare(options.folder, path)
        print((log.path / "report.json").read_text())
        genre = list(log.schema.item_features)[-1]
        plain = IFAConfig(32, num_heads=2, half_lives=(math.inf, 30.0))
        counted = IFAConfig(
            32,
            num_heads=2,
            half_lives=(math.inf, 30.0),
            identity_features=(genre,),
            identity_buckets=log.schema.item_features[genre],
            identity_half_lives=(math.inf, 30.0),
        )
        rows = {}
        for name, interaction, ifa in (
            ("no history", "none", plain),
            ("softmax", "softmax", plain),
            ("IFA", "ifa", plain),
            (f"IFA, identity heads of {genre}", "ifa", counted),
        ):
            out = options.out / name.replace(" ", "_").replace(",", "")
            train(TrainConfig(log.path, out, interaction, ifa, epochs=options.epochs, optimizers=STEPS))
            measured = evaluate(EvaluateConfig(out))
            rows[name] = {metric: measured[metric] for metric in METRICS}
        print("\nTest requests:")
        print(pd.DataFrame(rows).T.to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
