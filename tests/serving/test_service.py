"""The HTTP service: responses, refusals, batching, reloads while it serves, and shutdown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgpack
import numpy as np
import pandas as pd
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from helpers import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.types import Receive, Scope, Send
from toy import BUSY_USER, NEW_USER, NUM_EVENTS, ONE_EVENT_USER, make_toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.export import ExportConfig, export
from ifa_torchrec.commands.serve import ServeConfig, serve
from ifa_torchrec.models.archs import Candidates
from ifa_torchrec.serving import (
    Event,
    EventResult,
    KeyValueStore,
    RankingRequest,
    Scorer,
    StateError,
    StateStore,
    StoreError,
    drop,
    open_key_value_store,
)
from ifa_torchrec.serving.batching import Batcher, QueueFullError
from ifa_torchrec.serving.live import Limits, LiveScorer, Metrics
from ifa_torchrec.serving.service import create_app
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

TOKEN = {"Authorization": "Bearer secret"}
LATER_TEXT = "2024-07-19T00:00:00Z"
"""After the toy log's last event."""
LATER = pd.Timestamp(LATER_TEXT).value // 1000
FEATURES = {"context": {"store": 1, "weekday": 2}, "dense": {"hour": 0.5, "season": -1.0}}
REQUEST = {
    "user": BUSY_USER,
    "time": LATER_TEXT,
    "candidates": [3, 9, 20, 4],
    **FEATURES,
    "candidate_dense": {"price": [0.1, 2, -0.3, 0.0]},
}
EVENT = {"position": 10_000, "user": BUSY_USER, "item": 3, "time": "2024-07-18T12:00:00+02:00"}


@dataclass
class Folders:
    """A log, two runs on it, and a store with the states of both."""

    runs: tuple[Path, Path]
    store: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folder = tmp_path_factory.mktemp("serve")
    make_toy().write(folder / "log")
    ifa = IFAConfig(8, num_heads=2, identity_features=("item",), identity_half_lives=(3.0, 30.0))
    runs = folder / "run0", folder / "run1"
    for seed, run in enumerate(runs):
        train(TrainConfig(folder / "log", run, ifa=ifa, seed=seed, validate=False))
        build_states(BuildStatesConfig(run, str(folder / "states"), sum(NUM_EVENTS.values())))
    return Folders(runs, folder / "states")


@pytest.fixture(scope="module")
def models(folders) -> list[Run]:
    return [load_run(run, sharded=False) for run in folders.runs]


def scorer(models: list[Run], key_values: KeyValueStore, number: int = 0) -> Scorer:
    run = models[number]
    return Scorer(run.dlrm, run.log, StateStore(key_values, run.version))


@pytest.fixture
def key_values(folders, tmp_path) -> Iterator[KeyValueStore]:
    """A store for this test only."""
    shutil.copytree(folders.store, tmp_path / "states")
    store = open_key_value_store(str(tmp_path / "states"))
    yield store
    store.close()


@pytest.fixture
def live(models, key_values) -> Iterator[LiveScorer]:
    limits = Limits(
        max_body_bytes=20_000, max_requests=3, max_candidates=50, max_events=4, max_waiting=5, timeout=20
    )
    with LiveScorer(lambda: scorer(models, key_values), limits) as live:
        yield live


@pytest.fixture
def client(live) -> TestClient:
    return TestClient(create_app(live, "secret"), headers=TOKEN, raise_server_exceptions=False)


def rank(client: TestClient, *requests: dict[str, Any]) -> httpx.Response:
    return client.post("/rank", json={"requests": requests})


def append(client: TestClient, *events: dict[str, Any]) -> httpx.Response:
    return client.post("/events", json={"events": events})


def statuses(answer: httpx.Response) -> list[str]:
    """The status of each event."""
    assert answer.status_code == 200, answer.text
    return [result["status"] for result in answer.json()["results"]]


def changed(whole: dict, **fields: Any) -> dict:
    return {**whole, **fields}


@contextmanager
def held(live: LiveScorer) -> Iterator[None]:
    """Keep the scorer's thread busy meanwhile."""
    begun, done = threading.Event(), threading.Event()

    def wait(_: list) -> list:
        begun.set()
        done.wait()
        return [None]

    live._batcher.submit(wait, [None], [1.0])
    begun.wait()
    try:
        yield
    finally:
        done.set()


# ---------------------------------------------------------------------------------------- answers


def test_rank_answers_what_the_scorer_says_best_first(client, models, key_values):
    other = changed(REQUEST, user=ONE_EVENT_USER, k=2)
    rankings = rank(client, REQUEST, other).json()["rankings"]
    fields = {"candidate_dense": REQUEST["candidate_dense"], **FEATURES}
    users = (BUSY_USER, ONE_EVENT_USER)
    asked = [RankingRequest(user, REQUEST["candidates"], LATER, **fields) for user in users]
    wanted = scorer(models, key_values).rank(asked)
    assert [len(ranking["items"]) for ranking in rankings] == [4, 2]
    for ranking, want in zip(rankings, wanted, strict=True):
        k = len(ranking["items"])
        assert ranking["version"] == models[0].version
        assert ranking["items"] == want.items[:k]
        np.testing.assert_allclose(ranking["logits"]["label"], want.logits[:k, 0], rtol=1e-5)
        assert sorted(ranking["logits"]["label"], reverse=True) == ranking["logits"]["label"]
        probability = 1 / (1 + np.exp(-np.array(ranking["logits"]["label"])))
        np.testing.assert_allclose(ranking["predictions"]["label"], probability, rtol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["2024-07-19T02:00:00.0+02:00", "2024-07-19t00:00:00.000000123z", "2024-07-18 23:00:00-01:00"],
)
def test_a_time_may_be_written_in_any_zone(client, text):
    assert rank(client, changed(REQUEST, time=text)).json() == rank(client, REQUEST).json()


def test_a_request_too_early_is_ranked_as_of_a_later_time_which_is_reported_and_counted(client):
    (on_time,), (late,) = (
        rank(client, request).json()["rankings"]
        for request in (REQUEST, changed(REQUEST, time="1970-01-01T00:00:00Z"))
    )
    assert on_time["as_of"] is None and late["as_of"].startswith("2024-")
    assert rank(client, changed(REQUEST, time=late["as_of"])).json()["rankings"] == [
        changed(late, as_of=None)
    ]
    assert "ifa_late_requests_total 1.0\n" in client.get("/metrics").text


def test_each_stage_is_measured(client):
    assert rank(client, REQUEST, REQUEST).status_code == 200
    assert statuses(append(client, EVENT)) == ["taken"]
    shown = client.get("/metrics").text
    # two requests and a call with an event have waited; the two were ranked together, or one by one
    assert 'ifa_stage_seconds_count{stage="queue"} 3.0\n' in shown
    assert 'ifa_stage_seconds_count{stage="append"} 1.0\n' in shown
    for stage in ("store", "model"):
        (count,) = re.findall(rf'ifa_stage_seconds_count{{stage="{stage}"}} (\S+)', shown)
        assert float(count) in (1, 2)
    assert 'ifa_stage_seconds_bucket{le="0.00025",stage="model"}' in shown


def test_states_that_are_lost_are_no_longer_served(client, key_values, models):
    assert client.get("/readyz").status_code == 200
    drop(key_values, models[0].version)
    for answer in (rank(client, REQUEST), append(client, EVENT)):
        assert answer.status_code == 503 and "are gone" in answer.json()["error"]
    time.sleep(1.1)  # it asks the store once a second
    assert client.get("/readyz").status_code == 503


MSGPACK = {"Content-Type": "application/msgpack"}


def test_messagepack_is_answered_in_kind_as_json_is(client):
    packed = client.post("/rank", content=msgpack.packb({"requests": [REQUEST]}), headers=MSGPACK)
    assert packed.status_code == 200 and packed.headers["Content-Type"] == "application/msgpack"
    assert msgpack.unpackb(packed.content) == rank(client, REQUEST).json()
    event = msgpack.packb({"events": [EVENT]})
    for status in ("taken", "duplicate"):
        packed = client.post("/events", content=event, headers=MSGPACK)
        assert msgpack.unpackb(packed.content) == {"results": [{"status": status, "reason": None}]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "body: not valid MessagePack"),
        (b"\xc1", "body: not valid MessagePack (FormatError)"),
        (b"\x91" * 5000, "body: not valid MessagePack (StackError)"),
        (b"\xa1\xff", "body: not valid MessagePack ('utf-8' codec can't decode"),
        (msgpack.packb({"requests": [REQUEST]}) + b"\xc0", "body: not valid MessagePack (unpack(b) rec"),
        (msgpack.packb({"requests": [REQUEST]})[:-1], "body: not valid MessagePack"),
        (b"\xdd\xff\xff\xff\xff", "body: not valid MessagePack"),
        (msgpack.packb({7: REQUEST}), "body: not valid MessagePack (int is not allowed for map key"),
        (msgpack.packb([REQUEST]), "body: Input should be a valid dictionary or instance of RankReq"),
        (msgpack.packb(changed(REQUEST)), "; expected some of ['requests']"),
        (json.dumps({"requests": [REQUEST]}).encode(), "body: not valid MessagePack"),
    ],
)
def test_a_body_that_is_not_messagepack_of_requests_is_refused(client, content, message):
    answer = client.post("/rank", content=content, headers=MSGPACK)
    assert answer.status_code == 422 and message in answer.json()["error"], answer.text


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"user": b"anna"}, "requests.0.user: Input should be an id"),
        ({"user": 2**64 - 1}, "requests.0.user: Input should be an id"),
        ({"user": msgpack.ExtType(5, b"")}, "requests.0.user: Input should be an id"),
        ({"candidates": msgpack.Timestamp(1)}, "requests.0.candidates: Input should be a valid list"),
        ({"dense": {"hour": float("nan"), "season": 0.0}}, "dense.hour: Input should be a finite"),
        (
            {b"new": 1, "old": 1},
            "Value error, unknown fields [b'new', 'old']; expected some of ['user'",
        ),
        ({"context": {b"store": 1, "weekday": 2}}, "requests.0.context."),
    ],
)
def test_messagepack_is_refused_for_the_same_reasons_as_json(client, fields, message):
    content = msgpack.packb({"requests": [{**REQUEST, **fields}]})
    answer = client.post("/rank", content=content, headers=MSGPACK)
    assert answer.status_code == 422 and message in answer.json()["error"], answer.text


def test_a_request_without_a_time_is_ranked_as_of_now(client):
    now = datetime.now(timezone.utc).isoformat()
    without = {name: value for name, value in REQUEST.items() if name != "time"}
    (mine,), (given,) = (
        rank(client, request).json()["rankings"] for request in (without, changed(REQUEST, time=now))
    )
    np.testing.assert_allclose(mine["logits"]["label"], given["logits"]["label"], rtol=1e-4)


def test_a_new_user_is_ranked_for_if_said_to_be_new(client):
    assert rank(client, changed(REQUEST, user=NEW_USER, new_user=True)).status_code == 200


def test_events_are_in_the_store_when_the_response_comes_and_count_once(client, models, key_values):
    before = rank(client, REQUEST).json()
    assert statuses(append(client, EVENT, changed(EVENT, position=10_001))) == ["taken", "taken"]
    assert statuses(append(client, EVENT, changed(EVENT, position=10_002))) == ["duplicate", "taken"]
    time = LATER - 14 * 3600 * 1_000_000
    events = [Event(position, BUSY_USER, 3, time) for position in (10_000, 10_001, 10_002)]
    assert scorer(models, key_values).append(events) == [EventResult("duplicate")] * 3
    assert rank(client, REQUEST).json() != before
    elsewhere = changed(EVENT, partition=1)
    assert statuses(append(client, elsewhere, EVENT)) == ["taken", "duplicate"]
    assert statuses(append(client, elsewhere)) == ["duplicate"]


def test_a_user_is_forgotten_in_all_versions_and_is_then_new(client, models, key_values):
    before = {**EVENT, "time": "2024-07-18T12:00:00Z"}
    assert statuses(append(client, before)) == ["taken"]
    answer = client.delete(f"/users/{BUSY_USER}")
    assert answer.status_code == 200, answer.text
    gone = answer.json()
    assert gone["user"] == BUSY_USER and gone["events"] == 1 and gone["records"] == 6
    assert sorted(gone["versions"]) == sorted(run.version for run in models)
    assert rank(client, REQUEST).status_code == 404
    assert rank(client, changed(REQUEST, new_user=True)).status_code == 200
    again = {**before, "position": 10_001}
    assert statuses(append(client, before, again)) == ["forgotten", "forgotten"]
    assert client.delete(f"/users/{BUSY_USER}").json()["records"] == 0
    now = datetime.now(timezone.utc).isoformat()
    assert gone["until"] < now
    assert statuses(append(client, {**EVENT, "position": 10_002, "time": now})) == ["taken"]
    assert scorer(models, key_values).store.read([BUSY_USER], [None])[0].count.tolist() == [1]
    shown = client.get("/metrics").text
    assert 'ifa_forgotten_total{result="ok"} 2.0' in shown
    assert 'ifa_events_total{status="forgotten"} 2.0' in shown
    assert 'ifa_calls_total{path="/users/{user:path}",status="200"} 2.0' in shown


def test_forgetting_a_user_needs_the_token_and_the_exact_id(client, live):
    anyone = TestClient(client.app)
    assert anyone.delete(f"/users/{BUSY_USER}").status_code == 401
    assert rank(client, REQUEST).status_code == 200
    for name, user in (("a/b c", "a/b c"), ("%22a%22", "a"), ("9" * 20, "9" * 20), ('"\\ud800"', None)):
        answer = client.delete(f"/users/{name}")
        assert answer.status_code == 200, answer.text
        assert user is None or answer.json()["user"] == user
    assert client.delete("/users/").status_code == 422


def test_a_store_that_fails_forgets_nobody_and_says_so(client, live, monkeypatch):
    def failing(_: int | str) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(live._scorers[0], "forget", failing)
    answer = client.delete("/users/1")
    assert answer.status_code == 503 and "no room" in answer.text
    assert 'ifa_forgotten_total{result="failed"} 1.0' in client.get("/metrics").text
    held = threading.Event()
    monkeypatch.setattr(live._scorers[0], "forget", lambda _: held.wait(60))
    live.limits = dataclasses.replace(live.limits, timeout=0.05)
    assert client.delete("/users/1").status_code == 504
    for _ in range(5):
        answer = client.delete("/users/1")
    assert answer.status_code == 429 and "5 users already wait to be forgotten" in answer.text
    held.set()


def test_the_process_is_alive_ready_measured_and_described(client, live, models):
    rank(client, REQUEST)
    rank(client, changed(REQUEST, candidates=[1.5] * 4))
    append(client, EVENT)
    append(client, EVENT)
    anyone = TestClient(client.app)
    assert anyone.get("/healthz").json() == {"status": "ok"}
    assert anyone.get("/readyz").json() == {"version": models[0].version}
    assert anyone.get("/docs").status_code == anyone.get("/openapi.json").status_code == 200
    assert client.get("/no/such/page").json() == {"error": "Not Found"}
    shown = client.get("/metrics").text
    for line in (
        'ifa_calls_total{path="/rank",status="200"} 1.0',
        'ifa_calls_total{path="/rank",status="422"} 1.0',
        'ifa_calls_total{path="other",status="404"} 1.0',
        'ifa_call_seconds_count{path="/events"} 2.0',
        'ifa_events_total{status="taken"} 1.0',
        'ifa_events_total{status="duplicate"} 1.0',
        "ifa_candidates_total 4.0",
        "ifa_queue_length 0.0",
        f'ifa_model_info{{version="{models[0].version}"}} 1.0',
    ):
        assert line + "\n" in shown
    live.draining = True
    assert anyone.get("/readyz").status_code == 503
    assert rank(client, REQUEST).status_code == 200  # still


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer secret ", "Bearer s\xe9cret"],
)
@pytest.mark.parametrize("path", ["/rank", "/events"])
def test_without_the_token_nothing_is_read(live, header, path):
    client = TestClient(create_app(live, "secret"))
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = client.post(path, headers=headers, content=b"no JSON")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer TOKEN" in answer.json()["error"]


def test_a_token_may_have_any_letters_and_none_may_be_asked_for(live):
    client = TestClient(create_app(live, "sécret"))
    assert client.post("/rank", headers={"Authorization": "bearer sécret".encode()}).status_code == 422
    assert TestClient(create_app(live)).post("/rank").status_code == 422


@pytest.mark.parametrize(
    "fields, status, message",
    [
        ({"user": 999}, 404, "requests.0: user 999 has no state; if the user is new"),
        ({"user": "anna"}, 404, "requests.0: user 'anna' has no state"),
        (
            {"user": ""},
            422,
            "requests.0.user: Input should be an id: a non-empty string or",
        ),
        ({"user": "\ud800"}, 422, "requests.0.user: Input should be an id"),
        ({"user": True}, 422, "requests.0.user: Input should be an id"),
        ({"user": 7.0}, 422, "requests.0.user: Input should be an id"),
        ({"user": 2**63}, 422, "requests.0.user: Input should be an id"),
        ({"user": 10**4000}, 422, "requests.0.user: "),
        ({"user": None}, 422, "requests.0.user: "),
        (
            {"users": 7},
            422,
            "Value error, unknown fields ['users']; expected some of ['user'",
        ),
        ({"\ud800": 7}, 422, "requests.0: Value error, unknown fields ['\\ud800']; expected"),
        ({"candidates": []}, 422, "requests.0.candidates: List should have at least 1 item"),
        ({"candidates": [3, 9, None, 4]}, 422, "requests.0.candidates.2: Input should be an id"),
        ({"candidates": [3, 9, 2**64, 4]}, 422, "requests.0.candidates.2: Input should be an id"),
        ({"candidates": 3}, 422, "requests.0.candidates: Input should be a valid list"),
        ({"time": "yesterday"}, 422, "time: Value error, should be a time since 1970 with a zone"),
        ({"time": "2024-07-19T00:00:00"}, 422, "requests.0.time: "),
        ({"time": "2024-13-19T00:00:00Z"}, 422, "requests.0.time: Value error, month must be in 1..12"),
        ({"time": "1969-12-31T23:59:59Z"}, 422, "requests.0.time: "),
        ({"time": "0001-01-01T00:00:00+23:59"}, 422, "requests.0.time: "),
        ({"time": 1721347200}, 422, "requests.0.time: "),
        ({"time": -1}, 422, "requests.0.time: "),
        ({"context": {"store": 1}}, 422, "context: ['weekday'] missing; the model takes"),
        (
            {"context": {"store": [1], "weekday": 2}},
            422,
            "context.store: [1] is not an id; it must be a",
        ),
        ({"context": {"store": None, "weekday": 2}}, 422, "requests.0.context.store"),
        ({"context": {"store": 1, "weekday": 2, "\ud800": 1}}, 422, "requests.0"),
        ({"dense": {"hour": float("nan"), "season": 0}}, 422, "dense.hour: Input should be a finite"),
        ({"dense": {"hour": float("inf"), "season": 0}}, 422, "dense.hour: Input should be a finite"),
        ({"dense": {"hour": 1e300, "season": 0}}, 422, "dense.hour: a number is not finite as float32"),
        ({"dense": {"hour": 10**400, "season": 0}}, 422, "dense.hour"),
        ({"dense": {"hour": False, "season": 0}}, 422, "dense.hour: Input should be a valid number"),
        ({"candidate_dense": {"price": [0.0]}}, 422, "dense.price: 1 numbers for 4 candidates"),
        ({"k": 0}, 422, "requests.0.k: Input should be greater than or equal to 1"),
        ({"new_user": 1}, 422, "requests.0.new_user: Input should be a valid boolean"),
    ],
)
def test_a_bad_ranking_request_is_named(client, fields, status, message):
    body = json.dumps({"requests": [changed(REQUEST, **fields)]})
    answer = client.post("/rank", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    "fields",
    [
        {f"field {n}": 1 for n in range(100_000)},
        {"context": {str(n): "a" for n in range(100_000)}},
        {"candidates": ["a"] * 100_000},
        {"candidate_dense": {"price": ["a"] * 100_000}},
    ],
    ids=["fields", "features", "candidates", "numbers"],
)
def test_of_many_errors_one_is_reported(live, fields, monkeypatch):
    monkeypatch.setattr(live, "limits", Limits())
    answer = rank(TestClient(create_app(live)), changed(REQUEST, **fields))
    assert answer.status_code == 422
    assert answer.json()["error"].count("requests.0") == 1


def test_the_request_that_is_bad_is_named(client):
    answer = rank(client, REQUEST, REQUEST, changed(REQUEST, candidates=[99] * 5))
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("requests.2: candidate_dense.price: 4 numbers for 5 cand")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"position": -1}, "events.1.position: Input should be greater than or equal to 0"),
        ({"position": 2**63 - 1}, "events.1.position: Input should be less than or equal to"),
        ({"partition": -1}, "events.1.partition: Input should be greater than or equal to 0"),
        ({"partition": 2**32}, "events.1.partition: Input should be less than 4294967296"),
        ({"item": 4.5}, "events.1.item: Input should be an id"),
        ({"user": [7]}, "events.1.user: Input should be an id"),
        ({"time": None}, "events.1.time: "),
        ({"numbers": {"amount": "5"}}, "events.1.numbers.amount: Input should be a valid number"),
        ({"price": 1}, "events.1: Value error, unknown fields ['price']; expected some of"),
    ],
)
def test_a_call_with_a_malformed_event_is_refused_completely(client, fields, message):
    answer = append(client, changed(EVENT, position=10_001), changed(EVENT, **fields))
    assert answer.status_code == 422 and message in answer.json()["error"]
    assert statuses(append(client, changed(EVENT, position=10_001))) == ["taken"]


def test_a_refused_event_does_not_affect_the_others(client, live):
    append(client, changed(EVENT, position=10_005))
    bad = [
        ({"position": 10_005, "item": 4}, "position 10005 already holds user 40, item 3 at 2024-07-18"),
        ({"time": "9999-01-01T00:00:00Z"}, "time 253370764800000000 is 9999-01-01"),
        ({"weight": 1.0}, "weight: the model takes none; leave it out"),
        ({"features": {"action": "buy"}}, "features: ['action'] unknown; the model takes []"),
        ({"numbers": {"amount": None}}, "numbers: ['amount'] unknown; the model takes []"),
    ]
    for n, (fields, reason) in enumerate(bad):
        around = [changed(EVENT, position=10_010 + 2 * n + k) for k in (0, 1)]
        answer = append(client, around[0], changed(EVENT, **fields), around[1])
        assert statuses(answer) == ["taken", "refused", "taken"]
        assert reason in answer.json()["results"][1]["reason"]
    shown = client.get("/metrics").text
    assert f'ifa_events_total{{status="refused"}} {float(len(bad))}\n' in shown
    assert f'ifa_events_total{{status="taken"}} {float(2 * len(bad) + 1)}\n' in shown


def test_unknown_ids_are_ranked_and_counted(client):
    request = changed(REQUEST, candidates=[3, "new", 4, 1000], context={"store": "far", "weekday": 2})
    answer = rank(client, request)
    assert answer.status_code == 200, answer.text
    assert sorted(map(str, answer.json()["rankings"][0]["items"])) == ["1000", "3", "4", "new"]
    assert "new" in answer.json()["rankings"][0]["items"]  # a string stays a string
    assert statuses(append(client, changed(EVENT, item="new"), changed(EVENT, item="new"))) == [
        "taken",
        "duplicate",
    ]
    shown = client.get("/metrics").text
    for kind, number in (("candidate", 2.0), ("context", 1.0), ("event", 1.0)):
        assert f'ifa_unknown_total{{kind="{kind}"}} {number}\n' in shown


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 10_000, b"1" * 5000, b"null", b'{"requests": NaN}', b"NaN"]
)
@pytest.mark.parametrize("path", ["/rank", "/events"])
def test_a_body_that_is_not_json_is_refused(client, path, content):
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert list(answer.json()) == ["error"]


def test_limits_are_named(client):
    answer = rank(client, changed(REQUEST, candidates=[1] * 51))
    assert answer.status_code == 422
    assert "requests.0.candidates: got 51; at most 50 are accepted" in answer.json()["error"]
    lists = {"interest": [1] * 600, "other": [2] * 401}
    answer = rank(client, REQUEST, changed(REQUEST, context=FEATURES["context"] | lists))
    assert answer.status_code == 422
    assert "requests.1.context: ids in lists: got 1001; at most 1000 are" in answer.json()["error"]
    answer = rank(client, *[REQUEST] * 4)
    assert answer.status_code == 422 and "requests: got 4; at most 3" in answer.json()["error"]
    answer = append(client, *[EVENT] * 5)
    assert answer.status_code == 422 and "events: got 5; at most 4" in answer.json()["error"]


def test_a_body_too_large_is_not_read_to_its_end(client):
    read = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * 1000

    for content in (b" " * 20_001, pieces()):
        answer = client.post("/rank", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert "larger than 20000 bytes" in answer.json()["error"]


def test_a_full_disk_is_not_the_clients_fault(client, live, monkeypatch):
    def full(*_: Any) -> None:
        raise StoreError("no room left")

    with monkeypatch.context() as patch:
        patch.setattr(live._scorers[0].store.key_values, "update", full)
        answer = append(client, EVENT)
    assert answer.status_code == 503 and "no room left" in answer.json()["error"]
    assert statuses(append(client, EVENT)) == ["taken"]


def test_logits_that_json_cannot_express_are_the_requests_fault(client, live, monkeypatch):
    def overflowing(candidates: Candidates) -> torch.Tensor:
        return torch.full((len(candidates.tokens), 1), torch.nan)

    monkeypatch.setattr(live._scorers[0].model.set_arch, "forward", overflowing)
    answer = rank(client, REQUEST)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("requests.0: the logits overflow; give smaller numbers")


def test_a_server_error_is_reported_without_internals(client, live, monkeypatch):
    monkeypatch.setattr(live._scorers[0], "model", None)
    answer = rank(client, REQUEST)
    assert answer.status_code == 500
    assert answer.json() == {"error": "internal server error; see the server's log"}


# --------------------------------------------------------------------------------------- batching


def test_waiting_requests_are_batched_and_fail_separately(live, monkeypatch):
    scored, appended = [], []
    first = live._scorers[0]
    ranked, add = first.rank, first.append
    monkeypatch.setattr(first, "rank", lambda asked: (scored.append(len(asked)), ranked(asked))[1])
    monkeypatch.setattr(first, "append", lambda *a: (appended.append(len(a[0])), add(*a))[1])
    fields = {**FEATURES, "candidate_dense": {"price": [0.0]}}
    good = [RankingRequest(BUSY_USER, [item], LATER, **fields) for item in (1, 2)]
    bad = RankingRequest(999, [3], LATER, **fields)

    async def together() -> list:
        tasks = [
            live.append([Event(10_000, BUSY_USER, 1, LATER - 1)]),
            live.rank([good[0], bad]),
            live.append([Event(10_001, BUSY_USER, 1, LATER - 1)]),
            live.rank([good[1]]),
        ]
        with held(live):
            waiting = [asyncio.create_task(task) for task in tasks]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*waiting)

    one, (ranked, unknown), two, (other,) = asyncio.run(together())
    assert one == two == [EventResult("taken")] and appended == [2]
    assert (ranked.items, other.items) == ([1], [2])
    assert "user 999 has no state" in str(unknown)
    assert scored[0] == 3


def test_a_batch_is_no_fuller_than_a_call_may_be():
    batches = []
    begun, free = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        begun.set()
        free.wait()
        batches.append(items)
        return items

    with Batcher(capacity=10) as batcher:
        batcher.submit(work, [0], [0.1])
        begun.wait()
        futures = batcher.submit(work, [1, 2, 3, 4], [0.5, 0.6, 0.5, 7.0])
        futures[2].cancel()
        with pytest.raises(QueueFullError, match="4 of 10 places are taken"):
            batcher.submit(work, range(7), [0.1] * 7)
        free.set()
    assert batches == [[0], [1], [2], [4]]
    assert futures[3].result() == 4  # closing finishes what waits


def test_context_lists_fill_a_batch_as_candidates_do(live, monkeypatch):
    shares: list[float] = []

    def taken(work: Any, items: Any, of_each: list[float]) -> list:
        shares.extend(of_each)
        return []

    monkeypatch.setattr(live._batcher, "submit", taken)
    one = RankingRequest(1, [1], context={"store": "a name", "interest": [1, 2], "other": [3] * 498})
    asyncio.run(live.rank([one, dataclasses.replace(one, candidates=[1] * 40, context={"store": 3})]))
    assert shares == [0.5, 0.8]


def test_a_call_that_finds_the_queue_full_or_times_out_gets_advice(models, key_values):
    limits = Limits(max_requests=2, max_waiting=2, timeout=0.3)
    with LiveScorer(lambda: scorer(models, key_values), limits) as live:
        client = TestClient(create_app(live))
        with held(live):
            slow = append(client, EVENT)
            assert slow.status_code == 504
            assert "may still be added; send them again, each counts once" in slow.json()["error"]
            answer = rank(client, REQUEST, REQUEST)
            assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        live.limits = dataclasses.replace(limits, timeout=60)
        assert statuses(append(client, EVENT)) == ["taken"]


# ------------------------------------------------------------------------------------------ reload


class Loader:
    """Loads the next run; waits if told to."""

    def __init__(self, models: list[Run], key_values: KeyValueStore) -> None:
        self.models, self.key_values, self.number = models, key_values, 0

    def __call__(self) -> Scorer:
        if self.number >= len(self.models):
            raise StateError("no states of these weights")
        return scorer(self.models, self.key_values, self.number)


def count(key_values: KeyValueStore, model: Run) -> int:
    """The busy user's events."""
    return int(StateStore(key_values, model.version).read([BUSY_USER], [LATER + 1])[0].count)


def test_a_reload_brings_weights_whose_states_have_every_event(models, key_values, monkeypatch):
    load = Loader(models, key_values)
    catching, go_on = threading.Event(), threading.Event()
    catch_up = Scorer.catch_up

    def slow_catch_up(self: Scorer) -> int:
        if load.number == 1:
            catching.set()
            go_on.wait()
        return catch_up(self)

    monkeypatch.setattr(Scorer, "catch_up", slow_catch_up)
    with LiveScorer(load, Limits(timeout=20)) as live:
        client = TestClient(create_app(live))
        old, new = (model.version for model in models)
        append(client, EVENT)  # in the journal when the new weights come
        load.number = 1
        live.reload()
        catching.wait()
        # users are integers here, and a string of digits is the same user
        again = changed(EVENT, position=10_001, user=str(BUSY_USER))
        assert statuses(append(client, again)) == ["taken"]
        assert rank(client, REQUEST).json()["rankings"][0]["version"] == old
        go_on.set()
        until(lambda: live.version == new)
        answer = rank(client, REQUEST).json()["rankings"][0]
        assert answer["version"] == new
        assert client.get("/readyz").json() == {"version": new}
        until(lambda: 'ifa_reloads_total{result="ok"} 1.0' in client.get("/metrics").text)
        assert f'ifa_model_info{{version="{new}"}} 1.0' in client.get("/metrics").text
        assert statuses(append(client, EVENT, changed(EVENT, position=10_001))) == ["duplicate"] * 2
    for number in range(2):  # the old weights' states have them too
        assert count(key_values, models[number]) == 152


def test_a_reload_that_fails_leaves_the_weights_as_they_are(models, key_values, caplog):
    load = Loader(models, key_values)
    with LiveScorer(load, Limits(timeout=20)) as live:
        client = TestClient(create_app(live))
        load.number = 2
        live.reload()
        until(lambda: 'ifa_reloads_total{result="failed"} 1.0' in client.get("/metrics").text)
        assert f"the reload failed; weights {models[0].version} keep serving" in caplog.text
        assert "no states of these weights" in caplog.text
        assert rank(client, REQUEST).json()["rankings"][0]["version"] == models[0].version


def test_a_start_catches_up_with_the_journal(models, key_values):
    scorer(models, key_values, 0).append([Event(10_000, BUSY_USER, 3, LATER)])
    with LiveScorer(lambda: scorer(models, key_values, 1), Limits()):
        pass
    assert count(key_values, models[1]) == 151


# -------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_only_loopback_may_be_listened_on_without_a_token(host, monkeypatch):
    monkeypatch.delenv("IFA_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"set a token with --token-file or the environment"):
        serve(ServeConfig(Path("run"), "store", host=host))


def test_an_empty_or_missing_token_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("IFA_TOKEN", " ")
    with pytest.raises(ValueError, match="IFA_TOKEN: the token is empty"):
        serve(ServeConfig(Path("run"), "store"))
    with pytest.raises(ValueError, match=r"--token-file: .*No such file"):
        serve(ServeConfig(Path("run"), "store", token_file=tmp_path / "none"))


@pytest.mark.parametrize("name", ["max_candidates", "max_context_ids", "timeout", "max_waiting"])
def test_limits_are_above_0(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{name: 0})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def reloaded(url: str) -> bool:
    try:
        shown = httpx.get(f"{url}/metrics", headers=TOKEN, timeout=30).text
    except httpx.TransportError:  # closed by a worker that was replaced
        return False
    return 'ifa_reloads_total{result="ok"} 1.0' in shown


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "amid"), [(1, False), (2, False), (2, True)])
def test_a_service_takes_new_weights_on_sighup_and_loses_no_event(
    workers, amid, folders, models, tmp_path
):
    """Nor if it is stopped midway, when one process has the new weights and another the old."""
    states, link, token = tmp_path / "states", tmp_path / "run", tmp_path / "token"
    shutil.copytree(folders.store, states)
    first, second = folders.runs
    if workers > 1:  # these load from bundles
        first, second = tmp_path / "first", tmp_path / "second"
        for run, bundle in zip(folders.runs, (first, second), strict=True):
            export(ExportConfig(run, bundle=bundle))
    link.symlink_to(first)
    token.write_text("secret\n")
    port = free_port()
    options = ["--run", link, "--store", states, "--token-file", token, "--host", "0.0.0.0"]
    options += ["--port", str(port), "--drain", "1", "--limits.timeout", "20", "--workers", str(workers)]
    options += ["--log", "json" if workers > 1 else "text"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ifa_torchrec", "serve", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    answered: list[int] = []
    failed: list[str] = []
    seen: set[Any] = set()
    ending = threading.Event()
    url = f"http://127.0.0.1:{port}"

    def post_events() -> None:
        with httpx.Client(base_url=url, headers=TOKEN, timeout=30) as client:
            for position in range(20_000, 10_000_000):
                try:
                    answer = append(client, changed(EVENT, position=position))
                except httpx.TransportError:
                    if ending.is_set():
                        return
                    continue  # a worker that was replaced closed the connection
                if answer.status_code != 200:
                    failed.append(answer.text)
                    return
                answered.append(position)
                time.sleep(0.01)  # leave the processors to the loading

    anyone = httpx.Client(base_url=url, timeout=30)

    def ready() -> int | str:
        try:
            answer = anyone.get("/readyz")
        except httpx.TransportError:
            return "closed"
        seen.add(answer.json().get("version", answer.status_code))
        return answer.status_code

    poster = threading.Thread(target=post_events)
    try:
        until(lambda: ready() == 200 or process.poll() is not None, 180)
        poster.start()
        link.unlink()
        link.symlink_to(second)
        process.send_signal(signal.SIGHUP)
        until(lambda: ready() == 200 and models[1].version in seen, 120)
        if not amid:
            until(lambda: reloaded(url), 120)
        count = len(answered)
        until(lambda: len(answered) > count + 3)
        ending.set()
        process.send_signal(signal.SIGTERM)
        until(lambda: ready() == "closed")
        _, log = process.communicate(timeout=60)
    finally:
        ending.set()
        process.kill()
        anyone.close()
        if poster.ident is not None:
            poster.join()
    assert process.returncode == 0, log
    assert not failed
    assert seen == {models[0].version, models[1].version, 503}
    assert f"weights {models[1].version} are serving now" in log
    if workers > 1:
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert {"uvicorn.error", "ifa_torchrec.commands.serve"} <= {line["logger"] for line in lines}
        assert "INFO:" not in log
    store = open_key_value_store(str(states))
    time_sent = LATER - 14 * 3600 * 1_000_000
    events = [Event(position, BUSY_USER, 3, time_sent) for position in answered]
    newest = scorer(models, store, 1)
    if amid:
        newest.catch_up()  # as every service does before it serves
    assert {result.status for result in newest.append(events)} == {"duplicate"}
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_reads_a_topic_from_where_the_log_ends(workers, folders, models, broker, tmp_path):
    states, port, name = tmp_path / "states", free_port(), f"served-by-{workers}"
    shutil.copytree(folders.store, states)
    first = sum(NUM_EVENTS.values())
    events = [{**EVENT, "item": item} for item in (3, 9)]
    for event in events:
        del event["position"]
    address = broker.topic(name)
    broker.send(name, [(0, b"of the log")] * first + [(0, json.dumps(e).encode()) for e in events])
    options = ["--run", folders.runs[0], "--store", states, "--port", str(port), "--events", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "ifa_torchrec", "serve", *options, "--workers", str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )

    def ask(path: str) -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30).text
        except httpx.TransportError:
            assert process.poll() is None
            return ""

    try:
        until(lambda: '"stream":"flowing"' in ask("/readyz"), 180)
        until(lambda: 'ifa_events_total{status="taken"} 2.0\n' in ask("/metrics"))
        process.terminate()
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert f"reading events from topic {name}: position {first}, position 0 of partition 1" in log or (
        workers > 1
    )
    store = open_key_value_store(str(states))
    assert count(store, models[0]) == NUM_EVENTS[BUSY_USER] + 2
    assert StateStore(store, models[0].version).stream_positions([0]) == {0: first + 2}
    store.close()


# ------------------------------------------------------------------------------ any call whatever


class Late:
    """An application that can describe itself before a model is loaded."""

    app = create_app(SimpleNamespace(limits=Limits(), metrics=Metrics()), "secret")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@schemathesis.serializer("application/msgpack")
def packed(_: Any, value: Any) -> bytes:
    try:
        return msgpack.packb(value)
    except OverflowError:  # an integer too large for the format
        return b"\xc1"


@schemathesis.deserializer("application/msgpack")
def unpacked(_: Any, response: Any) -> Any:
    return msgpack.unpackb(response.content)


LATE = Late()
API = schemathesis.openapi.from_asgi("/openapi.json", LATE)


@pytest.fixture(scope="module")
def model_for_api(folders, models, tmp_path_factory) -> Iterator[None]:
    states = tmp_path_factory.mktemp("any") / "states"
    shutil.copytree(folders.store, states)
    store = open_key_value_store(str(states))
    with LiveScorer(lambda: scorer(models, store), Limits(timeout=20)) as live:
        LATE.app = create_app(live, "secret")
        yield
    store.close()


@API.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_response_is_as_openapi_describes_it(case, model_for_api):
    # the description does not list items and features, so it allows calls that are refused
    case.call_and_validate(headers=TOKEN, excluded_checks=[positive_data_acceptance])


NUMBERS = st.integers(-2, 60) | st.integers(-(2**64), 2**64)
TIMES = st.datetimes(timezones=st.just(timezone.utc)).map(datetime.isoformat) | st.just(LATER_TEXT)
FLOATS = st.floats() | st.floats(-10, 10)


# most calls that the description allows are refused early; these get further
@given(user=NUMBERS, item=NUMBERS, position=NUMBERS, time=TIMES, number=FLOATS, new=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_number_anywhere_gets_a_response(model_for_api, user, item, position, time, number, new):
    client = TestClient(LATE.app, headers={**TOKEN, "Content-Type": "application/json"})
    event = {"position": position, "user": user, "item": item, "time": time}
    answer = client.post("/events", content=json.dumps({"events": [event]}))
    assert answer.status_code in (200, 422), answer.text
    request = changed(REQUEST, user=user, candidates=[item, 1, 2, 3], time=time, new_user=new)
    request["dense"] = {"hour": number, "season": 0.0}
    answer = client.post("/rank", content=json.dumps({"requests": [request]}))
    assert answer.status_code in (200, 404, 409, 422), answer.text
