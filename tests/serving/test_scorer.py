"""Scorer: scores equal the model's on the raw history before each request; times are checked."""

from __future__ import annotations

import random
import re
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig, generate_set
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
from ifa_torchrec.serving import (
    Event,
    RankingRequest,
    RequestError,
    Scorer,
    StateError,
    StateLayout,
    StateStore,
    open_key_value_store,
)
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

DAY = 86_400_000_000
NUM_ITEMS, USERS, DAYS = 12, (1, 2, 3), 6
START = pd.Timestamp(2024, 1, 1)
FIRST = START.value // 1000
IFA = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(float("inf"), 2.0),
    identity_features=("item",),
    identity_half_lives=(float("inf"), 2.0),
    identity_buckets=8,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """For a log whose times are days, as is common: most days have several events, and each user makes a
    request just before, at and just after each event's time."""
    folder, rng = tmp_path_factory.mktemp("ties"), np.random.default_rng(0)
    user = rng.choice(USERS, 50)
    events = pd.DataFrame({"user": user, "item": rng.integers(0, NUM_ITEMS, 50)})
    events["time"] = START + pd.to_timedelta(rng.integers(0, DAYS, 50), unit="D")
    moments = [
        (user, START + pd.Timedelta(day, "D") + pd.Timedelta(shift, "us"))
        for user in USERS
        for day in range(DAYS)
        for shift in (-1, 0, 1)
    ]
    requests = pd.DataFrame(moments, columns=["user", "time"])
    requests["candidates"] = [rng.permutation(NUM_ITEMS)[:5].tolist() for _ in moments]
    requests["exposed"], requests["label"] = (
        [[True] * 5] * len(moments),
        [[1, 0, 0, 0, 1]] * len(moments),
    )
    log = EventLog.from_pandas(
        folder / "log",
        events=events,
        schema=LogSchema(item_features={"item": NUM_ITEMS}),
        requests={"train": requests},
    )
    train(TrainConfig(log.path, folder / "run", ifa=IFA, validate=False))
    return load_run(folder / "run", sharded=False)


def opened(run: Run, folder: Path, until: datetime | None, strict: bool = False) -> Scorer:
    build_states(BuildStatesConfig(run.config.out, str(folder), 0, until=until))
    store = StateStore(open_key_value_store(str(folder)), run.version)
    return Scorer(run.dlrm, run.log, store, strict)


def requests_of(dataset: RankingDataset) -> list[RankingRequest]:
    columns = dataset.requests
    return [
        RankingRequest(
            int(columns["user"][n]),
            columns["candidates"][dataset.candidate_rows([n])[0]].tolist(),
            int(columns["time"][n]),
            new_user=True,
        )
        for n in range(len(dataset))
    ]


@pytest.mark.parametrize("days", [0, 2, 4, DAYS])
@torch.no_grad()
def test_scores_are_those_of_the_events_strictly_before_the_request(run, tmp_path, days):
    """As in training, at, just before and just after the events' times: states are built from the first
    days, and the other events are appended in any order within a day."""
    until = datetime.fromtimestamp(FIRST / 1e6, timezone.utc) + pd.Timedelta(days, "D").to_pytimedelta()
    scorer = opened(run, tmp_path, until)
    dataset = run.dataset("train")
    trained = run.dlrm.eval()(dataset[list(range(len(dataset)))]).numpy().reshape(len(dataset), 5, 1)
    asked, events = requests_of(dataset), run.log.events
    users = np.repeat(run.log.users, np.diff(run.log.user_offsets))
    rng = random.Random(0)
    for day in range(max(days - 1, 0), DAYS):
        if day >= days:
            rows = np.flatnonzero(events["time"] == FIRST + day * DAY).tolist()
            rng.shuffle(rows)
            new = [Event(n, int(users[n]), int(events["item"][n]), int(events["time"][n])) for n in rows]
            assert {result.status for result in scorer.append(new)} <= {"taken"}
        now = [n for n, request in enumerate(asked) if abs(request.time - FIRST - day * DAY) <= 1]
        assert len(now) == 3 * len(USERS)
        rankings = scorer.rank([asked[n] for n in now])
        assert [ranking.as_of for ranking in rankings] == [None] * len(now)
        scores = scorer.score([asked[n] for n in now])
        np.testing.assert_allclose(scores, trained[now], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [None, 0, 1, 3, 9])
def test_the_best_are_chosen_as_generate_set_chooses_them(run, tmp_path, k):
    scorer = opened(run, tmp_path, None)
    now = FIRST + 9 * DAY
    asked = [RankingRequest(user, items, now) for user, items in ((1, [4, 2, 4, 7, 2, 9]), (2, [3]))]
    logits = torch.from_numpy(np.concatenate(scorer.score(asked))[:, 0])
    whole = JaggedTensor(logits, lengths=torch.tensor([6, 1]))
    chosen = generate_set(logits, whole, 6 if k is None else k)  # ties: the first
    items, rankings = np.array([4, 2, 4, 7, 2, 9, 3]), scorer.rank(asked, k)
    wanted = [rows.tolist() for rows in chosen.to_dense()]
    assert [ranking.items for ranking in rankings] == [items[rows].tolist() for rows in wanted]
    for ranking, rows in zip(rankings, wanted, strict=True):
        np.testing.assert_array_equal(ranking.logits[:, 0], logits[rows])
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        scorer.rank(asked, -1)


def test_a_request_too_early_is_ranked_as_of_a_later_time_or_refused(run, tmp_path):
    scorer = opened(run, tmp_path, None)
    late, new = RankingRequest(1, [1, 2, 3], FIRST), RankingRequest(9, [1, 2, 3], FIRST, new_user=True)
    marked, other = scorer.rank([late, new])
    assert other.as_of is None
    assert FIRST < marked.as_of < FIRST + DAYS * DAY
    (as_asked,) = scorer.rank([RankingRequest(1, [1, 2, 3], marked.as_of)])
    assert as_asked.as_of is None
    np.testing.assert_allclose(as_asked.logits, marked.logits, rtol=1e-5)
    scorer.strict = True
    with pytest.raises(StateError, match=r"user 1 has events at .* can leave out only those"):
        scorer.rank([late])
    assert scorer.rank([RankingRequest(1, [1, 2, 3], marked.as_of)])[0].as_of is None


def test_times_of_another_unit_are_refused_and_leave_the_state_as_it_was(run, tmp_path):
    scorer = opened(run, tmp_path, None)
    now = time.time_ns() // 1000
    before = scorer.score([RankingRequest(1, [1, 2, 3], now)])[0]
    for event in (Event(0, 1, 2, now * 1000), Event(0, 1, 2, now + 600_000_000)):
        cause = r"clock; .*nanoseconds\?" if event.time > 2 * now else "clock$"
        (result,) = scorer.append([event])
        assert result.status == "refused"
        assert re.search(rf"time {event.time} is .* 60 sec.* {cause}", result.reason)
    with pytest.raises(RequestError, match=r"^time \d+ is 5\d\d\d\d-.*nanoseconds\?"):
        scorer.score([RankingRequest(1, [1, 2, 3], now * 1000)])
    np.testing.assert_array_equal(scorer.score([RankingRequest(1, [1, 2, 3], now)])[0], before)
    assert scorer.append([Event(0, 1, 2, now + 50_000_000)])[0].status == "taken"
    # events that another clock accepted for other weights are still caught up with
    layout = StateLayout.of(run.dlrm.candidate_arch.ifa)
    StateStore.begin(scorer.store.key_values, "other", layout, 0).finish()
    other = StateStore(scorer.store.key_values, "other")
    event = Event(1, 1, 2, now + DAY)
    other.append([event], lambda _: scorer._encode(scorer._catalogue.encode_events([event]).features))
    assert scorer.catch_up() == 1


def test_the_stage_append_is_encoding_and_writing(run, tmp_path, monkeypatch):
    scorer, told = opened(run, tmp_path, None), []
    encode, slow = run.dlrm.encode, 0.05

    def encode_slowly(features):
        time.sleep(slow)
        return encode(features)

    monkeypatch.setattr(run.dlrm, "encode", encode_slowly)
    scorer.observe = lambda *stage: told.append(stage)
    now = time.time_ns() // 1000
    results = scorer.append([Event(n, user, 2, now) for n, user in enumerate(USERS)])
    assert {result.status for result in results} == {"taken"}
    assert [name for name, _ in told] == ["append"] and told[0][1] >= slow
