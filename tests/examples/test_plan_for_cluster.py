"""The plan for a hypothetical cluster, and its formulas compared with what ranks send."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from ifa_torchrec.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "plan_for_cluster"))
import log_size
import plan
import traffic


@pytest.mark.parametrize("module", [traffic, log_size])
def test_the_examples_in_docstrings_run(module) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def test_what_a_log_takes_by_hand() -> None:
    rates = log_size.Rates("by hand", 8.0, 24.0, 50_000, 20e6, 12)
    options = log_size.Options(2e12, hosts=100, gpus=4, cores=50, storage_gb_per_s=2, step_ms=64)
    text = log_size.report(options, rates)
    for told in (
        "16.0 TB of Parquet, 48.0 TB of columns",
        "only their own parts: 0.48 TB of columns",
        "as Parquet: 1.3 minutes",
        "4.0 million events per second and GPU, 16 million per host",
        "loader: 0.20 cores per GPU, 0.8 of a host's 50; measured on histories of 12 events",
        "0.4 GB per second and host",
        "preparation: 11,111 core-hours; 2.2 hours on all 5,000 cores",
    ):
        assert told in text, text


@pytest.mark.parametrize(
    ("change", "told"), [({"parquet_bytes": None}, "TypeError"), ({"column_bytes": 0}, "not above 0")]
)
def test_rates_that_are_none_are_told(tmp_path: Path, change: dict[str, object], told: str) -> None:
    file = tmp_path / "log.json"
    file.write_text(json.dumps({**json.loads(log_size.FILE.read_text()), **change}))
    with pytest.raises(ConfigError, match=rf"log\.json must have column_bytes.*{told}.*run benchmarks"):
        log_size.read_rates(file)


def test_a_log_or_a_cluster_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="hosts must be above 0, got 0"):
        log_size.report(log_size.Options(hosts=0), log_size.read_rates())


def measured(sharding: str):
    return traffic.measure(traffic.Options(sharding=sharding, requests=8, history=400, dim=16))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sharding", "tolerance"), [("table_wise", 0.003), ("row_wise", 0.03)])
def test_the_formulae_give_what_ranks_send(sharding: str, tolerance: float, world: int) -> None:
    """With row_wise the rows are random, so the share on other ranks is random, too."""
    table = run_ranks(measured, world, sharding)[0]
    parts = table.drop(index="all")
    assert len(parts) == 4 and (parts["formula"] > 1000).all()
    assert parts["collectives"].to_numpy() == pytest.approx(parts["formula"], rel=tolerance)
    # the sockets also carry gloo's own messages
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
    # 2e9 rows of 64 floats and a state each, over all ranks
    assert sum(memory) > 2e9 * (64 + 1) * 4 / plan.GB


def test_the_report_names_tables_memory_time_and_traffic(tmp_path) -> None:
    picture = tmp_path / "plan.svg"
    options = plan.Options(tables={"user_id_table": "row_wise"}, hosts=4, picture=picture)
    text = plan.report(options)
    assert "<!-- user_id_table: row_wise, 32 of 32 ranks -->" in picture.read_text()
    assert "user_id_table row_wise" in " ".join(text.split())
    for part in ("memory per rank", "planner's estimate", "vectors, forward"):
        assert part in text


def test_a_cluster_too_small_is_told_so() -> None:
    with pytest.raises(plan.ShardingError, match=r"no plan(?s:.*)table item_table"):
        plan.report(plan.Options(hosts=1, gpus=2))
