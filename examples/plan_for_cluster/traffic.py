"""The bytes that a training step sends between ranks, by formula and counted on local ranks.

    torchrun --nproc-per-node 2 examples/plan_for_cluster/traffic.py
    torchrun --nproc-per-node 4 examples/plan_for_cluster/traffic.py --sharding row_wise

Prints, for each part of a step, the bytes that a rank sends by the formula, the bytes that its
collectives were given for other ranks, and the bytes that its sockets sent.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, DLRM_IFATrain, IFAConfig, RankingBatch
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.distributed import (
    BatchSize,
    OptimizerConfig,
    ShardingConfig,
    init_process_group,
    shard,
)


@dataclass(frozen=True)
class Traffic:
    """The sizes that determine the traffic of a step.

    Args:
        ranks: W, number of ranks.
        batch: a rank's BatchSize.
        item_features: K, id features of an item, with one table each.
        context_features: Fs, pooled id features of a request, with one table each.
        dim: D, width of the embeddings.
        dense_parameters: number of weights outside the tables.
        whole_lengths: whether every rank gets all lengths, as with row_wise; otherwise only the rank of
            a table does.

    Example:
        >>> from traffic import BatchSize, Traffic
        >>> step = Traffic(ranks=2, batch=BatchSize(requests=4, events=900, candidates=100), dim=64)
        >>> step.bytes_sent()["vectors, forward"]  # half of 1,000 tokens' vectors of 256 bytes
        128000.0
    """

    ranks: int
    batch: BatchSize
    item_features: int = 1
    context_features: int = 0
    dim: int = 64
    dense_parameters: int = 0
    whole_lengths: bool = False

    def bytes_sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by kind; mean over the ranks."""
        away = (self.ranks - 1) / self.ranks  # share of the rows on other ranks
        tokens = self.item_features * (self.batch.events + self.batch.candidates)
        pooled = self.context_features * self.batch.requests
        lengths = (2 * self.item_features + self.context_features) * self.batch.requests
        hears = self.ranks if self.whole_lengths else 1
        vectors = (tokens + hears * pooled) * self.dim * 4
        return {
            "ids": away * (tokens + pooled) * 8,
            "lengths": away * hears * lengths * 8,
            "vectors, forward": away * vectors,
            "gradients, backward": away * vectors,
            "dense all-reduce": 2 * away * self.dense_parameters * 4,
        }


class CountBytes(TorchDispatchMode):
    """While active, counts the bytes that this rank's collectives are given for other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.integers = self.floats = self.all_reduced = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, rank, world = str(func), dist.get_rank(), dist.get_world_size()
        if "alltoall_base" in name:
            values, splits = args[1], args[4]
            mine = splits[rank] * values[0].numel() if splits else values.numel() / world
            self._add(values, values.numel() - mine)
        elif "_reduce_scatter_base" in name:
            self._add(args[1], args[1].numel() * (world - 1) / world)
        elif "_allgather_base" in name:
            self._add(args[1], args[1].numel() * (world - 1))
        elif "allreduce" in name:
            for values in args[0]:
                self.all_reduced += 2 * (world - 1) / world * values.numel() * values.element_size()
        elif "c10d" in name:
            raise NotImplementedError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))

    def _add(self, values: torch.Tensor, count: float) -> None:
        if values.is_floating_point():
            self.floats += count * values.element_size()
        else:
            self.integers += count * values.element_size()


def bytes_on_the_wire() -> int:
    """Bytes that this process's TCP sockets have sent and seen acknowledged (Linux)."""
    total = 0
    for file in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{file}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(file))) as copy:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:  # not a TCP socket, or closed meanwhile
            continue
    return total


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sharding: Literal["table_wise", "row_wise"] = "table_wise"
    """Sharding type of all tables."""
    requests: int = 16
    """B, requests per rank."""
    history: int = 500
    """Events per request."""
    candidates: int = 50
    """Candidates per request."""
    features: int = 4
    """Number of item features and of context features; a multiple of the ranks balances table_wise."""
    dim: int = 32
    """D, width of the embeddings."""


def random_batch(options: Options, rows: int) -> RankingBatch:
    """A batch of ids drawn uniformly from all rows."""
    b, features = options.requests, options.features
    events, candidates = b * options.history, b * options.candidates
    names = [f"f{k}" for k in range(features)]
    return RankingBatch(
        dense_features=torch.zeros(b, 0),
        context_features=KeyedJaggedTensor.from_lengths_sync(
            [f"c{k}" for k in range(features)],
            torch.randint(rows, (features * b,)),
            torch.ones(features * b, dtype=torch.int64),
        ),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            [prefix + name for prefix in ("history_", "candidate_") for name in names],
            torch.randint(rows, (features * (events + candidates),)),
            torch.cat(
                [
                    torch.full((features * b,), options.history),
                    torch.full((features * b,), options.candidates),
                ]
            ),
        ),
        candidate_dense=torch.zeros(candidates, 0),
        history_age=torch.rand(events),
        labels=torch.ones(candidates, 1),
        exposed=torch.ones(candidates, dtype=torch.bool),
    )


def measure(options: Options) -> pd.DataFrame:
    """The bytes of one step, one row per part, mean over the ranks. Called by all ranks."""
    device = init_process_group()
    world, rows = dist.get_world_size(), 10_000
    names = [f"f{k}" for k in range(options.features)]
    contexts = [f"c{k}" for k in range(options.features)]
    meta = torch.device("meta")
    model = DLRM_IFA(
        EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=c, num_embeddings=rows, embedding_dim=options.dim, feature_names=[c]
                )
                for c in contexts
            ],
            device=meta,
        ),
        EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=f,
                    num_embeddings=rows,
                    embedding_dim=options.dim,
                    feature_names=[f"history_{f}", f"candidate_{f}"],
                )
                for f in names
            ],
            device=meta,
        ),
        DLRM_IFAConfig(item_features=tuple(names), ifa=IFAConfig(options.dim, num_heads=2)),
    )
    batch_size = BatchSize(
        options.requests, options.requests * options.history, options.requests * options.candidates
    )
    sharding = ShardingConfig(tables=dict.fromkeys(names + contexts, options.sharding))
    train, _ = shard(DLRM_IFATrain(model), device, OptimizerConfig(), sharding, batch_size)
    torch.manual_seed(dist.get_rank())

    train(random_batch(options, rows))[0].backward()  # the first step does one-time work
    batch = random_batch(options, rows)
    dist.barrier()
    before = bytes_on_the_wire()
    with CountBytes() as forward:
        loss, _ = train(batch)
    with CountBytes() as backward:
        loss.backward()
    wire = bytes_on_the_wire() - before

    formula = Traffic(
        ranks=world,
        batch=batch_size,
        item_features=options.features,
        context_features=options.features,
        dim=options.dim,
        dense_parameters=_dense_parameters(train),
        whole_lengths=options.sharding == "row_wise",
    ).bytes_sent()
    by_formula = {
        "ids and lengths": formula.pop("ids") + formula.pop("lengths"),
        **formula,
    }
    counted = [forward.integers, forward.floats, backward.floats, backward.all_reduced, wire]
    mean = torch.tensor(counted, dtype=torch.float64)
    dist.all_reduce(mean)
    counted = (mean / world).tolist()
    table = pd.DataFrame(
        {"formula": by_formula.values(), "collectives": counted[:-1]}, index=list(by_formula)
    )
    table.loc["all"] = table.sum()
    table.loc["all", "sockets"] = counted[-1]
    table["collectives / formula"] = table["collectives"] / table["formula"]
    return table


def _dense_parameters(model: nn.Module) -> int:
    """The number of weights that DDP reduces: all outside the tables."""
    return sum(p.numel() for name, p in model.named_parameters() if "embedding_" not in name)


def main() -> None:
    """The command line."""
    with as_command():
        options = tyro.cli(Options, description=__doc__)
        table = measure(options)
        if dist.get_rank() == 0:
            print(
                f"Bytes that a rank sends in a step; {dist.get_world_size()} ranks, {options.sharding}:"
            )
            formats = {"collectives / formula": "{:.4f}".format}
            print(table.to_string(float_format="{:,.0f}".format, formatters=formats, na_rep=""))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
