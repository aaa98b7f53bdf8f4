"""Score a split with a trained model and measure the ranking.

    python -m ifa_torchrec.evaluate --run runs/mine --split test

Under torchrun the ranks share the requests; rank 0 prints and writes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from tqdm import tqdm

from ifa_torchrec.data import EventBudgetSampler, LogSchema, RankingDataset, make_loader
from ifa_torchrec.metrics import gauc, ranking_metrics


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``python -m ifa_torchrec.evaluate``."""

    run: Path
    """Folder of a training run (its --out)."""
    split: str = "test"
    """Requests to score."""
    data: Path | None = None
    """Event log; by default the one the run was trained on."""
    by: tuple[str, ...] = ()
    """Context features: metrics are also given for the requests of each of their values."""


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
        parts.append((indices, logits.float().cpu().numpy()))
    elapsed = time.perf_counter() - start
    model.train(training)
    gathered = [parts] * world
    if world > 1:
        dist.all_gather_object(gathered, parts)
    tasks = dataset.log.schema.tasks
    result = np.empty((len(dataset.requests["candidates"]), len(tasks)), np.float32)
    for indices, logits in (pair for rank_parts in gathered for pair in rank_parts):
        result[dataset.candidate_rows(indices)[0]] = logits
    return result, 1000 * elapsed / max(sum(len(indices) for indices, _ in parts), 1)


def measure(
    dataset: RankingDataset,
    scores: np.ndarray,
    by: tuple[str, ...] = (),
    probabilities: bool = True,
) -> dict:
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
        metrics: dict = ranking_metrics(request, score, label, probabilities)
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


def evaluate(config: EvaluateConfig) -> dict:
    """Load a run's last checkpoint and measure a split; rank 0 writes RUN/metrics-SPLIT.json.

    Returns:
        ``measure``'s numbers, and "ms_per_request".

    Raises:
        CheckpointError: the run has no checkpoint.
        LogError: the event log or the split is not there.
    """
    from ifa_torchrec.train import load_run

    run = load_run(config.run, config.data)
    for feature in config.by:
        if feature not in run.log.schema.context_features:
            raise ValueError(
                f"--by {feature}: no such context feature; there are {list(run.log.schema.context_features)}"
            )
    dataset = RankingDataset(run.log, config.split)
    scores, milliseconds = predict(
        run.model, dataset, run.device, run.config.max_events, run.config.max_requests
    )
    metrics = measure(dataset, scores, config.by)
    metrics["ms_per_request"] = milliseconds
    if dist.get_rank() == 0:
        (config.run / f"metrics-{config.split}.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    metrics = evaluate(config)
    if dist.get_rank() == 0:
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
