"""Served scores equal the trained model's: 1,000 real requests, from states updated in between."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
import pytest
import torch

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import Event, RankingRequest, Scorer, StateStore, open_key_value_store
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.scoring import measure
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(
    embedding_dim=32,
    num_heads=2,
    half_lives=(float("inf"), 30.0),
    identity_features=("item", "category"),
    identity_half_lives=(float("inf"), 30.0, 7.0),
    identity_buckets=131_072,
)


OPTIONS = {
    "as ifa train has it": {},
    "linear read-out, values, relations": {"ifa": IFA, "candidate_set": CandidateSetConfig("softmax")},
}


@pytest.fixture(scope="module", params=OPTIONS)
def run(request, real_log, tmp_path_factory) -> Run:
    """A model of real purchases, trained briefly so that its weights are not at initialisation."""
    folder = tmp_path_factory.mktemp("parity")
    config = TrainConfig(real_log.path, folder / "run", validate=False, **OPTIONS[request.param])
    train(config)
    return load_run(config.out, sharded=False)


def external(log: EventLog, name: str, rows: np.ndarray) -> list[int | str]:
    """The external ids of these rows; 0 for unknown."""
    if name not in log.vocabulary.names:  # integer users
        return rows.tolist()
    return [0 if i is None else i for i in log.vocabulary[name].at(rows)]


def numbers(column: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else x for x in column.tolist()]


def request_of(dataset: RankingDataset, number: int) -> RankingRequest:
    """A split's request, as sent to a server."""
    log, columns = dataset.log, dataset.requests
    schema, rows = log.schema, dataset.candidate_rows([number])[0]
    one = slice(number, number + 1)
    return RankingRequest(
        user=external(log, "user", columns["user"][one])[0],
        time=int(columns["time"][number]),
        candidates=external(log, schema.item, columns["candidates"][rows]),
        context={f: external(log, f, columns[f][one])[0] for f in schema.context_features},
        dense={f: numbers(columns[f][one])[0] for f in schema.dense_features},
        candidate_dense={f: numbers(columns[f][rows]) for f in schema.candidate_dense},
        new_user=True,
    )


@pytest.mark.slow
@torch.no_grad()
def test_served_scores_and_metrics_are_those_of_the_raw_histories(run, tmp_path):
    dataset = run.dataset("test")
    assert len(dataset) == 1000
    sampler = EventBudgetSampler(dataset.history_lengths, max_events=16384, max_requests=16)
    trained = np.concatenate([run.dlrm.eval()(b).numpy() for b in make_loader(dataset, sampler)])

    # states up to the first of these requests; later purchases are appended, user by user
    first = int(dataset.requests["time"].min())
    until = datetime.fromtimestamp(first / 1e6, timezone.utc)
    store = str(tmp_path / "states")
    build_states(BuildStatesConfig(run.config.out, store, until=until, position=0))
    scorer = Scorer(run.dlrm, run.log, StateStore(open_key_value_store(store), run.version))
    log, item = run.log, run.log.schema.item
    appended: dict[int, int] = {}
    served = [np.empty(0)] * len(dataset)
    for number in np.argsort(dataset.requests["time"], kind="stable").tolist():
        request = request_of(dataset, number)
        user = int(dataset.requests["user"][number])
        since, now = appended.get(user, first), request.time
        starts, ends = log.history_range(np.array([user] * 2), np.array([since, now]))
        rows = range(int(max(ends[0], starts[1])), int(ends[1]))
        times, items = log.events["time"], external(log, item, log.events[item][rows])
        events = [Event(r, request.user, i, int(times[r])) for r, i in zip(rows, items, strict=True)]
        assert {result.status for result in scorer.append(events)} <= {"taken"}
        appended[user] = now
        served[number] = scorer.score([request])[0]
    served = np.concatenate(served)

    assert np.abs(served - trained).max() < 1e-5
    # candidates whose logits differ by less than rounding may swap places
    tasks = run.dlrm.config.tasks
    wanted = measure(dataset, trained, tasks)
    assert measure(dataset, served, tasks) == pytest.approx(wanted, abs=2e-5)
