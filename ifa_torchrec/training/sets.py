"""The sets that a model chooses from a split's candidates, and their metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import CANDIDATES
from ifa_torchrec.data.synthetic_truth import SetTruth
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import Task, generate_set, ranking_score
from ifa_torchrec.training.metrics import Total, local_sum, mean
from ifa_torchrec.training.own import OwnRequests, counted, own_requests
from ifa_torchrec.training.scoring import apply_to_own


def best_by_score(
    split: RankingDataset | OwnRequests, logits: np.ndarray, tasks: Sequence[Task], k: int
) -> np.ndarray:
    """The k best of each request by ``ranking_score``.

    Args:
        split: the split, or this rank's requests of it.
        logits: [M, T], the logits of ``tasks``.
        tasks: the T tasks.
        k: size of a set.

    Returns:
        [M] int64: each candidate's position in its request's set, from 1; 0 if it is not in it.
    """
    score = ranking_score(torch.from_numpy(logits), tasks)
    lengths = torch.from_numpy(np.asarray(own_requests(split).counts, np.int64))
    candidates = JaggedTensor(torch.empty(len(score)), lengths=lengths)
    return places(generate_set(score, candidates, k), len(score)).numpy()


@torch.no_grad()
def chosen_one_by_one(
    model: DLRM_IFA, dataset: RankingDataset, device: torch.device, budget: tuple[int, int], k: int
) -> np.ndarray:
    """The sets that a model trained for greedy generation chooses one by one. Called by all ranks.

    Args:
        model: in evaluation mode, sharded or not.
        dataset: the split.
        device: this rank's device.
        budget: maximum of events and of requests per batch.
        k: size of a set.

    Returns:
        As from ``best_by_score``, for the requests that ``predict_own`` gives this rank.
    """

    def choose(batch: RankingBatch) -> Tensor:
        candidates = model.describe(batch)
        offsets = candidates.offsets
        whole = JaggedTensor(candidates.tokens, lengths=offsets.diff(), offsets=offsets)
        chosen = generate_set(model.set_gain(candidates), whole, k, "greedy")
        return places(chosen, len(candidates.tokens))[:, None]

    return apply_to_own(dataset, device, *budget, choose)[1][:, 0].astype(np.int64)


def places(chosen: JaggedTensor, rows: int) -> Tensor:
    """The position of each of ``rows`` candidates in the sets from ``generate_set``.

    Returns:
        [rows] int64, from 1; 0 for candidates in no set.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec.training.sets import places
        >>> chosen = JaggedTensor(torch.tensor([1, 0, 3]), lengths=torch.tensor([2, 1]))
        >>> places(chosen, 4).tolist()
        [2, 1, 0, 1]
    """
    starts = chosen.offsets()[:-1]
    lengths, members = chosen.lengths(), chosen.values()
    place = torch.arange(1, len(members) + 1, device=members.device)
    place -= torch.repeat_interleave(starts, lengths, output_size=len(members)).to(place.dtype)
    return members.new_zeros(rows).index_put((members,), place)


def measure_sets(split: RankingDataset | OwnRequests, place: np.ndarray, k: int) -> dict[str, Any]:
    """The metrics of a split's sets, by its labels and its items' features.

    Args:
        split: the split; or this rank's requests of it: the figures are then summed over the ranks. In
            that case called by all ranks, which get the same metrics.
        place: [M], each candidate's position in its request's set, from 1; 0 if it is not in it.
        k: size of a set, which is part of the metrics' names.

    Returns:
        ``set_metrics`` of the labels, as "ndcg@K" and "recall@K", or "TASK_ndcg@K" for several tasks;
        and by item feature "diversity", "duplicates" and "coverage" (see ``variety``), coverage also for
        the items themselves.
    """
    own = own_requests(split)
    log, schema = own.dataset.log, own.dataset.log.schema
    result: dict[str, Any] = {}
    for task, kind in schema.tasks.items():
        if kind == "binary":
            prefix = f"{task}_" if len(schema.tasks) > 1 else ""
            found = set_metrics(own.request, place, own.column(task), own.total)
            result |= {f"{prefix}{name}@{k}": value for name, value in found.items()}
    by_feature: dict[str, dict[str, float]] = {}
    every, _ = counted(log, own.dataset.requests[CANDIDATES])  # over all ranks
    for name in schema.item_features:
        groups = np.arange(log.num_items) if name == schema.item else np.asarray(log.items[name])
        of_candidate, known = groups[own.column(CANDIDATES)], np.unique(groups[every])
        by_feature[name] = variety(own.request, place, of_candidate, known[known > 0], own.total)
    for name in ("diversity", "duplicates", "coverage"):
        result[name] = {
            feature: found[name]
            for feature, found in by_feature.items()
            if name == "coverage" or feature != schema.item
        }
    return result


def rewards(
    split: RankingDataset | OwnRequests, places: Mapping[str, np.ndarray], k: int, truth: SetTruth
) -> dict[str, dict[str, float]]:
    """The expected number of items that users pick from the sets, for a synthetic log with known truth.

    Args:
        split: as for ``measure_sets``.
        places: the positions by name of a strategy, each as for ``measure_sets``.
        k: size of a set.
        truth: the truth of this split.

    Returns:
        For each name: "reward", the mean expected number of items picked from a set in its order, and
        "reward_share", its share of the best sets' reward.
    """

    own = own_requests(split)

    def of_requests(place: np.ndarray) -> Iterator[np.ndarray]:
        for first, last in itertools.pairwise([0, *np.cumsum(own.counts).tolist()]):
            mine = first + np.flatnonzero(place[first:last])
            yield own.rows[mine[np.argsort(place[mine])]]

    best = float(np.mean([truth.reward(rows) for rows in truth.best_sets(k)]))
    found = {
        name: mean(np.array([truth.reward(rows) for rows in of_requests(place)]), own.total)
        for name, place in places.items()
    }
    return {name: {"reward": value, "reward_share": value / best} for name, value in found.items()}


def set_metrics(
    request: np.ndarray, place: np.ndarray, label: np.ndarray, total: Total = local_sum
) -> dict[str, float]:
    """How well sets collect the positives; means over the requests whose labels are not all equal.

    Args:
        request: [M] request number of each candidate.
        place: [M], its position in the request's set, from 1; 0 if it is not in it.
        label: [M] 0 or 1.
        total: sums over ranks.

    Returns:
        "ndcg"; and "recall", relative to the number of positives that fit into the set. NaN if there is
        no such request with a set.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.sets import set_metrics
        >>> set_metrics(np.zeros(3, int), np.array([1, 0, 2]), np.array([1, 1, 0]))["recall"]
        0.5
    """
    numbers, request = np.unique(request, return_inverse=True)

    def each(values: np.ndarray) -> np.ndarray:
        return np.bincount(request, values, len(numbers))

    size, positives, candidates = each(place > 0), each(label), each(np.ones(len(label)))
    found = np.minimum(size, positives)
    discount = np.where(place > 0, 1 / np.log2(np.maximum(place, 1) + 1), 0.0)
    ideal = each(discount * (place <= found[request]))
    kept = (positives > 0) & (positives < candidates) & (size > 0)
    return {
        "ndcg": mean(each(discount * label)[kept] / ideal[kept], total),
        "recall": mean(each(label * (place > 0))[kept] / found[kept], total),
    }


def variety(
    request: np.ndarray,
    place: np.ndarray,
    group: np.ndarray,
    known: np.ndarray | None = None,
    total: Total = local_sum,
) -> dict[str, float]:
    """How varied sets are, by a grouping of their members.

    Args:
        request, place: as for ``set_metrics``.
        group: [M], an id; 0 is unknown, and differs from every other.
        known: [G], the ids among the candidates of all ranks, ascending, without 0; None for those in
            ``group``.
        total: sums over ranks.

    Returns:
        "diversity", the share of a set's pairs with different groups, mean over the sets of two or more;
        "duplicates", the number of a set's members whose group already occurs before them, mean over the
        sets; "coverage", the share of all candidates' groups that occur in some set. NaN if they are of
        nothing.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.sets import variety
        >>> variety(np.zeros(4, int), np.array([1, 2, 0, 3]), np.array([5, 5, 6, 7]))["duplicates"]
        1.0
    """
    numbers, request = np.unique(request, return_inverse=True)
    known = np.unique(group[group > 0]) if known is None else known
    member = place > 0
    of_known = np.searchsorted(known, group[member & (group > 0)])
    shown = total(np.bincount(of_known, minlength=len(known)).astype(np.float64)) > 0
    size = np.bincount(request[member], minlength=len(numbers))
    keys = np.stack([request[member], group[member]], axis=1)[group[member] > 0]
    pairs, counts = np.unique(keys, axis=0, return_counts=True)
    alike = np.bincount(pairs[:, 0], counts * (counts - 1), len(size))
    again = np.bincount(pairs[:, 0], counts - 1, len(size))
    some, several = size > 0, size > 1
    ordered = (size * (size - 1))[several]
    return {
        "diversity": mean(1 - alike[several] / ordered, total),
        "duplicates": mean(again[some], total),
        "coverage": int(shown.sum()) / len(known) if len(known) else np.nan,
    }
