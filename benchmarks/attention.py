"""Speed and memory of the attention only: IFA's backends, softmax and other linear attention.

    python benchmarks/attention.py           # about 5 minutes on 2 cores
    python benchmarks/attention.py --smoke   # small cases, no page

Writes docs/attention.md and its picture. Every contestant does the same work, from jagged tokens to
jagged answers, projections included; they take turns in one process. Stops without figures if the
results of contestants that compute the same thing differ.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from fbgemm_gpu import sparse_ops  # noqa: F401  registers the jagged operators
from report import ROOT, markdown, measured_by
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig, InteractionFidelityAttention, ops
from ifa_torchrec.ops.kernels import native

D, H, WIDTH = 64, 4, 16
EPS = 1e-6
SLOW = 1.0
"""If a run takes longer (seconds), it is the contestant's only run, instead of a median of several."""


@dataclass
class Case:
    """A batch of B requests."""

    name: str
    history: Tensor
    history_lengths: Tensor
    candidates: Tensor
    candidate_lengths: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    """Weights of queries, keys and values, each [H, d, D]."""

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return offsets_of(self.history_lengths), offsets_of(self.candidate_lengths)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Longest history and candidate set; computed once, as a loader would supply them."""
        return int(self.history_lengths.max()), int(self.candidate_lengths.max())


def offsets_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def make_case(name: str, history_lengths: Tensor, candidate_lengths: Tensor) -> Case:
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    return Case(
        name,
        random(int(history_lengths.sum()), D),
        history_lengths,
        random(int(candidate_lengths.sum()), D),
        candidate_lengths,
        tuple(random(H, WIDTH, D) / D**0.5 for _ in range(3)),
    )


def uniform(n: int, m: int, events: int) -> Case:
    """Requests with n events and m candidates, up to ``events`` events or half as many candidates."""
    requests = max(1, min(events // n, events // 2 // m))
    lengths = torch.full((requests,), n), torch.full((requests,), m)
    return make_case(f"n = {n:,}, m = {m:,}", *lengths)


def log_normal(requests: int) -> Case:
    """Heavy-tailed lengths, like real users': the longest history is about 14 times the mean."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(2, requests, generator=generator)
    history = (500 * (1.25 * spread[0]).exp()).long() + 1
    candidates = (100 * spread[1].exp()).long() + 1
    return make_case("log-normal", history, candidates)


# ---------------------------------------------------------------------------------- contestants
# Each: history [N, D], candidates [M, D], weights, Case -> answers [M, H * d].


def project(tokens: Tensor, weight: Tensor) -> Tensor:
    """[..., D] -> [..., H, d]."""
    return (tokens @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2])


def pad(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, longest, ...]; a view if all lengths are equal."""
    if bool((lengths == lengths[0]).all()):
        return tokens.unflatten(0, (len(lengths), -1))
    return pad_sequence(tokens.split(lengths.tolist()), batch_first=True)


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    if bool((lengths == padded.shape[1]).all()):
        return padded.flatten(0, 1)
    return padded[torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]]


def softmax_padded(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    """Padded to the longest; with a mask only if lengths differ."""
    q, k, v = (
        project(pad(x, lengths), w).transpose(1, 2)
        for x, lengths, w in zip(
            (candidates, history, history),
            (case.candidate_lengths, case.history_lengths, case.history_lengths),
            weights,
            strict=True,
        )
    )
    n = k.shape[2]
    same = bool((case.history_lengths == n).all())
    there = torch.arange(n, device=k.device) < case.history_lengths[:, None]
    mask = None if same else there[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return unpad(out.transpose(1, 2).flatten(2), case.candidate_lengths)


def softmax_per_user(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    parts = zip(
        project(candidates, weights[0]).split(case.candidate_lengths.tolist()),
        project(history, weights[1]).split(case.history_lengths.tolist()),
        project(history, weights[2]).split(case.history_lengths.tolist()),
        strict=True,
    )
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1)
        for part in parts
    ]
    return torch.cat(out).flatten(1)


def softmax_nested(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    history_offsets, candidate_offsets = case.offsets
    nested = torch.nested.nested_tensor_from_jagged
    longest, most = case.longest
    q = nested(project(candidates, weights[0]), candidate_offsets, max_seqlen=most)
    k, v = (nested(project(history, w), history_offsets, max_seqlen=longest) for w in weights[1:])
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).values().flatten(1)


def elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear_padded(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    q, k, v = (project(x, w) for x, w in zip((candidates, history, history), weights, strict=True))
    k, v = (pad(x, case.history_lengths).transpose(1, 2) for x in (elu(k), v))
    q = pad(elu(q), case.candidate_lengths).transpose(1, 2)
    out = q @ (k.mT @ v) / (q @ k.sum(2)[..., None] + EPS)
    return unpad(out.transpose(1, 2).flatten(2), case.candidate_lengths)


def linear_fbgemm(history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    """One call per head: fbgemm's jagged products take one matrix per request."""
    history_offsets, candidate_offsets = case.offsets
    longest, most = case.longest
    jagged = torch.ops.fbgemm
    out = []
    for h in range(H):
        q = elu(candidates @ weights[0][h].T)
        k, v = elu(history @ weights[1][h].T), history @ weights[2][h].T
        v = torch.cat([v, v.new_ones(len(v), 1)], dim=1)  # the last column sums phi(k)
        state = jagged.jagged_jagged_bmm(k, v, history_offsets, longest)
        read = jagged.jagged_dense_bmm(q, candidate_offsets, state, most)[0]
        out.append(read[:, :-1] / (read[:, -1:] + EPS))
    return torch.cat(out, dim=1)


def ifa(backend: str, history: Tensor, candidates: Tensor, weights, case: Case) -> Tensor:
    history_offsets, candidate_offsets = case.offsets
    decay = torch.zeros(H, device=history.device)
    state = ops.encode(history, history_offsets, *weights[1:], None, None, decay, "elu", backend)
    return ops.attend(candidates, candidate_offsets, weights[0], *state, "elu", EPS, backend)[0].flatten(
        1
    )


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "native": partial(ifa, "native"),
    "native bf16": partial(ifa, "native"),  # with bfloat16 tokens, see inputs_of
    "torch": partial(ifa, "torch"),
    "linear, padded": linear_padded,
    "linear, fbgemm": linear_fbgemm,
    "softmax, padded": softmax_padded,
    "softmax, per user": softmax_per_user,
    "softmax, nested": softmax_nested,
}
TOLERANCE = {"native bf16": 0.02}
MOST_SCORES = 200_000_000
"""Above this number of padded scores, nested tensors, which store them all, are left out."""


def contestants_of(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The contestants that fit into memory."""
    scores = H * len(case.history_lengths) * math.prod(case.longest)
    return {n: c for n, c in CONTESTANTS.items() if n != "softmax, nested" or scores <= MOST_SCORES}


def inputs_of(name: str, case: Case) -> tuple[Tensor, Tensor]:
    """Tokens in the contestant's dtype; leaves of the autograd graph."""
    dtype = torch.bfloat16 if name == "native bf16" else torch.float32
    return case.history.to(dtype).requires_grad_(), case.candidates.to(dtype).requires_grad_()


def check_agreement(case: Case, contestants: dict[str, Callable[..., Tensor]]) -> None:
    """Compare softmax with softmax and linear with linear: answers and gradients of the tokens."""
    truth: dict[bool, list[Tensor]] = {}
    for name, contestant in contestants.items():
        tokens = inputs_of(name, case)
        out = contestant(*tokens, case.weights, case)
        values = [out.detach(), *torch.autograd.grad(out.square().sum(), tokens)]
        expected = truth.setdefault(name.startswith("softmax"), values)
        compare(case, name, values, expected, TOLERANCE.get(name, 1e-4))


def compare(
    case: Case, name: str, values: list[Tensor], expected: list[Tensor], tolerance: float
) -> None:
    """Exit if a contestant's results are off by more than ``tolerance``, relative to the largest."""
    for value, right in zip(values, expected, strict=True):
        error = float((value.float() - right).abs().max() / right.abs().max())
        if not error <= tolerance:
            raise SystemExit(f"error: {case.name}: {name} is off by {error:.1e}; no figures")


# ------------------------------------------------------------------------------------- measuring


def forward(contestant, tokens: tuple[Tensor, Tensor], case: Case) -> None:
    with torch.no_grad():
        contestant(*tokens, case.weights, case)


def forward_backward(contestant, tokens: tuple[Tensor, Tensor], case: Case) -> None:
    weights = tuple(w.detach().requires_grad_() for w in case.weights)
    out = contestant(*tokens, weights, case)
    torch.autograd.grad(out.sum(), (*tokens, *weights))


PASSES = {"forward": forward, "forward + backward": forward_backward}


def seconds_of(case: Case, contestants: dict, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by pass and contestant; the contestants take turns."""
    tokens = {name: inputs_of(name, case) for name in contestants}
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for kind, run in PASSES.items():
            for name, contestant in contestants.items():
                done = times.setdefault((kind, name), [])
                if done and max(done) > SLOW:
                    continue
                start = time.perf_counter()
                run(contestant, tokens[name], case)
                seconds = time.perf_counter() - start
                if number or seconds > SLOW:  # the first round warms up
                    done.append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def status_kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_megabytes(run: Callable[[], None]) -> float:
    """The peak rise of resident memory during a run."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kilobytes("VmRSS")
    run()
    return max(0.0, (status_kilobytes("VmHWM") - before) / 1024)


def median_seconds(run: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass
class Machine:
    """This machine's rates, measured in this run."""

    flops: float
    copied: float
    """Floats per second, read and written to new memory, like an operator's result."""

    @classmethod
    def measure(cls) -> Machine:
        a, b = torch.randn(2, 2048, 2048)
        x = torch.randn(25_000_000)
        return cls(2 * 2048**3 / median_seconds(lambda: a @ b), len(x) / median_seconds(x.clone))

    def floor(self, case: Case) -> dict[str, float]:
        """Seconds for the arithmetic of linear attention at the rate of a large matrix product, plus its
        inputs and results at the rate of a copy.

        Backward: the gradients of phi(k), of the tokens (through values and through keys) and of the
        keys' weight, each a product of the size of a projection; nothing is recomputed.
        """
        n, m, b = len(case.history), len(case.candidates), len(case.history_lengths)
        state, projection = H * WIDTH * WIDTH, D * H * WIDTH
        encode, project_values = 2 * n * projection, b * projection * WIDTH
        attend = m * (projection + state)
        flops = 2 * (encode + project_values + attend)
        moved = (n * D + m * D + m * H * WIDTH + 2 * b * state) / 2
        backward = 2 * (4 * n * projection + 2 * project_values + 2 * attend)
        return {
            "forward": flops / self.flops + moved / self.copied,
            "forward + backward": (flops + backward) / self.flops
            + (2 * moved + n * D + m * D) / self.copied,
        }


# --------------------------------------------------------------------------------------- serving


@torch.no_grad()
def serving_table(events: tuple[int, ...], candidates: int = 1000, calls: int = 60) -> pd.DataFrame:
    """Milliseconds of one request on one thread, at the median and the 99th percentile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = InteractionFidelityAttention(IFAConfig(D, num_heads=H))
    asked = JaggedTensor(torch.randn(candidates, D), lengths=torch.tensor([candidates]))
    rows: dict[str, dict[str, str]] = {}
    for n in events:
        tokens = torch.randn(n, D)
        history = JaggedTensor(tokens, lengths=torch.tensor([n]))
        state = module.encode(history)
        q, k, v = module.query_proj, module.key_proj, module.value_proj

        def softmax(q=q, k=k, v=v, x=tokens):
            heads = (
                p.unflatten(-1, (H, WIDTH)).transpose(0, 1)[None]
                for p in (q(asked.values()), k(x), v(x))
            )
            return F.scaled_dot_product_attention(*heads)

        def retrieval(q=q, k=k, v=v, x=tokens):
            """Softmax over each candidate's 100 events with the highest inner product."""
            found = (asked.values() @ x.T).topk(min(100, len(x)), dim=1).indices
            query = q(asked.values()).unflatten(-1, (H, WIDTH))
            key, value = (p(x).unflatten(-1, (H, WIDTH))[found] for p in (k, v))
            share = torch.einsum("mhd,mlhd->mhl", query, key).softmax(-1)
            return torch.einsum("mhl,mlhd->mhd", share, value)

        runs: dict[str, Callable[[], object]] = {
            "attend, state cached": partial(module.attend, asked, state),
            "encode and attend": partial(module, asked, history),
            "softmax over the raw history": softmax,
            "top 100, then softmax": retrieval,
        }
        for new in (1, 10, 100):
            added = JaggedTensor(torch.randn(new, D), lengths=torch.tensor([new]))
            runs[f"update with {new} event{'s' * (new > 1)}"] = partial(
                module.update, state, added, torch.tensor([1.0])
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(calls + 1):
            # in another order each time: after a long call the next one finds the caches cold
            for name, call in random.Random(number).sample(list(runs.items()), len(runs)):
                if number > 5 and sum(times[name]) > SLOW:
                    continue
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
        for name, values in times.items():
            p50, p99 = np.percentile(values[1:], [50, 99])
            rows.setdefault(name, {})[f"n = {n:,}"] = f"{p50:.2f} / {p99:.2f}"
    torch.set_num_threads(threads)
    return pd.DataFrame([{"m = 1,000": name} | row for name, row in rows.items()])


# ----------------------------------------------------------------------------------------- report


def table_of(kind: str, results: dict[str, dict], floors: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Milliseconds of native, its ratio to the lower bound, and the others as multiples of it."""
    rows = []
    for case, seconds in results.items():
        mine, floor = seconds[kind, "native"], floors[case][kind]
        row = {"case": case, "floor, ms": f"{1000 * floor:.1f}", "native, ms": f"{1000 * mine:.1f}"}
        row["native / floor"] = f"{mine / floor:.2f}"
        row |= {
            f"{name} / native": f"{seconds[kind, name] / mine:.2f}" if (kind, name) in seconds else "-"
            for name in CONTESTANTS
            if name != "native"
        }
        rows.append(row)
    return pd.DataFrame(rows)


def draw(by_n: dict[int, dict], by_m: dict[int, dict]) -> None:
    """Plot microseconds per request against n and against m."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for ax, points, label in zip(
        axes, (by_n, by_m), ("n, events a request (m = 50)", "m, candidates (n = 10,000)"), strict=True
    ):
        for name in CONTESTANTS:
            xs = [x for x, seconds in points.items() if ("forward", name) in seconds]
            ax.loglog(xs, [1e6 * points[x]["forward", name] for x in xs], marker="o", label=name)
        ax.set(xlabel=label, ylabel="µs a request, forward")
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "attention.png", dpi=110)
    plt.close(figure)


@dataclass(frozen=True)
class Options:
    """How much to run."""

    events: int = 100_000
    """Total events of each case with uniform lengths."""
    rounds: int = 3
    """Timed runs per contestant, after one to warm up."""
    smoke: bool = False
    """Small cases, no page."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    if native.LIBRARY is None:
        raise SystemExit(f"error: the native kernels are {native.STATUS}")
    events, rounds = (2000, 1) if options.smoke else (options.events, options.rounds)
    sizes = (100, 1000) if options.smoke else (100, 1000, 10_000, 100_000)
    sets = (1, 50) if options.smoke else (1, 50, 1000)
    machine = Machine.measure()
    source = measured_by()
    for n, m in ((100, 7), (1000, 50)):
        check_agreement(uniform(n, m, 2000), CONTESTANTS)
    check_agreement(log_normal(8), CONTESTANTS)
    results: dict[str, dict] = {}
    floors: dict[str, dict[str, float]] = {}
    memory = []
    by_n: dict[int, dict] = {}
    by_m: dict[int, dict] = {}
    shapes = [(n, m) for n in sizes for m in sets]
    cases = [partial(uniform, n, m, events) for n, m in shapes]
    for shape, make in zip(
        [*shapes, None], [*cases, partial(log_normal, 8 if options.smoke else 64)], strict=True
    ):
        case = make()
        contestants = contestants_of(case)
        results[case.name] = seconds = seconds_of(case, contestants, rounds)
        floors[case.name] = machine.floor(case)
        row: dict[str, object] = {"case": case.name}
        for name, contestant in contestants.items():
            tokens = inputs_of(name, case)
            row[name] = f"{peak_megabytes(partial(forward_backward, contestant, tokens, case)):.0f}"
        memory.append(row)
        if shape is not None:
            requests = len(case.history_lengths)
            each = {key: value / requests for key, value in seconds.items()}
            if shape[1] == 50:
                by_n[shape[0]] = each
            if shape[0] == 10_000:
                by_m[shape[1]] = each
        print(
            case.name,
            {" ".join(key): f"{1000 * value:.1f}" for key, value in seconds.items()},
            flush=True,
        )
    tables = {kind: markdown(table_of(kind, results, floors)) for kind in PASSES}
    if options.smoke:
        return
    draw(by_n, by_m)
    text = (ROOT / "benchmarks" / "attention_page.md").read_text()
    page = text.format(
        measured_by=source,
        torch=torch.__version__,
        instructions=native.STATUS,
        gflops=f"{machine.flops / 1e9:.0f}",
        gigabytes=f"{4e-9 * machine.copied:.1f}",
        events=f"{options.events:,}",
        rounds=options.rounds,
        forward=tables["forward"],
        both=tables["forward + backward"],
        memory=markdown(pd.DataFrame(memory).fillna("-")),
        serving=markdown(serving_table((1000, 10_000, 100_000))),
    )
    (ROOT / "docs" / "attention.md").write_text(page)
    print("Wrote docs/attention.md and its picture")


if __name__ == "__main__":
    main()
