"""A compiled dense part scores as the model does, and is refused if it would not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from shop import Shop, shop_model

from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import (
    RankingRequest,
    Scorer,
    StateError,
    StateLayout,
    StateStore,
    open_key_value_store,
    quantize_tables,
)
from ifa_torchrec.serving import compiled as compiled_module
from ifa_torchrec.serving.compiled import CompiledDense, check_weights, compile_dense
from ifa_torchrec.serving.dense_graph import DenseGraph


@pytest.fixture(scope="module")
def model(shop):
    """A model whose candidates attend to each other, and which generates sets."""
    return shop_model(shop.log, candidate_set=CandidateSetConfig("softmax", generate=True))


@pytest.fixture(scope="module")
def package(shop, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "dense.pt2"
    compile_dense(model, shop.log.schema, path)
    return path


def test_what_a_package_was_compiled_for_is_checked(shop, model, tmp_path, monkeypatch):
    (tmp_path / "dense.pt2").touch()
    found = compiled_module._made_for(DenseGraph(model, shop.log.schema))
    for name in found:
        monkeypatch.setattr(
            compiled_module._Loader,
            "load_metadata_from_package",
            lambda *_, name=name: found | {name: "other"},
        )
        with pytest.raises(StateError, match=f"for {name} 'other', expected .*; compile it again"):
            CompiledDense(model, shop.log.schema, shop.log.items, tmp_path / "dense.pt2")


@pytest.fixture
def store(shop, model, tmp_path):
    key_values = open_key_value_store(str(tmp_path / "states"))
    layout, vocabulary = StateLayout.of(model.candidate_arch.ifa), shop.log.vocabulary.digest
    StateStore.begin(key_values, "weights", layout, 0, vocabulary=vocabulary).finish()
    return StateStore(key_values, "weights")


def asked(shop: Shop) -> list[RankingRequest]:
    """All requests of the shop, made now; one of them has unknown items."""
    requests = [dataclasses.replace(shop.request(n), time=None) for n in range(len(shop.requests))]
    known = requests[0]
    candidates = [*known.candidates, "of no vocabulary"]
    requests[0] = dataclasses.replace(
        known,
        candidates=candidates,
        candidate_dense={"bid": [None] * len(candidates)},
        candidate_features={"place": ["top"] * len(candidates)},
    )
    return requests


def assert_same(plain: Scorer, compiled: Scorer, requests: Sequence[RankingRequest]) -> None:
    alone = [compiled.score([request])[0] for request in requests]
    together = compiled.score(requests)
    for wanted, *others in zip(plain.score(requests), alone, together, strict=True):
        for found in others:
            np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.slow
def test_a_compiled_dense_part_scores_as_the_model(shop, model, package, store, int8):
    of = quantize_tables(model) if int8 else model
    plain = Scorer(of, shop.log, store)
    fast = CompiledDense(of, shop.log.schema, shop.log.items, package)
    compiled = Scorer(of, shop.log, store, compiled=fast)
    requests = asked(shop)
    assert_same(plain, compiled, requests)  # no user has a history
    plain.append(sorted(shop.events_before(0) + shop.events_before(1), key=lambda e: e.position))
    assert_same(plain, compiled, requests)
    for k, strategy in itertools.product((1, 3), ("topk", "greedy")):
        found, wanted = (s.rank(requests, k, strategy) for s in (compiled, plain))
        assert [r.items for r in found] == [r.items for r in wanted]
        assert [r.unknown_candidates for r in found] == [r.unknown_candidates for r in wanted]


@pytest.mark.slow
def test_a_package_of_other_weights_is_refused(shop, model, package, tmp_path):
    def load(of, path=package):
        return CompiledDense(of, shop.log.schema, shop.log.items, path)

    other = shop_model(shop.log, candidate_set=CandidateSetConfig("softmax", generate=True))
    load(other)  # the same weights
    check_weights(other, shop.log.schema, package)
    with torch.no_grad():
        other.set_arch.over_arch.model[-1].bias += 1
    for refuses in (load, lambda of: check_weights(of, shop.log.schema, package)):
        with pytest.raises(StateError, match=r"weights '\w+', expected '\w+'; compile it again"):
            refuses(other)
    with pytest.raises(StateError, match="weights"):
        load(shop_model(shop.log))
    (tmp_path / "damaged.pt2").write_bytes(b"no package")
    with pytest.raises(StateError, match="cannot be loaded"):
        load(model, tmp_path / "damaged.pt2")


def test_a_missing_package_is_named(shop, model, tmp_path):
    with pytest.raises(
        StateError, match=r"dense.pt2 does not exist; write it with ifa export --run RUN"
    ):
        CompiledDense(model, shop.log.schema, shop.log.items, tmp_path / "dense.pt2")
