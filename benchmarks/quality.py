"""Compares all sequence interactions, trained under the same budget on real and synthetic histories.

    python benchmarks/quality.py             # 4 to 8 hours on 2 cores
    python benchmarks/quality.py --smoke     # every run once, tiny: seconds each, no page

Writes docs/quality.md and its pictures. Trained runs are stored under --out and not trained again as
long as their options are the same, so a stopped study can be continued. Refuses to run if the tests of
the modules fail.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from cost import Cost, cost_of
from report import ROOT, commit, markdown, measured_by
from torchrec.sparse.jagged_tensor import JaggedTensor

sys.path.insert(0, str(ROOT))  # the examples are not an installed package
from examples.baselines import measured
from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, RankingDataset, synthetic
from ifa_torchrec.data.public import complete_journey
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetConfig,
    CandidateSetLossConfig,
    DINAttention,
    ETAAttention,
    HSTUAttention,
    LowRankAttention,
    SDIMAttention,
    SIMAttention,
    SoftmaxAttention,
    SOLARAttention,
    TWINAttention,
)
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.scoring import measure, time_per_request
from ifa_torchrec.training.trainer import train

JOURNEY, SYNTHETIC = "complete_journey", "synthetic"
SYNTHETIC_LOG = synthetic.SyntheticConfig(train=8000)
JOURNEY_LOG = complete_journey.CompleteJourneyConfig(train=10000, valid=500, test=3000)

IFA = TrainConfig(Path(), Path()).ifa
"""IFA with the default options of `ifa train`."""
AS_PUBLISHED: dict[str, Any] = dict(interest_mass=False, readout="linear")
"""Changes to that configuration for plain linear attention, without our additions."""
PEER = {
    JOURNEY: IFAConfig(64, num_heads=2, half_lives=(math.inf, 30.0), interest_mass=False),
    SYNTHETIC: IFAConfig(64, num_heads=1, interest_mass=False),
}
"""The peers as published: attention only. Half-lives (in days) are set where they help all peers."""
HEADS: dict[str, Any] = dict(interest_mass=True, identity_head_dim=IFA.identity_head_dim)
"""IFA's masses and identity heads, which the peers get in the second comparison. The features,
half-lives and buckets are those that `ifa train` chooses from the log, the same for all."""
EPOCHS = {JOURNEY: 1, SYNTHETIC: 3}
LENGTHS = (50, 200, 1000)
BESIDE = "+ identity"
STORED = "from a stored state"
PEERS = [name for name in INTERACTIONS if name not in ("none", "ifa")]
BASELINES = {
    "popularity": "most popular",
    "recency_count": "the user's own, recency",
    "lightgbm": "LightGBM, features by hand",
}
"""Baselines without a neural net (examples/baselines.py); one run each, shown as published."""
LABELS = {
    **BASELINES,
    "none": "no history",
    "mean": "mean pooling",
    "softmax": "softmax, whole history",
    "softmax_recent": "softmax, latest 50",
    "din": "DIN, latest 50",
    "sim": "SIM-hard, 50 of the category",
    "eta": "ETA, 50 by hash",
    "twin": "TWIN-style, 50 by score",
    "sdim": "SDIM, hash collisions",
    "low_rank": "LREA-style, rank 32",
    "solar": "SOLAR-style, rank 32",
    "hstu": "HSTU-style, latest 200",
    "ifa": "IFA, whole history",
}
SETTINGS = {
    "softmax, latest 200": ("softmax_recent", lambda c, *_: SoftmaxAttention(c, 200)),
    "DIN, latest 100": ("din", lambda c, *_: DINAttention(c, 100)),
    "SIM-hard, 200 of the category": ("sim", lambda c, *_: SIMAttention(c, "category", 200)),
    "ETA, 200 by 64 bits": ("eta", lambda c, *_: ETAAttention(c, 200)),
    "ETA, 50 by 256 bits": ("eta", lambda c, *_: ETAAttention(c, 50, num_hashes=256)),
    "TWIN-style, 200 by score": ("twin", lambda c, *_: TWINAttention(c, 200)),
    "SDIM, 16 groups of 5 bits": ("sdim", lambda c, *_: SDIMAttention(c, 16, 5)),
    "SDIM, 48 groups of 4 bits": ("sdim", lambda c, *_: SDIMAttention(c, 48, 4)),
    "LREA-style, rank 128": ("low_rank", lambda c, *_: LowRankAttention(c, 128)),
    "SOLAR-style, rank 64, all": ("solar", lambda c, *_: SOLARAttention(c, 64)),
    "HSTU-style, latest 50": ("hstu", lambda c, *_: HSTUAttention(c, 50)),
}
"""Other settings of the peers, with the row of the main tables that each varies."""
INTERACTIONS.update({name: make for name, (_, make) in SETTINGS.items()})


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("runs/quality")
    """Folder of the logs and runs."""
    seeds: int = 3
    """Seeds per run of the main tables."""
    ablation_seeds: int = 2
    """Seeds per ablation and history length; other settings of the peers have one."""
    jobs: int = 2
    """Parallel runs, each with one thread."""
    minutes: float = math.inf
    """Start no run after this many minutes; the page then has the finished runs."""
    smoke: bool = False
    """Tiny logs, one seed, no page, to check that all runs work."""


@dataclass(frozen=True)
class Job:
    """One training and its evaluation."""

    data: str
    variant: str
    seed: int
    options: dict[str, Any] = field(hash=False)
    """Fields of TrainConfig; none for a baseline."""


def variants(data: str) -> dict[str, dict[str, Any]]:
    """The main comparison: each interaction as published, and with IFA's identity heads and masses.
    `ifa + identity` is `ifa train` without options."""
    plain, beside = PEER[data], replace(PEER[data], **HEADS)
    search = {"search_feature": "category"}
    result: dict[str, dict[str, Any]] = {}
    result["ifa"] = dict(interaction="ifa", ifa=replace(IFA, **AS_PUBLISHED), identity=False)
    result[f"ifa {BESIDE}"] = dict(interaction="ifa", ifa=IFA)
    result["none"] = dict(interaction="none", ifa=plain)
    for name in PEERS:
        result[name] = dict(interaction=name, ifa=plain, identity=False, **search)
    for name in PEERS if data == JOURNEY else ("mean", "softmax"):  # of little use on the synthetic log
        result[f"{name} {BESIDE}"] = dict(interaction=name, ifa=beside, **search)
    return result


def lengths(data: str) -> dict[str, dict[str, Any]]:
    """IFA and softmax on only the latest events."""
    main = variants(data)
    return {
        f"{name}, latest {length}": dict(main[name], history_length=length)
        for name in (f"ifa {BESIDE}", f"softmax {BESIDE}", "softmax")
        for length in LENGTHS
    }


def settings(data: str) -> dict[str, dict[str, Any]]:
    """The peers as published, with other settings than in the main tables."""
    main = variants(data)
    return {name: dict(main[row], interaction=name) for name, (row, _) in SETTINGS.items()}


def ablations(data: str) -> dict[str, dict[str, Any]]:
    """IFA with one thing changed."""

    def model(**changes: Any) -> dict[str, Any]:
        return dict(interaction="ifa", ifa=IFA) | changes

    def ifa(**changes: Any) -> dict[str, Any]:
        return model(ifa=replace(IFA, **changes))

    related = CandidateSetConfig("softmax")
    named = dict(identity_features=("item", "category"))
    result = {
        "dense heads alone, with masses": model(identity=False),
        "linear read-out": ifa(readout="linear"),
        "identity heads with mean values": ifa(identity_head_dim=None),
        "the same without masses": ifa(identity_head_dim=None, interest_mass=False),
        "feature map elu": ifa(feature_map="elu"),
        "feature map relu": ifa(feature_map="relu"),
        "2 heads of width 32": ifa(num_heads=2),
        "2 heads of width 64": ifa(num_heads=2, head_dim=64),
        "candidates see each other, softmax": model(candidate_set=related),
        "candidates see each other, linear": model(candidate_set=CandidateSetConfig("linear")),
        "loss: no listwise term": model(loss=CandidateSetLossConfig(listwise=0.0)),
    }
    if data == JOURNEY:
        days = (math.inf, 30.0, 7.0)
        result |= {
            "dense half-lives (inf, 30), 2 heads": ifa(num_heads=2, half_lives=(math.inf, 30.0)),
            "identity heads of item and category alone": ifa(
                **named, identity_half_lives=days, identity_buckets=131072
            ),
            "the same in 4,096 buckets": ifa(**named, identity_half_lives=days, identity_buckets=4096),
            "the same without decay": ifa(
                **named, identity_half_lives=(math.inf,), identity_buckets=131072
            ),
        }
    return result


def jobs(options: Options) -> list[Job]:
    """All runs, the first seed of the main comparison first and the ablations last."""
    main, others = (1, 1) if options.smoke else (options.seeds, options.ablation_seeds)
    result = []
    for seed in range(main):
        for data in (JOURNEY, SYNTHETIC):
            result += [Job(data, name, seed, {}) for name in (BASELINES if seed == 0 else ())]
            result += [Job(data, name, seed, given) for name, given in variants(data).items()]
    for seed in range(others):
        for data in (JOURNEY, SYNTHETIC):
            rest = lengths(data) | ablations(data) | (settings(data) if seed == 0 else {})
            result += [Job(data, name, seed, given) for name, given in rest.items()]
    return result


def log_path(options: Options, data: str) -> Path:
    return options.out / "data" / data


def prepare(options: Options) -> dict[str, EventLog]:
    """Write the logs, unless done before."""
    journey, generated = JOURNEY_LOG, SYNTHETIC_LOG
    if options.smoke:
        journey = replace(journey, train=64, valid=32, test=64)
        generated = replace(generated, train=64, test=32)
    return {
        JOURNEY: complete_journey.prepare(log_path(options, JOURNEY), journey),
        SYNTHETIC: synthetic.prepare(log_path(options, SYNTHETIC), generated),
    }


def folder_of(options: Options, job: Job) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in job.variant)
    return options.out / job.data / name / f"seed-{job.seed}"


def run(options: Options, job: Job, deadline: float) -> dict[str, float] | None:
    """Train and measure, or read the stored result; None after the deadline. Run in a worker process."""
    torch.set_num_threads(1)
    folder = folder_of(options, job)
    config = TrainConfig(
        data=log_path(options, job.data),
        out=folder,
        epochs=EPOCHS[job.data],
        validate=False,
        checkpoint_every=10**9,
        seed=job.seed,
        **job.options,
    )
    result_file = folder / "result.json"
    options_of_run = repr(dataclasses.asdict(config))
    if result_file.exists():
        kept = json.loads(result_file.read_text())
        if kept["options"] == options_of_run:
            return kept["metrics"]
    if time.time() > deadline:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    if job.variant in BASELINES:
        folder.mkdir(parents=True)
        metrics = {"train_seconds": 0.0, **measured(EventLog(config.data), job.variant, job.seed)}
    else:
        training = train(config)
        metrics = evaluate(EvaluateConfig(run=folder))
        metrics["train_seconds"] = training["seconds"]
    kept = {"options": options_of_run, "commit": commit(), "metrics": metrics}
    result_file.write_text(json.dumps(kept))
    return metrics


Results = dict[str, dict[str, list[dict[str, float]]]]
"""The metrics of each seed, by data set and variant."""


def run_all(options: Options) -> Results:
    """Run all jobs, ``options.jobs`` in parallel."""
    results: Results = {JOURNEY: {}, SYNTHETIC: {}}
    todo, start = jobs(options), time.perf_counter()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        deadline = time.time() + 60 * options.minutes
        futures = {pool.submit(run, options, job, deadline): job for job in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            job, metrics = futures[future], future.result()
            if metrics is None:
                continue
            results[job.data].setdefault(job.variant, []).append(metrics)
            print(
                f"{number}/{len(todo)} {time.perf_counter() - start:.0f} s: {job.data}, {job.variant}, "
                f"seed {job.seed}: GAUC {metrics['gauc']:.4f}, trained {metrics['train_seconds']:.0f} s",
                flush=True,
            )
    return results


def mean_and_deviation(runs: list[dict[str, float]], metric: str, digits: int = 4) -> str:
    """ "mean ± standard deviation" over seeds; "-" if there are no runs."""
    values = [metrics[metric] for metrics in runs if metric in metrics]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main_table(
    of_data: dict[str, list[dict[str, float]]], cost: dict[str, float], sizes: dict[str, Cost]
) -> pd.DataFrame:
    """Quality and cost of every interaction, as published and with identity heads."""
    rows = []
    for name, label in LABELS.items():
        row = {"interaction": label}
        for title, variant in (("as published", name), ("with identity heads", f"{name} {BESIDE}")):
            runs = of_data.get(variant, [])
            row[f"GAUC, {title}"] = mean_and_deviation(runs, "gauc")
            row[f"NDCG@10, {title}"] = mean_and_deviation(runs, "ndcg@10")
            row[f"ms, {title}"] = f"{cost[variant]:.2f}" if variant in cost else "-"
            row |= size_columns(title, sizes.get(variant))
        rows.append(row)
    stored = {column: "-" for column in rows[0]} | {"interaction": "IFA, from a stored state"}
    for title, variant in (("as published", "ifa"), ("with identity heads", f"ifa {BESIDE}")):
        stored |= size_columns(title, sizes.get(f"{variant}, {STORED}"))
    return pd.DataFrame([*rows, stored])


def size_columns(title: str, cost: Cost | None) -> dict[str, str]:
    """MFLOP per candidate, and kB read from the history."""
    names = f"MFLOP a candidate, {title}", f"kB read a request, {title}"
    values = ("-", "-") if cost is None else (f"{cost.flop / 1e6:.2f}", f"{cost.read / 1000:,.1f}")
    return dict(zip(names, values, strict=True))


def length_table(of_data: dict[str, list[dict[str, float]]]) -> pd.DataFrame:
    """GAUC by the length to which histories are cut."""
    rows = []
    for name in (f"ifa {BESIDE}", f"softmax {BESIDE}", "softmax"):
        row = {
            "interaction": f"{LABELS[name.split()[0]].split(',')[0]} {name.partition(' ')[2]}".strip()
        }
        for length in LENGTHS:
            runs = of_data.get(f"{name}, latest {length}", [])
            row[f"latest {length:,}"] = mean_and_deviation(runs, "gauc")
        row["all"] = mean_and_deviation(of_data.get(name, []), "gauc")
        rows.append(row)
    return pd.DataFrame(rows)


def settings_table(results: Results) -> pd.DataFrame:
    """The peers' other settings, each after that of the main tables."""
    rows = []
    for name in PEERS:
        shown = {f"{LABELS[name]} (main tables)": name}
        shown |= {setting: setting for setting, (row, _) in SETTINGS.items() if row == name}
        if len(shown) > 1:
            rows += [
                {"setting": label}
                | {
                    f"GAUC, {data.replace('_', ' ')}": mean_and_deviation(of_data.get(key, []), "gauc")
                    for data, of_data in results.items()
                }
                for label, key in shown.items()
            ]
    return pd.DataFrame(rows)


def ablation_table(data: str, of_data: dict[str, list[dict[str, float]]]) -> pd.DataFrame:
    """IFA, and IFA with one thing changed."""
    rows = []
    names = {"IFA": f"ifa {BESIDE}", "identity heads, mean pooling beside": f"mean {BESIDE}"}
    names |= {"dense heads alone, linear read-out, no masses": "ifa"} | {
        name: name for name in ablations(data)
    }
    for label, variant in names.items():
        runs = of_data.get(variant, [])
        if not runs:
            continue
        row = {
            "variant": label,
            "GAUC": mean_and_deviation(runs, "gauc"),
            "NDCG@10": mean_and_deviation(runs, "ndcg@10"),
            "NE": mean_and_deviation(runs, "ne"),
            "calibration": mean_and_deviation(runs, "calibration", 3),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def trained(options: Options, data: str) -> dict[str, Run]:
    """The runs of seed 0 of the main variants."""
    folders = {n: folder_of(options, Job(data, n, 0, given)) for n, given in variants(data).items()}
    return {name: load_run(f) for name, f in folders.items() if (f / "result.json").exists()}


def request_cost(runs: dict[str, Run]) -> dict[str, float]:
    """Milliseconds per test request of each run's model."""
    first = next(iter(runs.values()))
    models: dict[str, torch.nn.Module] = {name: r.model for name, r in runs.items()}
    return time_per_request(models, first.dataset("test"), first.device)


def request_sizes(runs: dict[str, Run], requests: int = 32) -> dict[str, Cost]:
    """FLOP and bytes of test requests spread over the split; for IFA also from stored states."""
    result: dict[str, Cost] = {}
    for name, of_run in runs.items():
        test = of_run.dataset("test")
        batches = [test[np.array([i])] for i in np.linspace(0, len(test) - 1, requests).astype(int)]
        of_run.dlrm.eval()
        result[name] = cost_of(of_run.dlrm, batches)
        if name.split()[0] == "ifa":
            result[f"{name}, {STORED}"] = cost_of(of_run.dlrm, batches, from_state=True)
    return result


@torch.no_grad()
def scaling_table(events: tuple[int, ...] = (1000, 10_000, 100_000), rounds: int = 5) -> pd.DataFrame:
    """Median milliseconds of only the interaction for one request, by history and candidate set.

    The models take turns. Tokens are random, of width 64; there are events / 50 categories.
    """
    torch.manual_seed(0)
    modules = {
        name: INTERACTIONS[name](PEER[SYNTHETIC], 50, "category")
        for name in (
            "softmax",
            "twin",
            "eta",
            "sim",
            "sdim",
            "low_rank",
            "solar",
            "hstu",
            "softmax_recent",
        )
    }
    ifa = INTERACTIONS["ifa"](replace(IFA, **AS_PUBLISHED), 50, None)
    modules |= {"ifa": ifa}
    times: dict[str, dict[str, list[float]]] = {}
    for n in events:
        for m in (64, 1000):
            history = JaggedTensor(torch.randn(n, 64), lengths=torch.tensor([n]))
            candidates = JaggedTensor(torch.randn(m, 64), lengths=torch.tensor([m]))
            ids, asked = torch.randint(n // 50, (n, 1)), torch.randint(n // 50, (m, 1))
            arguments = (candidates, history, None, ids, asked)
            calls = {LABELS[name]: partial(module, *arguments) for name, module in modules.items()}
            calls["IFA, state cached"] = partial(ifa.attend, candidates, ifa.encode(history))
            column = f"n = {n:,}, m = {m:,}"
            for _ in range(rounds + 1):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    seconds = time.perf_counter() - start
                    times.setdefault(name, {}).setdefault(column, []).append(1000 * seconds)
    return pd.DataFrame(
        [
            {"interaction": name}
            | {column: f"{statistics.median(values[1:]):.1f}" for column, values in columns.items()}
            for name, columns in times.items()
        ]
    )


def commits(options: Options) -> set[str]:
    """The commits at which the stored runs were trained."""
    kept = (folder_of(options, job) / "result.json" for job in jobs(options))
    return {json.loads(file.read_text())["commit"] for file in kept if file.exists()}


def draw_cost(results: Results, costs: dict[str, dict[str, float]]) -> None:
    """Plot GAUC against milliseconds, for both data sets."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for ax, (data, of_data) in zip(axes, results.items(), strict=True):
        for number, name in enumerate(LABELS):
            colour = "black" if name == "ifa" else colours(number)
            for variant, marker in ((name, "o"), (f"{name} {BESIDE}", "^")):
                if variant in costs[data]:
                    y = statistics.mean(r["gauc"] for r in of_data[variant])
                    label = LABELS[name] if marker == "o" else None
                    ax.scatter(costs[data][variant], y, marker=marker, s=70, color=colour, label=label)
        ax.set(xlabel="milliseconds a test request", ylabel="GAUC", title=data.replace("_", " "))
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.suptitle("Quality against cost (circle: as published; triangle: with identity heads)")
    figure.savefig(ROOT / "docs" / "quality_cost.png", dpi=110)
    plt.close(figure)


def draw_lengths(results: Results, best: float) -> None:
    """Plot GAUC against the history length, for both data sets."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, (data, of_data) in zip(axes, results.items(), strict=True):
        for name in (f"ifa {BESIDE}", f"softmax {BESIDE}", "softmax"):
            given = [*(f"{name}, latest {length}" for length in LENGTHS), name]
            points = {
                str(length): statistics.mean(r["gauc"] for r in of_data[variant])
                for length, variant in zip([*LENGTHS, "all"], given, strict=True)
                if variant in of_data
            }
            ax.plot([*points], [*points.values()], marker="o", label=name)
        if data == SYNTHETIC:
            ax.axhline(best, linestyle=":", color="gray", label="best reachable")
        ax.set(xlabel="latest events given", ylabel="GAUC", title=data.replace("_", " "))
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(ROOT / "docs" / "quality_length.png", dpi=110)
    plt.close(figure)


def report(options: Options, logs: dict[str, EventLog], results: Results) -> str:
    """Draw the pictures and return the page's text."""
    source = measured_by("python benchmarks/quality.py")  # before the pictures change the tree
    runs = {data: trained(options, data) for data in results}
    costs = {data: request_cost(of_data) for data, of_data in runs.items()}
    sizes = {data: request_sizes(of_data) for data, of_data in runs.items()}
    test = RankingDataset(logs[SYNTHETIC], "test")
    best = synthetic.best_scores(test, SYNTHETIC_LOG)
    best_gauc = measure(test, best[:, None])["gauc"]
    draw_cost(results, costs)
    draw_lengths(results, best_gauc)
    of_journey = RankingDataset(logs[JOURNEY], "test").history_lengths
    text = (ROOT / "benchmarks" / "quality_page.md").read_text()
    return text.format(
        measured_by=source,
        torch=torch.__version__,
        seeds=options.seeds,
        ablation_seeds=options.ablation_seeds,
        journey_train=f"{JOURNEY_LOG.train:,}",
        journey_test=f"{JOURNEY_LOG.test:,}",
        journey_events=f"{of_journey.mean():,.0f}",
        journey_longest=f"{of_journey.max():,}",
        synthetic_train=f"{SYNTHETIC_LOG.train:,}",
        synthetic_test=f"{SYNTHETIC_LOG.test:,}",
        synthetic_events=f"{test.history_lengths.mean():,.0f}",
        synthetic=SYNTHETIC_LOG,
        best_gauc=f"{best_gauc:.4f}",
        journey_table=markdown(main_table(results[JOURNEY], costs[JOURNEY], sizes[JOURNEY])),
        synthetic_table=markdown(main_table(results[SYNTHETIC], costs[SYNTHETIC], sizes[SYNTHETIC])),
        journey_lengths=markdown(length_table(results[JOURNEY])),
        synthetic_lengths=markdown(length_table(results[SYNTHETIC])),
        scaling_table=markdown(scaling_table()),
        settings_table=markdown(settings_table(results)),
        commits=", ".join(sorted(commits(options))),
        journey_ablation=markdown(ablation_table(JOURNEY, results[JOURNEY])),
        synthetic_ablation=markdown(ablation_table(SYNTHETIC, results[SYNTHETIC])),
    )


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/modules", "tests/models"]
    if subprocess.run(tests, cwd=ROOT, check=False).returncode:
        raise SystemExit("error: the tests fail; not measuring a wrong model")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the runs' processes
    logs = prepare(options)
    results = run_all(options)
    if options.smoke:
        return
    (ROOT / "docs" / "quality.md").write_text(report(options, logs, results))
    print("Wrote docs/quality.md and its pictures")


if __name__ == "__main__":
    main()
