"""Scores the requests of a split with a model, and measures the ranking."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventBudgetSampler, RankingDataset, make_loader
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED, OFFSETS
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import Task, predictions, ranking_score
from ifa_torchrec.modules.tasks import ranking_weights
from ifa_torchrec.training.groups import by_history
from ifa_torchrec.training.metrics import (
    correlation,
    gauc,
    local_sum,
    mean,
    ndcg,
    ranking_metrics,
    recall,
    regression_metrics,
    why_unranked,
)
from ifa_torchrec.training.own import OwnRequests, all_reduce_sum, counted, order_of, own_requests
from ifa_torchrec.training.progress import progress_bar

_OF_EXPOSED = ("gauc", "ne", "calibration", "mae", "correlation")
"""Metrics that are also reported for exposed candidates only."""
_TIMED_BATCHES, _TIMED_EVENTS, _TIMED_REQUESTS = 30, 32768, 32
"""Number of batches that ``time_per_request`` times, and the budget of each."""


@torch.no_grad()
def predict(
    model: nn.Module, dataset: RankingDataset, device: torch.device, max_events: int, max_requests: int
) -> tuple[np.ndarray, float]:
    """Logits of every candidate of a split, in the split's order. Called by all ranks.

    Args:
        model: a sharded DLRM_IFATrain.
        dataset: the split, with all parts of its log open (``predict_own`` takes any).
        device: this rank's device.
        max_events, max_requests: budget of a batch.

    Returns:
        [M, T] float32 on every rank, and this rank's milliseconds per request, loading included.
    """
    with _evaluating(model):
        mine = apply_to_own(dataset, device, max_events, max_requests, lambda batch: model(batch)[1][1])
    gathered = [mine]
    if dist.get_world_size() > 1:
        gathered *= dist.get_world_size()
        dist.all_gather_object(gathered, mine)
    result = np.empty((len(dataset.requests[CANDIDATES]), len(dataset.log.schema.tasks)), np.float32)
    for requests, logits, _ in gathered:
        result[dataset.candidate_rows(requests)[0]] = logits
    return result, mine[2]


@torch.no_grad()
def predict_own(
    model: nn.Module, dataset: RankingDataset, device: torch.device, max_events: int, max_requests: int
) -> tuple[OwnRequests, np.ndarray, float]:
    """Logits of the candidates in this rank's share of a split's requests. Called by all ranks.

    Args:
        model, dataset, device, max_events, max_requests: as for ``predict``.

    Returns:
        The requests; [m, T] float32, their candidates' logits; and milliseconds per request, as from
        ``predict``.
    """
    with _evaluating(model):
        requests, logits, milliseconds = apply_to_own(
            dataset, device, max_events, max_requests, lambda batch: model(batch)[1][1]
        )
    total = all_reduce_sum if dist.get_world_size() > 1 else local_sum
    return OwnRequests(dataset, requests, total), logits, milliseconds


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def predict_alone(
    model: DLRM_IFA, dataset: RankingDataset, device: torch.device, max_events: int, max_requests: int
) -> np.ndarray:
    """Logits of the exposed candidates, scored in sets without the unexposed ones. Called by all ranks.

    Args:
        model: in evaluation mode, sharded or not.
        dataset, device, max_events, max_requests: as for ``predict``.

    Returns:
        [m, T] float32, for the candidates of the requests that ``predict_own`` gives this rank; 0 for
        unexposed ones.
    """

    def score(batch: RankingBatch) -> Tensor:
        exposed = batch.exposed
        logits = batch.labels.new_zeros(len(exposed), model.config.num_tasks)
        logits[exposed] = model.set_arch(model.describe(batch).only(exposed)).to(logits.dtype)
        return logits

    return apply_to_own(dataset, device, max_events, max_requests, score)[1]


def apply_to_own(
    dataset: RankingDataset,
    device: torch.device,
    max_events: int,
    max_requests: int,
    answer: Callable[[RankingBatch], Tensor],
) -> tuple[np.ndarray, np.ndarray, float]:
    """Apply a function to the batches of this rank's share of a split. Called by all ranks.

    Args:
        dataset, device, max_events, max_requests: as for ``predict``; a rank's share is the same each
            time that these are the same.
        answer: returns [m, width] for a batch of m candidates.

    Returns:
        [n] int64, the share's requests, in the split's order if it is the whole split; [m, width]
        float32, the function's result for their candidates; and milliseconds per request, loading
        included.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    start = time.perf_counter()
    order = order_of(dataset, seed=None)
    sampler = EventBudgetSampler(dataset.histories, max_events, max_requests, order, (rank, world))
    lists = list(sampler)
    answers: list[np.ndarray] = []
    bar = progress_bar(rank, lists, desc="score", unit="batch", leave=False)
    for _, batch in zip(bar, make_loader(dataset, lists), strict=True):
        answers.append(answer(batch.to(device, non_blocking=True)).float().cpu().numpy())
    requests = np.array([r for some in lists for r in some if r != EMPTY_REQUEST], np.int64)
    milliseconds = 1000 * (time.perf_counter() - start) / max(len(requests), 1)
    return requests, np.concatenate(answers), milliseconds


@torch.no_grad()
def time_per_request(
    models: dict[str, nn.Module], dataset: RankingDataset, device: torch.device
) -> dict[str, float]:
    """The time per request of each model, from the batch in memory to the scores: lookup, attention,
    dense layers. The models take turns on the same batches; one process.

    Args:
        models: sharded DLRM_IFATrains by name.
        dataset: the split to draw requests from, in random order.
        device: the models' device.

    Returns:
        Milliseconds per request by name, the median over 30 batches.
    """
    order = np.random.default_rng(0).permutation(len(dataset))
    sampler = EventBudgetSampler(dataset.history_lengths[order], _TIMED_EVENTS, _TIMED_REQUESTS)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _, indices in zip(range(_TIMED_BATCHES), sampler, strict=False):
        batch = dataset[order[indices]].to(device)
        for name, model in models.items():
            with _evaluating(model):
                start = time.perf_counter()
                model(batch)[0].item()
                times[name].append(1000 * (time.perf_counter() - start) / len(indices))
    return {name: float(np.median(values)) for name, values in times.items()}


def measure(
    split: RankingDataset | OwnRequests,
    scores: np.ndarray,
    tasks: Sequence[Task] | None = None,
    by: tuple[str, ...] = (),
    apart: bool = False,
    alone: np.ndarray | None = None,
) -> dict[str, Any]:
    """The metrics of one split.

    Args:
        split: the split; or this rank's requests of it: the figures are then summed over the ranks. In
            that case called by all ranks, which get the same metrics.
        scores: [M, T], the logits of ``tasks``, or any scores, of all its candidates.
        tasks: the model's tasks; None if the scores are not logits and only their order counts.
        by: context features; the entry "by" then has the metrics of the requests of each value.
        apart: whether to measure new and known items separately, and requests by history length.
        alone: [M, T], the logits of exposed candidates scored without the unexposed ones.

    Returns:
        The metrics of the task; for several tasks, a dict of metrics by task name.
        For a binary task, those of ``ranking_metrics``; for a regression, those of
        ``regression_metrics``, only over exposed candidates, since the others have no label. If the task
        is not the only one that ranks, "ranked_gauc" and so on measure how the ranking score orders its
        labels.
        For a binary task and each value V of a candidate tag: "gauc_V", of the positives against V's
        negatives. For a binary task, if not all candidates are exposed: "gauc_exposed", "ne_exposed" and
        "calibration_exposed", over exposed candidates only.
        With ``alone``, the difference between training and inference: the metrics of exposed candidates
        scored without the others, as "gauc_exposed_alone" and so on; and "gap_exposed_alone", the mean
        absolute difference between the two predictions of an exposed candidate.
        With ``apart``: "items", the metrics of "new" and of "known" candidates, and for a binary task
        "by_history" (see ``by_history``).
    """
    own = own_requests(split)
    dataset, schema = own.dataset, own.dataset.log.schema
    known = tasks or tuple(Task(name, kind) for name, kind in schema.tasks.items())
    # without a model, each column is the score of its own task
    ranking = ranking_score(torch.from_numpy(scores), tasks).numpy() if tasks else None
    result: dict[str, dict[str, Any]] = {}
    columns = scores.T if alone is None else alone.T
    for task, score, by_itself in zip(known, scores.T, columns, strict=True):
        of_task = TaskScores(own, task, score, logits=tasks is not None)
        metrics: dict[str, Any] = of_task.metrics()
        if ranking is not None and ranking_weights(known).keys() != {task.name}:
            metrics |= of_task.ranked(ranking)
        metrics |= of_task.against_tags() | of_task.exposed()
        if alone is not None:
            metrics |= of_task.exposed_alone(by_itself)
        for feature in by:
            of_request = np.asarray(dataset.requests[feature])
            with_candidates = of_request[np.diff(dataset.requests[OFFSETS]) > 0]
            values, _ = counted(dataset.log, with_candidates)  # over all ranks
            metrics.setdefault("by", {})[feature] = {
                int(value): of_task.metrics(of_request[own.request] == value) for value in values
            }
        if apart:
            new = dataset.log.item_rows(own.column(CANDIDATES)) == 0
            metrics["items"] = {
                name: {"candidates": own.count(kept), **of_task.metrics(kept)}
                for name, kept in (("new", new), ("known", ~new))
            }
            if task.kind == "binary" and tasks:
                metrics["by_history"] = by_history(own, score, of_task.label)
        result[task.name] = metrics
    return result if len(result) > 1 else next(iter(result.values()))


class TaskScores:
    """The scores and labels of one task of a split, and their metrics.

    Args:
        split: the split, or this rank's requests of it.
        task: one of the log's tasks.
        score: [M].
        logits: whether the scores are the task's logits.

    Attributes:
        request: [M] request number of each candidate; label: [M]; shown: [M] bool, whether exposed.
    """

    def __init__(
        self, split: RankingDataset | OwnRequests, task: Task, score: np.ndarray, logits: bool
    ) -> None:
        self.task, self.score, self._logits = task, score, logits
        self._own = own = own_requests(split)
        self.request, self._total = own.request, own.total
        self.label = own.column(task.name)
        self._tags = {
            name: own.column(tag) == value
            for tag, values in own.dataset.log.schema.candidate_tags.items()
            for value, name in enumerate(values)
        }
        self.shown = own.column(EXPOSED)
        self._counted = self.shown if task.kind == "regression" else np.ones_like(score, bool)

    def metrics(self, kept: np.ndarray | None = None) -> dict[str, Any]:
        """The metrics of all candidates, or of those that are kept, [M] bool."""
        kept = self._counted if kept is None else self._counted & kept
        request, score, label = self.request[kept], self.score[kept], self.label[kept]
        if self.task.kind == "binary":
            return {**ranking_metrics(request, score, label, self._logits, self._total)}
        if not self._logits:
            return {"correlation": correlation(request, score, label, self._total)}
        predicted = predictions(torch.from_numpy(score[:, None].copy()), (self.task,))
        return {**regression_metrics(request, predicted[:, 0].numpy(), label, self._total)}

    def exposed(self) -> dict[str, float]:
        """A binary task's metrics over exposed candidates; empty if all candidates are exposed. A
        regression's metrics are over exposed candidates anyway."""
        if self.task.kind == "regression" or not self._own.any(~self.shown):
            return {}
        found = self.metrics(self.shown)
        return {f"{name}_exposed": found[name] for name in _OF_EXPOSED if name in found}

    def exposed_alone(self, score: np.ndarray) -> dict[str, float]:
        """The metrics of exposed candidates by logits [M] that were computed without the others, and the
        mean change of their predictions."""
        shown = self.shown
        predicted = [
            predictions(torch.from_numpy(s[shown, None].copy()), (self.task,)).numpy()
            for s in (self.score, score)
        ]
        gap = mean(np.abs(predicted[0] - predicted[1]).astype(np.float64)[:, 0], self._total)
        request, label = self.request[shown], self.label[shown]
        if self.task.kind == "regression":
            found = regression_metrics(request, predicted[1][:, 0], label, self._total)
        else:
            found = ranking_metrics(request, score[shown], label, total=self._total)
        names = [name for name in _OF_EXPOSED if name in found]
        return {**{f"{name}_exposed_alone": found[name] for name in names}, "gap_exposed_alone": gap}

    def ranked(self, ranking: np.ndarray) -> dict[str, float]:
        """The metrics of the order that another score, [M], gives to the task's labels, as
        "ranked_NAME"; if not all candidates are exposed, also "ranked_gauc_exposed"."""
        if self.task.kind == "regression":
            rows = self._counted
            given = (self.request[rows], ranking[rows], self.label[rows])
            return {"ranked_correlation": correlation(*given, self._total)}
        measures = {"gauc": gauc, "ndcg@10": ndcg, "recall@10": recall}
        result = {
            f"ranked_{name}": measured(self.request, ranking, self.label, total=self._total)
            for name, measured in measures.items()
        }
        if self._own.any(~self.shown):
            given = (self.request[self.shown], ranking[self.shown], self.label[self.shown])
            result["ranked_gauc_exposed"] = gauc(*given, total=self._total)
        return result

    def against_tags(self) -> dict[str, float]:
        """GAUC of a binary task's positives against the negatives of each tag's value."""
        if self.task.kind == "regression":
            return {}
        result: dict[str, float] = {}
        for name, tagged in self._tags.items():
            kept = (self.label > 0) | tagged
            if self._own.any(self.label[kept] == 0):
                given = (self.request[kept], self.score[kept], self.label[kept])
                result[f"gauc_{name}"] = gauc(*given, self._total)
        return result

    def why_unranked(self) -> str | None:
        """Why no request can be ranked by the task's labels; None if one can."""
        return why_unranked(self.request[self._counted], self.label[self._counted], self._total)
