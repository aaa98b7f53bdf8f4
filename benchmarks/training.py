"""The speed-up of a training step by the native op and bfloat16, on the demo's model, with a profile.

    python benchmarks/training.py            # about 8 minutes on 2 cores

Writes docs/training.md. Every run trains on the same requests of The Complete Journey in the same order.
The cases take turns, each run in its own process. For each step the median over the runs is used, so
that a slow minute of the machine, which is longer than a run, does not count against one case.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import tyro
from report import ROOT, markdown, measured_by
from scaling import COLOURS, kind_of
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT))  # the examples are not an installed package
from examples.complete_journey.demo import MODELS
from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig, prepare
from ifa_torchrec.training import trainer
from ifa_torchrec.training.options import Precision, TrainConfig
from ifa_torchrec.training.trainer import Trainer

CASES: dict[str, tuple[str, Precision]] = {  # the operators' backend, and TrainConfig's precision
    "torch": ("torch", "fp32"),
    "native": ("native", "fp32"),
    "native, bf16": ("native", "bf16"),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 7
    """Runs per case; the cases take turns, and the median of each step is used."""
    requests: int = 400
    """Number of training requests."""


@dataclass(frozen=True)
class Times:
    """The times of a run."""

    steps: list[float]
    """Seconds of each step, including its batch."""
    events: float
    """Events in all steps."""
    waited: float
    """Share of the time in which a step waited for its batch."""


def work(case: str, data: str) -> Times:
    """Train once."""
    steps: list[float] = []

    class Timed(Trainer):
        def train_step(self, batches: Iterator[RankingBatch]) -> None:
            start = time.perf_counter()
            super().train_step(batches)
            steps.append(time.perf_counter() - start)

    with mock.patch.object(trainer, "Trainer", Timed):
        result = trainer.train(options_of(case, data))
    events = result["events_per_second"] * result["seconds"]
    return Times(steps, events, result["waited"] / result["seconds"])


def by_kind(case: str, data: str) -> dict[str, float]:
    """Train once with the profiler: milliseconds per step by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps = trainer.train(options_of(case, data))["steps"]
    kinds: Counter[str] = Counter()
    for event in profiler.events() or []:
        kinds[kind_of(event)] += event.self_cpu_time_total / 1000 / steps
    return dict(kinds)


def options_of(case: str, data: str) -> TrainConfig:
    """The demo's model in one of the CASES."""
    backend, precision = CASES[case]
    return TrainConfig(
        data=Path(data),
        out=Path(tempfile.mkdtemp()),
        ifa=replace(MODELS["ifa"][1], backend=backend),
        precision=precision,
        validate=False,
    )


def run(what: str, case: str, data: Path) -> Any:
    """Run ``work`` or ``by_kind`` in its own process."""
    call = f"t.{what}({case!r}, {str(data)!r})"
    code = f"import training as t, json; print(json.dumps({call}, default=vars))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: {case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    source = measured_by()
    times: dict[str, list[Times]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "log"
        prepare(data, CompleteJourneyConfig(train=options.requests, valid=10, test=10))
        for _ in range(options.rounds):
            for case, done in times.items():
                done.append(Times(**run("work", case, data)))
        profiles = {case: run("by_kind", case, data) for case in CASES}
    # without the first step, which does one-time work
    step = {case: np.median([t.steps[1:] for t in done], axis=0).mean() for case, done in times.items()}
    speeds = {case: done[0].events / len(done[0].steps) / step[case] for case, done in times.items()}
    rows = [
        {
            "case": case,
            "events per second": f"{speeds[case]:,.0f}",
            "relative to torch": f"{speeds[case] / speeds['torch']:.2f}",
            "ms per step": f"{1000 * step[case]:.1f}",
            "waiting for batches": f"{statistics.median(t.waited for t in times[case]):.1%}",
            **{f"{kind}, ms": f"{profiles[case].get(kind, 0):.0f}" for kind in COLOURS},
        }
        for case in CASES
    ]
    (ROOT / "docs" / "training.md").write_text(
        f"""# Speed: a training step of the demo's model

{source}, torch {torch.__version__};
{options.requests:,} requests of The Complete Journey, IFA as in the demo; {options.rounds} interleaved
runs of each case. Each step counts with its median over the runs; the first step is left out, since it
includes one-time setup. *bf16*: `--precision bf16`. *Waiting for batches*: the share of the training
time during which a step waited for its batch.

Milliseconds per step by kind come from one profiled run of each case, which is slower than the others.

{markdown(pd.DataFrame(rows))}
"""
    )
    print("Wrote docs/training.md")


if __name__ == "__main__":
    main()
