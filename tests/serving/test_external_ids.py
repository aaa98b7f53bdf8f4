"""External ids and event features: served scores are those of the model on the log's histories."""

from __future__ import annotations

import dataclasses
import random
import re
import struct

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from shop import SHOP_IFA, VOCABULARY, shop_model

from ifa_torchrec import InteractionFidelityAttention
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.serving import (
    Event,
    EventResult,
    KeyValueStore,
    RankingRequest,
    RequestError,
    Scorer,
    StateError,
    StateLayout,
    StateStore,
    open_key_value_store,
    trim_journal,
)
from ifa_torchrec.serving.live import Limits, LiveScorer
from ifa_torchrec.serving.service import create_app
from ifa_torchrec.serving.states.journal import pack_event, unpack_event
from ifa_torchrec.serving.states.layout import journal_key
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

LATER = 1_709_251_200_000_000  # 2024-03-01, after the shop's last event


@pytest.fixture
def key_values(tmp_path) -> KeyValueStore:
    store = open_key_value_store(str(tmp_path / "states"))
    yield store
    store.close()


def new_store(key_values, log, version="v1", vocabulary=None) -> StateStore:
    layout = StateLayout.of(InteractionFidelityAttention(SHOP_IFA))
    digest = log.vocabulary.digest if vocabulary is None else vocabulary
    StateStore.begin(key_values, version, layout, 0, vocabulary=digest).finish()
    return StateStore(key_values, version)


@pytest.fixture
def scorer(shop, key_values) -> Scorer:
    return Scorer(shop.model, shop.log, new_store(key_values, shop.log))


def request(shop, *candidates: int | str, user: int | str = "anna") -> RankingRequest:
    """The first request, later, with other candidates."""
    m = len(candidates)
    return dataclasses.replace(
        shop.request(0),
        user=user,
        time=LATER,
        candidates=candidates,
        candidate_dense={"bid": [0.0] * m},
        candidate_features={"place": ["top"] * m},
    )


@torch.no_grad()
def test_scores_are_the_models_on_the_log(shop, scorer):
    dataset, seen = RankingDataset(shop.log, "train"), set[int]()
    order = np.argsort(shop.requests["time"].to_numpy(), kind="stable").tolist()
    for n in order:
        events = [event for event in shop.events_before(n) if event.position not in seen]
        random.Random(n).shuffle(events)
        assert {result.status for result in scorer.append(events)} <= {"taken"}
        seen |= {event.position for event in events}
        expected = shop.model(dataset[[n]]).numpy()
        np.testing.assert_allclose(scorer.score([shop.request(n)])[0], expected, rtol=1e-4, atol=1e-5)
    assert len(seen) > 40
    together = scorer.score([shop.request(n) for n in order[-3:]])
    apart = [scorer.score([shop.request(n)])[0] for n in order[-3:]]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_new_item_that_the_user_met_is_told_from_one_that_they_did_not(shop, scorer):
    """Two items that the vocabulary does not know, alike in everything else."""
    unmet = scorer.score([request(shop, "never seen", "nor this")])[0]
    np.testing.assert_allclose(unmet[0], unmet[1], atol=1e-6)
    event = dataclasses.replace(shop.event(0), user="anna", item="never seen")
    assert scorer.append([event]) == [EventResult("taken", unknown=1)]
    met = scorer.score([request(shop, "never seen", "nor this")])[0]
    assert abs(met[0] - met[1]) > 1e-3
    # the same in another process, or the next day
    again = Scorer(shop.model, shop.log, scorer.store)
    np.testing.assert_array_equal(again.score([request(shop, "never seen", "nor this")])[0], met)


def test_an_item_beyond_the_table_is_recognised_by_its_number(shop, scorer):
    """The last items of the vocabulary have no row of their own, but descriptions and numbers."""
    before = scorer.score([request(shop, "item 12", "item 13")])[0]
    scorer.append([dataclasses.replace(shop.event(0), user="anna", item="item 12")])
    after = scorer.score([request(shop, "item 12", "item 13")])[0]
    assert abs((after - before)[0] - (after - before)[1]) > 1e-3
    assert scorer.rank([request(shop, "item 12", "item 13")])[0].unknown_candidates == 0


def test_ids_come_back_as_they_were_given_and_unknown_ones_are_counted(shop, scorer):
    asked = request(shop, "item 3", 7, "7", "item 99")
    context = {"store": 1000, "interest": ["jazz", "ski", 3]}
    asked = dataclasses.replace(asked, context=context, candidate_features={"place": ["top", 1, 2, 3]})
    ranking = scorer.rank([asked])[0]
    assert {(type(item), item) for item in ranking.items} == {(type(i), i) for i in asked.candidates}
    assert (ranking.unknown_candidates, ranking.unknown_context) == (3, 6)
    # a number and the string of its digits are the same item
    scores = dict(
        zip(asked.candidates, scorer.score([request(shop, *asked.candidates)])[0], strict=True)
    )
    np.testing.assert_allclose(scores[7], scores["7"], atol=1e-6)


def test_users_that_the_vocabulary_does_not_know_have_states(shop, scorer):
    events = [dataclasses.replace(shop.event(0), position=p, user=u) for p, u in enumerate(("eve", 7))]
    assert [result.status for result in scorer.append(events)] == ["taken"] * 2
    assert scorer.store.known(["eve", 7, "7", "anna"]).tolist() == [True, True, False, False]
    known = dataclasses.replace(request(shop, "item 1", user="eve"), new_user=False)
    assert len(scorer.score([known])[0]) == 1


def test_event_features_change_the_state(shop, key_values):
    """Each feature, each number, a missing number, and the weight."""
    base = dataclasses.replace(
        shop.event(0),
        features={"action": "buy", "device": "desk"},
        numbers={"dwell": 3.0, "amount": 2.0},
        weight=1.0,
    )
    versions = [
        base,
        dataclasses.replace(base, features={"action": "skip", "device": "desk"}),
        dataclasses.replace(base, features={"action": "buy", "device": "radio"}),
        dataclasses.replace(base, numbers={"dwell": 30.0, "amount": 2.0}),
        dataclasses.replace(base, numbers={"dwell": 3.0, "amount": None}),
        dataclasses.replace(base, weight=5.0),
    ]
    scores = []
    other = dataclasses.replace(shop.event(1), user=base.user, position=1000)
    for n, event in enumerate(versions):
        scorer = Scorer(shop.model, shop.log, new_store(key_values, shop.log, f"v{n}"))
        event = dataclasses.replace(event, position=n)
        scorer.append([event, dataclasses.replace(other, position=100 + n)])
        scores.append(scorer.score([request(shop, "item 2", "item 5", user=base.user)])[0])
    for n, one in enumerate(scores):
        for another in scores[n + 1 :]:
            assert np.abs(one - another).max() > 1e-5


def broken(event: Event, **changes) -> Event:
    return dataclasses.replace(event, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": {"action": "buy"}}, r"features: \['device'\] missing; the model takes \['action'"),
        ({"features": {"action": "buy", "device": None}}, r"features.device: None is not an id"),
        ({"numbers": {"dwell": 1.0}}, r"numbers: \['amount'\] missing"),
        ({"numbers": {"dwell": -1.0, "amount": 1.0}}, r"-1.0 is negative; this feature is log-scaled"),
        ({"numbers": {"dwell": 1.0, "amount": float("nan")}}, r"numbers.amount: a number is not finite"),
        ({"numbers": {"dwell": 1.0, "amount": 1e300}}, r"numbers.amount: a number is not finite"),
        ({"numbers": {"dwell": 1.0, "amount": "1"}}, r"numbers.amount: '1' is not a number"),
        ({"weight": None}, r"weight: missing; give a number"),
        ({"weight": -1.0}, r"weight: -1.0 is negative"),
        ({"weight": 3e38, "numbers": {"dwell": 1.0, "amount": 3e38}}, r"overflows; give smaller"),
        ({"user": True}, r"user: True is not an id"),
        ({"user": "\ud800"}, r"user: '\\ud800' is not an id"),
        ({"item": ""}, r"item: '' is not an id"),
        ({"item": 2**63}, r"item: 9223372036854775808 is not an id"),
        ({"item": 1.0}, r"item: 1.0 is not an id"),
        ({"position": -1}, r"position must be in 0\.\.2\*\*63 - 2, got -1"),
        ({"position": 2**63 - 1}, r"position must be in 0\.\.2\*\*63 - 2, got 9223372036854775807"),
        ({"time": 1.5}, r"time must be in 0\.\.2\*\*63 - 1 microseconds, got 1.5"),
    ],
)
def test_only_the_event_that_does_not_fit_the_schema_is_refused(shop, scorer, changes, reason):
    good = [broken(shop.event(n), user="anna") for n in range(2)]
    bad = broken(shop.event(2), **changes)
    first, refused, second = scorer.append([good[0], bad, good[1]])
    assert first.status == second.status == "taken"
    assert refused.status == "refused"
    assert re.search(reason, refused.reason), refused.reason


def test_only_the_event_at_another_events_position_is_refused(shop, scorer):
    scorer.append([shop.event(0)])
    again = dataclasses.replace(shop.event(0), numbers={"dwell": None, "amount": 77.5})
    results = scorer.append([shop.event(1), again, shop.event(0), shop.event(2)])
    assert [result.status for result in results] == ["taken", "refused", "duplicate", "taken"]
    assert "amount 77.5" in results[1].reason and "arrived again" in results[1].reason


def test_a_longer_vocabulary_recognises_journal_events_by_their_ids(shop, scorer, tmp_path):
    """A new version knows ids that an old one did not; features that the journal lacks are unknown."""
    events = [dataclasses.replace(shop.event(n), user="anna", item="brand new") for n in range(2)]
    assert [result.unknown for result in scorer.append(events)] == [
        1 + (event.features["device"] == "watch") for event in events
    ]
    schema = dataclasses.replace(
        shop.log.schema,
        event_features={**shop.log.schema.event_features, "page": 3},
        event_dense=("amount", "scroll", "dwell"),
    )
    vocabulary = VOCABULARY.extended({"item": ["brand new"], "device": ["watch"], "page": ["front"]})
    schema = dataclasses.replace(schema, event_features={**schema.event_features, "device": 4})
    log = EventLog.from_pandas(
        tmp_path / "log",
        events=shop.events.assign(page="front", scroll=1.0),
        schema=schema,
        items=shop.items,
        requests={"train": shop.requests},
        vocabulary=vocabulary,
    )
    newer = Scorer(shop_model(log, seed=1), log, new_store(scorer.store.key_values, log, "v2"))
    assert newer.catch_up() == 2
    told = [
        dataclasses.replace(
            event,
            features={**event.features, "page": "no page that is known"},
            numbers={**event.numbers, "scroll": None},
        )
        for event in events
    ]
    asked = [request(shop, "brand new", "item 4", "nor this")]
    caught = newer.score(asked)[0]
    apart = open_key_value_store(str(tmp_path / "others"))
    straight = Scorer(newer.model, log, new_store(apart, log, "v2"))
    assert [result.status for result in straight.append(told)] == ["taken"] * 2
    np.testing.assert_allclose(straight.score(asked)[0], caught, rtol=1e-5, atol=1e-6)
    assert newer.rank(asked)[0].unknown_candidates == 1


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(shop.log.path, out, ifa=dataclasses.replace(SHOP_IFA, gates={}), validate=False))
    return load_run(out, sharded=False)


def test_states_built_from_a_log_equal_those_of_its_events_over_http(shop, run, tmp_path):
    """Users, items and event features, by external ids both ways."""
    build_states(BuildStatesConfig(run.config.out, str(tmp_path / "built"), 1000))
    built = open_key_value_store(str(tmp_path / "built"))
    store = StateStore(built, run.version)
    assert store.known(["anna", "bob", "7", "eve", 1, 2]).tolist() == [True, True, *[False] * 4]
    empty = open_key_value_store(str(tmp_path / "empty"))
    layout = StateLayout.of(run.dlrm.candidate_arch.ifa)
    assert layout.gates == {"action": 4, "device": 3}
    StateStore.begin(empty, run.version, layout, 0, vocabulary=store.vocabulary).finish()
    asked = [request(shop, "item 1", "item 12", "new", user=user) for user in ("anna", "bob")]
    body = {
        "requests": [
            {**vars(r), "candidates": [*r.candidates], "time": "2024-03-01T00:00:00Z"} for r in asked
        ]
    }
    events = [shop.event(n) for n in range(len(shop.events))]
    sent = [{**vars(event), "time": str(np.datetime64(event.time, "us")) + "Z"} for event in events]

    def load() -> Scorer:
        return Scorer(run.dlrm, run.log, StateStore(empty, run.version))

    with LiveScorer(load, Limits(timeout=60)) as live:
        client = TestClient(create_app(live))
        random.Random(0).shuffle(sent)
        for part in (sent[:25], sent[20:]):
            answer = client.post("/events", json={"events": part})
            assert answer.status_code == 200, answer.text
        assert [result["status"] for result in answer.json()["results"]] == [
            *["duplicate"] * 5,
            *["taken"] * (len(sent) - 25),
        ]
        rankings = client.post("/rank", json=body).json()["rankings"]
    expected = Scorer(run.dlrm, run.log, store).rank(asked)
    for ranking, wanted in zip(rankings, expected, strict=True):
        assert ranking["items"] == wanted.items
        np.testing.assert_allclose(ranking["logits"]["label"], wanted.logits[:, 0], rtol=1e-4, atol=1e-5)
    # the built states count the events in the log as duplicates
    duplicates = Scorer(run.dlrm, run.log, store).append(events[:5])
    assert {result.status for result in duplicates} == {"duplicate"}
    for address in (built, empty):
        address.close()


def test_a_journal_of_another_format_is_refused(shop, scorer):
    event = shop.event(0)
    scorer.append([event])
    codec, key = scorer.store._codec, journal_key(event.place)
    for body in (struct.pack(">qqq", 7, 3, 5), b"\x80[1]", b"\x80{}", pack_event(event)[:-1]):
        scorer.store.key_values.update([], lambda _, body=body: {key: codec.seal(key, body)})
        with pytest.raises(
            StateError, match=r"event at position 0 was written by another version .*empty store"
        ):
            unpack_event(event.place, body)
        (result,) = scorer.append([event])
        assert result.status == "refused" and "was written by another version" in result.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": "item 1"}, "candidates must be a list of ids, got 'item 1'"),
        ({"candidates": ["item 1", 1.5]}, r"candidates\[1\]: 1.5 is not an id"),
        ({"context": {"store": 9}}, r"context: \['interest'\] missing"),
        ({"context": {"store": 9, "interest": "tea"}}, "context.interest must be a list of ids"),
        ({"context": {"store": ["tea"], "interest": []}}, r"context.store: \['tea'\] is not an id"),
        ({"dense": {"hour": "2"}}, "dense.hour: '2' is not a number"),
        ({"candidate_features": {}}, r"candidate_features: \['place'\] missing"),
        ({"candidate_features": {"place": ["top"]}}, "candidate_features.place: 1 ids for 2 candidates"),
        ({"candidate_dense": {"bid": [1.0, float("inf")]}}, "bid: a number is not finite"),
    ],
)
def test_a_request_that_does_not_fit_the_schema_is_refused(shop, scorer, changes, message):
    with pytest.raises(RequestError, match=message):
        scorer.score([dataclasses.replace(request(shop, "item 1", "item 2"), **changes)])


def test_states_of_another_vocabulary_are_refused(shop, key_values):
    store = new_store(key_values, shop.log, vocabulary="another")
    with pytest.raises(StateError, match=r"with the vocabulary 'another', .*ifa states --drop v1"):
        Scorer(shop.model, shop.log, store)
    layout = StateLayout.of(shop.model.candidate_arch.ifa)
    StateStore.begin(key_values, "v2", layout, 0, vocabulary="one")
    with pytest.raises(StateError, match="begun with another vocabulary"):
        StateStore.begin(key_values, "v2", layout, 0, vocabulary="other")


def test_during_a_reload_both_weights_take_the_same_event(shop, scorer, key_values):
    """The journal stores numbers as float32, and the other scorer must get the same event."""
    incoming = Scorer(shop.model, shop.log, new_store(key_values, shop.log, "v2"))
    numbers = {"dwell": 0.1, "amount": 4.99}
    events = [
        dataclasses.replace(shop.event(n), user="anna", numbers=numbers, weight=0.1) for n in range(2)
    ]
    with LiveScorer(lambda: scorer, Limits()) as live:
        live._scorers = (scorer, incoming)  # as during catch_up
        assert [result.status for result in live.add(events)] == ["taken"] * 2
        assert [result.status for result in live.add(events)] == ["duplicate"] * 2
    asked = [request(shop, "item 1", "item 2")]
    np.testing.assert_array_equal(incoming.score(asked)[0], scorer.score(asked)[0])


@pytest.mark.parametrize("same_time", [True, False])
def test_events_that_add_up_beyond_float32_are_refused_and_the_user_can_be_ranked(
    shop, scorer, same_time
):
    """Stored as infinity they would stay forever."""
    events = [
        dataclasses.replace(
            shop.event(0), position=n, user="anna", time=LATER - 100 + n * (not same_time), weight=4e36
        )
        for n in range(60)
    ]
    results = [scorer.append([event])[0] for event in events]
    found = [result.status for result in results]
    assert found[0] == "taken" and found[-1] == "refused"
    assert re.search(r"add up to \S+, beyond float32; give smaller weights", results[-1].reason)
    assert np.isfinite(scorer.score([request(shop, "item 1", "item 2")])[0]).all()
    # if events come together, those that fit are taken
    other = [dataclasses.replace(event, position=100 + n) for n, event in enumerate(events)]
    other = [dataclasses.replace(event, user="bob") for event in other]
    assert {result.status for result in scorer.append(other)} == {"taken", "refused"}
    assert np.isfinite(scorer.score([request(shop, "item 1", user="bob")])[0]).all()


def test_the_highest_position_can_be_trimmed(shop, scorer, key_values):
    event = dataclasses.replace(shop.event(0), position=2**63 - 2, partition=1)
    assert scorer.append([event])[0].status == "taken"
    assert trim_journal(key_values, event.time + 1).deleted == 1
    assert scorer.append([event])[0].status == "duplicate"
