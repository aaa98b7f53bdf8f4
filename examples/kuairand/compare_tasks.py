"""KuaiRand as an event log, and one model for all its tasks: no history, softmax, IFA.

    python examples/kuairand/compare_tasks.py --folder KuaiRand-Pure/data  # Pure, 1K or 27K, unpacked
    python examples/kuairand/compare_tasks.py                              # synthetic files

The events are all videos shown; the user's reaction to each gates the history's heads. A request is the
videos shown to a user in one sitting: which are clicked, watched for long, liked? The reader's docstring
(ifa_torchrec/data/public/kuairand.py) says which of these choices are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import made_up
import pandas as pd
import tyro

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data.public import kuairand
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train

TASKS = ["is_click", "long_view", "is_like"]
"""Tasks whose metrics are printed; the model learns all of kuairand.TASKS."""
METRICS = ["auc", "gauc", "ndcg@10", "ne", "calibration", "requests_ranked"]
IDENTITY = ("author_id", "item")


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    folder: Path | None = None
    """Folder `data` of an unpacked KuaiRand archive; by default synthetic files in its layout."""
    out: Path = Path("runs/kuairand")
    """Folder of all results; must not exist yet."""
    epochs: int = 3
    """Passes over the training requests."""
    users: int = 120
    """Number of users in the synthetic files."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with as_command():
        folder = options.folder or made_up.make(options.out / "made_up", options.users)
        log = kuairand.prepare(folder, options.out / "log")
        print((log.path / "report.json").read_text())
        plain = IFAConfig(32, num_heads=2, half_lives=(math.inf, 7.0))
        counted = IFAConfig(
            32,
            num_heads=2,
            half_lives=(math.inf, 7.0),
            identity_features=IDENTITY,
            identity_buckets=max(log.schema.item_features[feature] for feature in IDENTITY),
            identity_half_lives=(math.inf, 7.0),
        )
        rows = {}
        for name, interaction, ifa in (
            ("no history", "none", plain),
            ("softmax", "softmax", plain),
            ("IFA", "ifa", plain),
            ("IFA, identity heads", "ifa", counted),
        ):
            out = options.out / name.replace(" ", "_").replace(",", "")
            settings = {"epochs": options.epochs, "max_requests": 16, "identity": False}
            train(TrainConfig(log.path, out, interaction, ifa, **settings))
            measured = evaluate(EvaluateConfig(out))
            rows |= {(task, name): {m: measured[task][m] for m in METRICS} for task in TASKS}
        print("\nTest requests:")
        print(pd.DataFrame(rows).T.loc[TASKS].to_string(float_format="{:.4f}".format))
        if options.folder is None:
            print("These files are synthetic: the figures say nothing about KuaiRand.")


if __name__ == "__main__":
    main()
