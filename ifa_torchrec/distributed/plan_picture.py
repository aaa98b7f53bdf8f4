"""A sharding plan as a picture: which rank holds how much of which table."""

from __future__ import annotations

from pathlib import Path

from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from ifa_torchrec.distributed.errors import ShardingError
from ifa_torchrec.errors import require, writing


def draw_plan(plan: ShardingPlan, file: Path) -> None:
    """Draw one stacked bar per rank: how many weights of each table the rank holds.

    Args:
        plan: TorchRec's plan, from any planner; a DistributedModelParallel has it as its ``plan``.
        file: the picture; its suffix sets the format: .png, .svg or .pdf.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `demo`).
        ShardingError: the plan has no table.
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
        >>> from ifa_torchrec.distributed import draw_plan
        >>> from ifa_torchrec.distributed.sharders import sharders
        >>> tables = EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=64, num_embeddings=10**9, feature_names=["item"])])
        >>> cluster = Topology(world_size=64, local_world_size=8, compute_device="cuda")
        >>> file = Path(tempfile.mkdtemp()) / "plan.png"
        >>> draw_plan(EmbeddingShardingPlanner(topology=cluster).plan(tables, sharders()), file)
        >>> file.exists()
        True
    """
    require("demo", "matplotlib")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tables = {
        (name, path): sharding
        for path, module in plan.plan.items()
        if isinstance(module, EmbeddingModuleShardingPlan)
        for name, sharding in module.items()
    }
    if not tables:
        raise ShardingError(
            "draw_plan: the plan has no table; does the model have embedding collections?"
        )
    ranks = 1 + max(rank for sharding in tables.values() for rank in sharding.ranks or [0])
    figure = Figure(figsize=(max(6.0, 0.2 * ranks), 4 + 0.25 * len(tables)), layout="constrained")
    axes, below = figure.subplots(), [0.0] * ranks
    for number, ((name, _), sharding) in enumerate(tables.items()):
        weights = _millions_by_rank(sharding, ranks)
        held = f"{name}: {sharding.sharding_type}, {sum(w > 0 for w in weights)} of {ranks} ranks"
        if sharding.sharding_spec is None:  # a plan does not say how large a replicated table is
            held = f"{name}: {sharding.sharding_type}, a copy on each rank, not drawn"
        colour = colormaps["tab20"](number % 20)
        axes.bar(range(ranks), weights, bottom=below, color=colour, label=held, width=0.9)
        below = [a + b for a, b in zip(below, weights, strict=True)]
    axes.set(xlabel="rank", ylabel="millions of weights", title="Sharding plan: weights per rank")
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", alpha=0.3)
    for text in figure.legend(loc="outside lower center").get_texts():
        text.set_parse_math(False)
    with writing(file):
        figure.savefig(file, dpi=110)


def _millions_by_rank(sharding: ParameterSharding, ranks: int) -> list[float]:
    """Millions of a table's weights on each rank."""
    weights, spec = [0.0] * ranks, sharding.sharding_spec
    shards: list[ShardMetadata] = spec.shards if isinstance(spec, EnumerableShardingSpec) else []
    for shard in shards:
        rank = getattr(shard.placement, "rank", lambda: None)()
        rows, columns = shard.shard_sizes
        if rank is not None:
            weights[rank] += rows * columns / 1e6
    return weights
