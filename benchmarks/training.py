"""What the native op and bfloat16 give a training step of the demo's model, and where its time goes.

    python benchmarks/training.py            # about 10 minutes on 2 cores; --requests 200: 3

Writes docs/training.md. The same requests of The Complete Journey in the same order in every run; the
cases take turns, each run in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from report import ROOT, markdown, measured_by
from scaling import COLOURS, kind_of
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT))  # the examples are no package
from examples.complete_journey.demo import MODELS
from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig, prepare
from ifa_torchrec.training.options import Precision, TrainConfig
from ifa_torchrec.training.trainer import train

CASES: dict[str, tuple[str, Precision]] = {  # the operators' backend, and TrainConfig's precision
    "torch": ("torch", "fp32"),
    "native": ("native", "fp32"),
    "native, bf16": ("native", "bf16"),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 3
    """Times that each case is run, by turns; medians are reported."""
    requests: int = 2000
    """Training requests."""


def work(case: str, data: str, profiled: bool) -> dict[str, float]:
    """Train once: events a second, or milliseconds a step by kind."""
    backend, precision = CASES[case]
    config = TrainConfig(
        data=Path(data),
        out=Path(tempfile.mkdtemp()),
        ifa=replace(MODELS["ifa"][1], backend=backend),
        precision=precision,
        validate=False,
    )
    if not profiled:
        result = train(config)
        return {
            "events_per_second": result["events_per_second"],
            "waited": result["waited"] / result["seconds"],
        }
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps = train(config)["steps"]
    kinds: Counter[str] = Counter()
    for event in profiler.events() or []:
        kinds[kind_of(event)] += event.self_cpu_time_total / 1000 / steps
    return dict(kinds)


def run(case: str, data: Path, profiled: bool = False) -> dict[str, float]:
    """``work`` in a process of its own."""
    code = f"import training as t, json; print(json.dumps(t.work({case!r}, {str(data)!r}, {profiled})))"
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
    speeds: dict[str, list[float]] = {case: [] for case in CASES}
    waited: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "log"
        log = prepare(data, CompleteJourneyConfig(train=options.requests, valid=10, test=10))
        for _ in range(options.rounds):
            for case, done in speeds.items():
                result = run(case, data)
                done.append(result["events_per_second"])
                waited[case].append(result["waited"])
        profiles = {case: run(case, log.path, profiled=True) for case in CASES}
    before = statistics.median(speeds["torch"])
    rows = [
        {
            "case": case,
            "events a second": f"{statistics.median(done):,.0f}",
            "to torch": f"{statistics.median(done) / before:.2f}",
            "waiting for batches": f"{statistics.median(waited[case]):.1%}",
            **{f"{kind}, ms": f"{profiles[case].get(kind, 0):.0f}" for kind in COLOURS},
        }
        for case, done in speeds.items()
    ]
    (ROOT / "docs" / "training.md").write_text(
        f"""# Speed: a training step of the demo's model

{source}, torch {torch.__version__};
{options.requests:,} requests of The Complete Journey, IFA as the demo has it; medians of
{options.rounds} runs, the cases by turns. *bf16*: `--precision bf16`. *Waiting for batches*: the share
of the training's time in which a step waited for its batch to be made.

Milliseconds a step by kind are of one profiled run of each case, which is slower than the others.

{markdown(pd.DataFrame(rows))}
"""
    )
    print("Wrote docs/training.md")


if __name__ == "__main__":
    main()
