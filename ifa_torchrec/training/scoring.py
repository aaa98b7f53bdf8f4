"""Score the requests of a split with a model, and measure the ranking."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ifa_torchrec.data import EventBudgetSampler, LogSchema, RankingDataset, make_loader
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.training.metrics import gauc, ranking_metrics


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
    bar = tqdm(loader, desc="score", unit="batch", leave=False, disable=rank != 0)
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
    by: tuple[str, ...] = (),
    probabilities: bool = True,
) -> dict[str, Any]:
    """The metrics of one split.

    Args:
        dataset: the split.
        scores: [M, T], logits or any scores.
        by: context features; "by" then holds the metrics of each value's requests.
        probabilities: whether the scores are logits (see ``ranking_metrics``).

    Returns:
        For a log of one task ``ranking_metrics``' numbers; for more, a dict of them by task.
        For each candidate tag's value V: "gauc_V", of the positives against V's negatives.
    """
    offsets = dataset.requests["candidate_offsets"]
    request = np.repeat(np.arange(len(dataset)), np.diff(offsets))
    schema: LogSchema = dataset.log.schema
    result = {}
    for task, score in zip(schema.tasks, scores.T, strict=True):
        label = np.asarray(dataset.requests[task])
        metrics: dict[str, Any] = ranking_metrics(request, score, label, probabilities)
        for tag, values in schema.candidate_tags.items():
            for value, name in enumerate(values):
                kept = (label > 0) | (dataset.requests[tag] == value)
                if (label[kept] == 0).any():
                    metrics[f"gauc_{name}"] = gauc(request[kept], score[kept], label[kept])
        for feature in by:
            of_candidate = np.asarray(dataset.requests[feature])[request]
            metrics.setdefault("by", {})[feature] = {
                int(value): ranking_metrics(
                    request[of_candidate == value],
                    score[of_candidate == value],
                    label[of_candidate == value],
                    probabilities,
                )
                for value in np.unique(of_candidate)
            }
        result[task] = metrics
    return result if len(result) > 1 else next(iter(result.values()))
