"""Calibration: the fit, and that everything that uses a run predicts with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from toy import Toy

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog
from ifa_torchrec.models.calibration import calibrate
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.training.calibrate import fit
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train


def labels_of(logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return (torch.rand(len(logits), generator=torch.manual_seed(seed)) < logits.sigmoid()).float()


class TestFit:
    @pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, -2.0), (2.0, 1.0)])
    def test_finds_what_the_labels_were_drawn_by(self, scale: float, shift: float) -> None:
        logits = torch.randn(100_000, generator=torch.manual_seed(1))
        found = fit(logits, labels_of(scale * logits + shift), torch.ones(100_000))
        assert found == pytest.approx((scale, shift), abs=0.05)

    def test_the_mean_is_right_of_what_counts(self) -> None:
        logits = torch.randn(5000, generator=torch.manual_seed(1))
        labels, weights = labels_of(logits - 1), torch.rand(5000, generator=torch.manual_seed(2))
        weights[::3] = 0
        labels[::3] = 1
        scale, shift = fit(logits, labels, weights)
        said = (scale * logits + shift).sigmoid()
        assert (weights * said).sum() == pytest.approx((weights * labels).sum().item(), rel=1e-2)

    @pytest.mark.parametrize("labels", [torch.zeros(4), torch.ones(4), torch.empty(0)])
    def test_nothing_to_fit(self, labels: torch.Tensor) -> None:
        assert fit(torch.arange(len(labels)).float(), labels, torch.ones(len(labels))) == (1.0, 0.0)

    def test_labels_that_can_be_told_apart_give_a_finite_scale(self) -> None:
        logits = torch.tensor([-1.0, -2.0, 1.0, 2.0])
        scale, shift = fit(logits, (logits > 0).float(), torch.ones(4))
        assert 1 < scale < 10 and abs(shift) < 1


@pytest.mark.parametrize("attention", ["none", "softmax"])
def test_all_ways_to_a_logit(attention: str) -> None:
    """From histories, from states, within a set, and given candidates already taken."""
    tables = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                embedding_dim=8,
                num_embeddings=100,
                feature_names=[f"history_{name}", f"candidate_{name}"],
            )
            for name in ("item", "category")
        ]
    )
    config = DLRM_IFAConfig(
        ("item", "category"),
        ifa=IFAConfig(8, num_heads=2),
        num_tasks=2,
        candidate_set=CandidateSetConfig(attention, generate=True),
    )
    model = DLRM_IFA(None, tables, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # weights that start at 0 have no effect
    sequence = KeyedJaggedTensor.from_lengths_sync(
        keys=["history_item", "candidate_item", "history_category", "candidate_category"],
        values=torch.arange(18),
        lengths=torch.tensor([4, 0, 3, 2, 4, 0, 3, 2]),
    )
    none = KeyedJaggedTensor.empty()
    features = RankingFeatures(
        torch.zeros(2, 0), none, sequence, torch.zeros(5, 0), history_age=torch.rand(4)
    )
    taken = torch.tensor([True, False, False, False, True])

    def logits() -> list[torch.Tensor]:
        given = model.logits_given(model.describe(features), taken)
        return [model(features), model.attend(features, model.encode(features)), given]

    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 3.0])
    before = logits()
    calibrate(model, scale, shift)
    for now, was in zip(logits(), before, strict=True):
        torch.testing.assert_close(now, scale * was + shift, rtol=1e-4, atol=1e-4)


def test_a_run_predicts_by_what_was_fitted(toy: Toy, log: EventLog, tmp_path: Path) -> None:
    plain = TrainConfig(log.path, tmp_path / "plain", ifa=IFAConfig(8, num_heads=2), calibrate=False)
    fitted = dataclasses.replace(plain, out=tmp_path / "fitted", calibrate=True)
    for config in (plain, fitted):
        train(config)
    raw, moved = (evaluate(EvaluateConfig(c.out, split="valid", picture=True)) for c in (plain, fitted))
    assert (fitted.out / "reliability-valid.png").stat().st_size > 1000
    groups = moved["reliability"]["label"]
    said, count = (np.array([g[part] for g in groups]) for part in ("prediction", "candidates"))
    assert (np.diff(said) > 0).all() and len(said) == 10
    true = np.array([g["label"] for g in groups])
    assert (said * count).sum() / (true * count).sum() == pytest.approx(moved["calibration_exposed"])
    assert moved["gauc"] == raw["gauc"]
    assert abs(np.log(raw["calibration_exposed"])) > 0.05  # unexposed candidates are not in the loss
    assert moved["calibration_exposed"] == pytest.approx(1, abs=1e-3)
    assert moved["ne_exposed"] <= raw["ne_exposed"]
    kept = [
        json.loads((config.out / "validations.json").read_text())["validations"][0]["calibration"]
        for config in (plain, fitted)
    ]
    assert kept[0] == {} and kept[1]["label"][0] > 0
