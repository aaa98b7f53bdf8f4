"""Plan the tables of any cluster with TorchRec's planner, without access to the cluster.

    python examples/plan_for_cluster/plan.py
    python examples/plan_for_cluster/plan.py --hosts 2 --item-rows 500_000_000 --picture plan.png

Prints the plan, the memory per device, and the cost of a training step: the planner's estimate for the
tables, and the history's traffic by the formulas of traffic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.planners import to_sharding_plan
from torchrec.distributed.planner.types import ShardingOption
from traffic import Traffic

from ifa_torchrec import DLRM_IFATrain, IFAConfig
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.data import LogSchema
from ifa_torchrec.distributed import BatchSize, ShardingConfig, ShardingError, draw_plan
from ifa_torchrec.distributed.planning import make_planner
from ifa_torchrec.distributed.sharders import sharders
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig

GB = 2**30


@dataclass(frozen=True)
class Options:
    """The cluster, the tables and a rank's batch."""

    hosts: int = 8
    """Number of hosts."""
    gpus: int = 8
    """GPUs per host, with one rank each."""
    hbm_gb: float = 80.0
    """Memory per GPU, in 2^30 bytes."""
    intra_host_gb_per_s: float = 450.0
    """A GPU's bandwidth to the others of its host, in 2^30 bytes per second."""
    inter_host_gb_per_s: float = 50.0
    """A GPU's bandwidth to other hosts, in 2^30 bytes per second."""
    item_rows: int = 2_000_000_000
    """Rows of the item table."""
    user_rows: int = 400_000_000
    """Rows of the users' context table."""
    dim: int = 64
    """D, width of the embeddings."""
    requests: int = 64
    """B, requests per rank."""
    history: int = 4000
    """Mean number of events per request."""
    candidates: int = 500
    """Candidates per request."""
    tables: dict[str, str] | None = None
    """Sharding types by table, e.g. item_table row_wise; the planner chooses for the rest."""
    picture: Path | None = None
    """Draw the weights per rank and table to this .png, .svg or .pdf file."""


def plan(options: Options) -> tuple[list[ShardingOption], Topology]:
    """Plan without a process group.

    Raises:
        ShardingError: the tables do not fit into the cluster, or cannot be sharded as asked.
    """
    schema = LogSchema(
        item_features={"item": options.item_rows, "category": 20_000},
        context_features={"user_id": options.user_rows, "country": 250, "hour": 24},
        dense_features=("price_level", "account_age"),
    )
    config = TrainConfig(Path(), Path(), ifa=IFAConfig(embedding_dim=options.dim, num_heads=4))
    model = DLRM_IFATrain(build_model(schema, config))  # on the meta device: takes no memory
    cluster = Topology(
        world_size=options.hosts * options.gpus,
        local_world_size=options.gpus,
        compute_device="cuda",
        hbm_cap=int(options.hbm_gb * GB),
        intra_host_bw=options.intra_host_gb_per_s * GB / 1000,  # bytes per millisecond
        inter_host_bw=options.inter_host_gb_per_s * GB / 1000,
    )
    planner = make_planner(
        model, cluster, ShardingConfig(tables=options.tables or {}), batch_size(options)
    )
    try:
        planner.plan(model, sharders())
    except Exception as error:
        raise ShardingError(f"the cluster has no plan for these tables: {error}") from error
    return planner._best_plan or [], cluster  # TorchRec has its estimates only here


def batch_size(options: Options) -> BatchSize:
    """A rank's batch."""
    return BatchSize(
        options.requests, options.requests * options.history, options.requests * options.candidates
    )


def tables_of(options: Sequence[ShardingOption]) -> pd.DataFrame:
    """One row per table."""
    return pd.DataFrame(
        {
            "table": [o.name for o in options],
            "sharding": [o.sharding_type for o in options],
            "kernel": [o.compute_kernel for o in options],
            "ranks": [len({shard.rank for shard in o.shards}) for o in options],
            "rows per shard": [f"{max(shard.size[0] for shard in o.shards):,}" for o in options],
            "weights, GB": [f"{o.tensor.numel() * 4 / GB:.2f}" for o in options],
            "GB per rank": [
                f"{max((s.storage.hbm + s.storage.ddr) / GB for s in o.shards):.2f}" for o in options
            ],
            "ms per step": [f"{max(s.perf.total for s in o.shards):.2f}" for o in options],
        }
    )


def memory_of_ranks(options: Sequence[ShardingOption], ranks: int) -> list[float]:
    """HBM in GB that the tables, their optimisers and their lookups need on each rank."""
    memory = [0.0] * ranks
    for option in options:
        for part in option.shards:
            memory[part.rank] += part.storage.hbm / GB
    return memory


def report(options: Options) -> str:
    """The text that this script prints; draws the plan if asked."""
    found, cluster = plan(options)
    if options.picture is not None:
        draw_plan(to_sharding_plan(found, cluster), options.picture)
    ranks, batch = cluster.world_size, batch_size(options)
    memory = memory_of_ranks(found, ranks)
    parts = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "input_dist_comms")
    milliseconds = {part: [0.0] * ranks for part in parts}
    for option in found:
        for shard in option.shards:
            for part in parts:
                milliseconds[part][shard.rank] += getattr(shard.perf, part)
    traffic = Traffic(
        ranks=ranks,
        batch=batch,
        item_features=2,
        context_features=3,
        dim=options.dim,
        whole_lengths=True,
    ).bytes_sent()
    vectors = traffic["vectors, forward"]
    # share of a rank's peers on other hosts
    far = (ranks - options.gpus) / max(ranks - 1, 1)
    slow = far * vectors / (options.inter_host_gb_per_s * GB)
    fast = (1 - far) * vectors / (options.intra_host_gb_per_s * GB)
    lines = [
        f"{options.hosts} hosts of {options.gpus} GPUs; a rank's batch: {batch.requests:,} requests, "
        f"{batch.events:,} events, {batch.candidates:,} candidates",
        "",
        tables_of(found).to_string(index=False),
        "",
        f"memory per rank: tables, optimiser states and lookups {min(memory):.1f} to "
        f"{max(memory):.1f} GB of {options.hbm_gb:.0f}",
        "planner's estimate for the tables in a step (busiest rank): "
        + ", ".join(f"{name} {max(of_ranks):.1f}" for name, of_ranks in milliseconds.items())
        + f"; all {max(map(sum, zip(*milliseconds.values(), strict=True))):.1f} ms",
        "",
        "sent by a rank in a step, by formula (MB): "
        + ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in traffic.items() if value),
        f"vectors forward at the links' full bandwidth: {1000 * max(slow, fast):.1f} ms; backward "
        "the same",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    with as_command():
        print(report(tyro.cli(Options, description=__doc__)))


if __name__ == "__main__":
    main()
