"""A plan's picture shows the weights that the plan puts on each rank."""

from __future__ import annotations

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan

from ifa_torchrec.distributed import ShardingError, draw_plan, plan_picture
from ifa_torchrec.distributed.sharders import sharders


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_draws_where_the_weights_lie(kind, tmp_path) -> None:
    tables = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=name, embedding_dim=256, num_embeddings=4000, feature_names=[f"{name}_id"]
            )
            for name in ("a$b$", "other")
        ],
    )
    kernels = ["dense"] if kind == "data_parallel" else ["fused"]
    constraints = {
        "a$b$": ParameterConstraints([kind], kernels),
        "other": ParameterConstraints(["row_wise"], ["fused"]),
    }
    cluster = Topology(world_size=4, compute_device="cuda")
    planner = EmbeddingShardingPlanner(topology=cluster, constraints=constraints)
    plan = planner.plan(tables, sharders())
    weights = plan_picture._millions_by_rank(plan.plan[""]["a$b$"], 4)
    assert sum(weights) == pytest.approx(0 if kind == "data_parallel" else 4000 * 256 / 1e6)
    if kind == "row_wise":
        assert weights == pytest.approx([1000 * 256 / 1e6] * 4)
    draw_plan(plan, tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    ranks = {"table_wise": "1 of 4 ranks", "row_wise": "4 of 4 ranks", "data_parallel": "a copy on each"}
    assert f"<!-- a$b$: {kind}, {ranks.get(kind, '')}" in picture


def test_a_plan_without_tables_is_refused(tmp_path) -> None:
    with pytest.raises(ShardingError, match="no table"):
        draw_plan(ShardingPlan(plan={}), tmp_path / "plan.png")
