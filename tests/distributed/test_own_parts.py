"""Ranks that open only their own parts of a log train on and measure each request once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_ranks
from toy import SPLITS, make_toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogError, RankingDataset, make_loader
from ifa_torchrec.data.parts import own_parts, part_of
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.distributed import checkpoint, init_process_group
from ifa_torchrec.training import trainer as train_module
from ifa_torchrec.training.options import TrainConfig, to_json
from ifa_torchrec.training.touched import touched_rows
from ifa_torchrec.training.trainer import Trainer, batch_size, train

PARTS = 4
END = int(np.datetime64("2024-05-01", "us").astype(np.int64))
Lists = list[list[int]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy, path = make_toy(), tmp_path_factory.mktemp("whole") / "log"
    EventLog.from_pandas(path, toy.events, toy.schema, toy.items, toy.requests, parts=PARTS)
    return path


@pytest.fixture(scope="module")
def copies(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The log of each of two ranks, without the other rank's parts."""
    folder = tmp_path_factory.mktemp("copies")
    for rank in (0, 1):
        path = folder / str(rank) / "log"
        shutil.copytree(whole, path, ignore=shutil.ignore_patterns(".columns"))
        for part in own_parts(PARTS, (1 - rank, 2)):
            for file in path.rglob(f"part-{part:05}.parquet"):
                file.unlink()
        with pytest.raises(LogError, match="missing"):
            EventLog(path)
    return [folder / str(rank) / "log" for rank in (0, 1)]


def config_of(data: Path, out: Path, **changes) -> TrainConfig:
    ifa = IFAConfig(8, num_heads=2, half_lives=(math.inf, 30.0), identity_features=("item",))
    given = {"ifa": ifa, "max_requests": 4, "checkpoint_every": 3, "calibrate": False}
    return TrainConfig(data, out, **(given | changes))


class Watched:
    """Records a sampler's lists, by the requests' numbers in the whole split."""

    def __init__(self, dataset: RankingDataset, sampler: EventBudgetSampler, seen: list[Lists]) -> None:
        self.sampler, self.lists = sampler, Lists()
        self.first = sum(dataset.of_parts[: dataset.log.own.start])
        seen.append(self.lists)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.watch, iter(self.sampler))

    def watch(self, requests: list[int]) -> list[int]:
        self.lists.append([self.first + r for r in requests if r != EMPTY_REQUEST])
        return requests


def train_here(data: list[Path], out: Path, changes: dict) -> tuple[list[Lists], dict]:
    """The lists of each epoch and the result of a training on the rank's own copy."""
    init_process_group()
    seen: list[Lists] = []

    def watched(*given):
        return make_loader(given[0], Watched(*given, seen))

    with (
        mock.patch.object(train_module, "make_loader", watched),
        mock.patch.object(checkpoint, "KEEP", 99),
    ):
        return seen, train(config_of(data[dist.get_rank()], out, **changes))


@pytest.fixture(scope="module")
def out(copies: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture(scope="module")
def ranks(copies: list[Path], out: Path) -> list[tuple[list[Lists], dict]]:
    return run_ranks(train_here, 2, copies, out, {"epochs": 2})


def test_each_request_is_trained_once_an_epoch(ranks: list, whole: Path) -> None:
    users = EventLog(whole).requests("train")["user"]
    for epoch in (0, 1):
        lists = [passes[epoch] for passes, _ in ranks]
        assert len(lists[0]) == len(lists[1])
        of_ranks = [[r for one in of_rank for r in one] for of_rank in lists]
        assert sorted(of_ranks[0] + of_ranks[1]) == list(range(SPLITS["train"]))
        for rank, requests in enumerate(of_ranks):
            assert {*part_of(users[requests], PARTS)} <= {*own_parts(PARTS, (rank, 2))}
    assert ranks[0][0][0] != ranks[0][0][1]


def test_the_validation_is_that_of_the_whole_log(ranks: list, out: Path, whole: Path) -> None:
    (_, one), (_, two) = ranks
    measured = [{k: v for k, v in result.items() if k.startswith("valid_")} for result in (one, two)]
    assert measured[0] == measured[1]
    # the run's best checkpoint, measured by one process that opens all parts
    again = evaluate(EvaluateConfig(out, split="valid", data=whole))
    for name in ("gauc", "ne", "calibration", "ndcg@10"):
        assert measured[0][f"valid_{name}"] == pytest.approx(again[name], rel=1e-5)


def evaluate_here(data: list[Path], run: Path) -> dict:
    return evaluate(EvaluateConfig(run, data=data[dist.get_rank()], by=("store",), set_size=2))


def test_what_is_evaluated_is_the_whole_log(
    ranks: list, copies: list[Path], out: Path, whole: Path
) -> None:
    wanted, *found = (
        evaluate(EvaluateConfig(out, data=whole, by=("store",), set_size=2)),
        *run_ranks(evaluate_here, 2, copies, out),
    )
    for metrics in found:
        assert numbers(metrics).keys() == numbers(wanted).keys()
        for name, value in numbers(wanted).items():
            near = 2e-4 if name.endswith("auc") or "reliability" in name else 1e-5
            assert numbers(metrics)[name] == pytest.approx(value, abs=near, nan_ok=True), name
    assert {"by", "by_history", "items", "shares", "sets"} <= wanted.keys()


def numbers(metrics: dict, prefix: str = "") -> dict:
    """The metrics in one dict, without the time."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and name != "ms_per_request":
            found[f"{prefix}{name}"] = value
    return found


def decided_here(data: list[Path], one: Path, out: Path) -> tuple[list[dict], set[int]]:
    """What two ranks decide from a log in parts of their own, and from one without parts; and the items
    of this rank's events."""
    found = []
    for number, path in enumerate((data[dist.get_rank()], one)):
        trainer = Trainer(config_of(path, out / str(number), max_requests=None))
        assert trainer.log.whole == (number == 1)
        config = to_json(asdict(trainer.config))
        options = {name: config[name] for name in ("max_requests", "warmup_steps", "optimizers", "ifa")}
        log = trainer.log
        users = RankingDataset.of_users(log, log.users, np.full(len(log.users), END))
        touched = touched_rows(users, histories=True, unknown_items=False)
        batch = batch_size(trainer.dataset, 100, 4)
        rows = {name: used.tolist() for name, used in touched.items()}
        found.append({**options, "touched": rows, "batch": batch, "unknown": trainer._unknown})
    own = EventLog(data[dist.get_rank()], (dist.get_rank(), 2))
    return found, {*own.events["item"].tolist()}


def test_what_is_decided_is_of_all_parts(copies: list[Path], tmp_path: Path) -> None:
    one = make_toy().write(tmp_path / "one").path
    told = run_ranks(decided_here, 2, copies, one, tmp_path / "out")
    for (in_parts, without), _ in told:
        assert in_parts == without
    (_, first), (_, second) = told
    touched = {n for n, used in enumerate(told[0][0][0]["touched"]["item"]) if used}
    assert touched == first | second and first != second


@pytest.mark.parametrize("world", [1, 2])
def test_other_ranks_go_on(
    ranks: list, copies: list[Path], out: Path, whole: Path, tmp_path: Path, world: int
) -> None:
    shutil.copytree(out, tmp_path / "run")
    for step in (tmp_path / "run/checkpoints").iterdir():
        if int(step.name.removeprefix("step-")) > 3:
            shutil.rmtree(step)
    changes = {"epochs": 2, "resume": True}
    if world == 1:
        rest = [train_here([whole], tmp_path / "run", changes)]
    else:
        rest = run_ranks(train_here, 2, copies, tmp_path / "run", changes)
        assert [passes[0] for passes, _ in rest] == [passes[0][3:] for passes, _ in ranks]
    made = [one for passes, _ in ranks for one in passes[0][:3]]
    made += [one for passes, _ in rest for one in passes[0]]
    assert sorted(r for one in made for r in one) == list(range(SPLITS["train"]))
