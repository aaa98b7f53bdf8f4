"""A training run that is loaded again: its options, log and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.distributed import checkpoint, init_process_group, shard
from ifa_torchrec.models import DLRM_IFA, DLRM_IFATrain
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig, read_options, to_json


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


def inputs_of(log: EventLog) -> dict[str, Any]:
    """What a log must share with that of the training, for the model to mean something; as JSON."""
    schema = dataclasses.asdict(log.schema)
    del schema["candidate_tags"]  # the model does not see them
    schema |= {name: [*schema[name].items()] for name in ("item_features", "context_features")}
    return {"schema": json.loads(json.dumps(schema)), "codes": log.codes()}


def check_log(checkpoints: Path, log: EventLog, belongs_to: Mapping[str, Any] | None = None) -> None:
    """Refuse a log that a run's model cannot read. Called by all ranks.

    Args:
        checkpoints: those of the run; where they are damaged, whoever loads them says so.
        log: the log that it is to read.
        belongs_to: what a checkpoint made now would belong to, where ``log`` must be the very log of the
            training, to go on with it.

    Raises:
        LogError: its features, table sizes or codes are not those of the training or, with
            ``belongs_to``, anything else is not.
    """
    now = belongs_to or inputs_of(log)
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
        if belongs_to and belongs_to["log"] != was["log"]:
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
    config = read_options(folder)
    device = init_process_group()
    log = EventLog(data or config.data)
    check_log(folder / "checkpoints", log)
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
    progress = checkpoint.load(checkpoints, model, config=to_json(config.fixed()))
    return Run(config, log, model, device, checkpoint.version(checkpoints, progress))
