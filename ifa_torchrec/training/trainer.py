"""The training loop: steps, checkpoints, curves, validation."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.data.scales import warn_of_unscaled
from ifa_torchrec.distributed import BatchSize, checkpoint, init_process_group, shard
from ifa_torchrec.errors import DivergedError, writing
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig, _to_json
from ifa_torchrec.training.run import _check_log, _inputs
from ifa_torchrec.training.scoring import measure, predict


def train(config: TrainConfig) -> dict[str, float]:
    """Train, checkpoint and validate. Called by all ranks.

    Returns:
        "steps", "seconds" (training alone); if there was a step to make, "events_per_second"
        (this rank's), "loss" (mean of the last tenth, all ranks'), and "imbalance" (see
        EventBudgetSampler); if validated, "valid_gauc" and others.

    Raises:
        LogError: the event log is missing or bad.
        ShardingError: the tables cannot be sharded as asked, or do not fit.
        CheckpointError: OUT holds checkpoints and --resume was not given, or none of them is whole,
            or they are of another configuration. Or another training writes to OUT.
        PlaceError: OUT cannot be written; the last checkpoint is left as it was.
        DivergedError: the loss is not finite; the last checkpoint is left as it was.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.trainer import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> days = pd.date_range("2024-01-01", periods=4)
        >>> requests = pd.DataFrame({"user": [1, 1], "time": days[2:], "candidates": [[0, 2], [1, 2]],
        ...     "exposed": [[True, True]] * 2, "label": [[1, 0]] * 2})
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 3}),
        ...     events=pd.DataFrame({"user": 1, "item": [0, 1, 0, 1], "time": days}),
        ...     requests={"train": requests, "test": requests})
        >>> config = TrainConfig(folder / "log", folder / "run", ifa=IFAConfig(8, num_heads=2))
        >>> train(config)["steps"]
        1
        >>> sorted(evaluate(EvaluateConfig(folder / "run")))[:3]
        ['auc', 'calibration', 'gauc']
    """
    device = init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    log = EventLog(config.data)
    dataset = RankingDataset(log, "train", config.history_length)
    if rank == 0:
        warn_of_unscaled(dataset.requests, [*log.schema.dense_features, *log.schema.candidate_dense])
    sampler = EventBudgetSampler(
        dataset.history_lengths,
        config.max_events,
        config.max_requests,
        seed=config.seed,
        shard=(rank, world),
    )
    checkpoint.seed_everything(config.seed)
    model, optimizer = shard(
        DLRM_IFATrain(build_model(log.schema, config), config.loss, across_ranks=True),
        device,
        config.optimizers,
        config.sharding,
        batch_size(dataset, config),
    )

    with checkpoint.locked(config.out):
        return _train(config, log, dataset, sampler, model, optimizer, device)


def _train(
    config: TrainConfig,
    log: EventLog,
    dataset: RankingDataset,
    sampler: EventBudgetSampler,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    device: torch.device,
) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = config.out / "checkpoints"
    # A position in the data means nothing for other data.
    belongs_to = {**_to_json(config.fixed()), "log": log.fingerprint(), **_inputs(log)}
    step, first_epoch, taken = 0, 0, 0
    if checkpoint.checkpoints_of_rank_0(folder):
        if not config.resume:
            raise checkpoint.CheckpointError(
                f"{folder} holds checkpoints: give --resume to go on, or another --out"
            )
        _check_log(folder, log, whole=True)
        progress = checkpoint.load(folder, model, optimizer, belongs_to)
        step, first_epoch, taken = progress["step"], progress["epoch"], progress["request"]
    if rank == 0:
        if config.resume:
            found = f"going on from step {step}" if step else "no checkpoint here; starting"
            print(f"{folder}: {found}", file=sys.stderr)
        saved = dataclasses.replace(config, data=config.data.resolve())
        text = json.dumps(_to_json(dataclasses.asdict(saved)), indent=2, allow_nan=False)
        draft = config.out / ".config.json"
        with writing(config.out / "config.json"):
            draft.write_text(text)
            draft.rename(config.out / "config.json")  # whole, also if this is killed
    curves = Curves(config.out / "tensorboard", step) if rank == 0 else None

    losses: list[float] = []
    unread: list[torch.Tensor] = []  # reading a loss waits for the device
    events, seconds, imbalance, result = 0, 0.0, 1.0, {}

    def forward(batch: Any) -> tuple[torch.Tensor, Any]:
        """The pipeline's call of the model by a RankingBatch; keeps what the curves show."""
        nonlocal events
        events += len(batch.history_age)
        loss, output = model(batch)
        mean = loss.detach() / world  # see DLRM_IFATrain, across_ranks
        dist.all_reduce(mean)
        unread.append(mean)
        return loss, output

    pipeline = TrainPipelineSparseDist(model, optimizer, device, custom_model_fwd=forward)
    bar = tqdm(
        total=config.epochs * len(dataset),
        initial=first_epoch * len(dataset) + taken,
        desc=config.out.name,
        unit="request",
        disable=rank != 0,
    )
    for epoch in range(first_epoch, config.epochs):
        sampler.start_at(epoch, taken)
        batches = iter(make_loader(dataset, sampler))
        start = time.perf_counter()
        for number in range(1, len(sampler) + 1):
            set_learning_rate(optimizer, config, step, (epoch + taken / len(dataset)) / config.epochs)
            pipeline.progress(batches)
            step += 1
            bar.update(sampler.requests_taken(number) - taken)
            taken = sampler.requests_taken(number)
            last = number == len(sampler)
            save = step % config.checkpoint_every == 0 or last
            if step % 10 == 0 or save:
                losses += _finite(unread, step, folder)
                unread.clear()
                mean = sum(losses[-10:]) / len(losses[-10:])
                bar.set_postfix(loss=f"{mean:.4f}")
                if curves is not None:
                    speed = events / (seconds + time.perf_counter() - start)
                    curves.show({"train/loss": mean, "train/events_per_second": speed}, step)
            if save:
                seconds += time.perf_counter() - start
                position = {"epoch": epoch + last, "request": 0 if last else taken}
                progress = {"step": step, **position, "config": belongs_to}
                progress["data"] = str(log.path.resolve())
                checkpoint.save(folder, model, optimizer, progress)
                start = time.perf_counter()
        imbalance = sampler.imbalance()
        taken = 0
        pipeline.detach()
        result = validate(model, log, config, device, curves, step)
    bar.close()
    if not result:  # the checkpoint was of a run that had nothing left but this
        result = validate(model, log, config, device, curves, step)
    if curves is not None:
        curves.close()
    if losses:
        tail = losses[-max(len(losses) // 10, 1) :]
        result["loss"] = sum(tail) / len(tail)
        result["events_per_second"] = events / seconds
        result["imbalance"] = imbalance
    return {"steps": step, "seconds": seconds, **result}


class Curves:
    """What TensorBoard shows of a run; an error names the folder.

    Args:
        folder: where they lie.
        step: the first; what a killed run wrote after its last checkpoint is not shown twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step)

    def show(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        with writing(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest."""
        with writing(self.folder):
            self._writer.close()


def batch_size(dataset: RankingDataset, config: TrainConfig) -> BatchSize:
    """A rank's largest batch, for the planner: the budget, and as many candidates as usual."""
    requests = max(len(dataset), 1)
    candidates = len(dataset.requests["candidates"]) / requests
    return BatchSize(config.max_requests, config.max_events, math.ceil(candidates * config.max_requests))


def _finite(losses: list[torch.Tensor], step: int, folder: Path) -> list[float]:
    """The latest losses, up to that of ``step``.

    Raises:
        DivergedError: one of them is not finite.
    """
    read = torch.stack(losses).tolist()
    for number, loss in enumerate(read, start=step - len(read) + 1):
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {number}: the loss is {loss}; train anew with lower learning rates; the last "
                f"checkpoint in {folder}, if there is one, is whole"
            )
    return read


def validate(
    model: nn.Module,
    log: EventLog,
    config: TrainConfig,
    device: torch.device,
    curves: Curves | None,
    step: int,
) -> dict[str, float]:
    """Measure the split `valid`, if there is one and the config wants it.

    Returns:
        "valid_METRIC", or for several tasks "valid_TASK_METRIC"; empty if nothing was measured.
    """
    if not config.validate or "valid" not in log.splits:
        return {}
    dataset = RankingDataset(log, "valid", config.history_length)
    scores, _ = predict(model, dataset, device, config.max_events, config.max_requests)
    metrics = measure(dataset, scores)
    if len(log.schema.tasks) > 1:
        metrics = {f"{task}_{k}": v for task, of_task in metrics.items() for k, v in of_task.items()}
    if curves is not None:
        curves.show({f"valid/{name}": value for name, value in metrics.items()}, step)
    return {f"valid_{name}": value for name, value in metrics.items()}


def set_learning_rate(
    optimizer: CombinedOptimizer, config: TrainConfig, step: int, progress: float
) -> None:
    """Warm the dense parameters' rate up, then let it fall in a line to 5%; tables keep theirs.

    Args:
        optimizer: from ``shard``.
        config: TrainConfig.
        step: steps made so far.
        progress: share of all epochs' requests taken so far, 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    rate = config.optimizers.dense_lr * warm * max(0.05, 1 - progress)
    parts: dict[str, torch.optim.Optimizer] = dict(optimizer.optimizers)
    for group in parts["dense"].param_groups:
        group["lr"] = rate
