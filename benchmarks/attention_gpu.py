"""Speed and memory of the attention only, on a GPU: IFA's backends, softmax and padded linear attention.

    python benchmarks/attention_gpu.py           # two minutes
    python benchmarks/attention_gpu.py --smoke   # small cases, on any device; no page

Writes docs/attention_gpu.md. The contestants are those of attention.py, all in bfloat16, so that softmax
can use PyTorch's flash kernels; with differing lengths it does so through nested tensors and
varlen_attn. Stops without figures if the results of contestants that compute the same thing differ. Also
measures a lower bound for linear attention, from arithmetic and memory rates measured in the same run,
and the identity heads' operator, ``match``, by backend.
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
    Machine,
    compare,
    contestants_of,
    ifa,
    linear_padded,
    log_normal,
    project,
    softmax_nested,
    softmax_padded,
    uniform,
)
from report import ROOT, markdown, measured_by
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ifa_torchrec import ops

GPU = torch.cuda.is_available()


def softmax_varlen(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    """PyTorch's flash kernels on jagged rows, without padding or nested tensors."""
    q, k, v = (project(x, w) for x, w in zip((candidates, history, history), weights, strict=True))
    history_offsets, candidate_offsets = (offsets.int() for offsets in case.offsets)
    out = varlen_attn(q, k, v, candidate_offsets, history_offsets, *case.longest[::-1])
    assert isinstance(out, Tensor)  # a pair only on request
    return out.flatten(1)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "IFA": partial(ifa, "torch"),
    **({"IFA, Triton": partial(ifa, "triton")} if GPU else {}),
    "linear, padded": linear_padded,
    "softmax, padded": softmax_padded,
    "softmax, nested": softmax_nested,
    **({"softmax, varlen": softmax_varlen} if GPU else {}),  # has no CPU kernel
}
TOLERANCE = 0.03
"""Tolerance of bfloat16 results against float32 ones, relative to the largest."""
MEMORY = 40e9
"""A contestant that needs more bytes for padded tokens and scores is left out."""


def on(case: Case, device: torch.device, dtype: torch.dtype) -> Case:
    """The case on a device, in a dtype."""
    return dataclasses.replace(
        case,
        history=case.history.to(device, dtype),
        history_lengths=case.history_lengths.to(device),
        candidates=case.candidates.to(device, dtype),
        candidate_lengths=case.candidate_lengths.to(device),
        weights=tuple(w.to(device, dtype) for w in case.weights),
    )


def fitting(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The contestants that fit into memory: with a mask, softmax has no flash kernel and stores all
    scores."""
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
    """The tokens as leaves of the autograd graph."""
    return case.history.clone().requires_grad_(), case.candidates.clone().requires_grad_()


def check_agreement(case: Case, device: torch.device) -> None:
    """Compare answers and gradients with the reference and padded softmax in float32 on the CPU."""
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
    """Milliseconds of one run."""
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


def megabytes_of(run: Callable[[], object], device: torch.device) -> float:
    """The peak rise of a GPU's allocated memory in a run; 0 on a CPU."""
    if device.type == "cpu":
        run()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rates_of(device: torch.device) -> Machine:
    """FLOP per second of a large product, and numbers copied per second, both in bfloat16."""
    size, numbers = (8192, 2**29) if device.type == "cuda" else (256, 10**6)
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    x = torch.zeros(numbers, device=device, dtype=torch.bfloat16)

    def seconds(run: Callable[[], object]) -> float:
        return statistics.median(milliseconds(run, device) for _ in range(8)) / 1000

    return Machine(2 * size**3 / seconds(lambda: a @ b), numbers / seconds(x.clone))


def of_match(case: Case, backend: str, backward: bool) -> None:
    """Match each candidate with the events of its id, at three half-lives; there are 10,000 ids."""
    device, tokens = case.history.device, case.history.detach().requires_grad_(backward)
    history_offsets, candidate_offsets = case.offsets
    ids = torch.arange(max(len(case.history), len(case.candidates)), device=device) * 7919 % 10_000
    ages = torch.ones(len(tokens), device=device)
    decay = torch.tensor([0.0, 0.02, 0.1], device=device)
    asked = ids[: len(case.candidates)], candidate_offsets
    events = tokens, ids[: len(tokens)], history_offsets
    sums, weights = ops.match(*asked, *events, None, ages, decay, backend)
    if backward:
        torch.autograd.grad(sums.sum() + weights.sum(), tokens)


Table = list[dict[str, str]]


def timed(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Median milliseconds and megabytes by name; the runs take turns, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    memory = {}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            memory[name] = megabytes_of(
                lambda name=name, run=run: times[name].append(milliseconds(run, device)), device
            )
    return {name: (statistics.median(spent[2:]), memory[name]) for name, spent in times.items()}


def row_of(case: Case, found: dict[str, tuple[float, float]], names: list[str]) -> dict[str, str]:
    """A row with milliseconds and megabytes."""
    cells = {name: f"{found[name][0]:.2f} ({found[name][1]:,.0f})" for name in names if name in found}
    return {"case": case.name} | {name: cells.get(name, "-") for name in names}


@dataclass(frozen=True)
class Options:
    """How much to run."""

    events: int = 1_000_000
    """Total events of each case with uniform lengths."""
    rounds: int = 10
    """Timed runs per contestant, after two to warm up."""
    smoke: bool = False
    """Small cases, no page."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cuda" if GPU else "cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("error: there is no GPU here; --smoke runs small cases on the CPU")
    for case in (uniform(100, 7, 2000), uniform(1000, 50, 2000), log_normal(8)):
        check_agreement(case, device)
    events, rounds = (2000, 1) if options.smoke else (options.events, options.rounds)
    sizes = (100, 1000) if options.smoke else (1000, 10_000, 100_000, 1_000_000)
    shapes = [(n, m) for n in sizes for m in ((7, 50) if options.smoke else (50, 1000, 5000))]
    cases = [partial(uniform, n, m, events) for n, m in shapes]
    cases.append(partial(log_normal, 8 if options.smoke else 2048))
    mine = "IFA, Triton" if GPU else "IFA"
    backends = {"torch": "torch", **({"Triton": "triton"} if GPU else {})}
    rates = rates_of(device)
    tables: dict[str, Table] = {kind: [] for kind in (*PASSES, "match")}
    for make in cases:
        case = on(make(), device, torch.bfloat16)
        contestants, tokens, floors = fitting(case), tokens_of(case), rates.floor(case)
        for kind, step in PASSES.items():
            runs = {name: partial(step, run, tokens, case) for name, run in contestants.items()}
            found = timed(runs, rounds, device)
            floor = 1000 * floors[kind]
            row = row_of(case, found, list(CONTESTANTS))
            row |= {"floor": f"{floor:.3f}", f"{mine} / floor": f"{found[mine][0] / floor:.1f}"}
            print(kind, row, flush=True)
            tables[kind].append(row)
        runs = {
            f"{name}, {kind}": partial(of_match, case, backend, kind != "forward")
            for kind in PASSES
            for name, backend in backends.items()
        }
        tables["match"].append(row_of(case, timed(runs, rounds, device), list(runs)))
        print("match", tables["match"][-1], flush=True)
    if options.smoke:
        return
    text = (ROOT / "benchmarks" / "attention_gpu_page.md").read_text()
    page = text.format(
        measured_by=measured_by(),
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        events=f"{options.events:,}",
        rounds=options.rounds,
        tflops=f"{rates.flops / 1e12:.0f}",
        terabytes=f"{4 * rates.copied / 1e12:.1f}",
        forward=markdown(pd.DataFrame(tables["forward"])),
        both=markdown(pd.DataFrame(tables["forward + backward"])),
        match=markdown(pd.DataFrame(tables["match"])),
    )
    (ROOT / "docs" / "attention_gpu.md").write_text(page)
    print("Wrote docs/attention_gpu.md")


if __name__ == "__main__":
    main()
