"""FuxiCTR's long-sequence models, ours of the same names, and IFA, on the same requests of the same log.

    python -m venv FUXI && FUXI/bin/pip install fuxictr torch
    python benchmarks/peers/run.py --fuxictr-python FUXI/bin/python

Writes docs/peers.md. FuxiCTR runs in an environment of its own, or from a checkout (--fuxictr DIR); none
of its code is here. Each run is a process of its own, of one thread, one at a time, kept under --out and
not made again as long as it is the same; with --minutes the page has what there is by then. One of
FuxiCTR's models is tried in the settings of SETTINGS with few events, and all take what ranks the split
`valid` best.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no package
from benchmarks.peers.fuxictr_worker import peak_memory
from benchmarks.peers.to_fuxictr import label_of, left_out, to_fuxictr
from benchmarks.report import ROOT, commit, markdown, measured_by
from ifa_torchrec import IFAConfig
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.public import complete_journey
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetLossConfig, Task
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import measure, predict
from ifa_torchrec.training.trainer import train

FUXICTR, OURS = "FuxiCTR", "this package"
COMMON = dict(
    optimizer="adam",
    loss="binary_crossentropy",
    metrics=["AUC", "logloss"],
    task="binary_classification",
    monitor="AUC",
    monitor_mode="max",
    verbose=0,
    dnn_hidden_units=[64, 32],
    attention_dim=64,
    num_heads=2,
    topk=50,
    short_seq_len=50,
)
"""As FuxiCTR's configurations of SIM, ETA, SDIM and TWIN have it."""
MODELS: dict[str, dict[str, Any]] = {
    "TWIN": {},
    "SIM": {},
    "ETA": dict(hash_bits=32),
    "SDIM": dict(num_hashes=2, hash_bits=4),
    "DIN": dict(
        dnn_hidden_units=[500, 500, 500],
        attention_hidden_units=[64],
        attention_hidden_activations="Dice",
    ),
}
"""FuxiCTR's models, and what their configurations have besides."""
SETTINGS = {
    "batches of 256": dict(batch_size=256, embedding_dim=16, learning_rate=1e-3),
    "batches of 256, rate 3e-3": dict(batch_size=256, embedding_dim=16, learning_rate=3e-3),
    "batches of 8192, as published": dict(batch_size=8192, embedding_dim=16, learning_rate=1e-3),
}
"""Rows of a batch, width of a feature, learning rate."""
TRIAL = ("TWIN", 50)
"""The model and the latest events with which the settings are tried; all models take the best."""
PEER = IFAConfig(64, num_heads=2, half_lives=(math.inf, 30.0), interest_mass=False)
"""Our peers, as benchmarks/quality.py has them as published."""
POINTWISE = dict(loss=CandidateSetLossConfig(listwise=0.0))
OUR_MODELS: dict[str, dict[str, Any]] = {
    **{name: dict(interaction=name.lower(), ifa=PEER, identity=False, **POINTWISE) for name in MODELS},
    "IFA": POINTWISE,
    "IFA, as `ifa train`": {},
}
"""Ours; all but the last are trained by the log loss alone, as FuxiCTR's are."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    fuxictr_python: Path
    """Python of an environment in which FuxiCTR, or what a checkout of it needs, is installed."""
    fuxictr: Path | None = None
    """Checkout of FuxiCTR to take in place of the installed one."""
    data: Path | None = None
    """Event log with the splits train, valid and test; by default 2,000, 200 and 1,000 requests of The
    Complete Journey."""
    out: Path = Path("runs/peers")
    """Where the log in FuxiCTR's layout and the runs are kept."""
    lengths: tuple[int, ...] = (50, 200, 1000)
    """Latest events of a history that the models are given."""
    passes: int = 1
    """Over the training requests."""
    seeds: int = 1
    minutes: float = math.inf
    """Start no run later than this."""
    search_feature: str = "category"
    """Item feature by which our SIM searches."""


@dataclass(frozen=True)
class Job:
    """One training, and what is measured of it."""

    library: str
    model: str
    length: int
    seed: int
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def folder(self, out: Path) -> Path:
        names = (self.library, self.model, self.setting, str(self.length), str(self.seed))
        return out / "runs" / "".join(c if c.isalnum() else "-" for c in "_".join(names))


def fuxictr_job(model: str, setting: str, length: int, seed: int) -> Job:
    """One of FuxiCTR's models in a setting."""
    options = COMMON | MODELS[model] | SETTINGS[setting] | dict(max_len=length, seed=seed, gpu=-1)
    return Job(FUXICTR, model, length, seed, setting, options)


def our_job(options: Options, model: str, length: int, seed: int) -> Job:
    """One of ours."""
    given = OUR_MODELS[model] | dict(history_length=length, epochs=options.passes)
    return Job(OURS, model, length, seed, "", given | dict(search_feature=options.search_feature))


def timed(log: EventLog, length: int, count: int = 50) -> np.ndarray:
    """The test requests that are timed: spread over those whose history is as long as is given, or over
    the longest where there are none."""
    lengths = RankingDataset(log, "test", length).history_lengths
    longest = np.flatnonzero(lengths == lengths.max())
    return longest[np.linspace(0, len(longest) - 1, count).astype(int)]


def fuxictr(options: Options, log: EventLog, job: Job, folder: Path) -> dict[str, Any]:
    """Train one of FuxiCTR's models in its own environment."""
    given = dict(layout=str(options.out / "fuxictr"), model=job.model, out=str(folder))
    given |= dict(passes=options.passes, options=job.options, timed=timed(log, job.length).tolist())
    (folder / "job.json").write_text(json.dumps(given))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if options.fuxictr is not None:
        environment["PYTHONPATH"] = str(options.fuxictr)
    else:
        environment.pop("PYTHONPATH", None)
    command = [str(options.fuxictr_python), str(ROOT / "benchmarks/peers/fuxictr_worker.py")]
    try:
        with (folder / "log.txt").open("w") as told:
            command.append(str(folder / "job.json"))
            subprocess.run(command, env=environment, stdout=told, stderr=told, check=True)
    except FileNotFoundError as error:
        raise ConfigError(f"--fuxictr-python {options.fuxictr_python}: no such program") from error
    except subprocess.CalledProcessError as error:
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        raise ConfigError(
            f"{job.model} of FuxiCTR failed: {' '.join(last)} ({folder / 'log.txt'}). Is it installed "
            f"there ({options.fuxictr_python} -m pip install fuxictr torch)?"
        ) from error
    figures = json.loads((folder / "figures.json").read_text())
    figures["logits"] = {}
    for split in ("valid", "test"):
        # of probabilities in float32, which can be 0 or 1
        said = np.clip(np.load(folder / f"{split}.npy"), 1e-7, 1 - 1e-7)
        figures["logits"][split] = np.log(said / (1 - said))
    return figures


def ours(options: Options, log: EventLog, job: Job, folder: Path) -> dict[str, Any]:
    """Train one of ours in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_ours, log_path(options), folder, job).result()


def _ours(data: Path, folder: Path, job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    kept = dict(validate=False, checkpoint_every=10**9)
    config = TrainConfig(data, folder, seed=job.seed, **kept, **job.options)
    start = time.process_time()
    train(config)
    seconds = time.process_time() - start
    run = load_run(folder)
    test = run.dataset("test")
    logits, _ = predict(run.model, test, run.device, config.max_events, config.scored_requests)
    memory = peak_memory()
    times: dict[str, list[float]] = {"load": [], "score": []}
    run.model.eval()
    with torch.no_grad():
        for request in timed(run.log, job.length):
            start = time.process_time()
            batch = test[np.array([request])]
            loaded = time.process_time()
            run.model(batch)
            times["load"].append(1000 * (loaded - start))
            times["score"].append(1000 * (time.process_time() - loaded))
    return {
        "rows": int(RankingDataset(run.log, "train").requests[EXPOSED].sum()),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "memory": memory,
        "ms": {name: float(np.median(values)) for name, values in times.items()},
        "logits": {"test": logits[:, list(run.log.schema.tasks).index(label_of(run.log.schema))]},
    }


def log_path(options: Options) -> Path:
    return options.data or options.out / "log"


def quality(log: EventLog, split: str, logits: np.ndarray) -> dict[str, float]:
    """AUC, GAUC, NDCG@10, NE and log loss of the label's logits, [M]."""
    dataset, label = RankingDataset(log, split), label_of(log.schema)
    of_all = np.zeros((len(dataset.requests[CANDIDATES]), len(log.schema.tasks)), np.float32)
    of_all[:, list(log.schema.tasks).index(label)] = logits
    tasks = [Task(name, kind) for name, kind in log.schema.tasks.items()]
    measured = measure(dataset, of_all, tasks)
    measured = measured[label] if len(tasks) > 1 else measured
    mean = float(np.mean(dataset.requests[label]))
    entropy = -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
    result = {name: float(measured[name]) for name in ("auc", "gauc", "ndcg@10", "ne")}
    return result | {"log_loss": entropy * result["ne"]}


Result = dict[str, Any]
"""Figures of a run, with "test", and of FuxiCTR's "valid", as ``quality`` has them."""


def run(options: Options, log: EventLog, job: Job, deadline: float) -> Result | None:
    """Train and measure, or read what was measured; None after the deadline."""
    folder = job.folder(options.out)
    kept, described = folder / "result.json", repr((asdict(job), options.passes, str(log_path(options))))
    if kept.exists() and (found := json.loads(kept.read_text()))["job"] == described:
        return found["result"]
    if time.time() > deadline:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = (fuxictr if job.library == FUXICTR else ours)(options, log, job, folder)
    result |= {split: quality(log, split, z) for split, z in result.pop("logits").items()}
    result["commit"] = commit()
    kept.write_text(json.dumps({"job": described, "result": result}))
    print(
        f"{job.library} {job.model}, latest {job.length}, {job.setting or 'as it is'}, seed {job.seed}: "
        f"GAUC {result['test']['gauc']:.4f}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result


Results = dict[tuple[str, str, int, str], list[Result]]
"""By library, model, length and setting, the results of each seed."""


def run_all(options: Options, log: EventLog) -> Results:
    """The settings first, then ours and FuxiCTR's in turn, the shortest history first."""
    results: Results = {}
    deadline = time.time() + 60 * options.minutes

    def one(job: Job) -> None:
        if (result := run(options, log, job, deadline)) is not None:
            results.setdefault((job.library, job.model, job.length, job.setting), []).append(result)

    model, length = TRIAL
    for setting in SETTINGS:
        one(fuxictr_job(model, setting, length, 0))
    setting = best(results)
    for seed in range(options.seeds):
        for length in sorted(options.lengths):
            for model in OUR_MODELS:
                one(our_job(options, model, length, seed))
                if model in MODELS:
                    one(fuxictr_job(model, setting, length, seed))
    return results


def tried(results: Results) -> dict[str, float]:
    """GAUC of `valid` by setting."""
    model, length = TRIAL
    found = {setting: results.get((FUXICTR, model, length, setting)) for setting in SETTINGS}
    return {setting: runs[0]["valid"]["gauc"] for setting, runs in found.items() if runs}


def best(results: Results) -> str:
    """The setting in which `valid` was ranked best."""
    of_setting = tried(results)
    return max(of_setting, key=lambda name: of_setting[name], default=next(iter(SETTINGS)))


FIGURES: dict[str, tuple[str, int]] = {
    "GAUC": ("{:.4f}", 1),
    "NDCG@10": ("{:.4f}", 1),
    "AUC": ("{:.4f}", 1),
    "log loss": ("{:.4f}", -1),
    "CPU s a pass": ("{:,.0f}", -1),
    "rows a CPU s": ("{:,.0f}", 1),
    "peak GB": ("{:.2f}", -1),
    "ms a request": ("{:.1f}", -1),
    "of it loading": ("{:.1f}", -1),
}
"""The columns of the tables: how they are written, and whether more (1) or less (-1) is better."""


def figures(options: Options, runs: list[Result]) -> dict[str, float]:
    """The columns of FIGURES, means over seeds."""

    def of(result: Result) -> dict[str, float]:
        test, ms = result["test"], result["ms"]
        told = (test["gauc"], test["ndcg@10"], test["auc"], test["log_loss"])
        cost = (result["seconds"] / options.passes, result["rows"] * options.passes / result["seconds"])
        told += (*cost, result["memory"] / 1e9, ms["load"] + ms["score"], ms["load"])
        return dict(zip(FIGURES, told, strict=True))

    return {name: statistics.mean(of(result)[name] for result in runs) for name in FIGURES}


def rows_of(options: Options, results: Results, length: int) -> dict[tuple[str, str], dict[str, float]]:
    """The figures of every model at a length, by library and model; of FuxiCTR's in its best setting."""
    found = {}
    for model in (*MODELS, *(name for name in OUR_MODELS if name not in MODELS)):
        for library in (FUXICTR, OURS):
            setting = best(results) if library == FUXICTR else ""
            if runs := results.get((library, model, length, setting)):
                found[library, model] = figures(options, runs)
    return found


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    """A table of the page."""
    return markdown(
        pd.DataFrame(
            {"model": model, "of": library}
            | {name: FIGURES[name][0].format(value) for name, value in told.items()}
            for (library, model), told in rows.items()
        )
    )


def better(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    """Where FuxiCTR's models have the better figure, against ours of the same name and against IFA."""
    lines = []
    for (library, model), told in rows.items():
        for other in (model, *(name for name in OUR_MODELS if name not in MODELS)):
            mine = rows.get((OURS, other))
            if library == OURS or mine is None:
                continue
            ahead = [
                f"{name} {text.format(told[name])} against {text.format(mine[name])}"
                for name, (text, sign) in FIGURES.items()
                if sign * told[name] > sign * mine[name]
            ]
            if ahead:
                named = "ours" if other == model else other
                lines.append(f"- FuxiCTR's {model} against {named}: {'; '.join(ahead)}.")
    return "\n".join(lines) or "- Nowhere in these runs."


def tried_table(results: Results) -> str:
    """GAUC of `valid` in each setting."""
    found, taken = tried(results), best(results)
    rows = [
        {
            "setting": f"{setting} (taken)" if setting == taken else setting,
            "GAUC of `valid`": f"{found[setting]:.4f}" if setting in found else "not run",
        }
        for setting in SETTINGS
    ]
    return markdown(pd.DataFrame(rows))


def page(options: Options, log: EventLog, results: Results) -> str:
    """The text of docs/peers.md."""
    parts = []
    for length in sorted(options.lengths):
        rows = rows_of(options, results, length)
        parts.append(f"## The latest {length:,} events\n")
        parts.append(table(rows) if rows else "Not run yet.")
        if any(library == FUXICTR for library, _ in rows):
            parts.append(f"\nWhere FuxiCTR has the better figure:\n\n{better(rows)}")
        parts.append("")
    commits = {r["commit"] for runs in results.values() for r in runs}
    versions = {r["version"] for runs in results.values() for r in runs if "version" in r}
    lost = [*left_out(log.schema, label_of(log.schema)), "the times of events"]
    counts = [len(log.requests(split)["user"]) for split in ("train", "test")]
    text = (Path(__file__).parent / "page.md").read_text()
    for name, value in {
        "MEASURED": measured_by("python benchmarks/peers/run.py"),
        "TRAINED": ", ".join(sorted(commits)) or "none yet",
        "VERSION": ", ".join(sorted(versions)) or "(not run)",
        "TRAIN_REQUESTS": f"{counts[0]:,}",
        "TEST_REQUESTS": f"{counts[1]:,}",
        "PASSES": "one pass" if options.passes == 1 else f"{options.passes} passes",
        "SEEDS": "one seed" if options.seeds == 1 else f"up to {options.seeds} seeds, means",
        "LEFT_OUT": ", ".join(lost),
        "TABLES": "\n".join(parts).strip(),
        "TABLE_TRIED": tried_table(results),
    }.items():
        text = text.replace(name, value)
    return text


def main(options: Options) -> None:
    """Convert, run, and write the page."""
    options = replace(options, out=options.out.absolute())
    if options.data is None:
        small = complete_journey.CompleteJourneyConfig(train=2000, valid=200, test=1000)
        log = complete_journey.prepare(log_path(options), small)
    else:
        log = EventLog(options.data)
    for split in ("train", "valid", "test"):
        if split not in log.splits:
            raise ConfigError(f"--data {options.data}: no split {split!r}, there are {log.splits}")
    if not (options.out / "fuxictr" / "feature_map.json").exists():  # written last
        to_fuxictr(log, options.out / "fuxictr")
    results = run_all(options, log)
    (ROOT / "docs" / "peers.md").write_text(page(options, log, results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
