"""Requests of a split that a rank has scored, and sums over what all ranks have."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.order import PartByPart
from ifa_torchrec.training.metrics import Total, one_rank


class OwnRequests:
    """Whole requests of a split, and how figures of them are summed with those of other ranks.

    Args:
        dataset: the split.
        requests: [n] int64, their numbers.
        total: sums over ranks; ``one_rank`` where these are all requests.

    Attributes:
        rows: [m] int64, the rows of their candidates in the split's flat candidate columns.
        counts: [n] int64, how many each request has.
        request: [m] int64, the number of each candidate's request.
    """

    def __init__(self, dataset: RankingDataset, requests: np.ndarray, total: Total) -> None:
        self.dataset, self.total = dataset, total
        self.rows, self.counts = dataset.candidate_rows(requests)
        self.request = np.repeat(requests, self.counts)

    def column(self, name: str) -> np.ndarray:
        """[m], the candidates' values in a column of the split.

        Args:
            name: of the column, which has a value a candidate.
        """
        return self.dataset.requests[name][self.rows]

    def any(self, of_candidate: np.ndarray) -> bool:
        """Whether it is so of a candidate of any rank.

        Args:
            of_candidate: [k] bool.
        """
        return self.count(of_candidate) > 0

    def count(self, of_candidate: np.ndarray) -> int:
        """Of how many candidates of all ranks it is so.

        Args:
            of_candidate: [k] bool.
        """
        return int(self.total(np.array([of_candidate.sum()], np.float64))[0])


def own_requests(split: RankingDataset | OwnRequests) -> OwnRequests:
    """A rank's requests as they are; of a split, all of them, of a log's parts of its own as well.

    Args:
        split: the one or the other.
    """
    if isinstance(split, OwnRequests):
        return split
    return OwnRequests(split, np.arange(len(split)), over_parts(split.log))


def over_parts(log: EventLog) -> Total:
    """Sums over the ranks, where each has parts of its own of a log open; else what is given.

    Args:
        log: as this rank has it open.
    """
    return one_rank if log.whole else over_ranks()


def order_of(dataset: RankingDataset, seed: int | None) -> int | PartByPart | None:
    """The order of a split's requests as the sampler takes it.

    Args:
        dataset: the split.
        seed: shuffles with this seed; None keeps the order.
    """
    if len(dataset.of_parts) == 1:
        return seed
    return PartByPart(dataset.of_parts, seed, None if dataset.log.whole else _gathered)


def counted(log: EventLog, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers among whole numbers of a split, ascending, and how often each is there; those
    of all ranks, where each has parts of its own open.

    Args:
        log: as this rank has it open.
        values: [n] int64, of what is open.
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


def over_ranks() -> Total:
    """Sums over the ranks of the process group.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.own import over_ranks
        >>> device = init_process_group()
        >>> over_ranks()(np.array([2.0, 3.0])).tolist()
        [2.0, 3.0]
    """

    # the group's, which the model may not be on: rounded tables are on the CPU
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def total(figures: np.ndarray) -> np.ndarray:
        sums = torch.from_numpy(np.asarray(figures, np.float64).copy()).to(device)
        dist.all_reduce(sums)
        return sums.cpu().numpy()

    return total
