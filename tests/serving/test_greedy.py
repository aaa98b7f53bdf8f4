"""Sets that a server chooses one by one equal those that the model chooses from histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from shop import SHOP_IFA, Shop, shop_model
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import DLRM_IFA, InteractionFidelityAttention, generate_set
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import (
    RankingRequest,
    RequestError,
    Scorer,
    StateLayout,
    StateStore,
    open_key_value_store,
)
from ifa_torchrec.serving.live import Limits, LiveScorer
from ifa_torchrec.serving.service import create_app


@pytest.fixture(scope="module", params=["none", "softmax"])
def model(shop: Shop, request) -> DLRM_IFA:
    """A model whose candidates see those taken."""
    return shop_model(shop.log, candidate_set=CandidateSetConfig(request.param, generate=True))


@pytest.fixture
def store(shop: Shop, tmp_path) -> Iterator[StateStore]:
    key_values = open_key_value_store(str(tmp_path / "states"))
    layout = StateLayout.of(InteractionFidelityAttention(SHOP_IFA))
    digest = shop.log.vocabulary.digest
    StateStore.begin(key_values, "v1", layout, 0, vocabulary=digest).finish()
    yield StateStore(key_values, "v1")
    key_values.close()


@pytest.fixture
def scorer(shop: Shop, model: DLRM_IFA, store: StateStore) -> Scorer:
    return Scorer(model, shop.log, store)


@torch.no_grad()
def chosen_from_history(model: DLRM_IFA, dataset: RankingDataset, n: int, k: int) -> list[int]:
    """The indices of the candidates chosen one by one."""
    candidates = model.describe(dataset[[n]])
    rows = JaggedTensor(candidates.tokens, offsets=candidates.offsets)
    chosen = generate_set(model.set_gain(candidates), rows, k, "greedy")
    return chosen.values().tolist()


@torch.no_grad()
def test_sets_equal_those_from_histories(shop: Shop, model: DLRM_IFA, scorer: Scorer) -> None:
    dataset, seen = RankingDataset(shop.log, "train"), set[int]()
    differ = 0
    for n in np.argsort(shop.requests["time"].to_numpy(), kind="stable").tolist():
        scorer.append([event for event in shop.events_before(n) if event.position not in seen])
        seen |= {event.position for event in shop.events_before(n)}
        request = shop.request(n)
        (ranking,) = scorer.rank([request], 3, "greedy")
        wanted = [request.candidates[row] for row in chosen_from_history(model, dataset, n, 3)]
        assert ranking.items == wanted
        differ += wanted != scorer.rank([request], 3)[0].items
        # each item's logits given the others
        rows = [request.candidates.index(item) for item in ranking.items]
        taken = torch.zeros(len(request.candidates), dtype=torch.bool)
        taken[rows] = True
        given = model.logits_given(model.describe(dataset[[n]]), taken)[rows]
        np.testing.assert_allclose(ranking.logits, given.numpy(), rtol=1e-4, atol=1e-5)
    assert differ and len(seen) > 40


def test_requests_together_and_apart(shop: Shop, scorer: Scorer) -> None:
    asked = [shop.request(n) for n in range(len(shop.requests))]
    for strategy in ("topk", "greedy"):
        together = scorer.rank(asked, 2, strategy)
        for request, ranking in zip(asked, together, strict=True):
            (alone,) = scorer.rank([request], 2, strategy)
            assert ranking.items == alone.items and len(alone.items) == min(2, len(request.candidates))
            np.testing.assert_allclose(ranking.logits, alone.logits, rtol=1e-4, atol=1e-5)
    # the first items of a set are the smaller set
    larger = scorer.rank(asked, 4, "greedy")
    assert [r.items[:2] for r in larger] == [r.items for r in scorer.rank(asked, 2, "greedy")]
    assert scorer.rank([], 2, "greedy") == scorer.rank([]) == []
    assert scorer.rank(asked[:1], 0, "greedy")[0].items == []


def test_what_is_refused(shop: Shop, scorer: Scorer, store: StateStore) -> None:
    asked = [shop.request(0)]
    with pytest.raises(RequestError, match=r"'greedy' chooses the k best one by one; give k"):
        scorer.rank(asked, strategy="greedy")
    with pytest.raises(ValueError, match="strategy must be 'topk' or 'greedy', got 'best'"):
        scorer.rank(asked, 2, "best")  # type: ignore[arg-type]
    untrained = Scorer(shop.model, shop.log, store)
    with pytest.raises(RequestError, match=r"not trained to generate sets .* --candidate-set.generate"):
        untrained.rank(asked, 2, "greedy")


def body(request: RankingRequest, **fields: object) -> dict:
    """A request's JSON."""
    return {
        "user": request.user,
        "candidates": list(request.candidates),
        "time": "2024-02-01T00:00:00Z",
        "context": request.context,
        "dense": request.dense,
        "candidate_dense": request.candidate_dense,
        "candidate_features": request.candidate_features,
        "new_user": True,
        **fields,
    }


def test_over_http(shop: Shop, scorer: Scorer, store: StateStore) -> None:
    asked = [shop.request(n) for n in range(3)]
    at = [dataclasses.replace(request, time=1_706_745_600_000_000) for request in asked]
    bodies = [
        body(asked[0], k=2, strategy="greedy"),
        body(asked[1], k=2),
        body(asked[2], k=4, strategy="greedy"),
    ]
    with LiveScorer(lambda: scorer, Limits(max_set=4, timeout=20)) as live:
        client = TestClient(create_app(live))
        rankings = client.post("/rank", json={"requests": bodies}).json()["rankings"]
        metrics = client.get("/metrics").text
        no_k = client.post("/rank", json={"requests": [body(asked[0], strategy="greedy")]})
        unknown = client.post("/rank", json={"requests": [body(asked[0], k=2, strategy="best")]})
        many = dataclasses.replace(asked[0], candidates=["item 1"] * 5)
        fields = {"candidate_dense": {"bid": [0.0] * 5}, "candidate_features": {"place": ["top"] * 5}}
        large = client.post("/rank", json={"requests": [body(many, k=5, strategy="greedy", **fields)]})
        small = client.post("/rank", json={"requests": [body(many, k=4, strategy="greedy", **fields)]})
    wanted = [
        *scorer.rank(at[:1], 2, "greedy"),
        *scorer.rank(at[1:2], 2),
        *scorer.rank(at[2:], 4, "greedy"),
    ]
    assert [ranking["items"] for ranking in rankings] == [ranking.items for ranking in wanted]
    for ranking, want in zip(rankings, wanted, strict=True):
        np.testing.assert_allclose(ranking["logits"]["label"], want.logits[:, 0], rtol=1e-4, atol=1e-6)
    candidates = sum(len(request.candidates) for request in asked)
    assert f"ifa_candidates_total {candidates:.1f}" in metrics
    assert no_k.status_code == 422 and "requests.0.k: strategy 'greedy'" in no_k.json()["error"]
    assert unknown.status_code == 422 and "requests.0.strategy" in unknown.json()["error"]
    assert large.status_code == 422 and "chooses at most 4" in large.json()["error"]
    assert small.status_code == 200


def test_a_model_that_was_not_trained_for_it_says_so(shop: Shop, store: StateStore) -> None:
    plain = Scorer(shop.model, shop.log, store)
    request = shop.request(0)
    with LiveScorer(lambda: plain, Limits(timeout=20)) as live:
        client = TestClient(create_app(live))
        both = [body(request, k=2), body(request, k=2, strategy="greedy")]
        answer = client.post("/rank", json={"requests": both})
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("requests.1: strategy 'greedy': this model was not")
        assert client.post("/rank", json={"requests": both[:1]}).status_code == 200
