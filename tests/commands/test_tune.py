"""The search: its trials, continuing a stopped search, and one real trial."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from toy import Toy, make_toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands import tune as tune_module
from ifa_torchrec.commands.tune import TuneConfig, space_of, tune, with_option
from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed import checkpoint
from ifa_torchrec.errors import ConfigError, DivergedError
from ifa_torchrec.training.options import TrainConfig

SEARCH = ("optimizers.dense-lr=0.001..0.01", "ifa.num-heads=1,2,4", "recent-length=10..50")


@pytest.fixture
def config(log: EventLog, tmp_path: Path) -> TuneConfig:
    pytest.importorskip("optuna")
    base = TrainConfig(log.path, tmp_path / "tuned", ifa=IFAConfig(8, num_heads=2), epochs=1)
    return TuneConfig(base, trials=4, search=SEARCH)


@pytest.fixture
def tried(monkeypatch) -> list[TrainConfig]:
    """Filled with the trials' options instead of training; more heads are better."""
    trials: list[TrainConfig] = []

    def trains(config: TrainConfig) -> dict[str, float]:
        trials.append(config)
        heads, rate = config.ifa.num_heads, config.optimizers.dense_lr or 0.0
        if len(trials) == 2 and config.seed == 1:
            raise KeyboardInterrupt
        if config.seed == 2 and len(trials) < 4:
            raise DivergedError("step 1: the loss is nan")
        return {f"valid_{config.keep_best}": heads - rate}

    monkeypatch.setattr(tune_module, "train", trains)
    return trials


def test_the_best_of_the_trials(config: TuneConfig, tried: list[TrainConfig]) -> None:
    result = tune(config)
    assert len(tried) == 4
    best = max(tried, key=lambda c: c.ifa.num_heads - c.optimizers.dense_lr)
    assert result["out"] == str(best.out)
    assert result["options"]["optimizers.dense_lr"] == best.optimizers.dense_lr
    assert json.loads((config.train.out / "best.json").read_text()) == result
    assert len({trial.out for trial in tried}) == 4
    for trial in tried:
        assert 0.001 <= trial.optimizers.dense_lr <= 0.01 and 10 <= trial.recent_length <= 50
        assert trial.optimizers.table_lr == config.train.optimizers.table_lr


def test_the_least_error_is_best(config: TuneConfig, tried: list[TrainConfig]) -> None:
    result = tune(dataclasses.replace(config, train=dataclasses.replace(config.train, keep_best="ne")))
    assert result["value"] == min(c.ifa.num_heads - c.optimizers.dense_lr for c in tried)


def test_it_goes_on_where_it_was_stopped(config: TuneConfig, tried: list[TrainConfig]) -> None:
    """The stopped trial is repeated; finished trials are not."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    tune(config)
    assert len(tried) == 5
    assert tried[2] == dataclasses.replace(tried[1], out=tried[2].out)
    assert tune(config)["metric"] == "gauc_exposed" and len(tried) == 5


def test_a_search_that_goes_on_tries_what_is_new(config: TuneConfig, tried: list[TrainConfig]) -> None:
    tune(dataclasses.replace(config, trials=3))
    tune(dataclasses.replace(config, trials=6))
    assert len({trial.optimizers.dense_lr for trial in tried}) == 6


def test_a_calibration_is_best_near_one(config: TuneConfig, tried: list[TrainConfig]) -> None:
    base = dataclasses.replace(config.train, keep_best="calibration")
    result = tune(dataclasses.replace(config, train=base))
    values = [c.ifa.num_heads - c.optimizers.dense_lr for c in tried]
    assert result["value"] == min(values, key=lambda value: abs(math.log(value)))
    with pytest.raises(ConfigError, match=r"--train\.keep-best last: trials are compared by a metric"):
        TuneConfig(dataclasses.replace(config.train, keep_best="last"))


@pytest.mark.parametrize(
    "change", [{"keep_best": "ne"}, {"epochs": 2}, {"data": "copy"}, {"max_requests": 2}]
)
def test_a_search_of_other_options_is_not_taken_up(
    config: TuneConfig, tried: list[TrainConfig], change: dict[str, Any], tmp_path: Path
) -> None:
    tune(config)
    if "data" in change:
        change = {"data": Path(shutil.copytree(config.train.data, tmp_path / change["data"]))}
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, **change))
    with pytest.raises(ConfigError, match=f"has a search with another {next(iter(change))}"):
        tune(other)
    with pytest.raises(ConfigError, match="has a search with another search"):
        tune(dataclasses.replace(config, search=SEARCH[:2]))


def test_two_searches_do_not_share_a_folder(config: TuneConfig, tried: list[TrainConfig]) -> None:
    with (
        checkpoint.locked(config.train.out),
        pytest.raises(checkpoint.CheckpointError, match="another training writes here"),
    ):
        tune(config)
    assert not tried


def test_a_trial_that_diverges_is_none(config: TuneConfig, tried: list[TrainConfig]) -> None:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=2))
    with pytest.raises(DivergedError, match="lower learning rates"):
        tune(dataclasses.replace(config, trials=2))
    assert tune(config)["out"] == str(tried[3].out)


def test_values_that_do_not_go_together_are_no_trial(
    config: TuneConfig, tried: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """They count as trials; otherwise they would be tried again at every start."""
    tune(dataclasses.replace(config, trials=8, search=("ifa.num-heads=1,3", "dropout=0,0.1,0.2,0.3")))
    said = capsys.readouterr().err.splitlines()
    wrong = [line for line in said if "cannot be trained: IFAConfig: embedding_dim 8" in line]
    assert wrong and tried and len(wrong) + len(tried) == len(said) == 8


def test_options_that_a_training_refuses_are_no_trial(config: TuneConfig, capsys) -> None:
    """As the same trial would be refused at every start."""
    search = ("candidate-set.attention=none,softmax", "loss.consistency=0.1,0.2")
    with pytest.raises(DivergedError, match="no trial was completed"):
        tune(dataclasses.replace(config, trials=1, search=("candidate-set.attention=none", search[1])))
    out = config.train.out.with_name("second")
    train = dataclasses.replace(config.train, out=out)
    assert tune(TuneConfig(train, trials=4, search=search))["value"] > 0
    assert "cannot be trained: " in capsys.readouterr().err


def test_the_default_metric_is_that_of_a_training(
    config: TuneConfig, tried: list[TrainConfig], tmp_path: Path
) -> None:
    """Over exposed candidates; of the first task, if there are several."""
    toy = make_toy()
    schema = dataclasses.replace(toy.schema, tasks={"label": "binary", "buy": "binary"})
    for frame in toy.requests.values():
        frame["buy"] = frame["label"]
    log = Toy(toy.events, toy.items, toy.requests, schema).write(tmp_path / "tasks")
    train = dataclasses.replace(config.train, data=log.path, out=tmp_path / "of tasks")
    assert tune(dataclasses.replace(config, train=train))["metric"] == "label_gauc_exposed"
    requests = {name: frame for name, frame in toy.requests.items() if name != "valid"}
    log = Toy(toy.events, toy.items, requests, schema).write(tmp_path / "without valid")
    with pytest.raises(ConfigError, match="nothing to search by"):
        tune(dataclasses.replace(config, train=dataclasses.replace(train, data=log.path)))


def search_on_a_rank(config: TuneConfig) -> None:
    with pytest.raises(ConfigError, match="one rank: start it without torchrun"):
        tune(config)


def test_several_ranks_are_refused(config: TuneConfig) -> None:
    run_ranks(search_on_a_rank, 2, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropot=0,0.1", "--search dropot: no such option of ifa train"),
        ("ifa.num-heads.x=1", "no such option"),
        ("dropout", "give NAME=LOW..HIGH"),
        ("dropout=0.3..0.1", "LOW below HIGH"),
        ("dropout=a..b", "give NAME=LOW..HIGH"),
        ("dropout=0..inf", "give NAME=LOW..HIGH"),
        ("epochs=0.4..5", "epochs=0.4..5: the option is an integer"),
    ],
)
def test_what_cannot_be_searched(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(text)
    with pytest.raises(ConfigError, match="--trials must be at least 1"):
        TuneConfig(TrainConfig(Path("log"), Path("run")), trials=0)


def test_a_value_that_an_option_cannot_have() -> None:
    config = TrainConfig(Path("log"), Path("run"))
    assert with_option(config, "ifa.feature_map", "relu").ifa.feature_map == "relu"
    assert with_option(config, "interaction", "sdim").interaction == "sdim"
    for name, value in (("ifa.feature_map", "gelu"), ("ifa.num_heads", "two"), ("dropout", "1.5")):
        with pytest.raises(ConfigError, match=name.rpartition(".")[2]):
            with_option(config, name, value)


def test_a_real_trial(config: TuneConfig) -> None:
    result = tune(dataclasses.replace(config, trials=1, search=("dropout=0.1",)))
    assert 0 < result["value"] <= 1 and (Path(result["out"]) / "config.json").exists()
