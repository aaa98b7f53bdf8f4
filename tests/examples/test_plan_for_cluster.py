"""The plan of a cluster that is not there, and its formulae against what ranks really send."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "plan_for_cluster"))
import plan
import traffic


def test_the_traffic_example_runs() -> None:
    assert doctest.testmod(traffic).attempted > 0
    assert doctest.testmod(traffic).failed == 0


def measured(sharding: str):
    return traffic.measure(traffic.Options(sharding=sharding, requests=8, history=400, dim=16))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sharding", "tolerance"), [("table_wise", 0.003), ("row_wise", 0.03)])
def test_the_formulae_give_what_ranks_send(sharding: str, tolerance: float, world: int) -> None:
    """With row_wise the rows are drawn at random, so the share that lies elsewhere is too."""
    table = run_ranks(measured, world, sharding)[0]
    parts = table.drop(index="all")
    assert len(parts) == 4 and (parts["formula"] > 1000).all()
    assert parts["collectives"].to_numpy() == pytest.approx(parts["formula"], rel=tolerance)
    # the sockets carry gloo's own messages besides
    everything = table.loc["all"]
    assert everything["collectives"] * 0.98 < everything["sockets"] < everything["collectives"] * 1.1


@pytest.mark.slow
def test_every_table_is_planned_and_fits() -> None:
    options = plan.Options()
    found, cluster = plan.plan(options)
    assert {o.name for o in found} == {
        f"{name}_table" for name in ("item", "category", "user_id", "country", "hour")
    }
    for option in found:
        assert sum(s.size[0] * s.size[1] for s in option.shards) == option.tensor.numel()
    memory = plan.memory_of_ranks(found, cluster.world_size)
    assert min(memory) > 0
    assert max(memory) < options.hbm_gb
    # 2e9 rows of 64 floats and a state each are spread over all
    assert sum(memory) > 2e9 * (64 + 1) * 4 / plan.GB


def test_the_report_names_tables_memory_time_and_traffic(tmp_path) -> None:
    picture = tmp_path / "plan.svg"
    options = plan.Options(tables={"user_id_table": "row_wise"}, hosts=4, picture=picture)
    text = plan.report(options)
    assert "<!-- user_id_table: row_wise, 32 of 32 ranks -->" in picture.read_text()
    assert "user_id_table row_wise" in " ".join(text.split())
    for part in ("memory of a rank", "planner's estimate", "vectors, forward"):
        assert part in text


def test_a_cluster_too_small_is_told_so() -> None:
    with pytest.raises(plan.ShardingError, match=r"no plan(?s:.*)table item_table"):
        plan.report(plan.Options(hosts=1, gpus=2))
