"""Score the requests of a split with a model, and measure the ranking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ifa_torchrec.data import EventBudgetSampler, LogSchema, RankingDataset, make_loader
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.data.schema import EXPOSED, OFFSETS
from ifa_torchrec.modules import Task, predictions, ranking_score
from ifa_torchrec.modules.tasks import ranking_weights
from ifa_torchrec.training.groups import by_history, new_items
from ifa_torchrec.training.metrics import (
    correlation,
    gauc,
    ndcg,
    ranking_metrics,
    recall,
    regression_metrics,
    why_unranked,
)
from ifa_torchrec.training.progress import progress_bar


@torch.no_grad()
def predict(
    model: nn.Module, dataset: RankingDataset, device: torch.device, max_events: int, max_requests: int
) -> tuple[np.ndarray, float]:
    """Logits of every candidate of a split, in the split's order. Called by all ranks.

    Args:
        model: a sharded DLRM_IFATrain.
        dataset: the split.
        device: this rank's.
        max_events, max_requests: budget of a batch.

    Returns:
        [M, T] float32 on every rank, and this rank's milliseconds a request, loading included.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sampler = EventBudgetSampler(dataset.history_lengths, max_events, max_requests, shard=(rank, world))
    loader = make_loader(dataset, sampler)
    training = model.training
    model.eval()
    start = time.perf_counter()
    parts = []
    bar = progress_bar(rank, loader, desc="score", unit="batch", leave=False)
    for indices, batch in zip(sampler, bar, strict=True):
        _, (_, logits, _) = model(batch.to(device, non_blocking=True))
        requests = [index for index in indices if index != EMPTY_REQUEST]
        parts.append((requests, logits.float().cpu().numpy()))
    elapsed = time.perf_counter() - start
    model.train(training)
    gathered = [parts] * world
    if world > 1:
        dist.all_gather_object(gathered, parts)
    tasks = dataset.log.schema.tasks
    result = np.empty((len(dataset.requests["candidates"]), len(tasks)), np.float32)
    for requests, logits in (pair for rank_parts in gathered for pair in rank_parts):
        result[dataset.candidate_rows(requests)[0]] = logits
    return result, 1000 * elapsed / max(sum(len(requests) for requests, _ in parts), 1)


@torch.no_grad()
def time_per_request(
    models: dict[str, nn.Module],
    dataset: RankingDataset,
    device: torch.device,
    batches: int = 30,
    max_events: int = 32768,
    max_requests: int = 32,
) -> dict[str, float]:
    """What a request costs each model, the models taking turns; one process.

    From the batch in memory to the scores: lookup, attention, dense layers.

    Args:
        models: sharded DLRM_IFATrains by name.
        dataset: where requests are drawn from, in an order of its own.
        device: the models'.
        batches: batches timed.
        max_events, max_requests: budget of a batch.

    Returns:
        Milliseconds a request, the median over batches.
    """
    order = np.random.default_rng(0).permutation(len(dataset))
    sampler = EventBudgetSampler(dataset.history_lengths[order], max_events, max_requests)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _, indices in zip(range(batches), sampler, strict=False):
        batch = dataset[order[indices]].to(device)
        for name, model in models.items():
            training = model.training
            model.eval()
            start = time.perf_counter()
            model(batch)[0].item()
            times[name].append(1000 * (time.perf_counter() - start) / len(indices))
            model.train(training)
    return {name: float(np.median(values)) for name, values in times.items()}


def measure(
    dataset: RankingDataset,
    scores: np.ndarray,
    tasks: Sequence[Task] | None = None,
    by: tuple[str, ...] = (),
    apart: bool = False,
) -> dict[str, Any]:
    """The metrics of one split.

    Args:
        dataset: the split.
        scores: [M, T], the logits of ``tasks``, or any scores.
        tasks: the model's; None where the scores are none of a model's and only their order counts.
        by: context features; "by" then holds the metrics of each value's requests.
        apart: whether to measure new and known items apart, and requests by their histories' lengths.

    Returns:
        For a log of one task its numbers; for more, a dict of them by task. Of a binary task
        ``ranking_metrics``'; of a regression ``regression_metrics``', over the exposed candidates alone,
        since nobody knows the numbers of the others. Where a task does not rank alone, "ranked_gauc" and
        so on say how the score that ranks orders that task's labels.
        For each candidate tag's value V of a binary task: "gauc_V", of the positives against V's
        negatives.
        With ``apart`` "items", the numbers of "new" and of "known" candidates, and of a binary task
        "by_history" (see ``by_history``).
    """
    schema: LogSchema = dataset.log.schema
    known = tasks or tuple(Task(name, kind) for name, kind in schema.tasks.items())
    # of no model: each column is of its own task alone
    ranking = ranking_score(torch.from_numpy(scores), tasks).numpy() if tasks else None
    result: dict[str, dict[str, Any]] = {}
    for task, score in zip(known, scores.T, strict=True):
        of_task = TaskScores(dataset, task, score, logits=tasks is not None)
        metrics: dict[str, Any] = of_task.metrics()
        if ranking is not None and ranking_weights(known).keys() != {task.name}:
            metrics |= {f"ranked_{name}": value for name, value in of_task.order(ranking).items()}
        metrics |= of_task.against_tags()
        for feature in by:
            of_candidate = np.asarray(dataset.requests[feature])[of_task.request]
            metrics.setdefault("by", {})[feature] = {
                int(value): of_task.metrics(of_candidate == value) for value in np.unique(of_candidate)
            }
        if apart:
            new = new_items(dataset)
            metrics["items"] = {
                name: {"candidates": int(kept.sum()), **of_task.metrics(kept)}
                for name, kept in (("new", new), ("known", ~new))
            }
            if task.kind == "binary" and tasks:
                metrics["by_history"] = by_history(dataset, score, of_task.label)
        result[task.name] = metrics
    return result if len(result) > 1 else next(iter(result.values()))


class TaskScores:
    """The scores and labels of one task of a split, and what they are worth.

    Args:
        dataset: the split.
        task: Task, of the log.
        score: [M].
        logits: whether the scores are the task's logits.

    Attributes:
        request: [M] request number of each candidate; label: [M].
    """

    def __init__(self, dataset: RankingDataset, task: Task, score: np.ndarray, logits: bool) -> None:
        self.task, self.score, self._logits = task, score, logits
        self.request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests[OFFSETS]))
        self.label = np.asarray(dataset.requests[task.name])
        self._tags = {
            name: (np.asarray(dataset.requests[tag]) == value)
            for tag, values in dataset.log.schema.candidate_tags.items()
            for value, name in enumerate(values)
        }
        regression = task.kind == "regression"
        self._counted = (
            np.asarray(dataset.requests[EXPOSED]) if regression else np.ones_like(score, bool)
        )

    def metrics(self, kept: np.ndarray | None = None) -> dict[str, Any]:
        """Of all candidates, or of those that are kept, [M] bool."""
        kept = self._counted if kept is None else self._counted & kept
        request, score, label = self.request[kept], self.score[kept], self.label[kept]
        if self.task.kind == "binary":
            return {**ranking_metrics(request, score, label, self._logits)}
        if not self._logits:
            return {"correlation": correlation(request, score, label)}
        said = predictions(torch.from_numpy(score[:, None].copy()), (self.task,))
        return {**regression_metrics(request, said[:, 0].numpy(), label)}

    def order(self, ranking: np.ndarray) -> dict[str, float]:
        """How another score, [M], orders the task's labels."""
        if self.task.kind == "regression":
            rows = self._counted
            return {"correlation": correlation(self.request[rows], ranking[rows], self.label[rows])}
        measures = {"gauc": gauc, "ndcg@10": ndcg, "recall@10": recall}
        return {k: measured(self.request, ranking, self.label) for k, measured in measures.items()}

    def against_tags(self) -> dict[str, float]:
        """GAUC of a binary task's positives against the negatives of each tag's value."""
        if self.task.kind == "regression":
            return {}
        result: dict[str, float] = {}
        for name, tagged in self._tags.items():
            kept = (self.label > 0) | tagged
            if (self.label[kept] == 0).any():
                result[f"gauc_{name}"] = gauc(self.request[kept], self.score[kept], self.label[kept])
        return result

    def why_unranked(self) -> str | None:
        """Why no request can be ranked by the task's labels; None where one can."""
        return why_unranked(self.request[self._counted], self.label[self._counted])
