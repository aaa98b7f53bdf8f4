"""Loading a training run: its options, log and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.data.schema import USER
from ifa_torchrec.data.vocabulary import Vocabulary
from ifa_torchrec.distributed import checkpoint, init_process_group, shard
from ifa_torchrec.models import DLRM_IFA, DLRM_IFATrain
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.calibrate import apply
from ifa_torchrec.training.options import TrainConfig, read_options, to_json
from ifa_torchrec.training.validations import calibration_of, in_use

_TABLES = (
    "item_features",
    "item_lists",
    "event_features",
    "context_features",
    "context_lists",
    "candidate_features",
)
"""Fields of a log's schema that name tables and their numbers of rows."""


@dataclass
class Run:
    """A trained model with its options and log. ``version`` names its weights, which are from step
    ``step``; ``scales`` are the means and deviations with which it standardises numbers."""

    config: TrainConfig
    log: EventLog
    model: nn.Module
    device: torch.device
    step: int
    version: str
    scales: Mapping[str, Scale]

    @property
    def dlrm(self) -> DLRM_IFA:
        """The model without its loss."""
        return next(m for m in self.model.modules() if isinstance(m, DLRM_IFA))

    def dataset(self, split: str) -> RankingDataset:
        """A split as input for the model."""
        return RankingDataset(self.log, split, self.config.history_length)


def inputs_of(log: EventLog) -> dict[str, Any]:
    """What a log must have in common with the training's log for the model to apply; as JSON."""
    schema = dataclasses.asdict(log.schema)
    del schema["candidate_tags"]  # the model does not see them
    # lists, since the order of features and tasks matters and comparing JSON objects ignores it
    ordered = {name: [*v.items()] if isinstance(v, dict) else v for name, v in schema.items()}
    return {"schema": json.loads(json.dumps(ordered)), "vocabulary": log.vocabulary.digests()}


def check_log(
    checkpoints: Path,
    log: EventLog,
    belongs_to: Mapping[str, Any] | None = None,
    grow: bool = False,
) -> dict[str, Any] | None:
    """Refuse a log that a run's model cannot read. Called by all ranks.

    Unless training is resumed on it, the log may have more ids than the training's log: its vocabulary
    must then begin with the run's, and its item table may have more rows, which are new items.

    Args:
        checkpoints: the folder of the run's checkpoints; damage is reported when they are loaded.
        log: the log for the model to read.
        belongs_to: the configuration that a checkpoint would have now, if ``log`` must be exactly the
            training's log, to resume it.
        grow: whether all tables may have more rows, since the model will have them.

    Returns:
        The progress in the last checkpoint, as from ``Trainer.state_dict``; None if none can be read.

    Raises:
        LogError: its features, table sizes or vocabulary differ from the training's or, with
            ``belongs_to``, its content does.
        CheckpointError: the last checkpoint has another format.
    """
    now = belongs_to or inputs_of(log)
    progress = checkpoint.latest_progress(checkpoints)
    if progress is None:
        return None
    was, schema = progress["config"], json.loads(json.dumps(now["schema"]))
    if not belongs_to:
        _let_grow(schema, was["schema"], grow)
    fields = [name for name in schema if schema[name] != was["schema"][name]]
    ids = {f for f, _ in now["vocabulary"].items() ^ was["vocabulary"].items()}
    known = f"the log that {checkpoints.parent} was trained on ({progress['data']})"
    if fields:
        differing = "; ".join(f"{f} {schema[f]}, there {was['schema'][f]}" for f in fields)
        raise LogError(
            f"{log.place} has another schema than {known}: {differing}; prepare it with the same schema"
        )
    ids -= {USER} if not belongs_to else set()  # users have no table
    if ids and (belongs_to or not _extends(log.vocabulary, Vocabulary.load(checkpoints.parent))):
        raise LogError(
            f"{log.place} has another vocabulary than {known}: rows of {sorted(ids)} belong to other "
            "ids; prepare it with the vocabulary that the run keeps (ifa data prepare --vocabulary "
            f"{checkpoints.parent})"
        )
    if belongs_to and belongs_to["log"] != was["log"]:
        raise LogError(
            f"{log.place} has other content than {known}, so a position in it means nothing; give that "
            "log unchanged, or start a new training with another --out"
        )
    return progress


def _let_grow(schema: dict[str, Any], was: Mapping[str, Any], grow: bool) -> None:
    """Replace the numbers of rows that have grown by the earlier ones: for the item's table, or for all
    tables."""
    for field in _TABLES if grow else _TABLES[:1]:
        pairs = list(zip(schema[field], was[field], strict=False))
        for table, (name, rows) in pairs if grow else pairs[:1]:
            if table[0] == name:
                table[1] = min(table[1], rows)


def _extends(vocabulary: Vocabulary, of_run: Vocabulary) -> bool:
    """Whether a vocabulary begins with the run's vocabulary, users excluded."""
    return vocabulary.begins_with(
        Vocabulary({name: of_run[name] for name in of_run.names if name != USER})
    )


def load_run(
    folder: Path, data: str | Path | None = None, sharded: bool = True, whole_log: bool = True
) -> Run:
    """Build a run's model, load its best checkpoint (its last if none was validated), and apply its
    calibration, if one was fitted. Called by all ranks.

    The number of ranks may differ from the training's; the planner decides where the tables go.

    Args:
        folder: the run's --out.
        data: event log; None for the one it was trained on.
        sharded: whether the tables are sharded over the ranks; otherwise each rank has all of them, on
            the CPU, as plain modules that can be quantised and exported.
        whole_log: whether each rank opens all parts of the log, or only its own; see EventLog.

    Raises:
        CheckpointError: there is no run or no checkpoint, or config.json is damaged or differs from the
            options in the checkpoint.
        LogError: the log is missing or bad, or the model cannot read it: its features or table sizes
            differ from the training's, or its vocabulary does not begin with the run's.
    """
    config = read_options(folder)
    device = init_process_group()
    shard_of_log = (0, 1) if whole_log else (dist.get_rank(), dist.get_world_size())
    log = EventLog(data or config.data, shard_of_log)
    trained = check_log(folder / "checkpoints", log) or {}
    _narrow(log, trained)
    # the scales of the training's log, not of this one
    scales = {name: Scale(**figures) for name, figures in trained.get("scales", {}).items()}
    model: nn.Module = DLRM_IFATrain(build_model(log.schema, config, scales), config.loss)
    if sharded:
        model, _ = shard(model, device, config.optimizers)
    else:
        device = torch.device("cpu")
        for module in model.modules():
            if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
                module.to_empty(device=device)  # from the meta device; the rows are loaded below
    checkpoints = folder / "checkpoints"
    # the options are compared, since config.json may be from a later training without checkpoints
    best, fitted = in_use(folder)
    progress = checkpoint.load(checkpoints, model, config=to_json(config.fixed()), step=best)
    step, version = progress["step"], checkpoint.version(checkpoints, progress)
    run = Run(config, log, model, device, step, version, scales)
    apply(run.dlrm, calibration_of(fitted, step))
    return run


def version_of(folder: Path) -> str:
    """The version of the weights that ``load_run`` would load; loads nothing. Called by all ranks.

    Args:
        folder: the run's --out.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    checkpoints, (best, _) = folder / "checkpoints", in_use(folder)
    steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints_of_rank_0(checkpoints)]
    if not steps:
        raise checkpoint.CheckpointError(f"{folder}: no checkpoint here; give the --out of a training")
    return checkpoint.version(checkpoints, {"step": best if best in steps else steps[-1]})


def _narrow(log: EventLog, trained: Mapping[str, Any]) -> None:
    """Cut the log's item table to the run's rows, so that further items are new items."""
    if trained:
        rows = dict(trained["config"]["schema"]["item_features"])
        log.schema = dataclasses.replace(log.schema, item_features=rows)
