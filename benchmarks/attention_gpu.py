"""The attention alone on a GPU: IFA's backends, softmax and padded linear attention.

    python benchmarks/attention_gpu.py           # a minute
    python benchmarks/attention_gpu.py --smoke   # small cases, on any device; no page

Writes docs/attention_gpu.md. The contestants are those of attention.py, all in bfloat16, so that
softmax has PyTorch's flash kernels; where lengths differ it has them by nested tensors. Refuses to print
where the results of those that compute the same thing differ.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
import tyro
from attention import (
    PASSES,
    Case,
    D,
    H,
    compare,
    contestants_of,
    ifa,
    linear_padded,
    log_normal,
    softmax_nested,
    softmax_padded,
    uniform,
)
from report import ROOT, markdown, measured_by
from torch import Tensor

CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "IFA": partial(ifa, "torch"),
    **({"IFA, Triton": partial(ifa, "triton")} if torch.cuda.is_available() else {}),
    "linear, padded": linear_padded,
    "softmax, padded": softmax_padded,
    "softmax, nested": softmax_nested,
}
TOLERANCE = 0.03
"""Of results in bfloat16 against those in float32, relative to the largest."""
MEMORY = 40e9
"""Bytes of padded tokens and scores from which a contestant is left out."""


def on(case: Case, device: torch.device, dtype: torch.dtype) -> Case:
    """The case on a device."""
    return dataclasses.replace(
        case,
        history=case.history.to(device, dtype),
        history_lengths=case.history_lengths.to(device),
        candidates=case.candidates.to(device, dtype),
        candidate_lengths=case.candidate_lengths.to(device),
        weights=tuple(w.to(device, dtype) for w in case.weights),
    )


def fitting(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Those whose memory suffices: a mask costs softmax its flash kernels, and it keeps all scores."""
    same = bool((case.history_lengths == case.history_lengths[0]).all())
    requests, longest = len(case.history_lengths), int(case.history_lengths.max())
    padded = 2 * requests * longest * D * 4
    scores = 0 if same else 4 * H * requests * longest * int(case.candidate_lengths.max())
    nested = "softmax, nested" in contestants_of(case) or case.history.is_cuda
    return {
        name: contestant
        for name, contestant in CONTESTANTS.items()
        if (name.startswith("IFA") or padded + scores * (name == "softmax, padded") < MEMORY)
        and (nested or name != "softmax, nested")
    }


def tokens_of(case: Case) -> tuple[Tensor, Tensor]:
    """Leaves of the graph."""
    return case.history.clone().requires_grad_(), case.candidates.clone().requires_grad_()


def check_agreement(case: Case, device: torch.device) -> None:
    """With the reference and with padded softmax in float32 on the CPU: answers and gradients."""
    truths = {"IFA": partial(ifa, "reference"), "softmax": softmax_padded}
    exact, here = on(case, torch.device("cpu"), torch.float32), on(case, device, torch.bfloat16)
    for name, contestant in CONTESTANTS.items():
        truth = truths["softmax" if name.startswith("softmax") else "IFA"]
        results = []
        for run, of in ((truth, exact), (contestant, here)):
            tokens = tokens_of(of)
            out = run(*tokens, of.weights, of)
            found = [out.detach(), *torch.autograd.grad(out.float().square().sum(), tokens)]
            results.append([value.float().cpu() for value in found])
        right, found = results
        compare(case, name, found, right, TOLERANCE)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """One run's."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass(frozen=True)
class Options:
    """How much to run."""

    events: int = 1_000_000
    """Events in all, of each case of uniform lengths."""
    rounds: int = 10
    """Turns of each contestant, after two to warm up."""
    smoke: bool = False
    """Small cases, no page."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("error: there is no GPU here; --smoke runs small cases on the CPU")
    for case in (uniform(100, 7, 2000), uniform(1000, 50, 2000), log_normal(8)):
        check_agreement(case, device)
    events, rounds = (2000, 1) if options.smoke else (options.events, options.rounds)
    sizes = (100, 1000) if options.smoke else (1000, 10_000, 100_000, 1_000_000)
    shapes = [(n, m) for n in sizes for m in ((7, 50) if options.smoke else (50, 1000, 5000))]
    cases = [partial(uniform, n, m, events) for n, m in shapes]
    cases.append(partial(log_normal, 8 if options.smoke else 2048))
    tables: dict[str, list[dict[str, str]]] = {kind: [] for kind in PASSES}
    for make in cases:
        case = on(make(), device, torch.bfloat16)
        contestants, tokens = fitting(case), tokens_of(case)
        for kind, step in PASSES.items():
            times: dict[str, list[float]] = {name: [] for name in contestants}
            memory, before = {}, 0
            for number in range(rounds + 2):
                for name, contestant in contestants.items():
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    spent = milliseconds(partial(step, contestant, tokens, case), device)
                    if device.type == "cuda":
                        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                    if number > 1 or options.smoke:
                        times[name].append(spent)
            row = {"case": case.name}
            for name in CONTESTANTS:
                row[name] = "-"
                if name in times:
                    row[name] = f"{statistics.median(times[name]):.2f} ({memory.get(name, 0):,.0f})"
            print(kind, row, flush=True)
            tables[kind].append(row)
    if options.smoke:
        return
    text = (ROOT / "benchmarks" / "attention_gpu_page.md").read_text()
    page = text.format(
        measured_by=measured_by("python benchmarks/attention_gpu.py"),
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        events=f"{options.events:,}",
        rounds=options.rounds,
        forward=markdown(pd.DataFrame(tables["forward"])),
        both=markdown(pd.DataFrame(tables["forward + backward"])),
    )
    (ROOT / "docs" / "attention_gpu.md").write_text(page)
    print("Wrote docs/attention_gpu.md")


if __name__ == "__main__":
    main()
