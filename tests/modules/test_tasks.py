"""What logits mean: predictions in the labels' units, and the ranking score."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ifa_torchrec import DLRM_IFAConfig, IFAConfig
from ifa_torchrec.batch import Scale
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import Task, predictions, ranking_score

CLICK, BUY = Task("click"), Task("buy")
WATCH = Task("watch", "regression", scale=Scale(3.0, 1.5, log=True))
STARS = Task("stars", "regression", scale=Scale(4.0, 0.5))


class TestPredictions:
    @pytest.mark.parametrize("task", [WATCH, STARS], ids=["log", "plain"])
    @pytest.mark.parametrize("label", [0.0, 0.5, 12.0, 7200.0])
    def test_bring_back_what_the_label_was(self, task: Task, label: float) -> None:
        logits = task.standardised(torch.tensor([[label]], dtype=torch.float64))
        assert predictions(logits, (task,)).item() == pytest.approx(label, rel=1e-9, abs=1e-9)

    def test_each_task_by_its_kind(self) -> None:
        logits = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]])
        predicted = predictions(logits, (CLICK, WATCH, STARS))
        wanted = [[0.5, math.expm1(4.5), 3.0], [1 / (1 + math.exp(-3)), math.expm1(3.0), 4.0]]
        np.testing.assert_allclose(predicted.numpy(), wanted, rtol=1e-6)

    def test_of_no_candidates(self) -> None:
        assert predictions(torch.empty(0, 2), (CLICK, WATCH)).shape == (0, 2)

    def test_bfloat16_is_computed_in_float32(self) -> None:
        predicted = predictions(torch.ones(1, 1, dtype=torch.bfloat16), (WATCH,))
        assert predicted.dtype == torch.float32 and predicted.item() == pytest.approx(math.expm1(4.5))


class TestRankingScore:
    LOGITS = torch.tensor([[2.0, -1.0, 0.3], [50.0, 2.0, -1.0], [40.0, 3.0, 2.0]])

    def test_the_first_task_ranks_where_none_is_named(self) -> None:
        score = ranking_score(self.LOGITS, (CLICK, BUY, WATCH))
        assert torch.equal(score, self.LOGITS[:, 0])

    def test_a_task_alone_ranks_by_its_logit(self) -> None:
        """The probabilities for logits 40 and 50 would be equal."""
        tasks = (CLICK, BUY, dataclasses.replace(WATCH, rank=-2.0))
        assert torch.equal(ranking_score(self.LOGITS, tasks), -2 * self.LOGITS[:, 2])
        alone = (dataclasses.replace(CLICK, rank=3.0), BUY, WATCH)
        assert ranking_score(self.LOGITS, alone).argsort().tolist() == [0, 2, 1]

    def test_several_are_summed(self) -> None:
        tasks = (CLICK, dataclasses.replace(BUY, rank=2.0), dataclasses.replace(WATCH, rank=0.5))
        wanted = 2 / (1 + np.exp(-self.LOGITS[:, 1].double())) + 0.5 * self.LOGITS[:, 2]
        np.testing.assert_allclose(ranking_score(self.LOGITS, tasks).numpy(), wanted, rtol=1e-6)

    def test_of_no_candidates(self) -> None:
        assert ranking_score(torch.empty(0, 2), (CLICK, BUY)).shape == (0,)

    def test_it_exports(self) -> None:
        class Ranks(torch.nn.Module):
            def forward(self, logits: torch.Tensor) -> torch.Tensor:
                tasks = (dataclasses.replace(CLICK, rank=1.0), BUY, dataclasses.replace(WATCH, rank=0.5))
                return ranking_score(logits, tasks) + predictions(logits, tasks)[:, 2]

        candidates = torch.export.Dim("M", min=2)
        graph = torch.export.export(Ranks(), (self.LOGITS,), dynamic_shapes=({0: candidates},))
        more = torch.randn(7, 3)
        assert torch.equal(graph.module()(more), Ranks()(more))


@pytest.mark.parametrize("function", [predictions, ranking_score])
def test_logits_of_other_tasks(function) -> None:
    with pytest.raises(ValueError, match=r"\[M, 2\] for the tasks \['click', 'buy'\], got \[3, 1\]"):
        function(torch.zeros(3, 1), (CLICK, BUY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ordinal"}, "kind must be .* got 'ordinal'"),
        ({"weight": -1.0}, "in the loss must be"),
        ({"weight": math.inf}, "in the loss must be"),
        ({"weight": math.nan}, "in the loss must be"),
        ({"rank": math.nan}, "in the ranking must be finite"),
    ],
)
def test_a_task_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"task 'like'.*{message}"):
        Task("like", **options)


class TestModelConfig:
    @staticmethod
    def make(**options) -> DLRM_IFAConfig:
        return DLRM_IFAConfig(("item",), ifa=IFAConfig(8), **options)

    def test_tasks_without_names(self) -> None:
        assert self.make(num_tasks=2).tasks == (Task("label_0"), Task("label_1"))

    def test_tasks_are_kept(self) -> None:
        assert self.make(num_tasks=2, tasks=(CLICK, WATCH)).tasks == (CLICK, WATCH)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": (CLICK, WATCH)}, "num_tasks is 1.*set num_tasks=2"),
            ({"num_tasks": 0}, "num_tasks must be 1 or more"),
            ({"num_tasks": 2, "tasks": (CLICK, CLICK)}, "same name"),
            ({"tasks": (Task("click", weight=0.0),)}, "weight 0 in the loss"),
        ],
    )
    def test_tasks_that_do_not_fit(self, options: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.make(**options)
