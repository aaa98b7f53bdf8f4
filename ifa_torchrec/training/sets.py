"""The sets that a model chooses from a split's candidates, and what they are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.schema import CANDIDATES, OFFSETS
from ifa_torchrec.data.synthetic_truth import SetTruth
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import Task, generate_set, ranking_score
from ifa_torchrec.training.scoring import of_batches


def best_by_score(
    dataset: RankingDataset, logits: np.ndarray, tasks: Sequence[Task], k: int
) -> np.ndarray:
    """The k best of each request by ``ranking_score``.

    Args:
        dataset: the split.
        logits: [M, T], and tasks: T of them.
        k: how many.

    Returns:
        [M] int64: each candidate's place in its request's set, from 1; 0 for those not in it.
    """
    offsets = torch.from_numpy(np.asarray(dataset.requests[OFFSETS]).astype(np.int64))
    score = ranking_score(torch.from_numpy(logits), tasks)
    candidates = JaggedTensor(torch.empty(len(score)), lengths=offsets.diff(), offsets=offsets)
    return places(generate_set(score, candidates, k), len(score)).numpy()


@torch.no_grad()
def chosen_one_by_one(
    model: DLRM_IFA, dataset: RankingDataset, device: torch.device, budget: tuple[int, int], k: int
) -> np.ndarray:
    """The sets that a model that was trained for it chooses one by one. Called by all ranks.

    Args:
        model: in evaluation mode, sharded or whole.
        dataset: the split.
        device: this rank's.
        budget: most events and most requests of a batch.
        k: how many.

    Returns:
        As ``best_by_score``, on every rank.
    """

    def choose(batch: RankingBatch) -> Tensor:
        candidates = model.describe(batch)
        offsets = candidates.offsets
        whole = JaggedTensor(candidates.tokens, lengths=offsets.diff(), offsets=offsets)
        chosen = generate_set(model.set_gain(candidates), whole, k, "greedy")
        return places(chosen, len(candidates.tokens))[:, None]

    return of_batches(dataset, device, *budget, choose, 1)[0][:, 0].astype(np.int64)


def places(chosen: JaggedTensor, rows: int) -> Tensor:
    """The place of each of ``rows`` candidates in the sets that ``generate_set`` gave.

    Returns:
        [rows] int64, from 1; 0 for those in no set.

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


def measure_sets(dataset: RankingDataset, place: np.ndarray, k: int) -> dict[str, Any]:
    """What the sets of a split are worth by its labels and its items' features.

    Args:
        dataset: the split.
        place: [M] of each candidate in its request's set, from 1; 0 for those not in it.
        k: how many a set was to have; the names of the numbers have it.

    Returns:
        ``set_metrics`` of the labels, "ndcg@K" and "recall@K", or "TASK_ndcg@K" for several tasks;
        and by item feature "diversity", "duplicates" and "coverage" (see ``variety``), the last of
        the items too.
    """
    requests, log = dataset.requests, dataset.log
    schema = log.schema
    request = np.repeat(np.arange(len(dataset)), np.diff(requests[OFFSETS]))
    result: dict[str, Any] = {}
    for task, kind in schema.tasks.items():
        if kind == "binary":
            prefix = f"{task}_" if len(schema.tasks) > 1 else ""
            found = set_metrics(request, place, np.asarray(requests[task]))
            result |= {f"{prefix}{name}@{k}": value for name, value in found.items()}
    numbers = np.asarray(requests[CANDIDATES])
    ids = {schema.item: numbers} | {
        name: np.asarray(log.items[name])[numbers]
        for name in schema.item_features
        if name != schema.item
    }
    by_feature = {name: variety(request, place, of_candidate) for name, of_candidate in ids.items()}
    for name in ("diversity", "duplicates", "coverage"):
        result[name] = {
            feature: found[name]
            for feature, found in by_feature.items()
            if name == "coverage" or feature != schema.item
        }
    return result


def rewards(
    dataset: RankingDataset, places: Mapping[str, np.ndarray], k: int, truth: SetTruth
) -> dict[str, dict[str, float]]:
    """What users are expected to pick of the sets of a synthetic log, whose truth is known.

    Args:
        dataset: the split.
        places: by name, as ``measure_sets``'.
        k: how many a set was to have.
        truth: of this split.

    Returns:
        For each name "reward", the mean number of items picked of a set in its order, and
        "reward_share", its share of the best sets'.
    """

    def mean(sets: Iterable[np.ndarray]) -> float:
        return float(np.mean([truth.reward(rows) for rows in sets]))

    def of_requests(place: np.ndarray) -> Iterator[np.ndarray]:
        for first, last in itertools.pairwise(np.asarray(dataset.requests[OFFSETS]).tolist()):
            rows = first + np.flatnonzero(place[first:last])
            yield rows[np.argsort(place[rows])]

    best = mean(truth.best_sets(k))
    found = {name: mean(of_requests(place)) for name, place in places.items()}
    return {name: {"reward": value, "reward_share": value / best} for name, value in found.items()}


def set_metrics(request: np.ndarray, place: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How well sets gather the positives; means over the requests whose labels are not all equal.

    Args:
        request: [M] request number of each candidate.
        place: [M], its place in the request's set, from 1; 0 if it is not in it.
        label: [M] 0 or 1.

    Returns:
        "ndcg", and "recall" of the positives that the set's places can hold. NaN where there is no such
        request with a set.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.sets import set_metrics
        >>> set_metrics(np.zeros(3, int), np.array([1, 0, 2]), np.array([1, 1, 0]))["recall"]
        0.5
    """
    requests = int(request.max()) + 1 if len(request) else 0

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(request, values, requests)

    size, positives, candidates = total(place > 0), total(label), total(np.ones(len(label)))
    found = np.minimum(size, positives)
    discount = np.where(place > 0, 1 / np.log2(np.maximum(place, 1) + 1), 0.0)
    ideal = total(discount * (place <= found[request]))
    kept = (positives > 0) & (positives < candidates) & (size > 0)
    if not kept.any():
        return {"ndcg": np.nan, "recall": np.nan}
    return {
        "ndcg": float((total(discount * label)[kept] / ideal[kept]).mean()),
        "recall": float((total(label * (place > 0))[kept] / found[kept]).mean()),
    }


def variety(request: np.ndarray, place: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """How varied sets are by what groups their members.

    Args:
        request, place: as ``set_metrics``'.
        group: [M], an id; 0 is unknown, and like no other.

    Returns:
        "diversity", the share of a set's pairs that are of different groups, the mean over the sets of
        two or more; "duplicates", how many members of a set are of a group that stands before them in
        it, the mean over the sets; "coverage", how many of the groups among all candidates
        stand in some set, as a share. NaN where there is none.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.sets import variety
        >>> variety(np.zeros(4, int), np.array([1, 2, 0, 3]), np.array([5, 5, 6, 7]))["duplicates"]
        1.0
    """
    known = np.unique(group[group > 0])
    member = place > 0
    shown = np.unique(group[member & (group > 0)])
    size = np.bincount(request[member])
    keys = np.stack([request[member], group[member]], axis=1)[group[member] > 0]
    pairs, counts = np.unique(keys, axis=0, return_counts=True)
    alike = np.bincount(pairs[:, 0], counts * (counts - 1), len(size))
    again = np.bincount(pairs[:, 0], counts - 1, len(size))
    some, several = size > 0, size > 1
    ordered = (size * (size - 1))[several]
    return {
        "diversity": float((1 - alike[several] / ordered).mean()) if several.any() else np.nan,
        "duplicates": float(again[some].mean()) if some.any() else np.nan,
        "coverage": len(shown) / len(known) if len(known) else np.nan,
    }
