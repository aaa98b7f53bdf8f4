"""benchmarks/cost.py's counts, compared with formulas of the sizes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cost import Cost, cost_of, history_bytes

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.modules import INTERACTIONS

D, M = 8, 5
CONFIG = IFAConfig(D, num_heads=2, half_lives=(math.inf, 30.0), feature_map="hedgehog")


def cost(config: IFAConfig, interaction: str, events: int, **how: bool) -> Cost:
    table = EmbeddingConfig(
        name="item",
        embedding_dim=D,
        num_embeddings=100,
        feature_names=["history_item", "candidate_item"],
    )
    model = DLRM_IFA(
        None,
        EmbeddingCollection(tables=[table]),
        DLRM_IFAConfig(("item",), ifa=config, interaction=interaction),
    )
    ids = torch.cat([1 + torch.arange(events) % 7, 1 + torch.arange(M)])
    request = RankingFeatures(
        torch.zeros(1, 0),
        KeyedJaggedTensor.empty(),
        KeyedJaggedTensor.from_lengths_sync(
            keys=["history_item", "candidate_item"], values=ids, lengths=torch.tensor([events, M])
        ),
        torch.zeros(M, 0),
        history_age=torch.rand(events),
    )
    return cost_of(model, [request], **how)


def test_an_event_costs_what_its_products_do():
    """For softmax keys, values, scores and sums; for IFA keys, values, their product; 2 d_phi = 4 d."""
    more = {
        name: cost(CONFIG, name, 30).flop - cost(CONFIG, name, 20).flop for name in ("softmax", "ifa")
    }
    assert more["softmax"] * M == 10 * (2 * 2 * D * D + M * 2 * 2 * D)
    assert more["ifa"] * M == 10 * 2 * (2 * D * D + D * 2 * (D // 2))
    assert cost(CONFIG, "ifa", 20, from_state=True).flop == cost(CONFIG, "ifa", 0, from_state=True).flop
    assert cost(CONFIG, "ifa", 20, from_state=True).flop < cost(CONFIG, "ifa", 20).flop
    assert cost(CONFIG, "none", 20) == Cost(cost(CONFIG, "none", 0).flop, 0.0)


def test_bytes_of_a_state_are_those_of_its_tensors():
    config = IFAConfig(D, num_heads=2, identity_features=("item",), identity_half_lives=(7.0, 30.0))
    ifa = INTERACTIONS["ifa"](config, 50, None)
    ids = torch.arange(12)[:, None] % 5  # id 0 is unknown
    state = ifa.encode(JaggedTensor(torch.randn(12, D), lengths=torch.tensor([12])), history_ids=ids)
    kept = (state.key_value, state.key_sum, state.identity_key, state.identity_value, state.identity_sum)
    expected = sum(x.numel() * x.element_size() for x in kept)
    assert history_bytes(ifa, 12, M, ids) == expected
    assert cost(config, "ifa", 20).read == cost(config, "ifa", 20, from_state=True).read


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("none", 0),
        ("mean", 2 * (D + 1)),
        ("softmax", 1000 * (D + 1)),
        ("softmax_recent", 50 * (D + 1)),
        ("din", 50 * (D + 1)),
        ("sim", 250 * (D + 1)),
        ("eta", 1000 * 4 + 500 * (D + 1)),
        ("twin", 1000 * (D + 1)),
        ("sdim", 128 * 2 * (D + 1)),
        ("low_rank", 2 * D * 32 + 2),
        ("solar", 2 * (D * D + 1)),
        ("hstu", 200 * (2 * D + 1)),
        ("ifa", 2 * D * (D // 2 + 1)),
    ],
)
def test_bytes_of_the_dense_heads(name: str, numbers: int):
    module = INTERACTIONS[name](CONFIG, 50, "item")
    assert history_bytes(module, 1000, M, None) == 4 * numbers
