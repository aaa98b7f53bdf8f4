"""Requests of a split that a rank has scored, and sums over all ranks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.order import PartByPart
from ifa_torchrec.training.metrics import Total, local_sum


class OwnRequests:
    """Whole requests of a split on one rank, and the sum of their figures over all ranks.

    Args:
        dataset: the split.
        requests: [n] int64, their numbers.
        total: sums over ranks; ``local_sum`` if these are all requests.

    Attributes:
        rows: [m] int64, the rows of their candidates in the split's flat candidate columns.
        counts: [n] int64, number of candidates per request.
        request: [m] int64, the number of each candidate's request.
    """

    def __init__(self, dataset: RankingDataset, requests: np.ndarray, total: Total) -> None:
        self.dataset, self.total = dataset, total
        self.rows, self.counts = dataset.candidate_rows(requests)
        self.request = np.repeat(requests, self.counts)

    def column(self, name: str) -> np.ndarray:
        """[m], the candidates' values in a column of the split.

        Args:
            name: the column's name; it has one value per candidate.
        """
        return self.dataset.requests[name][self.rows]

    def any(self, of_candidate: np.ndarray) -> bool:
        """Whether ``of_candidate`` is true for any candidate on any rank.

        Args:
            of_candidate: [k] bool.
        """
        return self.count(of_candidate) > 0

    def count(self, of_candidate: np.ndarray) -> int:
        """For how many candidates of all ranks ``of_candidate`` is true.

        Args:
            of_candidate: [k] bool.
        """
        return int(self.total(np.array([of_candidate.sum()], np.float64))[0])


def own_requests(split: RankingDataset | OwnRequests) -> OwnRequests:
    """``split`` itself if it is a rank's requests; all requests of a split, or of the parts that this
    rank has open.

    Args:
        split: a split or a rank's requests.
    """
    if isinstance(split, OwnRequests):
        return split
    return OwnRequests(split, np.arange(len(split)), sum_over_parts(split.log))


def sum_over_parts(log: EventLog) -> Total:
    """The Total for a log: sums over the ranks if each has its own parts open, otherwise ``local_sum``.

    Args:
        log: as this rank has it open.
    """
    return local_sum if log.whole else all_reduce_sum


def order_of(dataset: RankingDataset, seed: int | None) -> int | PartByPart | None:
    """The order of a split's requests, for the sampler.

    Args:
        dataset: the split.
        seed: shuffles with this seed; None keeps the split's order.
    """
    if len(dataset.of_parts) == 1:
        return seed
    return PartByPart(dataset.of_parts, seed, None if dataset.log.whole else _gathered)


def counted(log: EventLog, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a split's integers, ascending, and their counts; over all ranks if each has
    its own parts open.

    Args:
        log: as this rank has it open.
        values: [n] int64, of the open parts.
    """
    numbers, counts = np.unique(values, return_counts=True)
    if log.whole:
        return numbers, counts
    of_ranks = np.concatenate(_gathered(np.stack([numbers, counts])), axis=1)
    numbers, place = np.unique(of_ranks[0], return_inverse=True)
    return numbers, np.bincount(place, of_ranks[1]).astype(np.int64)


def _gathered(values: np.ndarray) -> list[np.ndarray]:
    found = [values] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return found


def all_reduce_sum(figures: np.ndarray) -> np.ndarray:
    """The Total of the process group: the sum over its ranks, as float64. Called by all ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.own import all_reduce_sum
        >>> device = init_process_group()
        >>> all_reduce_sum(np.array([2.0, 3.0])).tolist()
        [2.0, 3.0]
    """
    # the process group's device; the model may be on another (int8 tables are on the CPU)
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    sums = torch.from_numpy(np.asarray(figures, np.float64).copy()).to(device)
    dist.all_reduce(sums)
    return sums.cpu().numpy()
