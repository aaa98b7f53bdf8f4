"""Checks for terms of the loss that have no effect on a log, or a wrong one."""

from __future__ import annotations

import warnings

import numpy as np

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import EXPOSED, OFFSETS
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetLossConfig
from ifa_torchrec.training.own import sum_over_parts


def check_loss(dataset: RankingDataset, loss: CandidateSetLossConfig, rank: int) -> None:
    """Warn of terms of the loss that have no effect on a split, or refuse them. Called by all ranks.

    Args:
        dataset: the split.
        loss: the loss's configuration.
        rank: this process's rank; only rank 0 warns.

    Raises:
        ConfigError: there is a consistency term, which adds half of a step's time, but all candidates
            are exposed. Or unexposed candidates are left out, and all exposed ones have the label 1.
    """
    requests = dataset.requests
    if not loss.unexposed or not loss.pointwise_unexposed:
        _check_negatives(dataset)
    if loss.consistency and not _any(dataset, ~requests[EXPOSED]):
        raise ConfigError(
            f"--loss.consistency {loss.consistency:g}: the term compares sets with and without the "
            "unexposed candidates, and the split `train` has none; set its weight to 0, or use a log "
            "with unexposed candidates"
        )
    if loss.listwise and not _any(dataset, np.diff(requests[OFFSETS]) >= 2) and rank == 0:
        warnings.warn(
            f"--loss.listwise {loss.listwise:g} has no effect: no request of the split `train` has "
            "two candidates to compare",
            stacklevel=2,
        )


def _check_negatives(dataset: RankingDataset) -> None:
    """Refuse a log whose negatives are all unexposed, if the loss leaves unexposed candidates out."""
    exposed = np.asarray(dataset.requests[EXPOSED])
    if not _any(dataset, ~exposed):
        return
    for task, kind in dataset.log.schema.tasks.items():
        negative = np.asarray(dataset.requests[task]) == 0
        if kind == "binary" and not _any(dataset, negative & exposed) and _any(dataset, negative):
            raise ConfigError(
                f"--loss.unexposed 0: in the split `train` all exposed candidates have {task} 1; if the "
                "0 of the others is a true label, give --loss.unexposed 1, or prepare them as exposed"
            )


def _any(dataset: RankingDataset, found: np.ndarray) -> bool:
    """Whether anything was found in a split's columns, on any rank that has parts of it."""
    return bool(sum_over_parts(dataset.log)(np.array([found.sum()]))[0])
