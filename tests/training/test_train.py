"""Training, checkpoints, evaluation and explanation, end to end on the toy log."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import flattened
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrec.sparse.jagged_tensor import JaggedTensor
from toy import BUSY_USER, NEW_USER, SCHEMA, SPLITS, Toy, make_toy

from ifa_torchrec import IFAConfig, InteractionFidelityAttention, generate_set
from ifa_torchrec.__main__ import main
from ifa_torchrec.commands import evaluate as evaluate_module
from ifa_torchrec.commands.command_line import result_as_json
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogError, RankingDataset, order
from ifa_torchrec.data.schema import BESIDE_TASKS
from ifa_torchrec.distributed import (
    CheckpointError,
    OptimizerConfig,
    ShardingConfig,
    init_process_group,
    shard,
)
from ifa_torchrec.distributed.checkpoint import checkpoints
from ifa_torchrec.errors import ConfigError, DivergedError
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.models.archs import CandidateArch
from ifa_torchrec.modules import (
    INTERACTIONS,
    CandidateSetConfig,
    CandidateSetLossConfig,
    SoftmaxAttention,
)
from ifa_torchrec.training import decide
from ifa_torchrec.training import trainer as train_module
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.decide import amounts, decided
from ifa_torchrec.training.metrics_table import as_table
from ifa_torchrec.training.options import TrainConfig, from_json, to_json
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import measure, predict
from ifa_torchrec.training.sets import measure_sets, places
from ifa_torchrec.training.trainer import train
from ifa_torchrec.training.validations import Validations, in_use

IFA = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(math.inf, 30.0),
    identity_features=("item",),
    identity_buckets=4096,
    identity_half_lives=(math.inf,),
)


@pytest.fixture
def config(log: EventLog, tmp_path: Path) -> TrainConfig:
    """Six batches per epoch."""
    return TrainConfig(
        data=log.path,
        out=tmp_path / "run",
        ifa=IFA,
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(dense_lr=0.01),
        warmup_steps=3,
        max_requests=8,
        max_events=10_000,
        epochs=2,
        calibrate=False,  # since weights are compared
    )


@pytest.fixture(scope="module")
def trained(log: EventLog, tmp_path_factory) -> Path:
    """A finished run, for tests that only read it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(
        TrainConfig(data=log.path, out=out, ifa=IFA, max_requests=8, checkpoint_every=4, validate=False)
    )
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All weights of a run's last checkpoint."""
    state = load_run(run).model.state_dict()
    return {
        # the only rank has whole tables
        name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in state.items()
    }


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run / "checkpoints")]


class Stopped(Exception):
    """Simulates the end of a process."""


def stop_before_step(monkeypatch, step: int) -> None:
    set_learning_rate = train_module.set_learning_rate

    def stops(optimizer, config, now, progress):
        if now == step:
            raise Stopped
        set_learning_rate(optimizer, config, now, progress)

    monkeypatch.setattr(train_module, "set_learning_rate", stops)


def requests_trained(monkeypatch, toy: Toy) -> list[list[int]]:
    """Filled during training: the requests of each step, identified by their season."""
    steps: list[list[int]] = []
    forward = CandidateArch.forward
    number_of = {np.float32(s): n for n, s in enumerate(toy.requests["train"]["season"])}
    assert len(number_of) == SPLITS["train"]

    def keeps(self, lookups, batch):
        if self.training:
            steps.append([number_of[season] for season in batch.dense_features[:, 1].numpy()])
        return forward(self, lookups, batch)

    monkeypatch.setattr(CandidateArch, "forward", keeps)
    return steps


def train_stopped(config: TrainConfig, monkeypatch, step: int) -> None:
    with monkeypatch.context() as patch:
        stop_before_step(patch, step)
        with pytest.raises(Stopped):
            train(config)


class TestTrain:
    @pytest.mark.parametrize(
        "interaction",
        [
            pytest.param(name, marks=() if name in ("none", "softmax", "ifa") else pytest.mark.slow)
            for name in INTERACTIONS
        ],
    )
    def test_learns_what_can_be_learnt(self, config: TrainConfig, toy: Toy, interaction: str) -> None:
        """Only the clicked category can be learnt."""
        clicked = np.concatenate(list(toy.requests["train"]["label"])).mean()
        no_model = -(clicked * math.log(clicked) + (1 - clicked) * math.log(1 - clicked))
        loss = CandidateSetLossConfig(listwise=0.0)
        result = train(dataclasses.replace(config, interaction=interaction, epochs=8, loss=loss))
        assert result["steps"] == 8 * 6
        assert result["loss"] < 0.5 * no_model
        assert result["valid_gauc"] > 0.9
        assert result["valid_ne"] < 0.8

    def test_an_interaction_added_to_the_registry_is_trained_and_read_again(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ConfigError, match=r"--interaction must be one of .*, got 'latest one'"):
            dataclasses.replace(config, interaction="latest one")
        monkeypatch.setitem(INTERACTIONS, "latest one", lambda c, *_: SoftmaxAttention(c, 1))
        train(dataclasses.replace(config, interaction="latest one"))
        assert load_run(config.out).config.interaction == "latest one"

    def test_reports_its_speed_and_writes_its_run(self, config: TrainConfig) -> None:
        result = train(config)
        assert result["steps"] == 12
        assert result["seconds"] > 0 and result["events_per_second"] > 0
        assert json.loads((config.out / "config.json").read_text())["max_requests"] == 8
        assert list((config.out / "tensorboard").glob("events.*"))
        assert steps_of(config.out) == [6, 12]

    def test_validation_is_a_choice_and_changes_no_weight(self, config: TrainConfig) -> None:
        plain = dataclasses.replace(config, out=config.out / "plain", validate=False)
        assert not [name for name in train(plain) if name.startswith("valid")]
        train(config)
        assert_same_weights(plain.out, config.out)

    def test_every_task_is_validated(self, toy: Toy, config: TrainConfig, tmp_path: Path) -> None:
        requests = {name: f.assign(bought=f["label"]) for name, f in toy.requests.items()}
        schema = dataclasses.replace(SCHEMA, tasks=("label", "bought"))
        log = Toy(toy.events, toy.items, requests, schema).write(tmp_path / "two-tasks")
        result = train(dataclasses.replace(config, data=log.path))
        for task in ("label", "bought"):
            assert [name for name in result if task in name and "gauc" in name], list(result)
        # names that a task cannot have
        assert {*evaluate(EvaluateConfig(config.out, set_size=2))} == {"label", "bought", *BESIDE_TASKS}

    def test_the_seed_decides_the_weights(self, config: TrainConfig) -> None:
        runs = [
            dataclasses.replace(config, out=config.out / str(n), seed=seed, validate=False)
            for n, seed in enumerate((1, 1, 2))
        ]
        for run in runs:
            train(run)
        assert_same_weights(runs[0].out, runs[1].out)
        with pytest.raises(AssertionError):
            assert_same_weights(runs[0].out, runs[2].out)

    def test_a_loss_that_is_not_finite(self, config: TrainConfig) -> None:
        wild = dataclasses.replace(
            config, optimizers=OptimizerConfig(dense_lr=1e30), warmup_steps=1, checkpoint_every=1
        )
        with pytest.raises(DivergedError, match=r"step \d+.*learning rates.*complete"):
            train(wild)
        # no checkpoint contains the step that diverged
        assert steps_of(config.out) and max(steps_of(config.out)) < 12

    @pytest.mark.parametrize(
        ("dense_lr", "table_lr", "what"), [(1e36, 0.02, "prediction"), (0.001, 1e39, "weight")]
    )
    def test_weights_that_are_not_finite_are_not_kept(
        self, config: TrainConfig, dense_lr: float, table_lr: float, what: str
    ) -> None:
        """The loss of the only step is computed with the weights before it."""
        wild = OptimizerConfig(dense_lr=dense_lr, table_lr=table_lr)
        one = dataclasses.replace(config, optimizers=wild, epochs=1, max_requests=1000, warmup_steps=0)
        one = dataclasses.replace(one, max_events=10**6, checkpoint_every=10**6)
        with pytest.raises(DivergedError, match=f"step 1: a {what}.* is not finite; train again"):
            train(one)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            *((name, 0) for name in ("epochs", "max_events", "max_requests", "checkpoint_every")),
            *((name, 0) for name in ("history_length", "recent_length")),
            *((name, -1) for name in ("warmup_steps", "seed", "table_init")),
            *((name, math.inf) for name in ("table_init",)),
            ("dropout", 1.0),
            *(("over_arch_layer_sizes", sizes) for sizes in ((), (8, 0))),
            ("seed", 1 << 63),
        ],
    )
    def test_options_out_of_range(self, config: TrainConfig, option: str, value: object) -> None:
        """It is reported before anything is read or written."""
        with pytest.raises(ConfigError, match=f"^--{option.replace('_', '-')}.*(at least|below)"):
            dataclasses.replace(config, **{option: value})

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_rates_and_memory_out_of_range(self, value: float) -> None:
        for name in ("table_lr", "dense_lr", "weight_decay", "table_weight_decay"):
            with pytest.raises(ConfigError, match=f"OptimizerConfig: {name} must be a number of at"):
                OptimizerConfig(**{name: value})
        with pytest.raises(
            ConfigError, match=r"table_optimizer must be one of .*'adagrad'.*, got 'adam'"
        ):
            OptimizerConfig(table_optimizer=typing.cast(Any, "adam"))
        with pytest.raises(ConfigError, match="memory_gb must be positive"):
            ShardingConfig(memory_gb=value)

    def test_no_log(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(LogError, match="nowhere: no such event log"):
            train(dataclasses.replace(config, data=tmp_path / "nowhere"))
        assert not config.out.exists()


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def curves_of(run: Path) -> dict[str, dict[int, float]]:
    """The points of some TensorBoard curves, by step."""
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    names = ("train/loss", "valid/gauc")
    return {name: {point.step: point.value for point in curves.Scalars(name)} for name in names}


class TestResume:
    @pytest.mark.parametrize(
        ("stop", "every", "resumed_at"),
        [(3, 2, 2), (8, 100, 6), (10, 4, 8)],
        ids=["first epoch", "at an epoch's end", "second epoch"],
    )
    def test_a_resumed_run_ends_as_one_that_never_stopped(
        self, config: TrainConfig, monkeypatch, stop: int, every: int, resumed_at: int
    ) -> None:
        whole = train(dataclasses.replace(config, out=config.out / "whole"))
        halves = dataclasses.replace(config, out=config.out / "halves", checkpoint_every=every)
        train_stopped(halves, monkeypatch, stop)
        assert steps_of(halves.out)[-1] == resumed_at < stop
        resumed = train(dataclasses.replace(halves, resume=True))
        assert resumed["steps"] == whole["steps"] == 12
        valid = [name for name in whole if name.startswith("valid_")]
        assert len(valid) > 4
        assert {name: resumed[name] for name in valid} == {name: whole[name] for name in valid}
        assert_same_weights(halves.out, config.out / "whole")

    def test_curves_stay_where_a_run_that_is_done_is_started_again(self, config: TrainConfig) -> None:
        train(config)
        before = curves_of(config.out)
        assert [*before["train/loss"]] == [6, 10, 12] and [*before["valid/gauc"]] == [6, 12]
        time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
        train(dataclasses.replace(config, resume=True))
        assert curves_of(config.out) == before

    def test_a_split_of_several_windows_goes_on_within_one(
        self, config: TrainConfig, monkeypatch
    ) -> None:
        """As for long splits, which are shuffled in windows; see data/order.py."""
        monkeypatch.setattr(order, "WINDOW", 16)
        monkeypatch.setattr(order, "BLOCK", 4)
        config = dataclasses.replace(config, validate=False)
        whole = dataclasses.replace(config, out=config.out / "whole")
        halves = dataclasses.replace(config, out=config.out / "halves", checkpoint_every=3)
        train(whole)
        train_stopped(halves, monkeypatch, 11)
        assert steps_of(halves.out)[-1] == 9  # 24 requests of the second epoch, of three windows
        assert train(dataclasses.replace(halves, resume=True))["steps"] == 12
        assert_same_weights(halves.out, whole.out)
        with (
            monkeypatch.context() as patch,
            pytest.raises(ConfigError, match="belongs to request order"),
        ):
            patch.setattr(order, "WINDOW", 32)
            train(dataclasses.replace(halves, resume=True))

    def test_a_position_is_asked_for_where_a_checkpoint_is_written(
        self, config: TrainConfig, monkeypatch
    ) -> None:
        """For a log in parts it takes time for all parts, too much for one step."""
        asked: list[int] = []
        state_dict = EventBudgetSampler.state_dict

        def counted(self, step):
            asked.append(step)
            return state_dict(self, step)

        monkeypatch.setattr(EventBudgetSampler, "state_dict", counted)
        train(dataclasses.replace(config, checkpoint_every=4, validate=False))
        # at the beginning of each pass, and of the checkpoints; an epoch's end is one
        assert asked == [0, 4, 6, 6, 2, 6]

    def test_dropout_and_decay_go_on_where_they_were(self, config: TrainConfig, monkeypatch) -> None:
        """The masks are those of an uninterrupted run, and validation draws none."""
        optimizers = OptimizerConfig(dense_lr=0.01, table_weight_decay=0.1)
        config = dataclasses.replace(
            config, dropout=0.5, optimizers=optimizers, epochs=1, checkpoint_every=2, validate=False
        )
        whole = dataclasses.replace(config, out=config.out / "whole", validate=True, validate_every=3)
        train(dataclasses.replace(whole, keep_best="last"))
        train_stopped(dataclasses.replace(config, keep_best="last"), monkeypatch, 3)
        train(dataclasses.replace(config, resume=True))
        assert_same_weights(config.out, whole.out)

    def test_a_run_stopped_while_it_validates(self, config: TrainConfig, monkeypatch) -> None:
        """All steps are done and saved, but not validated yet."""
        whole = train(dataclasses.replace(config, out=config.out / "whole", epochs=1))
        halves = dataclasses.replace(config, out=config.out / "halves", epochs=1)
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "measure", stops_at_once)
            with pytest.raises(Stopped):
                train(halves)
        resumed = train(dataclasses.replace(halves, resume=True))
        assert resumed["steps"] == 6
        assert resumed.get("valid_gauc") == whole["valid_gauc"]

    @pytest.mark.parametrize(
        "change",
        [
            {"max_requests": 5},
            {"max_requests": 48},
            {"max_events": 60},
            {"sharding": ShardingConfig(tables={"item_table": "row_wise", "store_table": "row_wise"})},
        ],
        ids=str,
    )
    def test_other_batches_and_sharding_take_each_request_that_is_left_once(
        self, config: TrainConfig, toy: Toy, monkeypatch, change: dict
    ) -> None:
        """The position in the data is a number of requests; another number of ranks is tested with
        the checkpoints."""
        trained = requests_trained(monkeypatch, toy)
        config = dataclasses.replace(config, checkpoint_every=2, validate=False)
        train_stopped(config, monkeypatch, 2)
        assert [len(step) for step in trained] == [8, 8]
        train(dataclasses.replace(config, resume=True, **change))
        flat = [request for step in trained for request in step]
        everything = list(range(SPLITS["train"]))
        assert sorted(flat[:48]) == sorted(flat[48:]) == everything
        assert flat[:48] != flat[48:]  # in another order
        if "max_requests" in change:
            left = min(change["max_requests"], 32)
            assert len(trained[2]) == left

    def test_the_learning_rate_goes_on_where_it_was(self, config: TrainConfig, monkeypatch) -> None:
        """It falls with the requests taken, independently of the batch sizes."""
        rates = []
        set_learning_rate = train_module.set_learning_rate

        def keeps(optimizer, config, step, progress):
            set_learning_rate(optimizer, config, step, progress)
            rates.append(dict(optimizer.optimizers)["dense"].param_groups[0]["lr"])

        monkeypatch.setattr(train_module, "set_learning_rate", keeps)
        config = dataclasses.replace(config, checkpoint_every=3, validate=False)
        train_stopped(config, monkeypatch, 3)
        train(dataclasses.replace(config, resume=True, max_requests=12))
        # a third, two thirds and all of the way up; then down: 8 of 96 requests a step, then 12
        wanted = [1 / 3, 2 / 3 * 88 / 96, 80 / 96, 72 / 96, 60 / 96]
        wanted += [48 / 96, 36 / 96, 24 / 96, 12 / 96]
        assert rates == pytest.approx([0.01 * rate for rate in wanted])

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 7}, "seed was 0, is 7"),
            (
                {"ifa": dataclasses.replace(IFA, num_heads=4, half_lives=None)},
                "ifa.num_heads was 2, is 4",
            ),
            ({"optimizers": OptimizerConfig(dense_lr=0.5)}, "optimizers.dense_lr was 0.01, is 0.5"),
            ({"interaction": "mean"}, "interaction was 'ifa', is 'mean'"),
            ({"epochs": 3}, "epochs was 2, is 3"),
        ],
        ids=str,
    )
    def test_another_configuration_is_refused_by_name(
        self, config: TrainConfig, monkeypatch, change: dict, named: str
    ) -> None:
        config = dataclasses.replace(config, checkpoint_every=1)
        train_stopped(config, monkeypatch, 2)
        before = (config.out / "config.json").read_text()
        with pytest.raises(CheckpointError, match=named) as error:
            train(dataclasses.replace(config, resume=True, **change))
        assert "same options, or another folder" in str(error.value)
        assert (config.out / "config.json").read_text() == before

    def test_where_and_how_often_may_change(self, config: TrainConfig, monkeypatch) -> None:
        train_stopped(dataclasses.replace(config, checkpoint_every=1), monkeypatch, 2)
        moved = config.out.rename(config.out.parent / "moved")
        config = dataclasses.replace(config, out=moved, checkpoint_every=5, validate=False, resume=True)
        assert train(config)["steps"] == 12

    def test_out_that_holds_checkpoints_is_not_overwritten(
        self, config: TrainConfig, monkeypatch
    ) -> None:
        config = dataclasses.replace(config, checkpoint_every=1)
        train_stopped(config, monkeypatch, 2)
        with pytest.raises(CheckpointError, match=r"has checkpoints.*--resume.*another --out"):
            train(config)
        assert steps_of(config.out) == [1, 2]

    def test_one_line_starts_a_run_and_goes_on_with_it(
        self, config: TrainConfig, monkeypatch, capsys
    ) -> None:
        """And prints which it does, on standard error."""
        plain = dataclasses.replace(config, out=config.out / "plain", validate=False)
        train(plain)
        assert "starting" not in capsys.readouterr().err
        config = dataclasses.replace(config, checkpoint_every=2, validate=False, resume=True)
        for stop, said in ((5, "no checkpoint here; starting"), (9, "resuming from step 4")):
            train_stopped(config, monkeypatch, stop)
            printed = capsys.readouterr()
            assert f"{config.out / 'checkpoints'}: {said}\n" in printed.err
            assert said not in printed.out
        assert train(config)["steps"] == 12
        assert "resuming from step 8" in capsys.readouterr().err
        assert_same_weights(config.out, plain.out)

    def test_half_written_checkpoints_do_not_count(self, config: TrainConfig, monkeypatch) -> None:
        whole = dataclasses.replace(config, out=config.out / "whole", validate=False)
        train(whole)
        config = dataclasses.replace(config, checkpoint_every=2, validate=False)
        train_stopped(config, monkeypatch, 5)
        folder = config.out / "checkpoints"
        draft = folder / ".step-000000005"  # from a step that is not saved again
        draft.mkdir()
        for name in ("__0_0.distcp", "progress.json"):
            (draft / name).write_text("half")
        assert steps_of(config.out) == [2, 4]
        train(dataclasses.replace(config, resume=True))
        assert_same_weights(config.out, whole.out)
        assert sorted(path.name for path in folder.iterdir()) == ["step-000000010", "step-000000012"]

    def test_a_crash_while_saving_leaves_the_checkpoint_before(
        self, config: TrainConfig, monkeypatch
    ) -> None:
        config = dataclasses.replace(config, checkpoint_every=2)
        train_stopped(config, monkeypatch, 3)
        before = weights(config.out)
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.checkpoint.save", stops_at_once)
            with pytest.raises(Stopped):
                train(dataclasses.replace(config, resume=True))
        assert steps_of(config.out) == [2]
        after = weights(config.out)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_only_the_last_checkpoints_are_kept(self, config: TrainConfig) -> None:
        train(dataclasses.replace(config, checkpoint_every=1, epochs=1, validate=False))
        assert steps_of(config.out) == [5, 6]
        assert len(list((config.out / "checkpoints").iterdir())) == 2


class TestDecided:
    """Open options are chosen from the log."""

    @pytest.mark.parametrize(
        ("requests", "batch", "warm", "rate"),
        [
            (48, 4, 2, 0.0011),
            (2000, 4, 80, 0.0011),
            (8000, 16, 80, 0.0021),
            (20_000, 32, 100, 0.003),
            (10**6, 32, 5000, 0.003),
        ],
    )
    def test_batch_warm_up_and_rate(
        self,
        config: TrainConfig,
        log: EventLog,
        monkeypatch,
        requests: int,
        batch: int,
        warm: int,
        rate: float,
    ) -> None:
        init_process_group()
        dataset = RankingDataset(log, "train")
        dataset.history_lengths = np.full(requests, 10)
        monkeypatch.setattr(RankingDataset, "__len__", lambda self: len(self.history_lengths))
        config = dataclasses.replace(
            config, max_requests=None, warmup_steps=None, keep_best="last", epochs=2
        )
        found = decided(config, dataset, amounts(config, dataset))
        assert (found.max_requests, found.warmup_steps) == (batch, warm)
        assert found.optimizers == config.optimizers  # as given
        config = dataclasses.replace(config, optimizers=OptimizerConfig())
        found = decided(config, dataset, amounts(config, dataset))
        assert found.optimizers == OptimizerConfig(dense_lr=rate)

    def test_identity_heads_on_all_that_describes_an_item(
        self, config: TrainConfig, log: EventLog
    ) -> None:
        dataset = RankingDataset(log, "train")
        config = dataclasses.replace(config, ifa=IFAConfig(8, num_heads=2))
        ifa = decided(config, dataset, amounts(config, dataset)).ifa
        assert (ifa.identity_features, ifa.identity_buckets) == (("item", "category"), 64)
        assert ifa.identity_half_lives == (math.inf, 30.0, 7.0)
        for change in ({"identity": False}, {"interaction": "none"}):
            changed = dataclasses.replace(config, **change)
            assert decided(changed, dataset, amounts(changed, dataset)).ifa == changed.ifa

    @pytest.mark.parametrize("identity", [True, False])
    @pytest.mark.parametrize(
        "given",
        [
            {"identity_features": ("category",)},
            {"identity_half_lives": (math.inf,)},
            {"identity_buckets": 4096},
            {"identity_features": ("item",), "identity_half_lives": (5.0,), "identity_buckets": 7},
        ],
    )
    def test_what_is_given_of_the_identity_heads_stays(
        self, given: dict[str, Any], identity: bool, config: TrainConfig, log: EventLog
    ) -> None:
        dataset = RankingDataset(log, "train")
        asked = IFAConfig(8, num_heads=2, **given)
        config = dataclasses.replace(config, ifa=asked, identity=identity)
        ifa = decided(config, dataset, amounts(config, dataset)).ifa
        if not (identity or asked.identity_features):
            assert ifa == asked
            return
        assert ifa.identity_features == given.get("identity_features", ("item", "category"))
        assert ifa.identity_half_lives == given.get("identity_half_lives", (math.inf, 30.0, 7.0))
        assert ifa.identity_buckets == given.get("identity_buckets", 64)

    def test_it_is_told_and_kept(self, config: TrainConfig, monkeypatch, capsys) -> None:
        """Even if another log, or another number of ranks, would give other values."""
        config = dataclasses.replace(
            config, warmup_steps=None, optimizers=OptimizerConfig(), checkpoint_every=2, validate=False
        )
        train_stopped(config, monkeypatch, 3)
        told = capsys.readouterr().err
        assert (
            "decided from the log: --optimizers.dense-lr 0.0015 --warmup-steps 1 --keep-best last"
            in told
        )
        assert "only 12 steps in all, too few to learn much: give --epochs 34, and validate" in told
        options = json.loads((config.out / "config.json").read_text())
        assert (options["warmup_steps"], options["keep_best"]) == (1, "last")
        monkeypatch.setattr(decide, "WARM_UP", 0.9)
        monkeypatch.setattr(decide, "DENSE_LR", 0.1)
        train(dataclasses.replace(config, resume=True))
        resumed = load_run(config.out).config
        assert (resumed.warmup_steps, resumed.optimizers.dense_lr) == (1, 0.0015)


def measured(monkeypatch, values: list[float]) -> list[int]:
    """Let the validations return these GAUCs, and count the validations."""
    made: list[int] = []

    def finds(dataset, scores, tasks):
        made.append(len(made))
        value = values[made[-1]]
        return {"gauc": value, "gauc_exposed": value, "ne": 1.0}

    monkeypatch.setattr(train_module, "measure", finds)
    return made


def trained_step(config: TrainConfig) -> tuple[float, int]:
    """The step that a training reports as best, and the step that is loaded."""
    return train(config)["best_step"], load_run(config.out).step


CALIBRATED = (
    '{"metric": "ne", "best": null, "validations": '
    '[{"step": 4, "metrics": {}, "calibration": {"label": %s}}]}'
)
BAD_PAIRS = ("[]", "[1.0]", "[1.0, 2.0, 3.0]", "[NaN, 0.0]", "[1.0, Infinity]", "[-1.0, 0.0]")


class TestKeepBest:
    def test_the_best_is_kept_and_used(self, config: TrainConfig, monkeypatch) -> None:
        measured(monkeypatch, [0.6, 0.8, 0.7, 0.75, 0.5, 0.65])
        result = train(dataclasses.replace(config, validate_every=2))
        assert (result["best_step"], result["valid_gauc"], result["steps"]) == (4, 0.8, 12)
        assert steps_of(config.out) == [4, 10, 12]
        assert load_run(config.out).step == 4
        assert json.loads((config.out / "config.json").read_text())["keep_best"] == "gauc_exposed"
        kept = json.loads((config.out / "validations.json").read_text())
        assert [v["step"] for v in kept["validations"]] == [2, 4, 6, 8, 10, 12]

    @pytest.mark.parametrize(
        ("metric", "values", "best"),
        [
            ("gauc", [0.5, 0.7, 0.7, 0.6], 3),
            ("ne", [0.9, 0.7, 0.8], 2),
            ("watch_mae", [math.nan, 3.0, 4.0], 2),
            ("calibration", [2.5, 0.5, 1.9], 3),
            ("last", [0.5, 0.4], None),
        ],
    )
    def test_which_value_is_best(self, metric: str, values: list[float], best: int | None) -> None:
        found = {step: {metric: value} for step, value in enumerate(values, start=1)}
        assert Validations(Path("run"), metric, found).best == best

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "Expecting property name"),
            ('{"metric": "ne", "best": "4", "validations": []}', "best"),
            (
                '{"metric": "ne", "best": 4, "validations": [{"step": 4}]}',
                r"validations\[0\]\.calibration",
            ),
            ('{"metric": "ne", "best": 4}', "validations is missing"),
            ('{"metric": "ne", "best": 3, "validations": []}', r"best must be one of .* \[\], got 3"),
            *((CALIBRATED % pair, "'label' must be a scale > 0") for pair in BAD_PAIRS),
        ],
    )
    def test_a_damaged_file_is_told_of(self, tmp_path: Path, text: str, message: str) -> None:
        """Otherwise another step than the best would silently be loaded, uncalibrated."""
        (tmp_path / "validations.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"validations\.json: not what .*{message}"):
            in_use(tmp_path)

    def test_a_best_step_without_its_checkpoint_is_told_of(self, config: TrainConfig) -> None:
        train(dataclasses.replace(config, validate_every=4, epochs=1))
        best = in_use(config.out)[0]
        shutil.rmtree(config.out / "checkpoints" / f"step-{best:09d}")
        with pytest.warns(UserWarning, match=f"has no step-{best:09d}; loading step-"):
            assert load_run(config.out).step != best

    def test_patience(self, config: TrainConfig, monkeypatch) -> None:
        """It stops, and does not continue when resumed."""
        config = dataclasses.replace(config, validate_every=1, patience=2)
        made = measured(monkeypatch, [0.6, 0.8, 0.7, 0.75, 0.9])
        assert train(config)["steps"] == 4
        again = train(dataclasses.replace(config, resume=True))
        assert (again["steps"], again["best_step"], len(made)) == (4, 2, 4)

    def test_validation_within_an_epoch_changes_no_weight(self, config: TrainConfig) -> None:
        plain = dataclasses.replace(config, out=config.out / "plain", validate=False)
        train(plain)
        train(dataclasses.replace(config, validate_every=4, keep_best="last"))
        assert_same_weights(plain.out, config.out)

    @pytest.mark.parametrize("stop", [3, 5])
    def test_a_resumed_run_keeps_the_same(self, config: TrainConfig, monkeypatch, stop: int) -> None:
        config = dataclasses.replace(config, validate_every=2, keep_best="ne", epochs=1)
        whole = dataclasses.replace(config, out=config.out / "whole")
        result = train(whole)
        train_stopped(config, monkeypatch, stop)
        resumed = train(dataclasses.replace(config, resume=True, keep_best=None))
        assert resumed["best_step"] == result["best_step"]
        assert (config.out / "validations.json").read_text() == (
            whole.out / "validations.json"
        ).read_text()
        assert_same_weights(config.out, whole.out)

    @pytest.mark.slow
    def test_on_two_ranks(self, config: TrainConfig) -> None:
        """They find the same best step, and it is the one that is loaded."""
        config = dataclasses.replace(config, validate_every=2, keep_best="ne", epochs=1, max_requests=4)
        first, second = run_ranks(trained_step, 2, config)
        assert first == second
        assert first[0] == first[1] == load_run(config.out).step

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"keep_best": "click"}, r"--keep-best click: not measured.*'gauc'.*'ne'"),
            (
                {"keep_best": "gauc", "validate": False},
                "--keep-best gauc needs validation: --no-validate",
            ),
            ({"patience": 3, "keep_best": "last"}, "--patience 3 uses the metric"),
            ({"validate_every": 3, "validate": False}, "--validate-every 3 needs validation"),
        ],
    )
    def test_what_cannot_be(self, config: TrainConfig, change: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(config, **change))
        assert not config.out.exists()

    @pytest.mark.parametrize(
        ("begun", "change", "message"),
        [
            ({"keep_best": "last"}, {"patience": 1}, "--patience 1 uses the metric"),
            ({}, {"patience": 1, "validate": False}, "--patience 1 needs validation"),
        ],
    )
    def test_nor_when_resumed(
        self, config: TrainConfig, begun: dict, change: dict, message: str
    ) -> None:
        train(dataclasses.replace(config, epochs=1, **begun))
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(config, resume=True, **change))
        plain = {"validate": False} if "validate" in change else {}
        train(dataclasses.replace(config, epochs=1, resume=True, **plain))

    def test_a_log_without_valid_keeps_the_last(
        self, toy: Toy, config: TrainConfig, tmp_path: Path
    ) -> None:
        requests = {name: frame for name, frame in toy.requests.items() if name != "valid"}
        log = Toy(toy.events, toy.items, requests, toy.schema).write(tmp_path / "no-valid")
        config = dataclasses.replace(config, data=log.path, epochs=1)
        assert "best_step" not in train(config)
        assert load_run(config.out).step == 6
        with pytest.raises(ConfigError, match="no split `valid`"):
            train(dataclasses.replace(config, out=config.out / "other", keep_best="ne"))


class TestWhatMayNotChange:
    def test_another_log(self, config: TrainConfig, toy: Toy, tmp_path: Path) -> None:
        """A position in one log is invalid in another."""
        train(dataclasses.replace(config, epochs=1))
        fewer = Toy(toy.events.iloc[1:], toy.items, toy.requests, toy.schema).write(tmp_path / "fewer")
        assert train(dataclasses.replace(config, epochs=1, resume=True))["steps"] == 6
        with pytest.raises(LogError, match=rf"{fewer.path} has other content than .*{config.data}"):
            train(dataclasses.replace(config, epochs=1, data=fewer.path, resume=True))

    def test_a_log_of_the_same_size_in_place_of_the_other(
        self, config: TrainConfig, toy: Toy, tmp_path: Path
    ) -> None:
        data = toy.write(tmp_path / "mine").path
        train(dataclasses.replace(config, epochs=1, data=data, validate=False))
        shutil.rmtree(data)
        make_toy(seed=1).write(data)
        with pytest.raises(LogError, match=rf"{data} has other content"):
            train(dataclasses.replace(config, epochs=1, data=data, resume=True))


class TestDamage:
    """The kinds of damage are tested with the checkpoints."""

    @pytest.fixture
    def damaged(self, config: TrainConfig) -> TrainConfig:
        """A run of six steps that has checkpoints at 4 and 6, the last one torn."""
        config = dataclasses.replace(config, checkpoint_every=4, epochs=1)
        train(config)
        assert steps_of(config.out) == [4, 6]
        tear(config.out / "checkpoints" / "step-000000006")
        return config

    def test_a_run_goes_on_from_the_checkpoint_before(
        self, config: TrainConfig, damaged: TrainConfig, capsys
    ) -> None:
        whole = dataclasses.replace(damaged, out=config.out / "whole", checkpoint_every=100)
        valid = train(whole)["valid_ne"]
        capsys.readouterr()
        with pytest.warns(UserWarning, match=r"step-000000006 is damaged.*trying another"):
            resumed = train(dataclasses.replace(damaged, resume=True))
        assert "resuming from step 4" in capsys.readouterr().err
        assert resumed["steps"] == 6 and resumed["valid_ne"] == valid
        assert steps_of(damaged.out) == [4, 6]
        assert_same_weights(damaged.out, whole.out)  # without a warning: it is whole again

    def test_evaluate_takes_the_checkpoint_before(self, damaged: TrainConfig) -> None:
        with pytest.warns(UserWarning, match=r"step-000000006 is damaged"):
            evaluate(EvaluateConfig(damaged.out, split="valid"))

    def test_no_checkpoint_is_whole(self, damaged: TrainConfig) -> None:
        tear(damaged.out / "checkpoints" / "step-000000004")
        for call in (
            lambda: train(dataclasses.replace(damaged, resume=True)),
            lambda: load_run(damaged.out),
        ):
            with (
                pytest.warns(UserWarning, match=r"step-000000006 is damaged"),
                pytest.raises(
                    CheckpointError, match=r"step-000000004 is damaged.*there is no earlier checkpoint"
                ),
            ):
                call()


def tear(path: Path) -> None:
    """Simulate a file system that loses its last writes."""
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def test_every_table_is_updated_by_the_fused_optimiser(trained: Path) -> None:
    """Also small ones, which the planner would otherwise copy and leave to AdamW."""
    run = load_run(trained)
    _, optimizer = shard(
        DLRM_IFATrain(build_model(run.log.schema, run.config)), run.device, run.config.optimizers
    )
    dense = dict(optimizer.optimizers)["dense"]
    assert dense.params and not [name for name in dense.params if "_table" in name]


def test_a_run_can_be_loaded_to_score_without_gradients(trained: Path) -> None:
    with torch.no_grad():
        run = load_run(trained)
        assert not torch.is_grad_enabled()  # as the caller set it
    assert run.config.ifa == IFA


def test_what_a_run_writes_is_json(config: TrainConfig) -> None:
    """Also infinite half-lives; NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    train(config)
    text = (config.out / "config.json").read_text()
    assert json.loads(text, parse_constant=refuse)["ifa"]["half_lives"] == ["inf", 30.0]
    assert load_run(config.out).config.ifa == IFA
    again = train(dataclasses.replace(config, resume=True))
    json.loads(json.dumps(again), parse_constant=refuse)


def fields_of(config: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Names and types of all options, including nested ones."""
    result = []
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            result += fields_of(value, (*path, name))
        else:
            result.append(((*path, name), hint))
    return result


def with_option(config: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = with_option(getattr(config, name), tuple(rest), value)
    return dataclasses.replace(config, **{name: value})


OPTIONS = fields_of(TrainConfig(data=Path("log"), out=Path("run"), ifa=IFA))
st.register_type_strategy(Path, st.text(st.characters(exclude_characters="\0")).map(Path))


@settings(deadline=None)
@given(st.data())
def test_any_options_come_back_as_they_were(data: st.DataObject) -> None:
    """Also infinity and NaN, names that look like them, each with its type."""
    config = TrainConfig(data=Path("log"), out=Path("run"), ifa=IFA)
    path, hint = data.draw(st.sampled_from(OPTIONS))
    values = st.from_type(hint)
    value = data.draw(st.sampled_from(SPECIAL[hint]) | values if hint in SPECIAL else values)
    try:
        config = with_option(config, path, value)
    except ConfigError:
        assume(False)
    text = json.dumps(to_json(dataclasses.asdict(config)), allow_nan=False)
    assert repr(from_json(TrainConfig, json.loads(text), "")) == repr(config)


SPECIAL: dict[Any, list[Any]] = {
    float: [math.inf, -math.inf, math.nan, 1.0],
    float | None: [math.inf, 1.0],
    tuple[float, ...]: [(math.inf, 7.0)],
    tuple[float, ...] | None: [None, (math.inf, 7.0)],
    tuple[str, ...]: [("inf", "nan")],
    str | None: ["inf", "nan", None],
    dict[str, int]: [{"inf": 2}],
    dict[str, str]: [{"item_table": "inf"}],
}


@pytest.mark.parametrize(("kind", "value"), [(float, math.inf), (float, math.nan), (str, "inf")])
def test_a_single_value_that_json_has_not(kind: type, value: Any) -> None:
    back = from_json(kind, json.loads(json.dumps(to_json(value))), "x")
    assert type(back) is kind and repr(back) == repr(value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda options: options.pop("max_events"), "max_events is missing"),
        (lambda options: options["ifa"].pop("eps"), r"ifa\.eps is missing"),
        (lambda options: options.update(depth=3), "depth is not an option of this version"),
        (lambda options: options["loss"].update(margin=1), r"loss\.margin is not an option of this"),
        (lambda options: options.update(epochs="two"), "epochs is 'two', expected type int"),
        (lambda options: options.update(validate=1), "validate is 1, expected type bool"),
        (
            lambda options: options.update(interaction="telepathy"),
            "interaction must be one of .*, got 'telepathy'",
        ),
        (lambda options: options["ifa"].update(half_lives=[7.0, "x"]), r"ifa\.half_lives\[1\] is 'x'"),
        (lambda options: options.update(ifa=None), "ifa is None"),
        (lambda options: options["ifa"].update(num_heads=3), "is not a multiple of num_heads 3"),
    ],
)
def test_options_that_are_not_a_runs(trained: Path, tmp_path: Path, change: Any, named: str) -> None:
    options = json.loads((trained / "config.json").read_text())
    change(options)
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match=rf"config\.json: not a run's options: .*{named}"):
        load_run(tmp_path)


@pytest.mark.parametrize("text", ["", '{"data": "a', "null", "[]", "\xff"])
def test_options_that_are_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: not a run's options"):
        load_run(tmp_path)


def stops_at_once(*args, **kwargs):
    raise Stopped


class TestEvaluate:
    def test_scores_are_those_of_the_model_in_memory(self, config: TrainConfig, monkeypatch) -> None:
        scores = []
        for module in (train_module, evaluate_module):

            def keeps(*args, predict_own=module.predict_own):
                result = predict_own(*args)
                scores.append(result[1])
                return result

            monkeypatch.setattr(module, "predict_own", keeps)
        result = train(dataclasses.replace(config, epochs=1))
        metrics = evaluate(EvaluateConfig(config.out, split="valid"))
        in_memory, loaded = scores
        assert np.ptp(in_memory) > 0
        np.testing.assert_array_equal(loaded, in_memory)
        assert metrics["gauc"] == result["valid_gauc"] and metrics["ne"] == result["valid_ne"]

    def test_scores_do_not_depend_on_the_batches(self, trained: Path, log: EventLog) -> None:
        run, dataset = load_run(trained), RankingDataset(log, "test")
        scores = [
            predict(run.model, dataset, run.device, *budget)[0]
            for budget in ((10**6, 100), (1, 1), (60, 3))
        ]
        assert scores[0].shape == (len(dataset.requests["candidates"]), 1)
        for other in scores[1:]:
            np.testing.assert_allclose(other, scores[0], rtol=1e-4, atol=1e-5)

    def test_metrics_are_written_and_returned(self, trained: Path) -> None:
        metrics = evaluate(EvaluateConfig(trained))
        assert (trained / "metrics-test.json").read_text() == result_as_json(metrics)
        assert {"auc", "gauc", "ndcg@10", "ne", "calibration", "ms_per_request"} <= metrics.keys()
        assert 0 <= metrics["gauc"] <= 1 and metrics["ms_per_request"] > 0

    def test_int8_tables_change_little_and_have_a_file_of_their_own(self, trained: Path) -> None:
        metrics, rounded = (evaluate(EvaluateConfig(trained, int8=int8)) for int8 in (False, True))
        assert rounded["ne"] != metrics["ne"] == pytest.approx(rounded["ne"], abs=1e-3)
        assert (trained / "metrics-test.json").read_text() == result_as_json(metrics)
        assert (trained / "metrics-test-int8.json").read_text() == result_as_json(rounded)

    def test_the_exposed_alone_are_scored_as_if_there_were_no_others(
        self, config: TrainConfig, toy: Toy, tmp_path: Path
    ) -> None:
        """As in a log without unexposed candidates."""
        related = dataclasses.replace(
            config, out=tmp_path / "related", candidate_set=CandidateSetConfig("softmax"), epochs=1
        )
        train(related)
        metrics = evaluate(EvaluateConfig(related.out))
        shown = {
            split: frame.assign(
                **{
                    name: [
                        np.asarray(values)[np.asarray(exposed)]
                        for values, exposed in zip(frame[name], frame["exposed"], strict=True)
                    ]
                    for name in toy.schema.candidate_lists
                }
            )
            for split, frame in toy.requests.items()
        }
        log = dataclasses.replace(toy, requests=shown).write(tmp_path / "shown")
        wanted = evaluate(EvaluateConfig(related.out, data=log.path))
        for name in ("gauc", "ne", "calibration"):
            assert metrics[f"{name}_exposed_alone"] == pytest.approx(wanted[name], abs=1e-5)
            assert f"{name}_exposed" in metrics and f"{name}_exposed_alone" not in wanted
        assert metrics["gap_exposed_alone"] > 0

    def test_candidates_that_do_not_see_each_other_have_no_gap(self, trained: Path) -> None:
        metrics = evaluate(EvaluateConfig(trained))
        assert "gauc_exposed" in metrics and "gap_exposed_alone" not in metrics

    def test_sets_of_a_model_that_chooses_one_by_one(
        self, config: TrainConfig, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "generates"
        train(dataclasses.replace(config, out=out, candidate_set=CandidateSetConfig(generate=True)))
        metrics, tasks = evaluate_module._evaluate(EvaluateConfig(out, set_size=3))
        run = load_run(out)
        dataset, model = run.dataset("test"), run.dlrm.eval()
        with torch.no_grad():
            candidates = model.describe(dataset[np.arange(len(dataset))])
            rows = JaggedTensor(candidates.tokens, offsets=candidates.offsets)
            greedy = generate_set(model.set_gain(candidates), rows, 3, "greedy")
            best = generate_set(model.logits_given(candidates)[:, 0], rows, 3)
        assert greedy.values().tolist() != best.values().tolist()
        for strategy, chosen in (("greedy", greedy), ("topk", best)):
            place = places(chosen, len(candidates.tokens)).numpy()
            assert metrics["sets"][strategy] == measure_sets(dataset, place, 3)
        assert json.loads((out / "metrics-test.json").read_text())["sets"].keys() == {"topk", "greedy"}
        table = as_table(metrics, tasks)
        assert "chosen one by one" in table and "duplicates of category" in table

    @pytest.mark.slow
    def test_two_ranks_measure_by_sums_what_one_measures(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        of_sets = CandidateSetConfig("softmax", generate=True)
        train(dataclasses.replace(config, out=out, candidate_set=of_sets))
        asked = EvaluateConfig(out, by=("store",), set_size=3)
        one, *two = (flattened(of) for of in (evaluate(asked), *run_ranks(evaluate, 2, asked)))
        for of_rank in (one, *two):
            assert of_rank.pop("ms_per_request") > 0
        assert two[0] == pytest.approx(two[1], abs=0, nan_ok=True)
        assert one.keys() == two[0].keys()
        assert {"by.store.1.gauc", "gap_exposed_alone", "sets.greedy.coverage.item"} <= one.keys()
        for name, value in one.items():
            assert two[0][name] == pytest.approx(value, abs=2e-4, nan_ok=True), name

    def test_sets_of_other_models_are_the_best_by_their_scores(self, trained: Path) -> None:
        assert evaluate(EvaluateConfig(trained, set_size=2))["sets"].keys() == {"topk"}
        with pytest.raises(ConfigError, match="--set-size must be at least 1, got 0"):
            EvaluateConfig(trained, set_size=0)

    def test_by_context_feature(self, trained: Path, toy: Toy) -> None:
        metrics = evaluate(EvaluateConfig(trained, split="train", by=("store", "weekday")))
        assert set(metrics["by"]) == {"store", "weekday"}
        requests = toy.requests["train"]
        mixed = requests["label"].map(lambda label: 0 < label.sum() < len(label))
        for feature, of_value in metrics["by"].items():
            wanted = mixed.groupby(requests[feature]).sum().to_dict()
            assert {value: m["requests_ranked"] for value, m in of_value.items()} == wanted
            # GAUC is a mean over requests, so each part's weight is its number of requests
            parts = [m["gauc"] * m["requests_ranked"] for m in of_value.values() if m["requests_ranked"]]
            assert sum(parts) == pytest.approx(metrics["gauc"] * mixed.sum())

    def test_by_an_unknown_feature(self, trained: Path) -> None:
        with pytest.raises(ValueError, match=r"--by moon.*\['store', 'weekday'\]"):
            evaluate(EvaluateConfig(trained, by=("moon",)))

    def test_unknown_split(self, trained: Path) -> None:
        with pytest.raises(LogError, match=r"no split 'tomorrow'.*train"):
            evaluate(EvaluateConfig(trained, split="tomorrow"))

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere: no run here.*--out"):
            evaluate(EvaluateConfig(tmp_path / "nowhere"))

    def test_another_log(self, trained: Path, tmp_path: Path) -> None:
        other = make_toy(seed=1).write(tmp_path / "other")
        here, there = (evaluate(EvaluateConfig(trained, data=data)) for data in (None, other.path))
        assert here["ne"] != there["ne"]

    def test_a_log_of_another_schema(self, trained: Path, toy: Toy, tmp_path: Path) -> None:
        rows = {"item": 40, "category": 6}
        schema = dataclasses.replace(toy.schema, item_features=rows)
        other = dataclasses.replace(toy, schema=schema).write(tmp_path / "other")
        with pytest.raises(LogError, match=rf"{other.path} has another schema.*item_features.*6.*5"):
            evaluate(EvaluateConfig(trained, data=other.path))

    def test_candidate_tags_choose_the_negatives(self, toy: Toy, log: EventLog) -> None:
        """A scorer that ranks positives above the popular and below the promoted items."""
        dataset = RankingDataset(log, "train")
        label, source = dataset.requests["label"], dataset.requests["source"]
        scores = np.where(label > 0, 0.0, np.where(source == 0, -1.0, 1.0)).astype(np.float32)
        metrics = measure(dataset, scores[:, None])
        assert metrics["gauc_popular"] == 1 and metrics["gauc_promoted"] == 0


class TestExplain:
    def test_names_the_top_candidate_and_the_events_that_weighed_most(
        self, trained: Path, toy: Toy, log: EventLog
    ) -> None:
        requests = toy.requests["test"]
        number = int(np.flatnonzero(requests["user"] == BUSY_USER)[1])
        request = requests.iloc[number]
        text = explain(ExplainConfig(trained, request=number, events=5))
        head, columns, *rows = text.splitlines()

        run, dataset = load_run(trained), RankingDataset(log, "test")
        scores, _ = predict(run.model, dataset, run.device, 10**6, 100)
        own = scores[dataset.candidate_rows([number])[0], 0]
        assert f"thing number {request['candidates'][own.argmax()]} (" in head
        probability = 1 / (1 + math.exp(-own.max()))
        assert f"(label {request['label'][own.argmax()]:.0f}, predicted {probability:.4g})" in head
        assert f"top of {len(own)} candidates" in head

        past = toy.events[(toy.events["user"] == BUSY_USER) & (toy.events["time"] < request["time"])]
        assert f"{len(past)} events in the history" in head
        days = (request["time"] - past["time"]).dt.total_seconds() / 86400
        known = {
            (f"thing number {item}", f"{age:.1f}") for item, age in zip(past["item"], days, strict=True)
        }
        assert columns.split() == ["weight", "days", "before", "event"]
        parsed = [row.split(maxsplit=2) for row in rows]
        assert len(parsed) == 5 and {(name, age) for _, age, name in parsed} <= known
        shares = [float(weight) for weight, *_ in parsed]
        assert shares == sorted(shares, reverse=True) and 0 < shares[0] <= 1

    def test_memory_is_for_the_top_candidate_alone(
        self, trained: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = []
        whole = InteractionFidelityAttention.attention_weights

        def watched(self, *given):
            found = whole(self, *given)
            shapes.extend(list(weights.shape) for weights in found)
            return found

        monkeypatch.setattr(InteractionFidelityAttention, "attention_weights", watched)
        number = int(np.flatnonzero(toy.requests["test"]["user"] == BUSY_USER)[0])
        explain(ExplainConfig(trained, request=number))
        assert [shape[0] for shape in shapes] == [1]

    def test_shares_of_all_events_sum_to_one_or_less(self, trained: Path, toy: Toy) -> None:
        """The weights sum to less if an identity head found no event of the same item."""
        number = int(np.flatnonzero(toy.requests["test"]["user"] == BUSY_USER)[0])
        _, _, *rows = explain(ExplainConfig(trained, request=number, events=10**6)).splitlines()
        assert len(rows) > 10
        assert 2 / 3 - 0.01 < sum(float(row.split()[0]) for row in rows) < 1.01

    def test_draws_the_events(self, trained: Path, toy: Toy, tmp_path: Path) -> None:
        number = int(np.flatnonzero(toy.requests["test"]["user"] == BUSY_USER)[0])
        config = ExplainConfig(trained, request=number, picture=tmp_path / "why.svg")
        _, _, first, *_ = explain(config).splitlines()
        drawn = (tmp_path / "why.svg").read_text()
        for name in ("dense 1", "item", first.split(maxsplit=2)[2]):
            assert f"<!-- {name}" in drawn  # how an SVG stores its texts
        with pytest.raises(ConfigError, match=r"why.txt: the name must end in .png, .svg or .pdf"):
            dataclasses.replace(config, picture=tmp_path / "why.txt")

    def test_a_request_without_history(self, trained: Path, toy: Toy) -> None:
        number = int(np.flatnonzero(toy.requests["test"]["user"] == NEW_USER)[0])
        with pytest.raises(ValueError, match=f"--request {number} has no history"):
            explain(ExplainConfig(trained, request=number))

    @pytest.mark.parametrize("number", [-1, SPLITS["test"]])
    def test_a_request_that_does_not_exist(self, trained: Path, number: int) -> None:
        with pytest.raises(ValueError, match=f"--request {number}.*test has requests 0 to 11"):
            explain(ExplainConfig(trained, request=number))

    def test_another_interaction_does_not_explain(self, config: TrainConfig) -> None:
        train(dataclasses.replace(config, interaction="mean", epochs=1, validate=False))
        with pytest.raises(ValueError, match=r"needs interaction 'ifa', got 'mean'"):
            explain(ExplainConfig(config.out))


class TestCommandLine:
    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("train", ["--data", "--out", "--interaction", "--ifa.half-lives", "--resume"]),
            ("evaluate", ["--run", "--split", "--by"]),
            ("explain", ["--run", "--request", "--events"]),
        ],
    )
    def test_help(self, command: str, options: list[str], monkeypatch, capsys) -> None:
        monkeypatch.setattr(sys, "argv", ["ifa", command, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert [option for option in options if option not in text] == []

    def test_train_evaluate_explain(self, log: EventLog, tmp_path: Path, monkeypatch, capsys) -> None:
        def run(*arguments: object) -> str:
            monkeypatch.setattr(sys, "argv", ["ifa", *map(str, arguments)])
            main()
            return capsys.readouterr().out

        out = tmp_path / "run"
        options = "--ifa.embedding-dim 8 --ifa.num-heads 2 --ifa.half-lives 7 inf --max-requests 16"
        printed = run("train", "--data", log.path, "--out", out, *options.split())
        assert json.loads(printed)["valid_gauc"] >= 0
        printed = run("evaluate", "--run", out, "--split", "test", "--by", "store")
        assert set(json.loads(printed)["by"]["store"]) <= {"0", "1", "2"}
        assert "thing number" in run("explain", "--run", out, "--request", 5)

    def test_a_required_option_is_missing(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(sys, "argv", ["ifa", "train", "--out", "somewhere"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code != 0
        assert "--data" in capsys.readouterr().err
