"""The value of event features, and how models handle new items.

    python benchmarks/events.py              # about 10 minutes on 2 cores
    python benchmarks/events.py --smoke      # every run once, tiny, no page

Uses synthetic logs whose best possible scores are known. Writes docs/events.md. Runs are stored under
--out and not trained again.
"""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from report import ROOT, markdown, measured_by, over_seeds

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, RankingDataset, synthetic
from ifa_torchrec.modules.tasks import binary_tasks
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.scoring import measure
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(
    embedding_dim=64,
    num_heads=1,
    feature_map="hedgehog",
    identity_features=("item", "topic", "category"),
    identity_buckets=131072,
    identity_half_lives=(math.inf,),
)
KINDS = synthetic.SyntheticConfig(train=4000, test=1500, mean_events=400, distance=150, kinds=True)
NEW = synthetic.SyntheticConfig(train=4000, test=2000, mean_events=400, distance=150, new_items=0.5)
OLD = replace(NEW, new_items=0.0, test=1500)


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/events")
    """Folder of the logs and runs."""
    seeds: int = 2
    """Seeds per run."""
    epochs: int = 3
    """Passes over the requests."""
    jobs: int = 2
    """Parallel runs, each with one thread."""
    smoke: bool = False
    """Tiny logs, one seed, one pass, no page."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its log and training options."""

    log: str
    name: str
    options: dict[str, Any]


ROWS = [
    Row("kinds", "IFA, gated by the action (the default)", {}),
    Row("kinds", "IFA, action and amount in the tokens alone", {"gate": ()}),
    Row("plain", "IFA without event features", {}),
    Row("plain", "no history", {"interaction": "none"}),
    Row("new", "IFA, items made unknown as often as in `valid` (the default)", {}),
    Row("new", "IFA, no item made unknown", {"unknown_items": 0.0}),
    Row("new", "no history", {"interaction": "none"}),
    Row("old", "IFA (the default)", {}),
    Row("old", "IFA, a tenth of the items made unknown", {"unknown_items": 0.1}),
]


def logs(options: Options) -> dict[str, tuple[EventLog, synthetic.SyntheticConfig]]:
    """The logs by name; "plain" is "kinds" without actions and amounts."""
    configs = {"kinds": KINDS, "new": NEW, "old": OLD}
    if options.smoke:
        configs = {name: replace(c, train=60, test=40, mean_events=300) for name, c in configs.items()}
    made = {
        name: (synthetic.prepare(options.out / f"log_{name}", config), config)
        for name, config in configs.items()
    }
    kinds, config = made["kinds"]
    path = options.out / "log_plain"
    if not path.exists():
        tables = {
            name: pd.read_parquet(kinds.path / f"{name}.parquet")
            for name in ("events", "items", "requests/train", "requests/test")
        }
        EventLog.from_pandas(
            path,
            events=tables["events"][["user", "time", "item"]],
            schema=replace(kinds.schema, event_features={}, event_dense=()),
            items=tables["items"],
            requests={split: tables[f"requests/{split}"] for split in ("train", "test")},
        )
    made["plain"] = EventLog(path), config
    return made


def run(options: Options, row: Row, seed: int) -> dict[str, Any]:
    """Train and measure, unless done before; returns the metrics of the split `test`."""
    torch.set_num_threads(1)
    settings = dict(ifa=IFA, epochs=1 if options.smoke else options.epochs, seed=seed, validate=False)
    if row.log == "old":  # its topics have no ids
        settings["ifa"] = replace(IFA, identity_features=("item", "category"))
    settings |= row.options
    name = "".join(c if c.isalnum() else "_" for c in f"{row.log} {row.name}")
    out = options.out / f"{name}_{seed}"
    done, asked = out / "done.json", repr(sorted(settings.items()))
    if not done.exists() or json.loads(done.read_text())["settings"] != asked:
        shutil.rmtree(out, ignore_errors=True)
        train(TrainConfig(data=options.out / f"log_{row.log}", out=out, **settings))
        metrics = evaluate(EvaluateConfig(run=out, split="test"))
        done.write_text(json.dumps({"settings": asked, "metrics": metrics}))
    return json.loads(done.read_text())["metrics"]


def table(
    log: str, results: dict[tuple[str, str], list[dict[str, Any]]], best: dict[str, Any]
) -> pd.DataFrame:
    """The rows of one log, means over the seeds, after the best possible scores."""

    def cells(name: str, runs: list[dict[str, Any]]) -> dict[str, str]:
        gaucs = [metrics["gauc"] for metrics in runs]
        spread = f" ± {np.ptp(gaucs) / 2:.4f}" if len(gaucs) > 1 else ""
        row = {"": name, "GAUC": f"{np.mean(gaucs):.4f}{spread}"}
        for part in ("new", "known") if log == "new" else ():
            figures = [metrics["items"][part] for metrics in runs]
            row[f"GAUC, {part}"] = f"{np.mean([f['gauc'] for f in figures]):.4f}"
            row[f"calibration, {part}"] = (
                f"{np.mean([f.get('calibration', math.nan) for f in figures]):.3f}"
            )
        if log != "new":
            row["calibration"] = f"{np.mean([m.get('calibration', math.nan) for m in runs]):.3f}"
        return row

    rows = [cells("the truth", [best])]
    wanted = ("kinds", "plain") if log == "kinds" else (log,)
    rows += [cells(name, runs) for (of, name), runs in results.items() if of in wanted]
    return pd.DataFrame(rows)


def main(options: Options) -> None:
    """Run everything and write the page."""
    options.out.mkdir(parents=True, exist_ok=True)
    made = logs(options)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        seeds = 1 if options.smoke else options.seeds
        running = {
            (row.log, row.name): [pool.submit(run, options, row, seed) for seed in range(seeds)]
            for row in ROWS
        }
        for key, futures in running.items():
            results[key] = [future.result() for future in futures]
            print(*key, [round(metrics["gauc"], 4) for metrics in results[key]], flush=True)
    text = (Path(__file__).parent / "events_page.md").read_text()
    for name in ("kinds", "new", "old"):
        log, config = made[name]
        dataset = RankingDataset(log, "test")
        scores = synthetic.best_scores(dataset, config)
        logits = np.log(scores / (1 - scores))[:, None]
        # given as logits of the log's task, so that the truth's calibration is measured, too
        best = measure(dataset, logits, binary_tasks(1), apart=True)
        found = markdown(table(name, results, best))
        text = text.replace(f"TABLE_{name.upper()}", found)
        print(found)
    if not options.smoke:
        text = text.replace("SEEDS", over_seeds(options.seeds))
        text = text.replace("MEASURED", measured_by())
        (ROOT / "docs" / "events.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
