"""Terms of the loss that a log leaves nothing to do, or that it turns to the wrong."""

from __future__ import annotations

import warnings

import numpy as np

from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import EXPOSED, OFFSETS
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetLossConfig
from ifa_torchrec.training.own import over_parts


def check_loss(dataset: RankingDataset, loss: CandidateSetLossConfig, rank: int) -> None:
    """Tell of terms of the loss that have nothing to do on a split. Called by all ranks.

    Args:
        dataset: the split.
        loss: its terms.
        rank: this process's; the first alone warns.

    Raises:
        ConfigError: there is a consistency term, which costs half of the time again, but all candidates
            are exposed. Or the unexposed are left out, and of the exposed all have the label 1.
    """
    requests = dataset.requests
    if not loss.unexposed or not loss.pointwise_unexposed:
        _check_negatives(dataset)
    if loss.consistency and not _any(dataset, ~requests[EXPOSED]):
        raise ConfigError(
            f"--loss.consistency {loss.consistency:g}: all candidates of the split `train` were "
            "exposed, and the term compares sets with and without those that were not; give it the "
            "weight 0, or a log with unexposed candidates"
        )
    if loss.listwise and not _any(dataset, np.diff(requests[OFFSETS]) >= 2) and rank == 0:
        warnings.warn(
            f"--loss.listwise {loss.listwise:g} has nothing to do: no request of the split `train` has "
            "two candidates to compare",
            stacklevel=2,
        )


def _check_negatives(dataset: RankingDataset) -> None:
    """Refuse a log that has the negatives among the unexposed, where these are left out of the loss."""
    exposed = np.asarray(dataset.requests[EXPOSED])
    if not _any(dataset, ~exposed):
        return
    for task, kind in dataset.log.schema.tasks.items():
        negative = np.asarray(dataset.requests[task]) == 0
        if kind == "binary" and not _any(dataset, negative & exposed) and _any(dataset, negative):
            raise ConfigError(
                f"--loss.unexposed 0: in the split `train` all exposed candidates have {task} 1; where "
                "a 0 is true of the others give --loss.unexposed 1, or prepare them as exposed"
            )


def _any(dataset: RankingDataset, found: np.ndarray) -> bool:
    """Whether anything was found in a split's columns, by any rank that has parts of it."""
    return bool(over_parts(dataset.log)(np.array([found.sum()]))[0])
