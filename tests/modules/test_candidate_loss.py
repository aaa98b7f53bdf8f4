"""CandidateSetLoss with tasks of several kinds and weights, compared with its formulae in loops."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ifa_torchrec import CandidateSetLoss
from ifa_torchrec.batch import Scale
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetLossConfig, Task, predictions

TASKS = (
    Task("click", weight=2.0),
    Task("watch", "regression", weight=0.5, scale=Scale(2.0, 1.5, log=True)),
    Task("buy", weight=0.25),
    Task("stars", "regression", scale=Scale(3.0, 0.5)),
)
# a usual request, an empty one, one candidate shown, none shown, two shown, a single candidate
REQUESTS = [6, 0, 3, 2, 2, 1]
EXPOSED = [1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1]


def inputs(tasks: tuple[Task, ...] = TASKS) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    m = sum(REQUESTS)
    logits = 2 * torch.randn(m, len(tasks), generator=g, dtype=torch.float64)
    numbers = 10 * torch.rand(m, len(tasks), generator=g, dtype=torch.float64)
    binary = torch.tensor([task.kind == "binary" for task in tasks])
    labels = torch.where(binary, (numbers < 4).double(), numbers)
    exposed = torch.tensor(EXPOSED).bool()
    alone = 2 * torch.randn(int(exposed.sum()), len(tasks), generator=g, dtype=torch.float64)
    return logits, labels, exposed, torch.tensor([0, *itertools.accumulate(REQUESTS)]), alone


def error(missed: float, kind: str) -> float:
    return abs(missed) - 0.5 if kind == "huber" and abs(missed) > 1 else missed**2 / 2


def plain(config: CandidateSetLossConfig, tasks, logits, labels, exposed, offsets, alone) -> float:
    """Each term as a sum of values and a sum of weights over all tasks."""
    sums = {"pointwise": [0.0, 0.0], "listwise": [0.0, 0.0], "consistency": [0.0, 0.0]}
    place = {row: n for n, row in enumerate(exposed.nonzero().flatten().tolist())}

    def add(term: str, value: float, weight: float) -> None:
        sums[term][0] += weight * value
        sums[term][1] += weight

    for t, task in enumerate(tasks):
        s, y = logits[:, t].tolist(), labels[:, t].tolist()
        for begin, end in itertools.pairwise(offsets.tolist()):
            rows = range(begin, end)
            shown = [c for c in rows if exposed[c]]
            gaps = [s[c] - alone[place[c], t].item() for c in shown]
            if task.kind == "regression":
                for c in shown:
                    label = math.log1p(y[c]) if task.scale.log else y[c]
                    missed = s[c] - (label - task.scale.mean) / task.scale.deviation
                    add("pointwise", error(missed, config.regression), task.weight)
                if shown:
                    add("consistency", sum(gap**2 / 2 for gap in gaps) / len(gaps), task.weight)
                continue
            u = {c: 1.0 if exposed[c] else config.unexposed for c in rows}
            for c in rows:
                p = 1 / (1 + math.exp(-s[c]))
                counted = u[c] if config.pointwise_unexposed else float(exposed[c])
                add("pointwise", -math.log(p if y[c] else 1 - p), task.weight * counted)
            negative = sum(u[c] * math.exp(s[c]) for c in rows if not y[c])
            positive = [c for c in rows if y[c] and u[c]]
            if positive and negative > 0:
                each = [math.log(1 + negative / math.exp(s[c])) for c in positive]
                add("listwise", sum(each) / len(each), task.weight)
            if len(shown) > 1:
                p = torch.tensor([s[c] for c in shown]).softmax(0)
                q = torch.stack([alone[place[c], t] for c in shown]).softmax(0)
                add("consistency", float(((p - q) * (p / q).log()).sum() / 2), task.weight)
    weights = dataclasses.asdict(config) | {"listwise": config.listwise_weight}
    return sum(weights[term] * total / max(n, 1e-9) for term, (total, n) in sums.items())


CONFIGS = [
    CandidateSetLossConfig(),
    CandidateSetLossConfig(unexposed=1.0),
    CandidateSetLossConfig(regression="squared", unexposed=0.3),
    CandidateSetLossConfig(pointwise_unexposed=False),
    CandidateSetLossConfig(pointwise=0.0, listwise=1.0, unexposed=0.5),
    CandidateSetLossConfig(pointwise=0.0, consistency=1.0),
    CandidateSetLossConfig(listwise=0.5, consistency=0.3, regression="squared"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
class TestKindsAndWeights:
    def test_is_the_plain_loop(self, config: CandidateSetLossConfig) -> None:
        given = inputs()
        value = CandidateSetLoss(config, tasks=TASKS)(*given)
        assert value.item() == pytest.approx(plain(config, TASKS, *given), rel=1e-6)

    def test_gradient(self, config: CandidateSetLossConfig) -> None:
        logits, *rest, alone = inputs()
        loss = CandidateSetLoss(config, tasks=TASKS)
        logits.requires_grad_(), alone.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, a: loss(x, *rest, a), (logits, alone))

    @pytest.mark.parametrize("left_out", range(len(TASKS)))
    def test_a_task_of_weight_0_is_as_if_it_were_not_there(
        self, config: CandidateSetLossConfig, left_out: int
    ) -> None:
        others = [t for t in range(len(TASKS)) if t != left_out]
        task = TASKS[left_out]
        tasks = list(TASKS)
        tasks[left_out] = Task(task.name, task.kind, weight=0.0, scale=task.scale)
        logits, labels, exposed, offsets, alone = inputs()
        logits.requires_grad_(), alone.requires_grad_()
        value = CandidateSetLoss(config, tasks=tasks)(logits, labels, exposed, offsets, alone)
        gradients = torch.autograd.grad(value, (logits, alone), allow_unused=True)
        for gradient in gradients:
            assert gradient is None or not gradient[:, left_out].any()
        without = CandidateSetLoss(config, tasks=[TASKS[t] for t in others])(
            logits[:, others], labels[:, others], exposed, offsets, alone[:, others]
        )
        assert value.item() == pytest.approx(without.item(), rel=1e-12)

    @pytest.mark.parametrize("rows", ["none exposed", "no candidates"])
    def test_nothing_to_learn_from_is_finite(self, config: CandidateSetLossConfig, rows: str) -> None:
        logits, labels, exposed, offsets, alone = inputs()
        exposed, alone = torch.zeros_like(exposed), alone[:0]
        if rows == "no candidates":
            logits, labels, exposed, offsets = logits[:0], labels[:0], exposed[:0], 0 * offsets
        logits.requires_grad_()
        value = CandidateSetLoss(config, tasks=TASKS)(logits, labels, exposed, offsets, alone)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite() and gradient.isfinite().all()
        numbers = [t for t, task in enumerate(TASKS) if task.kind == "regression"]
        assert not gradient[:, numbers].any()
        assert (value.item() == 0) == (
            rows == "no candidates"
            or config.unexposed == 0
            or config.pointwise == config.listwise_weight == 0
        )


@pytest.mark.parametrize("terms", [{}, {"listwise": 0.5}, {"pointwise": 0.0, "listwise": 1.0}])
def test_by_default_the_unexposed_teach_nothing(terms: dict[str, float]) -> None:
    logits, labels, exposed, offsets, _ = inputs()
    loss = CandidateSetLoss(CandidateSetLossConfig(**terms), tasks=TASKS)
    wanted = loss(logits, labels, exposed, offsets)
    logits, labels = logits.clone(), labels.clone()
    logits[~exposed], labels[~exposed] = 7.0, 1.0
    assert loss(logits, labels, exposed, offsets).item() == wanted.item()
    counted = CandidateSetLoss(CandidateSetLossConfig(**terms, unexposed=1.0), tasks=TASKS)
    assert counted(logits, labels, exposed, offsets).item() != wanted.item()
    # if all are exposed, the weight has no effect
    every = torch.ones_like(exposed)
    assert loss(logits, labels, every, offsets) == counted(logits, labels, every, offsets)


def test_what_stands_for_a_number_that_nobody_saw_counts_nothing() -> None:
    logits, labels, exposed, offsets, _ = inputs()
    loss = CandidateSetLoss(CandidateSetLossConfig(regression="squared"), tasks=TASKS)
    wanted = loss(logits, labels, exposed, offsets)
    for strange in (-1.0, 1e300, math.nan):
        labels[~exposed, 1] = strange
        logits.requires_grad_()
        value = loss(logits, labels, exposed, offsets)
        assert value.item() == wanted.item()
        assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_a_label_that_does_not_count_may_be_nan() -> None:
    """For unexposed candidates, and for a task without weight."""
    tasks = (*TASKS, Task("off", weight=0.0), Task("none", "regression", weight=0.0))
    logits, labels, exposed, offsets, _ = inputs()
    loss = CandidateSetLoss(tasks=tasks)
    logits = torch.cat([logits, logits[:, :2]], dim=1).requires_grad_()
    labels = torch.cat([labels, torch.zeros_like(labels[:, :2])], dim=1)
    wanted = loss(logits, labels, exposed, offsets)
    labels[:, -2:] = labels[~exposed] = math.nan
    value = loss(logits, labels, exposed, offsets)
    assert value.item() == wanted.item()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("regression", ["huber", "squared"])
def test_seconds_are_learnt_by_their_logarithm_and_come_back_in_seconds(regression: str) -> None:
    g = torch.Generator().manual_seed(0)
    items = torch.randint(20, (600,), generator=g)
    seconds = (torch.linspace(1, 7, 20)[items] + 0.2 * torch.randn(600, generator=g)).exp()
    logs = seconds.log1p()
    watch = Task("watch", "regression", scale=Scale(logs.mean().item(), logs.std().item(), log=True))
    model = nn.Embedding(20, 1)
    nn.init.zeros_(model.weight)
    loss = CandidateSetLoss(CandidateSetLossConfig(regression=regression), tasks=(watch,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    offsets, exposed = torch.tensor([0, 600]), torch.ones(600).bool()
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(items), seconds[:, None], exposed, offsets).backward()
        optimizer.step()
    predicted = predictions(model(items), (watch,))[:, 0]
    missed = (predicted - seconds).abs().mean()
    noise = (seconds - torch.linspace(1, 7, 20)[items].exp()).abs().mean()
    assert missed < 1.1 * noise < 0.3 * (seconds - seconds.mean()).abs().mean()


def test_tasks_that_the_loss_cannot_be_of() -> None:
    watch = Task("watch", "regression")
    with pytest.raises(ConfigError, match="listwise is the only term"):
        CandidateSetLoss(CandidateSetLossConfig(pointwise=0.0, listwise=1.0), tasks=[watch])
    with pytest.raises(ConfigError, match="listwise is the only term"):
        CandidateSetLoss(
            CandidateSetLossConfig(pointwise=0.0, listwise=1.0), tasks=[watch, Task("click", weight=0.0)]
        )
    with pytest.raises(ConfigError, match="weight 0 in the loss"):
        CandidateSetLoss(tasks=[Task("click", weight=0.0)])
    with pytest.raises(ConfigError, match="same name"):
        CandidateSetLoss(tasks=[watch, watch])
    with pytest.raises(ConfigError, match="'huber' or 'squared', got 'cubic'"):
        CandidateSetLossConfig(regression="cubic")  # type: ignore[arg-type]
    logits, labels, exposed, offsets, _ = inputs()
    with pytest.raises(ValueError, match=r"\[M, 1\] for the tasks \['watch'\], got \[14, 4\]"):
        CandidateSetLoss(tasks=[watch])(logits, labels, exposed, offsets)


def test_what_is_no_candidate_set_is_refused():
    loss, offsets = CandidateSetLoss(), torch.tensor([0, 2])
    labels, exposed = torch.zeros(2, 1), torch.ones(2).bool()
    with pytest.raises(ValueError, match=r"logits must be \[M, T\], got \[2\]"):
        loss(torch.zeros(2), labels[:, 0], exposed, offsets)
    with pytest.raises(ValueError, match=r"exposed must be bool, got torch\.int64"):
        loss(torch.zeros(2, 1), labels, exposed.long(), offsets)
