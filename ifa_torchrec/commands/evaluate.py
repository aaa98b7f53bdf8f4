"""Score a split with a trained model and measure the ranking.

    ifa evaluate --run runs/mine --split test
    torchrun --nproc-per-node 2 -m ifa_torchrec evaluate -- --run runs/mine --split test

Under torchrun the ranks share the requests, and the metrics are of all of them. (The "--" is needed:
torchrun would take --run for its own --run-path.) Rank 0 writes the metrics as JSON to standard output
and to a file, and as a readable table to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch.distributed as dist
import tyro

from ifa_torchrec.commands.command_line import result_as_json
from ifa_torchrec.data.schema import EXPOSED
from ifa_torchrec.data.synthetic_truth import SetTruth, truth_of
from ifa_torchrec.errors import ConfigError, writing
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.modules import Task
from ifa_torchrec.serving import quantize_tables
from ifa_torchrec.training.groups import shares
from ifa_torchrec.training.metrics_table import as_table
from ifa_torchrec.training.own import OwnRequests
from ifa_torchrec.training.reliability import draw, reliability
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.scoring import TaskScores, measure, predict_alone, predict_own
from ifa_torchrec.training.sets import best_by_score, chosen_one_by_one, measure_sets, rewards


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``ifa evaluate``."""

    run: Path
    """Folder of a training run (its --out)."""
    split: str = "test"
    """Split whose requests are scored."""
    data: str | Path | None = None
    """Event log, a folder or a URI; by default the log that the run was trained on."""
    by: tuple[str, ...] = ()
    """Context features: also measure the requests of each of their values."""
    set_size: int | None = None
    """Also measure sets of this many candidates that the model would show: the best by their own
    scores and, if it was trained for that (ifa train --candidate-set.generate), sets chosen one by
    one."""
    picture: bool = False
    """Draw the reliability of binary tasks, predictions against labels, to RUN/reliability-SPLIT.png.
    Needs the extra `demo`."""
    int8: bool = False
    """Round the tables to 8 bits, as ``ifa serve --int8`` does; each rank has all tables."""

    def __post_init__(self) -> None:
        if self.set_size is not None and self.set_size < 1:
            raise ConfigError(f"--set-size must be at least 1, got {self.set_size}")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Load a run's best checkpoint, or its last, and measure a split; rank 0 writes
    RUN/metrics-SPLIT.json, or metrics-SPLIT-int8.json.

    Returns:
        ``measure``'s metrics, also for new and known items separately; "shares" of ids that the model
        does not know; with a set size "sets", ``measure_sets``'s metrics for "topk" and "greedy";
        "reliability" of each binary task; "notes", the reason for each task whose ranking cannot be
        measured; "ms_per_request"; and the checkpoint's "step".

    Raises:
        CheckpointError: the run has no checkpoint.
        LogError: the event log or the split does not exist.
        WriteError: RUN cannot be written.
    """
    return _evaluate(config)[0]


def _evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], tuple[Task, ...]]:
    """What ``evaluate`` returns, and the model's tasks."""
    run = load_run(config.run, config.data, sharded=not config.int8, whole_log=False)
    if config.int8:
        run.model = DLRM_IFATrain(quantize_tables(run.dlrm))
    known = list(run.log.schema.context_features)
    for feature in config.by:
        if feature not in known:
            raise ConfigError(
                f"--by {feature}: no such context feature; the context features are {known}"
            )
    dataset = run.dataset(config.split)
    budget = run.config.max_events, run.config.scored_requests
    own, scores, milliseconds = predict_own(run.model, dataset, run.device, *budget)
    tasks = run.dlrm.config.tasks
    alone, shown = None, own.column(EXPOSED)
    if run.dlrm.config.candidate_set.attention != "none" and own.any(~shown):
        alone = predict_alone(run.dlrm.eval(), dataset, run.device, *budget)
    metrics = measure(own, scores, tasks, config.by, apart=True, alone=alone)
    metrics["shares"] = shares(dataset)
    metrics["reliability"] = {
        task.name: reliability(logits[shown], own.column(task.name)[shown], own.total)
        for task, logits in zip(tasks, scores.T, strict=True)
        if task.kind == "binary"
    }
    metrics["notes"] = notes(own, scores, tasks)
    if config.set_size is not None:
        metrics["sets"] = sets(run, own, truth_of(run.log, config.split), scores, config.set_size)
    metrics["ms_per_request"] = milliseconds
    metrics["step"] = run.step
    if dist.get_rank() == 0:
        name = f"metrics-{config.split}{'-int8' if config.int8 else ''}.json"
        with writing(config.run / name):
            (config.run / name).write_text(result_as_json(metrics))
        if config.picture:
            draw(metrics["reliability"], config.run / f"reliability-{config.split}.png")
    return metrics, tasks


def sets(
    run: Run, own: OwnRequests, truth: SetTruth | None, scores: np.ndarray, k: int
) -> dict[str, Any]:
    """The metrics of sets of k candidates, by each strategy that the model has, over all ranks."""
    model = run.dlrm.eval()
    chosen = {"topk": best_by_score(own, scores, model.config.tasks, k)}
    if model.config.candidate_set.generate:
        budget = run.config.max_events, run.config.scored_requests
        chosen["greedy"] = chosen_one_by_one(model, own.dataset, run.device, budget, k)
    measured = {strategy: measure_sets(own, place, k) for strategy, place in chosen.items()}
    if truth is not None:
        known = rewards(own, chosen, k, truth)
        measured = {strategy: of | known[strategy] for strategy, of in measured.items()}
    return measured


def notes(own: OwnRequests, scores: np.ndarray, tasks: Sequence[Task]) -> dict[str, str]:
    """The reason for each task whose ranking cannot be measured on a split, by task name."""
    reasons = {
        task.name: TaskScores(own, task, score, logits=True).why_unranked()
        for task, score in zip(tasks, scores.T, strict=True)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def main(config: Annotated[EvaluateConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    metrics, tasks = _evaluate(config)
    if dist.get_rank() == 0:
        print(as_table(metrics, tasks), file=sys.stderr)
        print(result_as_json(metrics))
    dist.destroy_process_group()


main.__doc__ = __doc__
