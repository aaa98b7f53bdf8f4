"""The training loop: steps, checkpoints, curves, validation."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from ifa_torchrec.batch import RankingBatch, Scale
from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.data.order import InTime, PartByPart
from ifa_torchrec.data.remote import full_name
from ifa_torchrec.data.schema import CANDIDATES
from ifa_torchrec.distributed import BatchSize, checkpoint, init_process_group, shard, zero_rows
from ifa_torchrec.distributed.rows import finite
from ifa_torchrec.distributed.saver import CheckpointSaver
from ifa_torchrec.errors import DivergedError, writing
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.modules import predictions
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.calibrate import calibrated, fit_tasks
from ifa_torchrec.training.check_loss import check_loss
from ifa_torchrec.training.curves import Curves
from ifa_torchrec.training.decide import (
    amounts,
    as_options,
    decided,
    steps,
    too_few_steps,
    unknown_items,
)
from ifa_torchrec.training.options import MOST_REQUESTS, TrainConfig, to_json, write_options
from ifa_torchrec.training.own import all_reduce_sum, order_of, sum_over_parts
from ifa_torchrec.training.precision import (
    autocast,
    check_precision,
    compile_dense,
    tf32_where_asked,
)
from ifa_torchrec.training.progress import progress_bar
from ifa_torchrec.training.run import check_log, inputs_of
from ifa_torchrec.training.scoring import measure, predict_own
from ifa_torchrec.training.touched import touched_rows
from ifa_torchrec.training.validations import LAST, VALIDATIONS_FILE, Fitted, Validations, flat

_REPORT_EVERY = 10  # steps


def train(config: TrainConfig) -> dict[str, float]:
    """Train, checkpoint and validate. Called by all ranks.

    Returns:
        "steps", "seconds" (only training); if any step was made, this rank's "events_per_second" and
        "waited" (seconds in which steps waited for batches), "loss" (mean of the last tenth of the
        steps, over all ranks), and "imbalance" (see EventBudgetSampler); if validated, "best_step", the
        step that is used from now on, and its metrics, "valid_gauc" and others.

    Raises:
        LogError: the event log is missing or bad.
        ShardingError: the tables cannot be sharded as asked, or do not fit.
        ConfigError: the options do not match the log, or the device does not support the precision.
        CheckpointError: OUT has checkpoints and --resume was not given, or none of them is complete, or
            they have another configuration. Or another training writes to OUT.
        WriteError: OUT cannot be written; the last checkpoint is unchanged.
        DivergedError: the loss, a weight or a score of `valid` is not finite; the last checkpoint is
            unchanged.

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
        ['auc', 'by_history', 'calibration']
    """
    return Trainer(config).train()


class Trainer:
    """A training: the model, its optimiser, its requests and its position. Used by all ranks.

    ``train`` has an example.

    Args:
        config: TrainConfig.

    Raises:
        LogError, ShardingError, ConfigError: see ``train``.

    Attributes:
        model, optimizer: from ``shard``.
        step: steps made; epoch: epochs finished; taken: requests taken from the current epoch.
        losses: mean over all ranks for each step made since the start or resumption.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.device = init_process_group()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        check_precision(config.precision, self.device)
        self.log = EventLog(config.data, self._shard())
        self._scales, self._unknown = self._of_log(config)
        self.dataset = RankingDataset(
            self.log, "train", config.history_length, self._unknown, config.seed
        )
        self._given, found = config, amounts(config, self.dataset)
        self.config = config = decided(config, self.dataset, found)
        check_loss(self.dataset, config.loss, self.rank)
        self._steps_in_all = steps(config, *found)
        requests_a_batch = config.max_requests or MOST_REQUESTS
        self.sampler = EventBudgetSampler(
            self.dataset.histories,
            config.max_events,
            requests_a_batch,
            seed=self._order(),
            shard=(self.rank, self.world),
        )
        torch.manual_seed(config.seed + dist.get_rank())  # ranks initialise different shards of tables
        model = build_model(self.log.schema, config, self._scales)
        self._model_config = model.config
        self.model, self.optimizer = shard(
            DLRM_IFATrain(model, config.loss, across_ranks=True),
            self.device,
            config.optimizers,
            config.sharding,
            batch_size(self.dataset, config.max_events, requests_a_batch),
        )
        if config.compile:
            compile_dense(self.model)
        self.step = self.epoch = self.taken = 0
        self._in_pass = 0  # steps made in the sampler's current pass
        self.losses: list[float] = []
        self._unread: list[torch.Tensor] = []  # read in batches: reading waits for the device
        self._events, self._seconds, self._start, self._waited = 0, 0.0, 0.0, 0.0
        self._checkpoints = config.out / "checkpoints"
        self._curves: Curves | None = None  # on rank 0
        # a position in the data is only valid for the same data
        self._belongs_to = {
            **to_json(config.fixed()),
            "log": self.log.fingerprint(),
            **inputs_of(self.log),
        }

    def train(self) -> dict[str, float]:
        """Train to the end of the last epoch, from the last checkpoint if there is one."""
        with checkpoint.locked(self.config.out), CheckpointSaver(self._checkpoints) as self._saver:
            self._begin()
            self._validate_if_due()  # a run may have been stopped just before its last validation
            while self.epoch < self.config.epochs and not self._is_enough():
                self._train_to_validation()
            self._bar.close()
            if self._curves is not None:
                self._curves.close()
        result = self._best()
        if self.losses:
            tail = self.losses[-max(len(self.losses) // 10, 1) :]
            result["loss"] = sum(tail) / len(tail)
            result["events_per_second"] = self._events / self._seconds
            result["waited"] = self._waited
            result["imbalance"] = self.sampler.imbalance()
        return {"steps": self.step, "seconds": self._seconds, **result}

    def train_step(self, batches: Iterator[RankingBatch]) -> None:
        """Make one step on the rank's next batch."""
        set_learning_rate(self.optimizer, self.config, self.step, self._progress())
        with tf32_where_asked(self.config.precision):
            self._pipeline.progress(batches)
        self.step += 1

    def validate(self) -> tuple[dict[str, float], Fitted]:
        """Measure the split `valid`.

        Returns:
            Its metrics, named "TASK_METRIC" for several tasks, and the calibration fitted on it; the
            same on all ranks.
        """
        metrics, fitted = self._measured("valid", {})
        if self._curves is not None:
            self._curves.show({f"valid/{name}": value for name, value in metrics.items()}, self.step)
        return metrics, fitted

    def _measured(self, split: str, calibration: Fitted) -> tuple[dict[str, float], Fitted]:
        """What ``validate`` returns, for any split, with metrics of calibrated logits."""
        config = self.config
        dataset = RankingDataset(self.log, split, config.history_length)
        budget = config.max_events, config.scored_requests
        own, scores, _ = predict_own(self.model, dataset, self.device, *budget)
        tasks = self._model_config.tasks
        # in the labels' units: a finite logit of a log-scaled task can be an infinite number
        predicted = predictions(torch.from_numpy(scores), tasks)
        all_are = bool(np.isfinite(scores).all() and predicted.isfinite().all())
        self._check_finite(all_are, f"a prediction of the split {split!r}")
        metrics = flat(measure(own, calibrated(scores, tasks, calibration), tasks), len(tasks))
        found = [(metrics, fit_tasks(own, scores, tasks, config.loss) if config.calibrate else {})]
        dist.broadcast_object_list(found)  # ranks on other processors may differ in the last digit
        return found[0]

    def _is_due(self) -> bool:
        """Whether to validate after this step: at an epoch's end, and every ``validate_every`` steps."""
        config, every = self.config, self.config.validate_every
        due = self.step and (not self.taken or (every and self.step % every == 0))
        return bool(due) and config.validate and "valid" in self.log.splits

    def _validate_if_due(self) -> None:
        if self._is_due() and self.step not in self._validations.by_step:
            metrics, fitted = self.validate()
            self._saver.wait()  # a validated step must have its checkpoint
            self._validations.by_step[self.step] = metrics
            self._validations.fitted[self.step] = fitted
            checkpoint.on_rank_0(self._validations.write)

    def _is_enough(self) -> bool:
        """Whether the last ``patience`` validations brought no improvement."""
        patience = self.config.patience
        return patience is not None and self._validations.without_gain >= patience

    def _best(self) -> dict[str, float]:
        """The metrics of the step that is used, as "valid_METRIC", and "best_step"; empty without
        validations."""
        if not self._validations.by_step:
            return {}
        best = self._validations.best
        step = max(self._validations.by_step) if best is None else best
        metrics = self._validations.by_step[step]
        return {"best_step": step, **{f"valid_{name}": value for name, value in metrics.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The position and the configuration, as JSON; stored with the weights in a checkpoint."""
        return {
            "step": self.step,
            **self.sampler.state_dict(self._in_pass),
            "config": self._belongs_to,
            "data": full_name(self.log.place),
            "scales": {name: dataclasses.asdict(s) for name, s in self._scales.items()},
        }

    def _begin(self) -> None:
        """Load the last checkpoint, write the options, open the progress bar and the curves."""
        config, folder = self.config, self._checkpoints
        if checkpoint.checkpoints_of_rank_0(folder):
            if not config.resume:
                raise checkpoint.CheckpointError(
                    f"{folder} has checkpoints: give --resume to continue, or another --out"
                )
            check_log(folder, self.log, self._belongs_to)
            progress = checkpoint.load(folder, self.model, self.optimizer, self._belongs_to)
            self.sampler.load_state_dict(progress)
            self.step, self.epoch, self.taken = (progress[k] for k in ("step", "epoch", "request"))
        else:
            self._initialise()
        self._validations = Validations.read(config.out, config.keep_best or LAST, self.step)
        checkpoint.on_rank_0(self._open)
        self._bar = progress_bar(
            self.rank,
            total=config.epochs * self.sampler.order.requests,
            initial=self.epoch * self.sampler.order.requests + self.taken,
            desc=config.out.name,
            unit="request",
        )

    def _open(self) -> None:
        """On rank 0: write the options, say how the training starts and open the curves."""
        write_options(self.config)
        if self.config.resume:
            found = f"resuming from step {self.step}" if self.step else self._nothing_found
            print(f"{self._checkpoints}: {found}", file=sys.stderr)
        self._tell()
        self._curves = Curves(self.config.out / "tensorboard", self.step + 1)

    _nothing_found = "no checkpoint here; starting"

    def _tell(self) -> None:
        """Print the options that were chosen, and a warning if there are few steps."""
        if options := as_options(self._given, self.config):
            print(f"decided from the log: {options}", file=sys.stderr)
        if few := too_few_steps(self.config, self._steps_in_all):
            print(few, file=sys.stderr)

    def _shard(self) -> tuple[int, int]:
        """The share of the log's parts that this rank opens."""
        return self.rank, self.world

    def _of_log(self, config: TrainConfig) -> tuple[Mapping[str, Scale], float]:
        """The scales that standardise numbers, and the share of items that are made unknown."""
        return self.log.scales, unknown_items(self.log, config)

    def _order(self) -> int | InTime | PartByPart | None:
        """The order of the requests, for the sampler."""
        return order_of(self.dataset, self.config.seed)

    def _progress(self) -> float:
        """The share of all requests taken so far, with which the dense learning rate falls."""
        return (self.epoch + self.taken / self.sampler.order.requests) / self.config.epochs

    def _initialise(self) -> None:
        """Start without a checkpoint: set the rows that no step will use to 0."""
        self._keep_vocabulary()
        histories = bool(self._model_config.history_keys)
        touched = touched_rows(self.dataset, histories, self._unknown > 0)
        if self.config.managed_rows:  # ids get rows in the order in which they occur
            schema = self.log.schema
            pooled = (*schema.context_features, *schema.context_lists, *schema.item_lists)
            touched = {name: touched[name] for name in pooled}
        zero_rows(self.model, {f"{name}_table": ~rows for name, rows in touched.items()})

    def _keep_vocabulary(self) -> None:
        """Store the log's vocabulary with the run, over anything that a killed run left."""

        def keep() -> None:
            shutil.rmtree(self.config.out / "vocabulary", ignore_errors=True)
            with writing(self.config.out):
                (self.config.out / VALIDATIONS_FILE).unlink(missing_ok=True)
                self.log.vocabulary.save(self.config.out)

        checkpoint.on_rank_0(keep)

    def _forward(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """The pipeline's call of the model on a RankingBatch; collects the values for the curves."""
        self._events += len(batch.history_age)
        with autocast(self.config.precision, self.device):
            loss, output = self.model(batch)
        mean = loss.detach() / self.world  # see DLRM_IFATrain, across_ranks
        dist.all_reduce(mean)
        self._unread.append(mean)
        return loss, output

    def _train_to_validation(self) -> None:
        """Train to the next validation, at the latest to the end of the epoch."""
        every = self.config.validate_every
        # a new pipeline each time: TorchRec's does not continue with batches that it has prefetched
        self._pipeline = TrainPipelineSparseDist(
            self.model, self.optimizer, self.device, custom_model_fwd=self._forward
        )
        self.sampler.load_state_dict(self.sampler.state_dict(self._in_pass))
        self._in_pass = 0
        self.dataset.set_epoch(self.epoch)
        loader = make_loader(self.dataset, self.sampler)
        with closing(iter(loader)) as batches:
            self._start = time.perf_counter()
            while True:
                self.train_step(batches)
                self._in_pass += 1
                taken = self.sampler.requests_taken(self._in_pass)
                self._bar.update(taken - self.taken)
                last = taken == self.sampler.order.requests
                self.epoch, self.taken = (self.epoch + 1, 0) if last else (self.epoch, taken)
                measured = last or (every is not None and self.step % every == 0)
                save = measured or self.step % self.config.checkpoint_every == 0
                if save or self.step % _REPORT_EVERY == 0:
                    self._report()
                if save:
                    self._save()
                if measured:
                    break
        self._waited += loader.waited
        self._pipeline.detach()
        self._validate_if_due()

    def _save(self) -> None:
        self._seconds += time.perf_counter() - self._start
        self._check_finite(finite(self.model), "a weight")
        self._saver.save(self.model, self.optimizer, self.state_dict(), self._validations.best)
        self._start = time.perf_counter()

    def _check_finite(self, all_are: bool, what: str) -> None:
        """Raise a DivergedError on all ranks if ``all_are`` is false on any of them."""
        if all_reduce_sum(np.array([not all_are]))[0]:
            raise _diverged(self.step, f"{what} is not finite", self._checkpoints)

    def _report(self) -> None:
        self.losses += _finite(self._unread, self.step, self._checkpoints)
        self._unread.clear()
        latest = self.losses[-10:]
        mean = sum(latest) / len(latest)
        self._bar.set_postfix(loss=f"{mean:.4f}")
        if self._curves is not None:
            speed = self._events / (self._seconds + time.perf_counter() - self._start)
            self._curves.show({"train/loss": mean, "train/events_per_second": speed}, self.step)


def batch_size(dataset: RankingDataset, max_events: int, max_requests: int) -> BatchSize:
    """A rank's largest batch, for the planner: the budget, and candidates in proportion to the requests.
    Called by all ranks."""
    found = np.array([len(dataset), len(dataset.requests[CANDIDATES])])
    requests, candidates = sum_over_parts(dataset.log)(found).tolist()
    return BatchSize(max_requests, max_events, math.ceil(candidates / max(requests, 1) * max_requests))


def _finite(losses: list[torch.Tensor], step: int, folder: Path) -> list[float]:
    """The latest losses as numbers; the last is that of ``step``.

    Raises:
        DivergedError: one of them is not finite.
    """
    read = torch.stack(losses).tolist()
    for number, loss in enumerate(read, start=step - len(read) + 1):
        if not math.isfinite(loss):
            raise _diverged(number, f"the loss is {loss}", folder)
    return read


def _diverged(step: int, what: str, folder: Path) -> DivergedError:
    return DivergedError(
        f"step {step}: {what}; train again with lower learning rates; the last checkpoint in {folder}, "
        "if there is one, is complete"
    )


def set_learning_rate(
    optimizer: CombinedOptimizer, config: TrainConfig, step: int, progress: float
) -> None:
    """Set the dense learning rate: linear warm-up, linear decay to 5%. The tables' rate is constant.

    Args:
        optimizer: from ``shard``.
        config: TrainConfig.
        step: steps made so far.
        progress: share of all epochs' requests taken so far, 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps or 0, 1))
    rate = config.optimizers.dense_rate * warm * max(0.05, 1 - progress)
    parts: dict[str, torch.optim.Optimizer] = dict(optimizer.optimizers)
    for group in parts["dense"].param_groups:
        group["lr"] = rate
