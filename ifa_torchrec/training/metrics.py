"""Metrics over predictions grouped by request, for rankings and for regressions.

Normalised entropy is TorchRec's. AUC, GAUC and NDCG@k are computed here, since counting scorers often
tie: TorchRec's GAUC and torchmetrics' NDCG order ties by position, so a scorer that cannot tell two
candidates apart is rewarded by chance. Here ties share their positions.

All metrics are computed from sums over requests or candidates. If each rank has whole requests of its
own, ``total`` sums the figures over the ranks, and no rank needs another rank's scores.

Requests whose labels are all equal have no order to judge: GAUC, NDCG and the correlation leave them
out, and `requests_ranked` is the number of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torchrec.metrics.ne import compute_ne

Total = Callable[[np.ndarray], np.ndarray]
"""Returns the sum of a float64 array over all ranks. Called by all ranks."""
_BITS = 22  # leading bits of a float32 by which ranks bin scores: sign, exponent, 13 of the mantissa
_BLOCK = 1 << 10  # bins per block; only blocks that some rank uses are summed


def local_sum(figures: np.ndarray) -> np.ndarray:
    """The Total of a rank that has all requests: returns its argument."""
    return figures


def auc(score: np.ndarray, label: np.ndarray, total: Total = local_sum) -> float:
    """Area under the ROC curve over all candidates; ties count half; NaN if all labels are equal.

    Over several ranks, scores tie if the first 22 bits of their float32 are equal, a relative resolution
    of 1/8,192.

    Args:
        score: [M] float, higher is better; label: [M] 0 or 1.
        total: sums over ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import auc
        >>> auc(np.array([1.0, 3.0, 3.0]), np.array([0, 0, 1]))
        0.75
    """
    bins, count = bins_of(score, total)
    # per score, in ascending order
    positives, all_ = total(
        np.stack([np.bincount(bins, label, count), np.bincount(bins, minlength=count)])
    )
    negatives = all_ - positives
    below = np.cumsum(negatives) - negatives
    pairs = positives.sum() * negatives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else np.nan


def gauc(request: np.ndarray, score: np.ndarray, label: np.ndarray, total: Total = local_sum) -> float:
    """Mean over requests of the area under the ROC curve; NaN if no request can be ranked.

    Args:
        request: [M] request number of each candidate.
        score: [M] float, higher is better; label: [M] 0 or 1.
        total: sums over ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import gauc
        >>> request, label = np.array([0, 0, 0, 1, 1]), np.array([1, 0, 0, 1, 1])
        >>> gauc(request, np.array([3., 1., 2., 5., 5.]), label)
        1.0
        >>> gauc(np.array([0, 0]), np.array([5., 5.]), np.array([1, 0]))
        0.5
    """
    frame = pd.DataFrame({"request": request, "label": label})
    frame["rank"] = pd.Series(score).groupby(request).rank().to_numpy()
    frame["positive_rank"] = frame["rank"] * frame["label"]
    sums = frame.groupby("request").agg(
        n=("label", "size"), positives=("label", "sum"), ranks=("positive_rank", "sum")
    )
    p, n = sums["positives"], sums["n"]
    ranked = (p > 0) & (p < n)
    # Mann-Whitney: the rank sum of the positives minus its minimum
    area = (sums["ranks"] - p * (p + 1) / 2)[ranked] / (p * (n - p))[ranked]
    return mean(area, total)


def ndcg(
    request: np.ndarray,
    score: np.ndarray,
    label: np.ndarray,
    k: int = 10,
    total: Total = local_sum,
) -> float:
    """Mean over requests of NDCG@k; ties share their positions; NaN if no request can be ranked.

    Args:
        request: [M] request number of each candidate.
        score: [M] float, higher is better; label: [M] 0 or 1.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import ndcg
        >>> ndcg(np.array([0, 0, 0]), np.array([3., 2., 1.]), np.array([1, 0, 0]))
        1.0
    """
    frame = pd.DataFrame({"request": request, "score": score, "label": label})
    groups = frame.groupby("request")

    def discount(column: str) -> np.ndarray:
        position = groups[column].rank(method="first", ascending=False).to_numpy()
        return np.where(position <= k, 1 / np.log2(position + 1), 0.0)

    frame["discount"] = discount("score")
    shared = frame.groupby(["request", "score"])["discount"].transform("mean")
    frame["gain"] = shared * frame["label"]
    frame["ideal"] = discount("label") * frame["label"]
    sums = groups[["gain", "ideal", "label"]].agg("sum")
    ranked = (sums["label"] > 0) & (sums["label"] < groups.size())
    return mean((sums["gain"] / sums["ideal"])[ranked], total)


def recall(
    request: np.ndarray,
    score: np.ndarray,
    label: np.ndarray,
    k: int = 10,
    total: Total = local_sum,
) -> float:
    """Mean over requests of recall@k; ties share their positions.

    It is relative to min(k, positives), so that 1.0 can be reached. Requests whose labels are all equal
    are left out; NaN if there are no others.

    Args:
        request: [M] request number of each candidate.
        score: [M] float, higher is better; label: [M] 0 or 1.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import recall
        >>> recall(np.array([0, 0, 0]), np.array([3., 2., 1.]), np.array([1, 0, 1]), k=2)
        0.5
    """
    frame = pd.DataFrame({"request": request, "score": score, "label": label})
    groups = frame.groupby("request")
    frame["found"] = groups["score"].rank(method="first", ascending=False) <= k
    shared = frame.groupby(["request", "score"])["found"].transform("mean")
    frame["found"] = shared * frame["label"]
    sums = groups[["found", "label"]].agg("sum")
    ranked = (sums["label"] > 0) & (sums["label"] < groups.size())
    return mean((sums["found"] / np.minimum(sums["label"], k))[ranked], total)


def ranking_metrics(
    request: np.ndarray,
    logit: np.ndarray,
    label: np.ndarray,
    probabilities: bool = True,
    total: Total = local_sum,
) -> dict[str, float]:
    """AUC, GAUC, NDCG@10, recall@10, NE and calibration of one task.

    Args:
        request: [M] request number of each candidate.
        logit: [M] float32.
        label: [M] 0 or 1.
        probabilities: whether the logits are log odds; for others, such as counts, NE and calibration
            are left out.
        total: sums over ranks.

    Returns:
        "auc" (1.0 is best), "gauc", "ndcg@10", "recall@10", "requests_ranked"; and "ne", the log
        loss relative to that of the mean label (below 1 is better than no model), and "calibration",
        mean prediction over mean label. If all labels are equal, the first four are NaN and the
        last two are left out.

    Raises:
        ValueError: a score is not finite.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import ranking_metrics
        >>> m = ranking_metrics(np.array([0, 0]), np.array([2., -2.], np.float32), np.array([1, 0]))
        >>> m["auc"], round(m["calibration"], 3)
        (1.0, 1.0)
    """
    _check_finite(request, logit, total)
    of_request, sizes = (np.bincount(request, weights, 1) for weights in (label, np.ones(len(label))))
    ranked = ((of_request > 0) & (of_request < sizes)).sum()
    positives, count, ranked = total(np.array([label.sum(), len(label), ranked], np.float64)).tolist()
    result = {
        "auc": auc(logit, label, total),
        "gauc": gauc(request, logit, label, total),
        "ndcg@10": ndcg(request, logit, label, total=total),
        "recall@10": recall(request, logit, label, total=total),
        "requests_ranked": int(ranked),
    }
    if probabilities and 0 < positives < count:  # otherwise NE is undefined
        logits, target = (torch.from_numpy(x.astype(np.float64)) for x in (logit, label))
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        sums = total(np.array([float(entropy), float(logits.sigmoid().sum())]))
        # compute_ne takes the entropy in bits
        figures = (sums[0] / np.log(2), count, positives, count - positives)
        result["ne"] = float(compute_ne(*map(_double, figures), eta=1e-12))
        result["calibration"] = float(sums[1] / positives)
    return result


def correlation(
    request: np.ndarray, score: np.ndarray, label: np.ndarray, total: Total = local_sum
) -> float:
    """Mean over requests of Pearson's correlation of score and label; NaN if no request can be ranked.

    Requests whose labels are all equal are left out. If all scores are equal, it is 0.

    Args:
        request: [M] request number of each candidate.
        score: [M] float; label: [M] float.
        total: sums over ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import correlation
        >>> request, label = np.array([0, 0, 0, 1, 1]), np.array([10., 20., 30., 5., 5.])
        >>> round(correlation(request, np.array([1., 2., 3., 1., 2.]), label), 6)
        1.0
        >>> correlation(request, np.ones(5), label)
        0.0
    """
    index, count = _numbered(request)
    x, y = (_centred(index, count, values) for values in (score, label))
    xy, xx, yy = (np.bincount(index, a * b, len(count)) for a, b in ((x, y), (x, x), (y, y)))
    apart, ranked = _differ(index, count, score), _differ(index, count, label)
    # values that differ may still be so close that their squares underflow in float64
    norm = np.where(apart, np.sqrt(xx) * np.sqrt(yy), np.inf)[ranked]
    return mean(xy[ranked] / np.maximum(norm, np.finfo(float).tiny), total)


def regression_metrics(
    request: np.ndarray, prediction: np.ndarray, label: np.ndarray, total: Total = local_sum
) -> dict[str, float]:
    """Errors of predicted numbers, and how well they order each request's candidates.

    Args:
        request: [M] request number of each candidate.
        prediction: [M] float, in the label's unit.
        label: [M] float.
        total: sums over ranks.

    Returns:
        "mae", the mean absolute error, and "rmse", the root mean squared error, both in the label's
        unit; "correlation", the mean of Pearson's over the requests whose labels are not all equal;
        "requests_ranked", the number of these. The first three are NaN if they are of nothing.

    Raises:
        ValueError: a prediction is not finite.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import regression_metrics
        >>> m = regression_metrics(np.array([0, 0]), np.array([5.0, 13.0]), np.array([2.0, 12.0]))
        >>> m["mae"], m["requests_ranked"]
        (2.0, 1)
    """
    _check_finite(request, prediction, total)
    error = prediction.astype(np.float64) - label
    ranked = _differ(*_numbered(request), label).sum()
    figures = (np.abs(error).sum(), (error**2).sum(), len(error), ranked)
    off, squared, count, ranked = total(np.array(figures, np.float64)).tolist()
    return {
        "mae": off / count if count else np.nan,
        "rmse": math.sqrt(squared / count) if count else np.nan,
        "correlation": correlation(request, prediction, label, total),
        "requests_ranked": int(ranked),
    }


def why_unranked(request: np.ndarray, label: np.ndarray, total: Total = local_sum) -> str | None:
    """Why no request can be ranked, so that GAUC, NDCG and the correlation are NaN; None if one can.

    Args:
        request: [M] request number of each candidate.
        label: [M].
        total: sums over ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import why_unranked
        >>> why_unranked(np.array([0, 1]), np.array([1, 0]))
        'each request has only one candidate, so there is no order within it'
    """
    index, count = _numbered(request)
    figures = (len(label), _differ(index, count, label).sum(), (count > 1).sum())
    candidates, ranked, several = total(np.array(figures, np.float64))
    if not candidates:
        return "there is no candidate"
    if ranked:
        return None
    if not several:
        return "each request has only one candidate, so there is no order within it"
    return "in every request all labels are equal, so no order is better than another"


def bins_of(score: np.ndarray, total: Total = local_sum) -> tuple[np.ndarray, int]:
    """The position of each score in ascending order: one bin per distinct score. Over several ranks, one
    bin per value of a score's first 22 bits, of the blocks of bins in which any rank has a score.

    Args:
        score: [M] float.
        total: sums over ranks.

    Returns:
        [M] int64, each score's bin, and the number of bins, some of which may be empty.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import bins_of
        >>> bins_of(np.array([0.5, -1.0, 0.5]))[0].tolist()
        [1, 0, 1]
    """
    if total is local_sum:
        places, bins = np.unique(score, return_inverse=True)
        return bins, len(places)
    bits = (score.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    bins = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> (32 - _BITS)
    used = total(np.bincount(bins // _BLOCK, minlength=(1 << _BITS) // _BLOCK).astype(np.float64)) > 0
    return (np.cumsum(used) - 1)[bins // _BLOCK] * _BLOCK + bins % _BLOCK, _BLOCK * int(used.sum())


def decile_cuts(cumulative: np.ndarray) -> np.ndarray:
    """Where numpy's deciles by the method "higher" fall among ascending distinct values.

    Args:
        cumulative: [n], n > 0, how many of the counted things are at most each value.

    Returns:
        Up to nine int64, ascending indices into the values, without duplicates.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import decile_cuts
        >>> decile_cuts(np.array([50, 100])).tolist()
        [0, 1]
    """
    nth = np.ceil((cumulative[-1] - 1) * (np.arange(1, 10) / 10))
    return np.unique(np.searchsorted(cumulative, nth, side="right"))


def mean(values: np.ndarray | pd.Series, total: Total = local_sum) -> float:
    """The mean over all ranks; NaN if there are no values.

    Args:
        values: [n] float.
        total: sums over ranks.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.training.metrics import mean
        >>> mean(np.array([1.0, 2.0]))
        1.5
    """
    value, count = total(np.array([values.sum(), len(values)], np.float64))
    return float(value / count) if count else np.nan


def _numbered(request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the index of its request among those with rows, and each request's number of rows."""
    _, index, count = np.unique(request, return_inverse=True, return_counts=True)
    return index, count


def _centred(index: np.ndarray, count: np.ndarray, values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - (np.bincount(index, values, len(count)) / count)[index]


def _differ(index: np.ndarray, count: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each request has rows with different values."""
    first = np.empty(len(count), values.dtype)
    first[index] = values
    return np.bincount(index, values != first[index], len(count)) > 0


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _check_finite(request: np.ndarray, score: np.ndarray, total: Total) -> None:
    """Raise ValueError on all ranks, so that the others do not wait for the one that found it."""
    bad = np.flatnonzero(~np.isfinite(score))
    if total(np.array([len(bad)], np.float64))[0]:
        if not len(bad):
            raise ValueError("a score on another rank is not a finite number")
        raise ValueError(f"request {request[bad[0]]}: a score is {score[bad[0]]}, not a finite number")
