"""Times a training step of the dense part, from looked-up embeddings to gradients, for IFA and peers.

    python benchmarks/dense_step.py            # a minute on a GPU
    python benchmarks/dense_step.py --smoke    # a small batch, on any device

Prints a table. Every model is the default model of ``ifa train``, except for its interaction, on the
same batch of log-normal histories (benchmarks/scaling.py) with 64 candidates per request. Embeddings are
looked up once, on the CPU: the tables and their optimiser are not part of the step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from attention_gpu import timed
from report import markdown, measured_by
from scaling import make_log
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import DLRM_IFATrain, RankingBatch
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.distributed import init_process_group
from ifa_torchrec.models.archs import Lookups
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.decide import amounts, decided
from ifa_torchrec.training.options import Precision, TrainConfig
from ifa_torchrec.training.precision import autocast, compile_dense


@dataclass(frozen=True)
class Options:
    """What to measure."""

    events: int = 262_144
    """Approximate number of events in the batch."""
    rounds: int = 10
    """Timed steps per model, after two to warm up; medians are reported."""
    precision: Precision = "bf16"
    """Precision, as for ``ifa train``."""
    compiled: bool = False
    """Also measure IFA under torch.compile; compiling takes a minute or two."""
    smoke: bool = False
    """Use 4,000 events and one round."""


def models(log: EventLog, dataset: RankingDataset, compiled: bool) -> dict[str, DLRM_IFATrain]:
    """The models by row name. Softmax and mean pooling also have IFA's identity heads and masses."""
    backends = ["triton", "torch"] if torch.cuda.is_available() else ["auto"]
    rows = {f"IFA, {name}": ("ifa", name) for name in backends}
    rows |= {"IFA, compiled": ("ifa", "auto")} if compiled else {}
    rows |= {"softmax": ("softmax", "auto"), "mean pooling": ("mean", "auto")}
    made = {}
    for name, (interaction, backend) in rows.items():
        config = TrainConfig(log.path, Path(), interaction=interaction)
        config = replace(config, ifa=replace(config.ifa, backend=backend))
        torch.manual_seed(0)
        config = decided(config, dataset, amounts(config, dataset))
        made[name] = DLRM_IFATrain(build_model(log.schema, config, log.scales))
        if name == "IFA, compiled":
            compile_dense(made[name])
    return made


def with_rows(train: DLRM_IFATrain, batch: RankingBatch, device: torch.device) -> Callable[[], Tensor]:
    """A function that computes the model's loss on a device, with looked-up embeddings instead of
    tables."""
    model = train.model
    for tables in (model.sparse_arch, model.item_sparse_arch, model.sequence_arch):
        if tables is not None:
            tables.to_empty(device="cpu")
            for values in tables.parameters():
                nn.init.uniform_(values, -0.1, 0.1)
    found = model.look_up(batch)

    def rows(given: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(
            given.values().detach().to(device).requires_grad_(),
            lengths=given.lengths().to(device),
            offsets=given.offsets().to(device),
        )

    context = None if found.context is None else found.context.detach().to(device).requires_grad_()
    there = Lookups(context, None, rows(found.history), rows(found.candidates))
    model.look_up = lambda features: there
    train.to(device)
    here = batch.to(device)
    return lambda: train(here)[0]


def requests_of(dataset: RankingDataset, events: int) -> np.ndarray:
    """The first requests of a random order, with at most this many events."""
    order = np.random.default_rng(0).permutation(len(dataset))
    return order[: max(1, int((dataset.history_lengths[order].cumsum() <= events).sum()))]


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    events, rounds = (4000, 1) if options.smoke else (options.events, options.rounds)
    device = init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        log = make_log(Path(folder) / "log", items=20_000)
        dataset = RankingDataset(log, "train")
        indices = requests_of(dataset, events)
        batch = dataset[indices]
        made = models(log, dataset, options.compiled)
        losses = {name: with_rows(train, batch, device) for name, train in made.items()}

    def step(loss: Callable[[], Tensor]) -> None:
        with autocast(options.precision, device):
            value = loss()
        value.backward()

    found = timed({name: partial(step, loss) for name, loss in losses.items()}, rounds, device)
    n, m = int(dataset.history_lengths[indices].sum()), len(batch.labels)
    rows = [
        {
            "model": name,
            "ms per step": f"{spent:.2f}",
            "million events per second": f"{n / spent / 1000:.1f}",
            "MB above what was there": f"{memory:,.0f}",
        }
        for name, (spent, memory) in found.items()
    ]
    print(f"{measured_by()}, {device}, torch {torch.__version__};")
    print(f"{len(indices):,} requests, {n:,} events, {m:,} candidates, {options.precision}\n")
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
