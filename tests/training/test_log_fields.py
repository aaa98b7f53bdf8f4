"""Training on a log with everything that a schema can name; new items, vocabularies, unused rows."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from every_field import KNOWN_ITEMS, make_rich
from ranks import run_ranks
from torch.distributed._shard.sharded_tensor import ShardedTensor
from toy import NUM_ITEMS, Toy, make_toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.data.vocabulary import Vocabulary
from ifa_torchrec.distributed import (
    OptimizerConfig,
    ShardingConfig,
    zero_rows,
)
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig
from ifa_torchrec.training import progress
from ifa_torchrec.training import trainer as trainer_module
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.touched import touched_rows
from ifa_torchrec.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> EventLog:
    return make_rich().write(tmp_path_factory.mktemp("rich") / "log")


def config_of(log: EventLog, out: Path, **changes) -> TrainConfig:
    fields = {"ifa": IFAConfig(8, num_heads=2, identity_features=("item",)), "max_requests": 16}
    return TrainConfig(log.path, out, **{**fields, "validate": False, **changes})


def item_vocabulary(first: str, count: int = NUM_ITEMS - 1) -> Vocabulary:
    return Vocabulary.of({"item": [f"{first}{i}" for i in range(1, count + 1)]})


def write_named(path: Path, toy: Toy, vocabulary: Vocabulary, first: str = "p") -> EventLog:
    """The toy's log, with strings as item ids."""
    name = np.array([None, *(f"{first}{i}" for i in range(1, NUM_ITEMS))], dtype=object)
    requests = {
        split: frame.assign(candidates=[name[np.maximum(c, 1)] for c in frame["candidates"]])
        for split, frame in toy.requests.items()
    }
    items = toy.items.iloc[1:].assign(item=name[1:])
    events = toy.events.assign(item=name[np.maximum(toy.events["item"], 1)])
    return EventLog.from_pandas(path, events, toy.schema, items, requests, vocabulary)


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> EventLog:
    """The log's vocabulary has item names."""
    folder = tmp_path_factory.mktemp("named")
    return write_named(folder / "log", make_toy(), item_vocabulary("p"))


@pytest.fixture(scope="module")
def named_run(named: EventLog, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(config_of(named, out))
    return out


class TestTraining:
    def test_all_fields_are_trained_measured_and_loaded_again(
        self, log: EventLog, tmp_path: Path
    ) -> None:
        config = config_of(
            log, tmp_path / "run", validate=True, candidate_set=CandidateSetConfig("softmax")
        )
        result = train(config)
        assert np.isfinite(result["loss"]) and np.isfinite(result["valid_label_gauc"])
        metrics = evaluate(EvaluateConfig(config.out))
        run = load_run(config.out)
        assert metrics["label"]["items"]["new"]["candidates"] > 0
        assert run.dlrm.config.gates == ("action", "device")
        scales = run.dlrm.config.scales
        assert scales["item_dense"] == tuple(log.scales[name] for name in ("weight", "year"))
        assert scales["history_dense"][0].log

    def test_gates_are_named_by_an_option(self, log: EventLog, tmp_path: Path) -> None:
        config = config_of(log, tmp_path, gate=("device",))
        assert build_model(log.schema, config).config.ifa.gates == {"device": 3}
        none = dataclasses.replace(config, gate=())
        assert build_model(log.schema, none).config.gates == ()
        with pytest.raises(ConfigError, match=r"--gate shop: no such event feature; .*'action'"):
            build_model(log.schema, dataclasses.replace(config, gate=("shop",)))
        with pytest.raises(ConfigError, match="with --gate"):
            config_of(log, tmp_path, ifa=IFAConfig(8, num_heads=2, gates={"action": 4}))

    def test_as_many_items_are_made_unknown_as_are_new_in_the_validation(
        self, log: EventLog, tmp_path: Path
    ) -> None:
        trainer = Trainer(config_of(log, tmp_path))
        share = log.new_items("valid")["candidates"]
        assert 0.1 < share < 0.5
        batch, plain = trainer.dataset[range(48)], RankingDataset(log, "train")[range(48)]

        def unknown(features) -> float:
            return (features.sequence_features["candidate_item"].values() == 0).float().mean().item()

        added = (unknown(batch) - unknown(plain)) / (1 - unknown(plain))
        assert added == pytest.approx(share, abs=0.1)
        other = Trainer(config_of(log, tmp_path, unknown_items=0.0)).dataset[range(48)]
        assert unknown(other) == unknown(plain)

    @pytest.mark.parametrize("share", [-0.1, 1.0])
    def test_a_share_that_is_none_is_refused(self, log: EventLog, tmp_path: Path, share: float) -> None:
        with pytest.raises(ConfigError, match="--unknown-items must be 0 or more and below 1"):
            config_of(log, tmp_path, unknown_items=share)


class TestTermsWithNothingToDo:
    def test_consistency_without_unexposed_candidates_is_refused(self, tmp_path: Path) -> None:
        toy = make_toy()
        for frame in toy.requests.values():
            frame["exposed"] = [np.ones(len(c), bool) for c in frame["candidates"]]
        log = toy.write(tmp_path / "log")
        config = config_of(
            log,
            tmp_path / "run",
            loss=CandidateSetLossConfig(consistency=0.2),
            candidate_set=CandidateSetConfig("softmax"),
        )
        with pytest.raises(ConfigError, match=r"--loss.consistency 0.2: .* the split `train` has none"):
            Trainer(config)

    def test_exposed_candidates_of_one_label_are_refused(self, tmp_path: Path) -> None:
        """Everything that was not clicked is unexposed."""
        toy = make_toy()
        for frame in toy.requests.values():
            frame["exposed"] = [np.asarray(label) > 0 for label in frame["label"]]
        log = toy.write(tmp_path / "log")
        with pytest.raises(
            ConfigError, match=r"all exposed candidates have label 1; .*--loss.unexposed 1"
        ):
            Trainer(config_of(log, tmp_path / "run"))
        Trainer(config_of(log, tmp_path / "run", loss=CandidateSetLossConfig(unexposed=1.0)))

    def test_listwise_with_one_candidate_a_request_is_told(self, tmp_path: Path) -> None:
        toy = make_toy()
        lists = ("candidates", "exposed", "label", "price", "source")
        for frame in toy.requests.values():
            for name in lists:
                frame[name] = [values[:1] for values in frame[name]]
        log = toy.write(tmp_path / "log")
        config = config_of(log, tmp_path / "run", loss=CandidateSetLossConfig(listwise=0.5))
        with pytest.warns(UserWarning, match=r"--loss.listwise 0.5 has no effect: no request"):
            Trainer(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            Trainer(dataclasses.replace(config, loss=CandidateSetLossConfig()))

    def test_a_bar_leaves_it_to_the_environment_whether_it_is_shown(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """tqdm reads TQDM_DISABLE, unless it is passed as an argument."""
        given = []
        monkeypatch.setattr(progress, "tqdm", lambda *_, **options: given.append(options))
        for rank in (0, 1):
            progress.progress_bar(rank, [1, 2], desc="score")
        assert given == [{"desc": "score"}, {"desc": "score", "disable": True}]


class TestVocabulary:
    def test_the_run_keeps_that_of_its_log(self, named: EventLog, named_run: Path) -> None:
        assert Vocabulary.load(named_run).digest == named.vocabulary.digest

    def test_another_is_refused(self, named_run: Path, tmp_path: Path) -> None:
        """All sizes are the same, but the rows belong to other items."""
        other = write_named(tmp_path / "other", make_toy(), item_vocabulary("q"), "q")
        with pytest.raises(LogError, match=rf"{other.path} has another vocabulary than .*\['item'\]"):
            evaluate(EvaluateConfig(named_run, data=other.path))
        resumed = dataclasses.replace(config_of(other, named_run), resume=True)
        with pytest.raises(LogError, match=r"another vocabulary than .*\['item'\]"):
            train(resumed)

    def test_a_longer_one_is_measured_and_what_it_adds_is_new(
        self, named: EventLog, named_run: Path, tmp_path: Path
    ) -> None:
        toy = make_toy()
        rows = toy.schema.item_features | {"item": NUM_ITEMS + 1}
        toy = dataclasses.replace(toy, schema=dataclasses.replace(toy.schema, item_features=rows))
        vocabulary = item_vocabulary("p").extended({"item": ["late"]})
        longer = write_named(tmp_path / "longer", toy, vocabulary)
        run = load_run(named_run, longer.path)
        assert run.log.schema.item_features["item"] == NUM_ITEMS
        assert run.log.item_rows(np.array([NUM_ITEMS - 1, NUM_ITEMS])).tolist() == [NUM_ITEMS - 1, 0]
        same = evaluate(EvaluateConfig(named_run))
        assert evaluate(EvaluateConfig(named_run, data=longer.path))["ne"] == pytest.approx(same["ne"])
        with pytest.raises(LogError, match="another schema"):
            train(dataclasses.replace(config_of(longer, named_run), resume=True))


# -------------------------------------------------------------------- rows that no step touches


def by_hand(log: EventLog) -> dict[str, set[int]]:
    """The rows that occur in the batches of an epoch."""
    found: dict[str, set[int]] = {}
    batch = RankingDataset(log, "train")[range(len(RankingDataset(log, "train")))]
    for features in (batch.sequence_features, batch.context_features, batch.item_lists):
        for key in features.keys():  # noqa: SIM118 a KJT is not a dict
            name = key.removeprefix("history_").removeprefix("candidate_")
            found.setdefault(name, set()).update(features[key].values().tolist())
    return found


def test_touched_rows_are_those_of_the_batches(log: EventLog) -> None:
    rows = touched_rows(RankingDataset(log, "train"), histories=True, unknown_items=False)
    assert {name: set(used.nonzero()[:, 0].tolist()) for name, used in rows.items()} == by_hand(log)
    assert not all(used.all() for used in rows.values())
    alone = touched_rows(RankingDataset(log, "train"), histories=False, unknown_items=True)
    assert alone["item"][0] and not alone["action"].any()


def start_of(log: EventLog, out: Path, kind: str) -> dict[str, tuple[bool, bool]]:
    """For each table, over all ranks: whether exactly the unused rows are zero."""
    tables = (*log.schema.item_features, *log.schema.event_features, *log.schema.candidate_features)
    config = config_of(
        log,
        out,
        sharding=ShardingConfig({f"{name}_table": kind for name in tables if name != "device"}),
        optimizers=OptimizerConfig("adagrad"),
        unknown_items=0.0,
    )
    trainer = Trainer(config)
    out.mkdir(parents=True, exist_ok=True)
    trainer._initialise()
    touched = by_hand(log)
    found = {}
    for name, value in trainer.model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            continue
        table = name.split(".")[-2].removesuffix("_table")
        zeros_good = others_good = True
        for part in value.local_shards():
            first = part.metadata.shard_offsets[0]
            for row, numbers in enumerate(part.tensor, start=first):
                if row in touched[table]:
                    others_good &= bool(numbers.any())
                else:
                    zeros_good &= not numbers.any()
        found[table] = (zeros_good, others_good)
    return found


def starts(path: Path, out: Path) -> list[dict[str, tuple[bool, bool]]]:
    log = EventLog(path)
    return [start_of(log, out / kind, kind) for kind in ("table_wise", "row_wise", "column_wise")]


def test_rows_that_no_step_touches_start_at_zero_wherever_they_lie(
    log: EventLog, tmp_path: Path
) -> None:
    for of_rank in run_ranks(starts, 2, log.path, tmp_path):
        for tables in of_rank:
            assert tables.keys() == by_hand(log).keys()
            assert set(tables.values()) == {(True, True)}


def test_rows_of_whole_tables_are_zeroed_too(log: EventLog, tmp_path: Path) -> None:
    """In a model that is not sharded, with a projection of the same name as a table."""
    tables = torch.nn.ModuleDict(
        {"embeddings": torch.nn.ModuleDict({"item_table": torch.nn.Embedding(3, 2)})}
    )
    tables["linears"] = torch.nn.ModuleDict({"item_table": torch.nn.Linear(2, 3)})
    zero_rows(tables, {"item_table": torch.tensor([True, False, False])})
    assert tables["embeddings"]["item_table"].weight.any(1).tolist() == [False, True, True]
    assert tables["linears"]["item_table"].weight.any(1).all()


def test_a_resumed_training_zeroes_nothing(named: EventLog, tmp_path: Path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(trainer_module, "zero_rows", lambda *given: calls.append(given))
    config = config_of(named, tmp_path / "run")
    train(config)
    assert len(calls) == 1
    train(dataclasses.replace(config, resume=True))
    assert len(calls) == 1


def test_known_items_are_fewer_than_items(log: EventLog) -> None:
    """The tests above would pass on a log without new ones."""
    assert log.num_items == NUM_ITEMS > KNOWN_ITEMS == log.schema.item_features["item"]
