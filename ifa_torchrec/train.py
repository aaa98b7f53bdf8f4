"""Train a DLRM_IFA on an event log.

    python -m ifa_torchrec.train --data LOG --out runs/mine
    torchrun --nproc-per-node 2 -m ifa_torchrec.train --data LOG --out runs/mine

Writes OUT/config.json, OUT/checkpoints/ and OUT/tensorboard/. With --resume it goes on from the
last checkpoint, if there is one, at the request where that was written; so the same line starts a
run and restarts it. The number of ranks, the batches' size and the sharding may then be others. While
it runs, no other training can write to OUT.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
)
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

from ifa_torchrec.command_line import as_command, result_as_json
from ifa_torchrec.data import (
    EventBudgetSampler,
    EventLog,
    LogError,
    LogSchema,
    RankingDataset,
    make_loader,
)
from ifa_torchrec.data.scales import warn_of_unscaled
from ifa_torchrec.distributed import (
    BatchSize,
    OptimizerConfig,
    ShardingConfig,
    checkpoint,
    init_process_group,
    shard,
)
from ifa_torchrec.errors import ConfigError, DivergedError, writing
from ifa_torchrec.models import DLRM_IFA, DLRM_IFAConfig, DLRM_IFATrain
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig, IFAConfig
from ifa_torchrec.scoring import measure, predict

EVICTION_INTERVAL = 10
"""Steps after which managed collisions give rows to new ids."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``python -m ifa_torchrec.train``."""

    data: Path
    """Event log to train on (its split `train`)."""
    out: Path
    """Folder of this run."""
    interaction: Literal[
        "ifa",
        "none",
        "mean",
        "softmax",
        "softmax_recent",
        "din",
        "sim",
        "eta",
        "twin",
        "sdim",
        "low_rank",
    ] = "ifa"
    """How candidates meet the history."""
    ifa: IFAConfig = field(default_factory=lambda: IFAConfig(embedding_dim=64, num_heads=2))
    """The sequence interaction; the other interactions use what applies to them."""
    recent_length: int = 50
    """Events that softmax_recent and din (the latest), sim, eta and twin (those found) attend to."""
    search_feature: str | None = None
    """Item feature that sim searches by; by default the last."""
    history_length: int | None = None
    """Latest events of a history that the model is given; None for all."""
    candidate_set: CandidateSetConfig = field(default_factory=CandidateSetConfig)
    """Whether and how the candidates of a request see each other."""
    loss: CandidateSetLossConfig = field(default_factory=CandidateSetLossConfig)
    """Weights of the loss's terms."""
    over_arch_layer_sizes: tuple[int, ...] = (64, 32)
    """Hidden layers over the interactions."""
    managed_rows: dict[str, int] = field(default_factory=dict)
    """Item tables of fewer rows than ids, e.g. item_table 20000: TorchRec's managed collisions give
    rows of their own to the ids that are met often and lately; the others share the last row."""
    table_init: float = 0.3
    """Tables start uniform in plus or minus this."""
    optimizers: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimisers and learning rates."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """Where the tables may lie, e.g. --sharding.tables item_table row_wise."""
    warmup_steps: int = 50
    """Steps in which the dense learning rate rises to its value; it then falls to 5% of it."""
    epochs: int = 1
    """Passes over the requests."""
    max_events: int = 32768
    """Budget of history events a batch and rank."""
    max_requests: int = 32
    """Most requests a batch and rank."""
    validate: bool = True
    """Measure the split `valid`, if there is one, after each epoch."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end in any case."""
    resume: bool = False
    """Go on from the last checkpoint in OUT, if there is one."""
    seed: int = 0
    """Seed of the weights and of the order of the requests."""

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(("epochs", "max_events", "max_requests", "checkpoint_every"), 1)
        at_least |= {"history_length": 1, "recent_length": 1, "warmup_steps": 0, "seed": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if not 0 <= self.table_init < math.inf:
            raise ConfigError(f"--table-init must be a number of at least 0, got {self.table_init}")
        sizes = self.over_arch_layer_sizes
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"--over-arch-layer-sizes: give sizes of at least 1, got {sizes}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed must be below 2^63, got {self.seed}")

    def fixed(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        free = {"data", "out", "resume", "checkpoint_every", "validate"}
        free |= {"max_events", "max_requests", "sharding"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


@dataclass
class Run:
    """A trained model and what it belongs to; ``version`` names its weights."""

    config: TrainConfig
    log: EventLog
    model: nn.Module
    device: torch.device
    version: str

    @property
    def dlrm(self) -> DLRM_IFA:
        """The model without its loss."""
        return next(m for m in self.model.modules() if isinstance(m, DLRM_IFA))

    def dataset(self, split: str) -> RankingDataset:
        """A split as the model takes it."""
        return RankingDataset(self.log, split, self.config.history_length)


def build_model(schema: LogSchema, config: TrainConfig) -> DLRM_IFA:
    """The model for a log: one table an id feature, on the meta device until it is sharded.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.train import TrainConfig, build_model
        >>> schema = LogSchema(item_features={"item": 100}, context_features={"store": 5})
        >>> model = build_model(schema, TrainConfig(data=Path("log"), out=Path("run")))
        >>> model.sequence_arch.embedding_collection.embedding_configs()[0].num_embeddings
        100
    """
    model = DLRM_IFAConfig(
        item_features=tuple(schema.item_features),
        dense_in_features=len(schema.dense_features),
        candidate_dense_in_features=len(schema.candidate_dense),
        interaction=config.interaction,
        ifa=config.ifa,
        recent_length=config.recent_length,
        search_feature=config.search_feature,
        candidate_set=config.candidate_set,
        over_arch_layer_sizes=config.over_arch_layer_sizes,
        num_tasks=len(schema.tasks),
    )
    table: dict[str, Any] = {
        "embedding_dim": config.ifa.embedding_dim,
        "init_fn": partial(nn.init.uniform_, a=-config.table_init, b=config.table_init),
    }
    meta = torch.device("meta")
    bags = [
        EmbeddingBagConfig(name=f"{f}_table", num_embeddings=rows, feature_names=[f], **table)
        for f, rows in schema.context_features.items()
    ]
    sequences = [
        EmbeddingConfig(
            name=f"{f}_table",
            num_embeddings=rows,
            feature_names=[prefix + f for prefix in model.prefixes],
            **table,
        )
        for f, rows in schema.item_features.items()
    ]
    tables = EmbeddingCollection(tables=sequences, device=meta)
    return DLRM_IFA(
        EmbeddingBagCollection(tables=bags, device=meta) if bags else None,
        _managed(tables, config.managed_rows) if config.managed_rows else tables,
        model,
    )


def _managed(tables: EmbeddingCollection, rows: dict[str, int]) -> ManagedCollisionEmbeddingCollection:
    """Tables of so many rows; those not named keep a row for each id, and one for ids not met yet."""
    configs = {table.name: table for table in tables.embedding_configs()}
    for name, count in rows.items():
        if name not in configs or not 2 <= count <= configs[name].num_embeddings:
            ids = {name: table.num_embeddings for name, table in configs.items()}
            raise ConfigError(
                f"--managed-rows: {name} {count}: name an item table and at least 2 rows, at most as "
                f"many as it has ids; there are {ids}"
            )
    managed = [
        dataclasses.replace(table, num_embeddings=rows.get(name, table.num_embeddings + 1))
        for name, table in configs.items()
    ]
    modules: dict[str, ManagedCollisionModule] = {
        table.name: MCHManagedCollisionModule(
            zch_size=table.num_embeddings,
            device=torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(),
            eviction_interval=EVICTION_INTERVAL,
            input_hash_size=configs[table.name].num_embeddings,
            buckets=dist.get_world_size() if dist.is_initialized() else 1,  # a rank's ids are its own
        )
        for table in managed
    }
    return ManagedCollisionEmbeddingCollection(
        EmbeddingCollection(tables=managed, device=torch.device("meta")),
        ManagedCollisionCollection(modules, managed),
    )


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
        >>> from ifa_torchrec.evaluate import EvaluateConfig, evaluate
        >>> from ifa_torchrec.train import TrainConfig, train
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


def _inputs(log: EventLog) -> dict[str, Any]:
    """What a log must share with that of the training, for the model to mean something; as JSON."""
    schema = dataclasses.asdict(log.schema)
    del schema["candidate_tags"]  # the model does not see them
    schema |= {name: [*schema[name].items()] for name in ("item_features", "context_features")}
    return {"schema": json.loads(json.dumps(schema)), "codes": log.codes()}


def _check_log(checkpoints: Path, log: EventLog, whole: bool = False) -> None:
    """Refuse a log that a run's model cannot read. Called by all ranks.

    Args:
        checkpoints: those of the run; where they are damaged, whoever loads them says so.
        log: the log that it is to read.
        whole: whether it must be the very log of the training, to go on with it.

    Raises:
        LogError: its features, table sizes or codes are not those of the training or, with ``whole``,
            anything else is not.
    """
    now = _inputs(log)
    for path in reversed(checkpoint.checkpoints_of_rank_0(checkpoints)):
        try:
            progress = json.loads((path / "progress.json").read_text())
            was, data = progress["config"], progress["data"]
            fields = [name for name in now["schema"] if now["schema"][name] != was["schema"][name]]
            codes = {f for f, _ in now["codes"].items() ^ was["codes"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        known = f"the log that {checkpoints.parent} was trained on ({data})"
        if fields:
            told = "; ".join(f"{f} {now['schema'][f]}, there {was['schema'][f]}" for f in fields)
            raise LogError(f"{log.path} has another schema than {known}: {told}; prepare it alike")
        if codes:
            raise LogError(
                f"{log.path} has other codes than {known}: rows of {sorted(codes)} stand for other ids, "
                "or codes/ is missing from one of them. Prepare both from one and the same list of ids; "
                "copy codes/ from there only if the numbers here were taken from it"
            )
        if whole and log.fingerprint() != was["log"]:
            raise LogError(
                f"{log.path} has other content than {known}, so that a position in it means nothing; "
                "give that log as it was, or train anew with another --out"
            )
        return


def load_run(folder: Path, data: Path | None = None, sharded: bool = True) -> Run:
    """Build a run's model and load its last checkpoint. Called by all ranks.

    There may be more or fewer ranks than trained it; where the tables lie, the planner decides.

    Args:
        folder: the run's --out.
        data: event log; None for the one it was trained on.
        sharded: whether the tables are spread over the ranks; else each rank holds all of them, on
            the CPU, as plain modules that can be quantised and exported.

    Raises:
        CheckpointError: there is no run or no checkpoint, or config.json is damaged or has other
            options than the checkpoint.
        LogError: the log is missing or bad, or the model cannot read it: it has other features or table
            sizes, or other codes than the log of the training.
    """
    config = _config_of(folder)
    device = init_process_group()
    log = EventLog(data or config.data)
    _check_log(folder / "checkpoints", log)
    model: nn.Module = DLRM_IFATrain(build_model(log.schema, config), config.loss)
    if sharded:
        model, _ = shard(model, device, config.optimizers)
    else:
        device = torch.device("cpu")
        for module in model.modules():
            if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
                module.to_empty(device=device)  # from the meta device; its rows are loaded below
    checkpoints = folder / "checkpoints"
    # config.json may be another training's, begun here before there was a checkpoint
    progress = checkpoint.load(checkpoints, model, config=_to_json(config.fixed()))
    return Run(config, log, model, device, checkpoint.version(checkpoints, progress))


def _to_json(value: Any) -> Any:
    """JSON of a config's dict; paths, and infinities and NaN, which JSON has not, become strings."""
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    strange = isinstance(value, float) and not math.isfinite(value)
    return str(value) if strange or isinstance(value, Path) else value


def _config_of(folder: Path) -> TrainConfig:
    """The options of a run."""
    file = folder / "config.json"
    try:
        return _from_json(TrainConfig, json.loads(file.read_text()), "")
    except FileNotFoundError:
        error = checkpoint.CheckpointError(f"{folder}: no run here; name the --out of a training")
        raise error from None
    except (OSError, ValueError) as error:  # a ConfigError too, of a value that cannot be
        raise checkpoint.CheckpointError(f"{file}: not a run's options: {error}") from error


def _from_json(kind: Any, value: Any, name: str) -> Any:
    """What ``_to_json`` made a string, a list or an object of, by the type that it had.

    Raises:
        ConfigError: it is of another type, or an object has other fields; the message names which.
    """
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        prefix = f"{name}." if name else ""
        for field_name in sorted(hints.keys() ^ value.keys()):
            wrong = "is missing" if field_name in hints else "is no option of this version"
            raise ConfigError(f"{prefix}{field_name} {wrong}")
        return kind(**{k: _from_json(hints[k], v, prefix + k) for k, v in value.items()})
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else _from_json(arguments[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _from_json(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and (value in ("inf", "-inf", "nan") or type(value) is int):
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{name or 'it'} is {value!r}, not of type {getattr(kind, '__name__', kind)}")


def main() -> None:
    """The command line."""
    with as_command():
        result = train(tyro.cli(TrainConfig, prog="python -m ifa_torchrec.train", description=__doc__))
        if dist.get_rank() == 0:
            print(result_as_json(result))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
