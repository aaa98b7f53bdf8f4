"""Training throughput on 1, 2 and 4 ranks of this machine, a time profile, and the ranks' imbalance.

    python benchmarks/scaling.py

Writes docs/scaling.md and docs/scaling.png. The work is the same in every case: the same requests in
the same order, with the same number of events per step over all ranks. Refuses to run if the sharded
model's tests fail.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import tyro
from report import ROOT, markdown, measured_by
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ifa_torchrec import DLRM_IFATrain, IFAConfig
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogSchema, RankingDataset, make_loader
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import batch_size

KINDS = {
    "communication": re.compile(
        r"c10d::|All2All|all2all|ReduceScatter|Reduce_Scatter|AllGather|All_Gather"
    ),
    "attention": re.compile(r"ifa::|_ifa_(encode|attend|match)"),
    "lookup": re.compile(r"fbgemm::|\[lookup\]|Lookup"),
    "loading": re.compile(r"DataLoader"),
}
"""Kinds of an operator's time, by patterns for its own name or a caller's; other operators are "dense",
and everything else, mostly Python, is "other"."""
COLOURS = {
    "lookup": "#4477aa",
    "communication": "#ee6677",
    "attention": "#228833",
    "dense": "#ccbb44",
    "loading": "#aa3377",
    "other": "#bbbbbb",
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 3
    """Runs per case; the cases take turns, and medians are reported."""
    steps: int = 30
    """Timed steps per run."""
    events: int = 32768
    """Events per step, over all ranks."""
    items: int = 200_000
    """Rows of the item table."""


def make_log(path: Path, items: int) -> EventLog:
    """Write a log with log-normal histories, 1,000 events on average, the longest about 20 times that;
    items are drawn by Zipf's law."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(1000) - 0.5, 1.0, 600).astype(int), 30_000)
    start = pd.Timestamp("2024-01-01")
    user = np.repeat(np.arange(len(lengths)), lengths)
    events = pd.DataFrame(
        {
            "user": user,
            "item": rng.zipf(1.2, len(user)) % items,
            "time": start + pd.to_timedelta(rng.integers(0, 365 * 86400, len(user)), unit="s"),
        }
    )
    item = np.arange(items)
    count = 4000
    requests = pd.DataFrame(
        {
            "user": rng.integers(0, len(lengths), count),
            "time": start + pd.Timedelta(days=366),
            "country": rng.integers(0, 100, count),
            "hour": rng.integers(0, 24, count),
            "candidates": list(rng.zipf(1.2, (count, 64)) % items),
            "exposed": [np.ones(64, bool)] * count,
            "label": list((rng.random((count, 64)) < 0.1).astype(np.float32)),
        }
    )
    return EventLog.from_pandas(
        path,
        events,
        LogSchema(
            item_features={"item": items, "category": 1000},
            context_features={"country": 100, "hour": 24},
        ),
        pd.DataFrame({"item": item, "category": item % 1000}),
        {"train": requests},
    )


def work(log_path: str, options: Options) -> tuple[float, dict[str, float]]:
    """The work of a rank. Returns events per second over all ranks, and its milliseconds per step by
    kind."""
    warnings.simplefilter("ignore")
    device = init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    log = EventLog(Path(log_path))
    dataset = RankingDataset(log, "train")
    config = TrainConfig(
        Path(log_path),
        Path(),
        ifa=IFAConfig(embedding_dim=64, num_heads=2, half_lives=(float("inf"), 30.0)),
        max_events=options.events // world,
        max_requests=max(64 // world, 1),
    )
    torch.manual_seed(rank)
    model, optimizer = shard(
        DLRM_IFATrain(build_model(log.schema, config, log.scales)),
        device,
        OptimizerConfig(),
        batch=batch_size(dataset, config.max_events, config.max_requests),
    )
    sampler = EventBudgetSampler(
        dataset.history_lengths, config.max_events, config.max_requests, seed=0, shard=(rank, world)
    )
    timed = [request for some in islice(sampler, 3, 3 + options.steps) for request in some]
    requests = [request for request in timed if request != EMPTY_REQUEST]
    events = torch.tensor(int(dataset.history_lengths[requests].sum()))
    dist.all_reduce(events)
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    batches = iter(make_loader(dataset, sampler))
    for _ in range(3):
        pipeline.progress(batches)

    dist.barrier()
    start = time.perf_counter()
    for _ in range(options.steps):
        pipeline.progress(batches)
    dist.barrier()
    seconds = time.perf_counter() - start

    profiled = 5
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(profiled):
            pipeline.progress(batches)
    kinds = Counter()
    for event in profiler.events() or []:
        kinds[kind_of(event)] += event.self_cpu_time_total / 1000 / profiled
    dist.destroy_process_group()
    return events.item() / seconds, dict(kinds)


def kind_of(event) -> str:
    """The kind of a profiler's event."""
    above = event
    while above is not None:
        for kind, pattern in KINDS.items():
            if pattern.search(above.name):
                return kind
        above = above.cpu_parent
    return "dense" if "::" in event.name or "Backward" in event.name else "other"


def run(log: Path, ranks: int, threads: int, options: Options) -> tuple[float, dict[str, float]]:
    """Run one case once: events per second, and the ranks' mean milliseconds per step by kind."""
    os.environ.update(OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    results = list(elastic_launch(config, work)(str(log), options).values())
    kinds = {kind: statistics.mean(r[1].get(kind, 0.0) for r in results) for kind in COLOURS}
    return statistics.mean(r[0] for r in results), kinds


def imbalance_table(lengths: np.ndarray) -> pd.DataFrame:
    """Most events of a rank over the mean, averaged over the steps, for three ways to make batches."""
    budget, requests = 32768, 32
    order = np.random.default_rng([0, 0]).permutation(len(lengths))
    rows = []
    for ranks in (2, 4, 8, 64):
        shared = EventBudgetSampler(lengths, budget, requests, seed=0, shard=(0, ranks))
        mine = [lengths[order[rank::ranks]] for rank in range(ranks)]
        # a rank's events, step by step
        counted = [
            [part[i : i + requests].sum() for i in range(0, len(part), requests)] for part in mine
        ]
        budgeted = [
            [part[batch].sum() for batch in EventBudgetSampler(part, budget, requests)] for part in mine
        ]
        rows.append(
            {
                "ranks": ranks,
                f"{requests} requests each": _imbalance(counted),
                "own batches by a budget": _imbalance(budgeted),
                "shared by events": f"{shared.imbalance():.3f}",
            }
        )
    return pd.DataFrame(rows)


def _imbalance(events: list[list[int]]) -> str:
    steps = min(map(len, events))
    by_step = np.array([of_rank[:steps] for of_rank in events])
    return f"{(by_step.max(0) / by_step.mean(0)).mean():.3f}"


def report(options: Options) -> str:
    """Measure, draw the picture, and return the page's text."""
    cores = os.cpu_count() or 1
    cases = [(1, 1), (1, 2), (2, 1), (4, 1)]
    speeds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    times: dict[tuple[int, int], list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        log = make_log(path, options.items)
        lengths = RankingDataset(log, "train").history_lengths
        for _ in range(options.rounds):
            for case in cases:
                speed, kinds = run(path, *case, options)
                speeds[case].append(speed)
                times[case].append(kinds)
                print(f"{case[0]} ranks of {case[1]} threads: {speed:,.0f} events/s", flush=True)
    rows, bars = [], {}
    base = statistics.median(speeds[cases[0]])
    for case in cases:
        ranks, threads = case
        speed = statistics.median(speeds[case])
        kinds = {kind: statistics.median(t[kind] for t in times[case]) for kind in COLOURS}
        name = f"{ranks} x {threads}" + (" (oversubscribed)" if ranks * threads > cores else "")
        bars[name] = kinds
        rows.append(
            {
                "ranks x threads": name,
                "events/s": f"{speed:,.0f}",
                "lowest to highest": f"{min(speeds[case]):,.0f} to {max(speeds[case]):,.0f}",
                "ratio": f"{speed / base:.2f}",
                **{kind: f"{ms:.0f}" for kind, ms in kinds.items()},
            }
        )
    draw(pd.DataFrame(bars).T)
    histories = f"mean {lengths.mean():,.0f}, longest {lengths.max():,}"
    return f"""# Scaling on one machine

{measured_by()},
torch {torch.__version__}, gloo. The work is the same in every row: {options.steps} steps of at most
{options.events:,} events over all ranks (D = 64, two item features, 64 candidates per request, a table
of {options.items:,} items; histories log-normal, {histories}). Medians of {options.rounds} rounds,
interleaved. Milliseconds per step and rank are the profiler's, over 5 further steps; communication
includes waiting for slower ranks.

{markdown(pd.DataFrame(rows))}

![Milliseconds per step by kind](scaling.png)

## How even the ranks are

The largest number of events on a rank divided by the mean over the ranks, averaged over the steps of an
epoch, with at most 32 requests per rank and, except in the first column, at most 32,768 events: 1 is
even; at 1.5 the ranks wait for a third of the time on average. In the first two columns the requests go
to the ranks in turn; the last is what training does.

{markdown(imbalance_table(lengths))}
"""


def draw(kinds: pd.DataFrame) -> None:
    """Draw the stacked bars."""
    axes = kinds.plot.barh(stacked=True, color=COLOURS, figsize=(8, 3), width=0.7)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step and rank")
    axes.set_ylabel("ranks x threads")
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, 1.18), frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(ROOT / "docs" / "scaling.png", dpi=120)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/distributed/test_sharding.py"]
    if subprocess.run(tests, cwd=ROOT).returncode:
        raise SystemExit("error: the tests fail; not measuring a wrong model")
    page = report(options)
    (ROOT / "docs" / "scaling.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
