"""float16 between ranks and in tables: trains to about the same, and loads on other numbers of ranks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_checkpoint import END, MIDDLE, TABLES, Kept, config_of, scores_of, train_all
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed import (
    OptimizerConfig,
    ShardingConfig,
    ShardingError,
    init_process_group,
    shard,
)
from ifa_torchrec.distributed.sharders import sharders
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train

CASES = [
    *(("table_wise", "fp32"), ("table_wise", "exchange"), ("table_wise", "tables")),
    *(("row_wise", "fp32"), ("row_wise", "both")),
]
"""The sharding type, and what is in float16."""


def config_with(log: Path, folder: Path, kind: str, half: str) -> TrainConfig:
    config = config_of(log, folder / f"{kind} {half}", kind=kind)
    exchange = "fp16" if half in ("exchange", "both") else "fp32"
    return dataclasses.replace(
        config,
        sharding=dataclasses.replace(config.sharding, exchange=exchange),
        table_dtype="fp16" if half in ("tables", "both") else "fp32",
    )


@pytest.fixture(scope="module")
def runs(log: EventLog, tmp_path_factory) -> dict[tuple[str, str], tuple[TrainConfig, Kept]]:
    """By case, what rank 0 of two recorded of a training, with the states of all ranks."""
    folder = tmp_path_factory.mktemp("half")
    configs = [config_with(log.path, folder, *case) for case in CASES]
    kept, _ = run_ranks(train_all, 2, configs)
    return dict(zip(CASES, zip(configs, kept, strict=True), strict=True))


def tables_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x for name, x in state.items() if name.endswith("_table.weight")}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "fp32"], ids=" ".join)
def test_it_trains_to_about_the_same(runs, case):
    expected, found = runs[case[0], "fp32"][1], runs[case][1]
    assert found.result["loss"] == pytest.approx(expected.result["loss"], rel=2e-3)
    before, after = expected.states[MIDDLE], expected.states[END]
    assert len(tables_of(after)) == len(TABLES)
    # with both, a row whose gradients are rounding alone takes a whole step of Adagrad another way
    size, bound = (np.mean, 0.1) if case[1] == "both" else (np.max, 0.03)
    for name, table in tables_of(found.states[END]).items():
        assert not np.array_equal(table, after[name])
        moved = size(np.abs(after[name] - before[name]))
        assert size(np.abs(table - after[name])) < bound * moved, name


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=" ".join)
def test_one_rank_loads_what_two_saved(runs, case):
    config, kept = runs[case]
    loaded = load_run(config.out, sharded=False)
    weights = loaded.model.state_dict()
    for name, table in tables_of(kept.states[END]).items():
        found = weights[name.removeprefix("model/")]
        assert found.dtype == torch.float16
        np.testing.assert_array_equal(found.float().numpy(), table)
    (on_one,) = run_ranks(scores_of, 1, [config.out])
    on_two, _ = run_ranks(scores_of, 2, [config.out])
    np.testing.assert_allclose(on_one[0], on_two[0], atol=1e-5)


@pytest.mark.slow
def test_it_goes_on_on_another_number_of_ranks(runs):
    config, _ = runs["row_wise", "both"]
    for step in (config.out / "checkpoints").iterdir():
        if step.name.startswith("step-") and int(step.name.removeprefix("step-")) > MIDDLE:
            shutil.rmtree(step)
    resumed = dataclasses.replace(config, resume=True, sharding=ShardingConfig(), max_requests=8)
    (found,) = run_ranks(train, 1, resumed)
    assert found["steps"] == END
    assert np.isfinite(found["loss"])


def rows_after_a_small_gradient(exchange: str) -> float:
    """The change of a row's first number for a gradient of 1e-8."""
    torch.manual_seed(0)
    config = EmbeddingConfig(name="item", embedding_dim=4, num_embeddings=8, feature_names=["item"])
    tables = torch.nn.ModuleDict({"seq": EmbeddingCollection([config], torch.device("meta"))})
    sharding = ShardingConfig({"item": "row_wise"}, exchange=exchange)
    tables, _ = shard(tables, init_process_group(), OptimizerConfig(), sharding)
    ids = KeyedJaggedTensor(["item"], torch.tensor([1, 6]), lengths=torch.tensor([1, 1]))
    before = tables.module["seq"](ids)["item"].values()
    (before.sum() * 1e-8).backward()
    return float((tables.module["seq"](ids)["item"].values() - before).abs().max())


def test_small_gradients_arrive():
    """In float16, 1e-8 underflows to 0."""
    for moved in run_ranks(rows_after_a_small_gradient, 2, "fp16"):
        assert moved > 0.01


def test_what_cannot_be_is_refused():
    with pytest.raises(ShardingError, match=r'exchange "bf16" needs GPUs: .*use "fp16"'):
        shard(
            torch.nn.Linear(1, 1),
            torch.device("cpu"),
            OptimizerConfig(),
            ShardingConfig(exchange="bf16"),
        )
    assert len(sharders("bf16", "cuda")) == 3
    with pytest.raises(ConfigError, match=r"exchange must be one of .*, got 'int8'"):
        ShardingConfig(exchange="int8")
    with pytest.raises(ConfigError, match="--table-dtype must be fp32 or fp16, got 'bf16'"):
        TrainConfig(Path("log"), Path("run"), table_dtype="bf16")
