"""Compares treatments of unexposed candidates in the loss, if exposure is biased.

    python benchmarks/exposure.py              # half an hour on 2 cores
    python benchmarks/exposure.py --smoke      # every run once, tiny, no page

Uses synthetic logs in which all candidates of the split `test`, exposed or not, have known labels.
Writes docs/exposure.md. Runs are stored under --out and not trained again.
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
from torch import Tensor, nn
from torch.nn import functional as F

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, RankingDataset, synthetic
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig
from ifa_torchrec.modules.tasks import binary_tasks
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.scoring import measure
from ifa_torchrec.training.trainer import Trainer

IFA = IFAConfig(
    embedding_dim=32,
    num_heads=1,
    feature_map="hedgehog",
    identity_features=("item",),
    identity_buckets=4096,
    identity_half_lives=(math.inf,),
)
# without noise a history reveals a user's interests, and so each candidate's exposure probability
LOG = synthetic.SyntheticConfig(
    train=2000,
    test=2000,
    mean_events=120,
    distance=40,
    topics=40,
    everyday_items=200,
    interests=4,
    evidence=4,
    noise=0.0,
    exposure=0.2,
)
LOGS = {
    "promoted": replace(LOG, promotion=2.0),
    "policy": replace(LOG, policy=2.0),
    "both": replace(LOG, promotion=2.0, policy=2.0),
    "few": replace(LOG, policy=2.0, train=400),
}
PROPENSITY = "propensity"
LEAST = 0.05
"""Smaller propensities are raised to it, so that one candidate weighs at most 20 times another."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/exposure")
    """Folder of the logs and runs."""
    seeds: int = 2
    """Seeds per run."""
    epochs: int = 3
    """Passes over the requests."""
    jobs: int = 2
    """Parallel runs, each with one thread."""
    logs: tuple[str, ...] = tuple(LOGS)
    """Logs to use."""
    smoke: bool = False
    """Tiny logs, one seed, one pass, no page."""


@dataclass(frozen=True)
class Row:
    """A row of the tables: a treatment of unexposed candidates."""

    name: str
    loss: CandidateSetLossConfig
    attention: str = "none"
    inverse: bool = False


def _loss(**terms: Any) -> CandidateSetLossConfig:
    return CandidateSetLossConfig(**terms)


ALONE = dict(pointwise_unexposed=False, listwise=0.0)
ROWS = [
    Row("exposed alone", _loss(**ALONE)),
    Row("exposed alone, by inverse propensity", _loss(**ALONE), inverse=True),
    Row("unexposed as negatives", _loss(listwise=0.0, unexposed=1.0)),
    Row("unexposed as negatives of weight 0.1", _loss(listwise=0.0, unexposed=0.1)),
    Row("exposed alone + 0.5 listwise among the exposed (the default)", _loss()),
    Row("exposed alone + 0.5 listwise, unexposed 0.1", _loss(pointwise_unexposed=False, unexposed=0.1)),
    Row("exposed alone + 0.5 listwise, unexposed 1", _loss(pointwise_unexposed=False, unexposed=1.0)),
    Row("softmax set, exposed alone", _loss(**ALONE), attention="softmax"),
    Row("softmax set, exposed alone + 0.3 consistency", _loss(**ALONE, consistency=0.3), "softmax"),
]


class InversePropensity(nn.Module):
    """Cross entropy of the exposed candidates, weighted by the inverse of their exposure probability,
    which the log contains; replaces a CandidateSetLoss."""

    def __init__(self, config: CandidateSetLossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, logits: Tensor, labels: Tensor, exposed: Tensor, offsets: Tensor, alone: None = None
    ) -> Tensor:
        weight = exposed / labels[:, 1].clamp(min=LEAST)
        each = F.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], reduction="none")
        return (weight * each).sum() / weight.sum().clamp(min=1e-9)


def prepare(options: Options, name: str) -> tuple[EventLog, synthetic.SyntheticConfig]:
    """The log, with each candidate's exposure probability as a task that is not trained."""
    config = LOGS[name]
    if options.smoke:
        config = replace(config, train=60, test=40)
    path = options.out / f"log_{name}"
    if not path.exists():
        plain = synthetic.prepare(options.out / f"log_{name}_plain", config)
        tables = {name: pd.read_parquet(plain.path / f"{name}.parquet") for name in ("events", "items")}
        requests = {}
        for split in plain.splits:
            dataset = RankingDataset(plain, split)
            pull = (synthetic.best_scores(dataset, config) > 0.5).astype(float)
            item = np.asarray(dataset.requests["candidates"])
            propensity = synthetic.exposure_probability(config, item, pull)
            frame = pd.read_parquet(plain.path / f"requests/{split}.parquet")
            ends = np.cumsum(frame["candidates"].map(len))[:-1]
            requests[split] = frame.assign(**{PROPENSITY: np.split(propensity, ends)})
        EventLog.from_pandas(
            path,
            events=tables["events"],
            schema=replace(plain.schema, tasks={"label": "binary", PROPENSITY: "regression"}),
            items=tables["items"],
            requests=requests,
        )
    return EventLog(path), config


def run(options: Options, log: str, row: Row, seed: int) -> dict[str, Any]:
    """Train and measure, unless done before; returns the metrics of the split `test`."""
    torch.set_num_threads(1)
    config = TrainConfig(
        data=options.out / f"log_{log}",
        out=options.out / f"{''.join(c if c.isalnum() else '_' for c in f'{log} {row.name}')}_{seed}",
        ifa=IFA,
        candidate_set=CandidateSetConfig(row.attention),
        loss=row.loss,
        task_weights={PROPENSITY: 0.0},
        epochs=1 if options.smoke else options.epochs,
        seed=seed,
        validate=False,
    )
    done, asked = config.out / "done.json", repr(config)
    if not done.exists() or json.loads(done.read_text())["settings"] != asked:
        shutil.rmtree(config.out, ignore_errors=True)
        trainer = Trainer(config)
        if row.inverse:
            of_loss = next(m for m in trainer.model.modules() if isinstance(m, DLRM_IFATrain))
            of_loss.loss = InversePropensity(config.loss)
        trainer.train()
        metrics = evaluate(EvaluateConfig(run=config.out, split="test"))["label"]
        done.write_text(json.dumps({"settings": asked, "metrics": metrics}))
    return json.loads(done.read_text())["metrics"]


def table(results: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """One row per treatment, means over the seeds."""

    def mean(runs: list[dict[str, Any]], name: str, digits: int = 4) -> str:
        values = [metrics[name] for metrics in runs if name in metrics]
        return f"{np.mean(values):.{digits}f}" if values else ""

    rows = []
    for name, runs in results.items():
        gaucs = [metrics["gauc"] for metrics in runs]
        spread = f" ± {np.ptp(gaucs) / 2:.4f}" if len(gaucs) > 1 else ""
        rows.append(
            {
                "": name,
                "GAUC": f"{np.mean(gaucs):.4f}{spread}",
                "NE": mean(runs, "ne"),
                "calibration": mean(runs, "calibration", 3),
                "GAUC, exposed": mean(runs, "gauc_exposed"),
                "calibration, exposed": mean(runs, "calibration_exposed", 3),
            }
        )
    return pd.DataFrame(rows)


def main(options: Options) -> None:
    """Run everything and write the page."""
    options.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, str] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        seeds = range(1 if options.smoke else options.seeds)
        for name in options.logs:
            log, config = prepare(options, name)
            running = {
                row.name: [pool.submit(run, options, name, row, seed) for seed in seeds] for row in ROWS
            }
            dataset = RankingDataset(log, "test")
            scores = synthetic.best_scores(dataset, config)
            logits = np.stack([np.log(scores / (1 - scores)), scores], axis=1)
            tasks = (binary_tasks(1)[0], replace(binary_tasks(1)[0], name=PROPENSITY, kind="regression"))
            results = {"the truth": [measure(dataset, logits, tasks)["label"]]}
            for key, futures in running.items():
                results[key] = [future.result() for future in futures]
                print(name, key, [round(m["gauc"], 4) for m in results[key]], flush=True)
            tables[name] = markdown(table(results))
            print(tables[name], flush=True)
    if options.smoke or set(tables) != set(LOGS):
        return
    text = (Path(__file__).parent / "exposure_page.md").read_text()
    for name, found in tables.items():
        text = text.replace(f"TABLE_{name.upper()}", found)
    text = text.replace("SEEDS", over_seeds(options.seeds))
    text = text.replace("MEASURED", measured_by())
    (ROOT / "docs" / "exposure.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
