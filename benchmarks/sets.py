"""The benefit and the cost of relations between candidates, and whether they harm if there are none.

    python benchmarks/sets.py              # 20 to 40 minutes on 2 cores
    python benchmarks/sets.py --costs      # only their cost, written into the existing page
    python benchmarks/sets.py --smoke      # every run once, tiny, no page
    python benchmarks/sets.py --journey LOG  # also on real requests, with all candidates exposed

Uses a synthetic log whose users pick from the shown set (data/synthetic_sets.py), and logs whose labels
do not depend on relations: a synthetic one and, with --journey, part of a log of The Complete Journey,
e.g. runs/data/complete_journey_demo from `make demo`. Writes docs/sets.md. Runs are stored under --out
and not trained again.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from report import ROOT, markdown, measured_by
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec import IFAConfig, generate_set
from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader, synthetic
from ifa_torchrec.data.schema import EXPOSED, OFFSETS
from ifa_torchrec.data.synthetic_sets import SHOWN, set_logits, sigmoid
from ifa_torchrec.data.synthetic_truth import SetTruth, truth_of
from ifa_torchrec.data.writing import drafting
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.models import DLRM_IFA, DLRM_IFATrain
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.metrics import gauc
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train

SET_SIZE = 10
COSTS = "## What they cost to train\n"
"""Heading of the page's section on costs."""
IFA = IFAConfig(
    embedding_dim=32,
    num_heads=1,
    feature_map="hedgehog",
    identity_features=("item", "category"),
    identity_buckets=131072,
    identity_half_lives=(math.inf,),
)
WITH_TOPICS = replace(IFA, identity_features=("item", "topic", "category"))
RELATIONS = synthetic.SyntheticConfig(
    train=12000,
    test=1000,
    mean_events=40,
    topics=20,
    interests=4,
    everyday_items=200,
    noise=0.0,
    distance=0,
    bias=-1.5,
    strength=3.0,
    relations=True,
)
JOURNEY = {"train": 4000, "test": 2000}
"""Number of requests used from each split, evenly spread."""
JOURNEY_PART = f"""
Requests of the Complete Journey, real baskets ({JOURNEY["train"]:,} of the split `train`, one pass, and
{JOURNEY["test"]:,} of `test`; 60 to 100 candidates each, all exposed):

TABLE_JOURNEY

"""
EPOCHS = {"relations": 1, "plain": 2, "journey": 1}
PLAIN = synthetic.SyntheticConfig(train=4000, test=2000, mean_events=300, distance=100)
SETS = {
    "by itself": CandidateSetConfig(),
    "softmax": CandidateSetConfig("softmax"),
    "linear": CandidateSetConfig("linear"),
    "generate": CandidateSetConfig(generate=True),
    "softmax, generate": CandidateSetConfig("softmax", generate=True),
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/sets")
    """Folder of the logs and runs."""
    seeds: int = 3
    """Seeds per run on logs without relations, and of "generate" on the log with relations."""
    journey: Path | None = None
    """Log of The Complete Journey with all candidates exposed; without it the page has no such table."""
    costs: bool = False
    """Train nothing: write only the last two tables, into the existing page."""
    smoke: bool = False
    """Tiny logs, one seed, no page."""


def part_of(whole: Path, path: Path, requests: dict[str, int]) -> EventLog:
    """A log with this many of another log's requests per split; written if it does not exist."""
    if path.exists():
        return EventLog(path)
    with drafting(path) as draft:
        for file in ("events.parquet", "items.parquet", "vocabulary.json"):
            shutil.copy(whole / file, draft)
        shutil.copytree(whole / "vocabulary", draft / "vocabulary")
        (draft / "requests").mkdir(exist_ok=True)
        for split, count in requests.items():
            frame = pd.read_parquet(whole / "requests" / f"{split}.parquet")
            rows = np.linspace(0, len(frame) - 1, min(count, len(frame))).astype(int)
            frame.iloc[rows].to_parquet(draft / "requests" / f"{split}.parquet", index=False)
        return EventLog.publish(draft, path, EventLog(whole).schema, list(requests))


def run(options: Options, log: str, name: str, seed: int) -> Path:
    """Train, unless done before; returns the run's folder."""
    folder = options.out / "".join(c if c.isalnum() else "_" for c in f"{log} {name} {seed}")
    done = folder / "done.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        ifa = WITH_TOPICS if log == "relations" else IFA
        config = TrainConfig(
            data=options.out / f"log_{log}",
            out=folder,
            ifa=ifa,
            epochs=EPOCHS[log],
            max_requests=16,
            seed=seed,
            validate=False,
            candidate_set=SETS[name],
        )
        done.write_text(json.dumps(train(config)))
    return folder


@dataclass(frozen=True)
class Split:
    """The split `test` of the log with relations, and its best possible scores."""

    dataset: RankingDataset
    truth: SetTruth
    alone: np.ndarray
    given: np.ndarray
    best: float

    @staticmethod
    def of(log: EventLog) -> Split:
        dataset, truth = RankingDataset(log, "test"), truth_of(log, "test")
        assert truth is not None
        exposed = np.asarray(dataset.requests[EXPOSED])
        best = float(np.mean([truth.reward(rows) for rows in truth.best_sets(SET_SIZE)]))
        return Split(dataset, truth, truth.scores_alone(), truth.scores_given(exposed), best)

    def gauc(self, score: np.ndarray) -> float:
        """GAUC of the exposed candidates by their true probabilities of being picked instead of drawn
        labels, which would add noise: how often, of a picked and an unpicked candidate, the picked one
        has the higher score; mean over the requests."""
        exposed = np.asarray(self.dataset.requests[EXPOSED])
        picked, score = (rows[exposed].reshape(-1, SHOWN) for rows in (self.given, score))
        weight = picked[:, :, None] * (1 - picked[:, None, :]) * (1 - np.eye(SHOWN))
        before = np.sign(score[:, :, None] - score[:, None, :]) / 2 + 0.5
        return float(((weight * before).sum((1, 2)) / weight.sum((1, 2))).mean())

    def drawn(self, score: np.ndarray) -> float:
        """GAUC of the exposed candidates by drawn labels."""
        exposed = np.asarray(self.dataset.requests[EXPOSED])
        labels = np.asarray(self.dataset.requests["label"])[exposed]
        return gauc(np.repeat(np.arange(len(labels) // SHOWN), SHOWN), score[exposed], labels)

    def share(self, sets: list[np.ndarray]) -> float:
        """The sets' share of the best sets' expected reward."""
        return float(np.mean([self.truth.reward(rows) for rows in sets])) / self.best

    def by_topk(self, score: np.ndarray) -> list[np.ndarray]:
        spans = zip(self.truth.offsets[:-1], self.truth.offsets[1:], strict=True)
        return [a + np.argsort(-score[a:b], kind="stable")[:SET_SIZE] for a, b in spans]

    def by_greedy(self) -> list[np.ndarray]:
        """The sets that the true scores choose one by one."""
        sets = []
        for first, last in zip(self.truth.offsets[:-1], self.truth.offsets[1:], strict=True):
            chosen = np.empty(0, np.int64)
            for _ in range(SET_SIZE):
                left = np.setdiff1d(np.arange(first, last), chosen)
                grown = np.column_stack([np.tile(chosen, (len(left), 1)), left])
                logit, topic = self.truth.logit[grown], self.truth.topic[grown]
                picked = sigmoid(set_logits(logit, topic))
                chosen = grown[picked.sum(1).argmax()]
            sets.append(chosen)
        return sets


@torch.no_grad()
def measured(split: Split, folder: Path) -> dict[str, float]:
    """A run's GAUC of the exposed candidates by true probabilities and by drawn labels, given the others
    that were shown if the model can use them; and its shares of the best sets' reward."""
    model = load_run(folder).dlrm.eval()
    requests = split.dataset
    given = np.zeros(len(split.alone))
    sets: dict[str, list[np.ndarray]] = {"topk": [], "greedy": []}
    sampler = EventBudgetSampler(requests.history_lengths, 32768, 64)
    for numbers, batch in zip(sampler, make_loader(requests, sampler), strict=True):
        rows, candidates = requests.candidate_rows(numbers)[0], model.scored(model.describe(batch))
        whole = JaggedTensor(candidates.tokens, offsets=candidates.offsets)
        logits = model.logits_given(candidates)
        given[rows] = logits[:, 0].numpy()
        chosen = {"topk": generate_set(logits[:, 0], whole, SET_SIZE)}
        if model.taken_arch is not None:
            given[rows] = model.logits_given(candidates, batch.exposed)[:, 0].numpy()
            chosen["greedy"] = generate_set(model.set_gain(candidates), whole, SET_SIZE, "greedy")
        for name, found in chosen.items():
            sets[name] += [rows[r] for r in found.values().view(-1, SET_SIZE).numpy()]
    result = {
        "given": split.gauc(given),
        "drawn": split.drawn(given),
        "topk": split.share(sets["topk"]),
    }
    return result | ({"greedy": split.share(sets["greedy"])} if sets["greedy"] else {})


def relations_table(options: Options, split: Split) -> pd.DataFrame:
    """Each model's metrics on the log with relations, between those of the two truths."""
    low, high = split.gauc(split.alone), split.gauc(split.given)
    drawn_low, drawn_high = split.drawn(split.alone), split.drawn(split.given)
    rows = [
        {
            "": "the truth, without knowing what is shown",
            "GAUC": f"{low:.4f}",
            "of the gap": "0.000",
            "by labels": "0.000",
            "top-k": f"{split.share(split.by_topk(split.alone)):.3f}",
            "greedy": "",
        },
        {
            "": "the truth, knowing what is shown",
            "GAUC": f"{high:.4f}",
            "of the gap": "1.000",
            "by labels": "1.000",
            "top-k": "",
            "greedy": f"{split.share(split.by_greedy()):.3f}",
        },
    ]
    for name in ("by itself", "softmax", "generate", "softmax, generate"):
        for seed in range(options.seeds if name == "generate" else 1):
            found = measured(split, run(options, "relations", name, seed))
            rows.append(
                {
                    "": f"{name}, seed {seed}",
                    "GAUC": f"{found['given']:.4f}",
                    "of the gap": f"{(found['given'] - low) / (high - low):.3f}",
                    "by labels": f"{(found['drawn'] - drawn_low) / (drawn_high - drawn_low):.3f}",
                    "top-k": f"{found['topk']:.3f}",
                    "greedy": f"{found['greedy']:.3f}" if "greedy" in found else "",
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


@torch.no_grad()
def plain_gauc(folder: Path) -> float:
    """GAUC of the split `test` with no candidate taken."""
    model, dataset = (loaded := load_run(folder)).dlrm.eval(), loaded.dataset("test")
    score = np.zeros(len(dataset.requests["candidates"]))
    sampler = EventBudgetSampler(dataset.history_lengths, 32768, 32)
    for numbers, batch in zip(sampler, make_loader(dataset, sampler), strict=True):
        score[dataset.candidate_rows(numbers)[0]] = model(batch)[:, 0].numpy()
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests[OFFSETS]))
    return gauc(request, score, np.asarray(dataset.requests[model.config.tasks[0].name]))


def harm_table(options: Options, log: str) -> pd.DataFrame:
    """GAUC by seed on a log whose labels do not depend on relations, and the loss by the relations."""
    found: dict[str, list[float]] = {name: [] for name in SETS if name != "softmax, generate"}
    for seed in range(options.seeds):
        for name, scores in found.items():
            scores.append(plain_gauc(run(options, log, name, seed)))
            print(log, name, seed, round(scores[-1], 4), flush=True)
    base = found["by itself"]
    return pd.DataFrame(
        {
            "": name,
            "GAUC, by seed": ", ".join(f"{score:.4f}" for score in scores),
            "mean": f"{np.mean(scores):.4f}",
            "against by itself, by seed": ", ".join(
                f"{score - alone:+.4f}" for score, alone in zip(scores, base, strict=True)
            ),
            "mean difference": f"{np.mean(scores) - np.mean(base):+.4f}",
        }
        for name, scores in found.items()
    )


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call on one core; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def made(log: EventLog, relations: CandidateSetConfig) -> DLRM_IFA:
    """A model with random weights on the CPU."""
    torch.manual_seed(0)
    config = TrainConfig(log.path, log.path, ifa=IFA, candidate_set=relations)
    model = build_model(log.schema, config, log.scales)
    model.to_empty(device="cpu")
    model.reset_parameters()
    return model


def step_table(options: Options) -> pd.DataFrame:
    """The time of a training step, update included, relative to the model whose candidates do not see
    each other."""
    log, device = EventLog(options.out / "log_plain"), init_process_group()
    models = {name: DLRM_IFATrain(made(log, relations)) for name, relations in SETS.items()}
    rows: dict[str, dict[str, str]] = {name: {"": name} for name in SETS}
    for requests in (16, 64):
        batch = RankingDataset(log, "train")[np.arange(requests)]
        calls = {}
        for name, model in models.items():
            sharded, optimizer = shard(copy.deepcopy(model), device, OptimizerConfig())
            pipeline = TrainPipelineSparseDist(sharded, optimizer, device)
            calls[name] = partial(pipeline.progress, itertools.repeat(batch))
        seconds = interleaved(calls, 3 if options.smoke else 40)
        for name, s in seconds.items():
            rows[name] |= {
                f"ms, {requests} requests": f"{1000 * s:.0f}",
                f"ratio, {requests} requests": f"{s / seconds['by itself']:.2f}",
            }
    return pd.DataFrame(rows.values())


@torch.no_grad()
def greedy_table(options: Options) -> pd.DataFrame:
    """The time of choosing ten of a thousand candidates, relative to ranking the thousand, histories
    included."""
    log = EventLog(options.out / "log_plain")
    dataset = RankingDataset(log, "test")
    batch = dataset[np.arange(32)]  # 1,024 candidates, moved to one request below
    sequence = batch.sequence_features
    m = len(batch.labels)
    one = replace_requests(batch, sequence, m)
    model = made(log, CandidateSetConfig(generate=True)).eval()
    state = model.encode(one)

    def rank(state: Any = None) -> None:
        generate_set(model.logits_given(model.describe(one, state))[:, 0], whole, SET_SIZE)

    def greedy(state: Any = None) -> None:
        generate_set(model.set_gain(model.describe(one, state)), whole, SET_SIZE, "greedy")

    whole = JaggedTensor(torch.empty(m), lengths=torch.tensor([m]))
    calls = {
        "rank": rank,
        "greedy": greedy,
        "rank, from the state": lambda: rank(state),
        "greedy, from the state": lambda: greedy(state),
    }
    seconds = interleaved(calls, 3 if options.smoke else 40)
    return pd.DataFrame(
        {
            "": name,
            "ms": f"{1000 * s:.1f}",
            "ratio": f"{s / seconds[name.replace('greedy', 'rank')]:.2f}",
        }
        for name, s in seconds.items()
    )


def replace_requests(batch: Any, sequence: Any, m: int) -> Any:
    """The first request of a batch, with the candidates of all requests."""
    keys, values, lengths = sequence.keys(), [], []
    for key in keys:
        part = sequence[key]
        count = m if key.startswith("candidate_") else int(part.lengths()[0])
        values.append(part.values()[:count])
        lengths.append(count)
    batch.sequence_features = KeyedJaggedTensor.from_lengths_sync(
        keys, torch.cat(values), torch.tensor(lengths)
    )
    batch.dense_features = batch.dense_features[:1]
    batch.history_age = batch.history_age[: lengths[keys.index("history_item")]]
    return batch


def write_costs(options: Options) -> None:
    """Rewrite the page's last sections."""
    page, template = ROOT / "docs" / "sets.md", (Path(__file__).parent / "sets_page.md").read_text()
    synthetic.prepare(options.out / "log_plain", PLAIN)
    text = COSTS + template.split(COSTS)[1]
    text = text.replace("COSTED", measured_by())
    for name, table in (("STEP", step_table(options)), ("GREEDY", greedy_table(options))):
        text = text.replace(f"TABLE_{name}", markdown(table))
    page.write_text(page.read_text().split(COSTS)[0] + text)
    print(text)


def main(options: Options) -> None:
    """Run everything and write the page."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.costs:
        return write_costs(options)
    configs = {"relations": RELATIONS, "plain": PLAIN}
    if options.smoke:
        options = replace(options, seeds=1)
        configs = {name: replace(c, train=64, test=40) for name, c in configs.items()}
    logs = {name: synthetic.prepare(options.out / f"log_{name}", c) for name, c in configs.items()}
    tables = {
        "STEP": step_table(options),
        "GREEDY": greedy_table(options),
        "RELATIONS": relations_table(options, Split.of(logs["relations"])),
        "HARM": harm_table(options, "plain"),
    }
    if options.journey is not None:
        count = dict.fromkeys(JOURNEY, 40) if options.smoke else JOURNEY
        part_of(options.journey, options.out / "log_journey", count)
        tables["JOURNEY"] = harm_table(options, "journey")
    text = (Path(__file__).parent / "sets_page.md").read_text()
    text = text.replace("\nJOURNEY\n", f"\n{JOURNEY_PART}" if options.journey else "")
    for name, table in tables.items():
        print(found := markdown(table), flush=True)
        text = text.replace(f"TABLE_{name}", found)
    if not options.smoke:
        text = text.replace("MEASURED", measured_by()).replace("COSTED", "the same")
        (ROOT / "docs" / "sets.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
