"""Compares variants with `ifa train`, log by log: an additional dense state per category, a history's
interest at full size, and no history.

    python benchmarks/tried.py                           # 60 trainings of up to two minutes
    python benchmarks/tried.py --logs journey --seeds 1  # a part
    python benchmarks/tried.py --smoke                   # every run once, tiny

Prints the tables of "Tried and left out" of docs/quality.md: one row per model, trained with the default
options of `ifa train`, with the mean over seeds of its GAUC and of the difference to `ifa train`'s,
whose paired standard error is over requests. Runs are stored under --out and not trained again.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from report import ROOT, commit, markdown, measured_by
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

sys.path.insert(0, str(ROOT))  # the examples are not an installed package
from examples.ml100k import fetch
from examples.movielens.compare import steps
from ifa_torchrec import IFAConfig, InteractionFidelityAttention
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, synthetic
from ifa_torchrec.data.prepare import prepare
from ifa_torchrec.data.public import complete_journey, recbole
from ifa_torchrec.models import archs
from ifa_torchrec.models.parts import InterestArch, Part
from ifa_torchrec.modules import INTERACTIONS
from ifa_torchrec.modules.projections import ZeroLinear
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import predict
from ifa_torchrec.training.trainer import train

IFA = "`ifa train`"
DENSE = dict(identity_features=(), identity_half_lives=(float("inf"),), identity_buckets=1)


class StateByCategory(InteractionFidelityAttention):
    """IFA with an additional dense state for each category of events: phi(k) (x) one-hot(category).

    A candidate reads only its own category's state, in the same way as IFA's: the same operators, over
    histories split by category. The result is added to IFA's through a matrix that starts at 0.

    Args:
        config: IFAConfig.
        feature: the item feature used as category; id 0, "unknown", has no state.
        width: d of its single head.
    """

    def __init__(self, config: IFAConfig, feature: str, width: int) -> None:
        super().__init__(config)
        self.feature = feature
        config = replace(config, num_heads=1, head_dim=width, **DENSE)
        with torch.random.fork_rng(devices=[]):  # other parameters are initialised as without it
            self.within = InteractionFidelityAttention(config)
            masses = int(config.interest_mass)
            self.within.output_proj = ZeroLinear(width + masses, config.embedding_dim)

    @property
    def id_features(self) -> tuple[str, ...]:
        named = self.config.identity_features
        return named if self.feature in named else (*named, self.feature)

    def forward(
        self,
        candidates: JaggedTensor,
        history: JaggedTensor,
        history_age: Tensor | None = None,
        history_ids: Any = None,  # a Tensor, since there is always an id feature
        candidate_ids: Any = None,
        history_gates: Tensor | None = None,
    ) -> JaggedTensor:
        given = (candidates, history, history_age, history_ids, candidate_ids, history_gates)
        interest = super().forward(*given)
        column = self.id_features.index(self.feature)
        asked, had = candidate_ids[:, column], history_ids[:, column]
        largest = 1 + torch.cat([asked, had]).max() if len(asked) else 1
        cell = request_of_row(candidates.offsets(), len(asked)) * largest + asked
        cells, cell = cell.unique(return_inverse=True)
        event_cell = request_of_row(history.offsets(), len(had)) * largest + had
        place = torch.searchsorted(cells, event_cell).clamp(max=max(len(cells) - 1, 0))
        events = ((cells[place] == event_cell) & (had != 0)).nonzero()[:, 0]
        events = events[place[events].argsort(stable=True)]
        order = cell.argsort(stable=True)

        def cut(tokens: JaggedTensor, rows: Tensor, cell: Tensor) -> JaggedTensor:
            lengths = torch.bincount(cell[rows], minlength=len(cells))
            return JaggedTensor(tokens.values().index_select(0, rows), lengths=lengths)

        found = self.within(
            cut(candidates, order, cell),
            cut(history, events, place),
            None if history_age is None else history_age[events],
            history_gates=None if history_gates is None else history_gates[events],
        )
        values = interest.values().index_add(0, order, found.values())
        return JaggedTensor(values, lengths=interest.lengths(), offsets=interest.offsets())


class FullSize(InterestArch):
    """An InterestArch that does not shrink the interest of short histories."""

    def forward(self, tokens: Tensor, interest: Tensor, events: Tensor, request: Tensor) -> Part:
        interest = self.norm(interest)
        return Part((interest,), (interest, tokens * interest, torch.log1p(events)[request, None]))


INTERACTIONS.update(
    {
        f"by_category_{width}": lambda config, _, feature, width=width: StateByCategory(
            config, feature or config.identity_features[-1], width
        )
        for width in (16, 64)
    }
)

MODELS: dict[str, tuple[str, type[InterestArch]]] = {
    IFA: ("ifa", InterestArch),
    "no history": ("none", InterestArch),
    "full size": ("ifa", FullSize),
    "a state a category, width 16": ("by_category_16", InterestArch),
    "a state a category, width 64": ("by_category_64", InterestArch),
}
"""For each model its interaction, and the InterestArch that prepares the answer for the over arch."""
JOURNEY = complete_journey.CompleteJourneyConfig(train=6000, valid=1000, test=2000)
SYNTHETIC = synthetic.SyntheticConfig(train=12000, mean_events=220, distance=100)


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/tried")
    """Folder of the logs and results."""
    seeds: int = 3
    """Seeds per run."""
    logs: tuple[str, ...] = ("journey", "synthetic", "ml100k", "ml100k_half")
    """Logs to use."""
    models: tuple[str, ...] = tuple(MODELS)
    """Models to train."""
    smoke: bool = False
    """Tiny logs, to check that all runs work."""


def log_of(options: Options, name: str) -> EventLog:
    """A log; written if it does not exist."""
    folder = options.out / "data" / name
    if name == "journey":
        tiny = replace(JOURNEY, train=64, valid=32, test=64)
        return complete_journey.prepare(folder, tiny if options.smoke else JOURNEY)
    if name == "synthetic":
        tiny = replace(SYNTHETIC, train=64, test=32)
        return synthetic.prepare(folder, tiny if options.smoke else SYNTHETIC)
    if folder.exists():
        return EventLog(folder)
    _, schema = next(steps(recbole.schema_of(fetch(options.out / "recbole"))))
    # train on fewer requests, so that more are left to rank
    splits = {"valid": 0.4, "test": 0.5} if name == "ml100k_half" else schema.splits
    return prepare(replace(schema, splits=splits), folder)


def run(options: Options, name: str, model: str, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """Train and measure, or read the stored result: the metrics, and the area under the ROC curve of
    each request, NaN if it cannot be ranked."""
    folder = options.out / name / "".join(c if c.isalnum() else "-" for c in model) / f"seed-{seed}"
    kept = folder / "result.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        feature = "category" if name in ("journey", "synthetic") else None
        data = options.out / "data" / name
        interaction, archs.InterestArch = MODELS[model]
        training = train(TrainConfig(data, folder, interaction, search_feature=feature, seed=seed))
        metrics = evaluate(EvaluateConfig(run=folder)) | {"train_seconds": training["seconds"]}
        np.save(folder / "areas.npy", areas(folder))
        kept.write_text(json.dumps({"commit": commit(), "metrics": metrics}))
    return json.loads(kept.read_text())["metrics"], np.load(folder / "areas.npy")


def areas(folder: Path) -> np.ndarray:
    """The area under the ROC curve of each test request of a run, [R]; their mean is GAUC."""
    trained = load_run(folder)
    test = trained.dataset("test")
    budget = trained.config.max_events, trained.config.scored_requests
    scores = predict(trained.model, test, trained.device, *budget)[0][:, 0]
    label = np.asarray(test.requests[next(iter(trained.log.schema.tasks))])
    rows = [test.candidate_rows([r])[0] for r in range(len(test))]
    above = [scores[r][label[r] > 0][:, None] - scores[r][label[r] == 0] for r in rows]
    return np.array([((a > 0) + (a == 0) / 2).mean() if a.size else np.nan for a in above])


def row(of: list[tuple[dict[str, float], np.ndarray]], base: list[np.ndarray]) -> dict[str, str]:
    """A model's figures on a log, compared with the areas of `ifa train` with the same seeds."""
    gaucs = [metrics["gauc"] for metrics, _ in of]
    difference = np.mean([mine - its for (_, mine), its in zip(of, base, strict=False)], axis=0)
    difference = difference[~np.isnan(difference)]
    spread = f" ± {statistics.stdev(gaucs):.4f}" if len(gaucs) > 1 else ""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return {
        "GAUC": f"{statistics.mean(gaucs):.4f}{spread}",
        "by seed": " ".join(f"{g:.4f}" for g in gaucs),
        "difference": f"{difference.mean():+.4f} ± {error:.4f}",
        "AUC": f"{statistics.mean(m['auc'] for m, _ in of):.4f}",
        "NE": f"{statistics.mean(m['ne'] for m, _ in of):.4f}",
        "calibration": f"{statistics.mean(m['calibration'] for m, _ in of):.3f}",
    }


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    for name in options.logs:
        log_of(options, name)
        found: dict[str, list[tuple[dict[str, float], np.ndarray]]] = {}
        for seed in range(1 if options.smoke else options.seeds):
            for model in options.models:
                found.setdefault(model, []).append(run(options, name, model, seed))
                metrics = found[model][-1][0]
                print(
                    f"{name}, {model}, seed {seed}: GAUC {metrics['gauc']:.4f}, "
                    f"trained {metrics['train_seconds']:.0f} s",
                    flush=True,
                )
        base = [of for _, of in found[IFA]]
        table = [{"model": model} | row(of, base) for model, of in found.items()]
        print(f"\n{name}, {measured_by()}\n{markdown(pd.DataFrame(table))}\n")


if __name__ == "__main__":
    main()
