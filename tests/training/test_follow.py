"""Continual training: each log is measured first and trained once, also after interruptions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import run_ranks
from test_train import IFA, Stopped, assert_same_weights, steps_of, stop_before_step, weights
from toy import SCHEMA, make_toy

from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.distributed import (
    CheckpointError,
    OptimizerConfig,
    ShardingConfig,
    init_process_group,
)
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.follow import Follower, Table, follow, going_on
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run

DAYS = ("2024-04-01", "2024-04-02", "2024-04-03")
NEW_ITEMS = 4  # per day


def write_day(path: Path, number: int, tables_grow: bool = True) -> EventLog:
    """A day's log: new items each day and, if tables grow, one more category and one more action."""
    toy, items = make_toy(seed=number + 1), 32 + NEW_ITEMS * number
    grown = number if tables_grow else 0
    actions = np.random.default_rng(number + 1).integers(0, 3 + grown, len(toy.events))
    requests = {"train": toy.requests["train"] if number == 0 else toy.requests["test"]}
    if number == 0:
        requests["valid"] = toy.requests["valid"]
    for frame in requests.values():  # items keep their category, which decides clicks
        frame["candidates"] = [candidates % items for candidates in frame["candidates"]]
    schema = dataclasses.replace(
        SCHEMA,
        item_features={"item": items, "category": SCHEMA.item_features["category"] + grown},
        event_features={"action": 3 + grown},
    )
    events = toy.events.assign(item=toy.events["item"] % items, action=actions)
    return EventLog.from_pandas(path, events, schema, toy.items[:items], requests)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    for number, day in enumerate(DAYS):
        write_day(folder / day, number)
    return folder


def config_of(logs: Path, out: Path) -> TrainConfig:
    """Twelve batches for the first day, three for each other day."""
    return TrainConfig(
        data=logs,
        out=out,
        ifa=IFA,
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(dense_lr=0.01),
        warmup_steps=3,
        max_requests=4,
        max_events=10_000,
        dropout=0.1,
    )


@pytest.fixture
def config(logs: Path, tmp_path: Path) -> TrainConfig:
    return config_of(logs, tmp_path / "runs")


@pytest.fixture(scope="module")
def whole(logs: Path, tmp_path_factory) -> TrainConfig:
    """All days, trained without interruption, for tests that only read the runs."""
    config = config_of(logs, tmp_path_factory.mktemp("whole") / "runs")
    assert list(follow(config)) == list(DAYS)
    return config


def table(config: TrainConfig) -> pd.DataFrame:
    return pd.read_csv(config.out / "parts.csv", index_col="part")


def test_a_part_is_measured_as_the_run_before_serves_it(config: TrainConfig, tmp_path: Path) -> None:
    """Including its calibration; new items are unknown to that run."""
    data = tmp_path / "days"
    for number, day in enumerate(DAYS[:2]):
        write_day(data / day, number, tables_grow=False)
    config = dataclasses.replace(config, data=data)
    trained = follow(config)[DAYS[1]]
    before = evaluate(EvaluateConfig(config.out / DAYS[0], "train", data / DAYS[1]))
    row = table(config).loc[DAYS[1]]
    for name in ("ne", "auc", "gauc", "calibration"):
        assert row[name] == trained[f"before_{name}"] == pytest.approx(before[name], abs=1e-5), name
    assert row["requests"] == 12
    assert row["new_items"] == pytest.approx(before["shares"]["new_items"]["candidates"], abs=1e-9)


def test_what_is_left_of_a_part_that_was_trained(whole: TrainConfig) -> None:
    assert list(table(whole).index) == list(DAYS)
    assert list((whole.out / "tensorboard").glob("events.*"))
    for day, steps in zip(DAYS, (12, 3, 3), strict=True):
        assert load_run(whole.out / day).step == steps
        assert load_run(whole.out / day).config.data == Path(whole.data) / day
    assert follow(whole) == {}


def test_tables_and_gates_grow_and_what_was_known_stays(whole: TrainConfig) -> None:
    was, now = (weights(whole.out / day) for day in DAYS[:2])
    grown = {name for name in now if now[name].shape != was[name].shape}
    tables = [name for name in grown if name.endswith("_table.weight")]
    assert len(tables) == 3 and len(grown) > 3  # the others are gates
    for name in grown:
        assert len(now[name]) - len(was[name]) == (NEW_ITEMS if "item_table" in name else 1)
    (category,) = [name for name in tables if "category_table" in name]
    # no item has it yet: it equals the unknown category as it was when the day began
    assert torch.equal(now[category][-1], was[category][0])


def test_a_part_is_trained_in_order_of_time(whole: TrainConfig, config: TrainConfig) -> None:
    part = dataclasses.replace(config, data=Path(config.data) / DAYS[1], out=config.out / DAYS[1])
    before = whole.out / DAYS[0]
    follower = Follower(going_on(part, before), before)
    taken = [request for requests in follower.sampler for request in requests]
    times = follower.dataset.requests["time"][taken]
    assert sorted(taken) == list(range(12)) != taken
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize(("every", "step"), [(2, 2), (100, 1)], ids=["in the middle", "at its start"])
def test_what_is_killed_ends_as_what_never_stopped(
    whole: TrainConfig, config: TrainConfig, monkeypatch, tmp_path: Path, every: int, step: int
) -> None:
    """And the logs arrive one after the other."""
    data = tmp_path / "days"
    config = dataclasses.replace(config, data=data, checkpoint_every=every)
    shutil.copytree(Path(whole.data) / DAYS[0], data / DAYS[0])
    follow(config)
    for day in DAYS[1:]:
        shutil.copytree(Path(whole.data) / day, data / day)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_before_step(patch, step)
            follow(config)
        assert steps_of(config.out / day) == ([2] if every == 2 else [])
        assert list(follow(config)) == [day]
        assert_same_weights(config.out / day, whole.out / day)
    pd.testing.assert_frame_equal(table(config), table(whole))


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(whole: TrainConfig, config: TrainConfig) -> None:
    """The growing tables are sharded over both ranks."""
    kinds = {f"{name}_table": "row_wise" for name in ("item", "category", "action")}
    shutil.copytree(whole.out / DAYS[0], config.out / DAYS[0])
    config = dataclasses.replace(config, sharding=ShardingConfig(tables=kinds))
    for trained in run_ranks(follow, 2, config):
        assert list(trained) == list(DAYS[1:])
    for name in ("ne", "gauc"):
        two, one = (table(c).loc[DAYS[1], name] for c in (config, whole))
        assert two == pytest.approx(one, abs=1e-5)


def test_a_part_whose_last_checkpoint_is_damaged_is_trained_to_its_end(
    whole: TrainConfig, config: TrainConfig, tmp_path: Path
) -> None:
    """Otherwise its last requests would never be trained."""
    data = tmp_path / "days"
    config = dataclasses.replace(config, data=data, checkpoint_every=1)
    for day in DAYS[:2]:
        shutil.copytree(Path(whole.data) / day, data / day)
    follow(config)
    last = config.out / DAYS[1] / "checkpoints" / "step-000000003"
    file = next(last.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    shutil.copytree(Path(whole.data) / DAYS[2], data / DAYS[2])
    with pytest.warns(UserWarning, match="step-000000003 is damaged"):
        assert list(follow(config)) == list(DAYS[1:])
    for day in DAYS[1:]:
        assert_same_weights(config.out / day, whole.out / day)


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "part,ne\nmonday,0.5,7\n", "part,ne\nmonday\n", "part,ne\n,0.5\n"]
)
def test_a_damaged_table_is_told_of(tmp_path: Path, text: str) -> None:
    init_process_group()
    (tmp_path / "parts.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"parts\.csv: row 1 is not what a training writes"):
        Table(tmp_path)


def test_a_log_that_comes_too_late_is_left_out_and_said(
    whole: TrainConfig, config: TrainConfig, tmp_path: Path, capsys
) -> None:
    data = tmp_path / "days"
    for day in DAYS[::2]:
        shutil.copytree(Path(whole.data) / day, data / day)
    config = dataclasses.replace(config, data=data)
    assert list(follow(config)) == [DAYS[0], DAYS[2]]
    shutil.copytree(Path(whole.data) / DAYS[1], data / DAYS[1])
    assert follow(config) == {}
    assert f"skipped, since they came after {DAYS[2]} was trained: {DAYS[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "s3://logs"}, "--follow: --data s3://logs"),
        ({"managed_rows": {"item_table": 10}}, "--managed-rows cannot grow"),
        ({"keep_best": "gauc"}, "leave out --keep-best"),
        ({"patience": 1}, "leave out --keep-best and --patience"),
    ],
)
def test_what_does_not_go_with_it(config: TrainConfig, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        follow(dataclasses.replace(config, **change))
    assert not config.out.exists()


def test_folders_that_are_not_what_is_wanted(
    whole: TrainConfig, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a log; --follow needs the folder"):
        follow(dataclasses.replace(config, data=Path(config.data) / DAYS[0]))
    with pytest.raises(ConfigError, match="is a run; --follow needs a folder"):
        follow(dataclasses.replace(config, out=whole.out / DAYS[0]))
    with pytest.raises(LogError, match="no logs here"):
        follow(dataclasses.replace(config, data=tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {}}'])
def test_damaged_progress_of_the_run_before(
    whole: TrainConfig, config: TrainConfig, content: str
) -> None:
    shutil.copytree(whole.out / DAYS[0], config.out / DAYS[0])
    for file in (config.out / DAYS[0]).glob("checkpoints/*/progress.json"):
        file.write_text(content)
    with pytest.raises(CheckpointError, match="no readable checkpoint here"):
        follow(config)


def test_other_options_or_other_ids_than_before(
    whole: TrainConfig, config: TrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(whole.out / DAYS[0], config.out / DAYS[0])
    with pytest.raises(CheckpointError, match=r"over_arch_layer_sizes was \[16\], is \[8\]"):
        follow(dataclasses.replace(config, over_arch_layer_sizes=(8,)))
    write_day(tmp_path / "days" / "2024-04-04", -1, tables_grow=False)  # fewer items than before
    with pytest.raises(LogError, match="another schema"):
        follow(dataclasses.replace(config, data=tmp_path / "days"))
