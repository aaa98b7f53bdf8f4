"""Every command reads a log in parts like one without parts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import BUSY_USER, NUM_EVENTS, Toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.data import Report
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.serving import StateStore, open_key_value_store
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(8, num_heads=2, identity_features=("item",), identity_buckets=64)
END = int(np.datetime64("2024-05-01", "us").astype(np.int64))


@pytest.fixture(scope="module")
def parts(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    path = tmp_path_factory.mktemp("parts") / "log"
    return EventLog.from_pandas(path, toy.events, toy.schema, toy.items, toy.requests, parts=3)


@pytest.fixture(scope="module")
def run(parts: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    result = train(TrainConfig(parts.path, out, ifa=IFA, max_requests=8))
    assert math.isfinite(result["loss"])
    return out


def test_evaluate(run: Path, log: EventLog, parts: EventLog) -> None:
    one, several = (evaluate(EvaluateConfig(run, data=of.path)) for of in (log, parts))
    for name in ("auc", "gauc", "ne", "calibration"):
        assert several[name] == pytest.approx(one[name], rel=1e-5)


def test_explain(run: Path, log: EventLog, parts: EventLog) -> None:
    texts = []
    for of in (log, parts):
        requests = RankingDataset(of, "test").requests
        mine = np.flatnonzero(np.asarray(requests["user"]) == BUSY_USER)
        latest = int(mine[np.asarray(requests["time"])[mine].argmax()])
        texts.append(explain(ExplainConfig(run, request=latest, data=of.path)))
    assert texts[0] == texts[1]


def test_report(log: EventLog, parts: EventLog, tmp_path: Path) -> None:
    one, several = (
        Report(of.path, tmp_path / f"{of.parts}.html").write().read_text() for of in (log, parts)
    )

    def numbers(page: str) -> list[str]:  # a split's section up to its plots
        return [section.split("<svg")[0] for section in page.split("<h2>")[1:]]

    assert numbers(one) == numbers(several) and len(numbers(one)) == len(log.splits)


def test_build_states(run: Path, log: EventLog, parts: EventLog, tmp_path: Path) -> None:
    version, users = load_run(run, sharded=False).version, list(NUM_EVENTS)
    keys = [np.arange(64)] * len(users)
    found = []
    for of in (log, parts):
        store = str(tmp_path / str(of.parts))
        build_states(BuildStatesConfig(run, store, 0, data=of.path))
        states = StateStore(open_key_value_store(store), version)
        found.append(states.read(users, [END] * len(users), keys, [True] * len(users))[0].state_dict())
        states.key_values.close()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-5, msg=name)
