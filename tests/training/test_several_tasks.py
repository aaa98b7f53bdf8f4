"""Two tasks, clicks and seconds, from the log to the table, the ranking and the explanation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_field import KNOWN_ITEMS, make_rich
from toy import BUSY_USER, Toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.__main__ import main
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.distributed import OptimizerConfig
from ifa_torchrec.errors import ConfigError, DivergedError
from ifa_torchrec.modules import predictions, ranking_score
from ifa_torchrec.serving import RankingRequest, Scorer, StateStore, open_key_value_store
from ifa_torchrec.training import trainer as train_module
from ifa_torchrec.training.build import tasks_of
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import predict, predict_own
from ifa_torchrec.training.trainer import train
from ifa_torchrec.training.validations import check_metric


@pytest.fixture(scope="module")
def toy() -> Toy:
    """Items of category 1 are clicked; the seconds depend on the category, from half a minute to ten."""
    toy, rng = make_rich(), np.random.default_rng(3)
    category = toy.items["category"].to_numpy()
    for frame in toy.requests.values():
        frame["watch"] = [
            30 * np.exp(category[items]) * rng.uniform(0.8, 1.25, len(items)) / np.e
            for items in frame["candidates"]
        ]
    return toy


@pytest.fixture(scope="module")
def log(toy: Toy, tmp_path_factory) -> EventLog:
    return toy.write(tmp_path_factory.mktemp("tasks") / "log")


@pytest.fixture(scope="module")
def run(log: EventLog) -> Path:
    out = log.path.parent / "run"
    config = TrainConfig(
        log.path,
        out,
        ifa=IFAConfig(
            8,
            num_heads=2,
            identity_features=("item",),
            identity_buckets=64,
            identity_half_lives=(math.inf,),
        ),
        task_weights={"watch": 2.0},
        rank_by={"label": 0.5, "watch": 1.0},
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(dense_lr=0.01),
        warmup_steps=3,
        max_requests=8,
        epochs=8,
        validate=False,
    )
    train(config)
    return out


def test_seconds_are_learnt_and_measured_in_seconds(run: Path, log: EventLog) -> None:
    metrics = evaluate(EvaluateConfig(run))
    requests = log.requests("test")
    seconds = requests["watch"][requests["exposed"]]
    no_model = np.abs(seconds - seconds.mean()).mean()
    assert no_model > 30
    assert metrics["watch"]["mae"] < 0.5 * no_model
    assert metrics["watch"]["correlation"] > 0.8
    assert metrics["label"]["gauc"] > 0.8
    assert metrics["watch"]["ranked_correlation"] > 0.5 > metrics["label"]["ranked_gauc"]
    assert json.loads((run / "metrics-test.json").read_text())["watch"]["mae"] == metrics["watch"]["mae"]


def test_the_model_has_the_logs_figures(run: Path, log: EventLog) -> None:
    label, watch = load_run(run).dlrm.config.tasks
    assert (label.kind, label.weight, label.rank) == ("binary", 1.0, 0.5)
    assert (watch.kind, watch.weight, watch.rank) == ("regression", 2.0, 1.0)
    assert watch.scale == log.scales["watch"] and watch.scale.log


def test_the_default_metric_orders_exposed_candidates(run: Path, log: EventLog) -> None:
    """The labels of the others are unknown, also if several tasks rank."""
    split, tasks = RankingDataset(log, "valid"), load_run(run).dlrm.config.tasks
    assert not split.requests["exposed"].all()
    assert check_metric(None, split, tasks) == "label_ranked_gauc_exposed"
    metrics = evaluate(EvaluateConfig(run))["label"]
    assert metrics["ranked_gauc_exposed"] != metrics["ranked_gauc"]


def test_a_regression_that_diverges_is_told_of(log: EventLog, tmp_path: Path, monkeypatch) -> None:
    """Its logits are finite, but not the seconds that they stand for."""

    def far_too_high(*given: Any) -> Any:
        own, scores, batches = predict_own(*given)
        return own, scores + 300, batches

    monkeypatch.setattr(train_module, "predict_own", far_too_high)
    config = TrainConfig(log.path, tmp_path / "run", ifa=IFAConfig(8), epochs=1)
    with pytest.raises(DivergedError, match="a prediction of the split 'valid' is not finite"):
        train(config)


def test_the_table_is_for_people_and_the_json_for_programs(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ifa", "evaluate", "--run", str(run)])
    main()
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)
    beside = {"shares", "notes", "reliability", "ms_per_request", "step"}
    assert metrics.keys() == {"label", "watch", *beside}
    for line in ("label (0 or 1)", "watch (a number)", "new items", "unknown action"):
        assert line in printed.err
    assert metrics["shares"]["new_items"]["candidates"] > 0
    assert metrics["label"]["items"]["new"]["candidates"] > 0


def test_serving_ranks_by_the_score_of_all_tasks(run: Path, log: EventLog, tmp_path: Path) -> None:
    build_states(BuildStatesConfig(run, str(tmp_path / "states"), 0))
    loaded = load_run(run, sharded=False)
    store = StateStore(open_key_value_store(str(tmp_path / "states")), loaded.version)
    scorer = Scorer(loaded.dlrm, loaded.log, store)
    rng = np.random.default_rng(0)
    request = RankingRequest(
        user=BUSY_USER,
        candidates=list(range(1, KNOWN_ITEMS)),
        context={"store": 1, "weekday": 1, "interest": [2]},
        dense={"hour": 0.5, "season": 0.0},
        candidate_dense={"price": rng.normal(size=KNOWN_ITEMS - 1).tolist()},
        candidate_features={"place": [1] * (KNOWN_ITEMS - 1)},
    )
    (ranking,) = scorer.rank([request])
    score = ranking_score(torch.from_numpy(ranking.logits), loaded.dlrm.config.tasks)
    assert (score.diff() <= 0).all() and score[0] > score[-1]
    assert (np.diff(ranking.logits[:, 0]) > 0).any(), "the first task alone would rank otherwise"


def test_explain_names_what_is_predicted_what_happened_and_new_items(
    run: Path, log: EventLog, toy: Toy
) -> None:
    number = int(np.flatnonzero(toy.requests["test"]["user"] == BUSY_USER)[1])
    head, columns, *rows = explain(ExplainConfig(run, request=number, events=10**6)).splitlines()
    loaded = load_run(run)
    dataset = loaded.dataset("test")
    scores, _ = predict(loaded.model, dataset, loaded.device, 10**6, 100)
    own = torch.from_numpy(scores[dataset.candidate_rows([number])[0]])
    tasks = loaded.dlrm.config.tasks
    top = int(ranking_score(own, tasks).argmax())
    request = toy.requests["test"].iloc[number]
    label, watch = predictions(own, tasks)[top].tolist()
    assert f": thing number {request['candidates'][top]} (" in head
    assert f"(label {request['label'][top]:.4g}, predicted {label:.4g}; " in head
    assert f"watch {request['watch'][top]:.4g}, predicted {watch:.4g})" in head

    assert columns.split() == ["weight", "days", "before", "action", "device", "event"]
    past = toy.events[(toy.events["user"] == BUSY_USER) & (toy.events["time"] < request["time"])]
    assert (past["item"] >= KNOWN_ITEMS).any(), "some events must be of new items"
    happened = {
        (str(e.action or "unknown"), str(e.device or "unknown"), str(e.item)) for e in past.itertuples()
    }
    told = {(row.split()[2], row.split()[3], row.split()[-1]) for row in rows}
    assert told == happened and len(rows) == len(past)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task_weights": {"buy": 1.0}}, r"--task-weights buy: no such task.*\['label', 'watch'\]"),
        ({"rank_by": {"buy": 1.0}}, "--rank-by buy: no such task"),
        ({"rank_by": {"watch": 0.0}}, "all weights are 0"),
        ({"task_weights": {"watch": -1.0}}, "task 'watch': its weight in the loss"),
    ],
)
def test_options_that_name_no_task(log: EventLog, options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tasks_of(log.schema, TrainConfig(log.path, Path("run"), **options), log.scales)
