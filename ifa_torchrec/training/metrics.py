"""Ranking metrics over predictions grouped by request.

AUC is torchmetrics' and normalised entropy torchrec's. GAUC and NDCG@k are computed here by pandas'
ranks, since scores that count tie often: torchrec's GAUC and torchmetrics' NDCG order ties by their
position, so that a scorer which cannot tell two candidates apart is paid by chance. Here ties share.

Requests whose labels are all equal have no ranking to judge: GAUC and NDCG leave them out, and
`requests_ranked` says how many are left.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_auroc
from torchrec.metrics.ne import compute_ne
from torchrec.sparse.jagged_tensor import JaggedTensor


def gauc(request: np.ndarray, score: np.ndarray, label: np.ndarray) -> float:
    """Mean over requests of the area under the ROC curve; NaN when no request can be ranked.

    Args:
        request: [M] request number of each candidate.
        score: [M] float, higher is better; label: [M] 0 or 1.

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
    # Mann-Whitney: the rank sum of the positives, less the least it can be
    area = (sums["ranks"] - p * (p + 1) / 2)[ranked] / (p * (n - p))[ranked]
    return float(area.mean())


def ndcg(request: np.ndarray, score: np.ndarray, label: np.ndarray, k: int = 10) -> float:
    """Mean over requests of NDCG@k; ties share their positions; NaN when none can be ranked.

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
    return float((sums["gain"] / sums["ideal"])[ranked].mean())


def recall(request: np.ndarray, score: np.ndarray, label: np.ndarray, k: int = 10) -> float:
    """Mean over requests of the share of positives among the k best; ties share their positions.

    Of min(k, positives), so that 1.0 can be reached. Requests whose labels are all equal are left
    out; NaN when no other is there.

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
    return float((sums["found"] / np.minimum(sums["label"], k))[ranked].mean())


def ranking_metrics(
    request: np.ndarray, logit: np.ndarray, label: np.ndarray, probabilities: bool = True
) -> dict[str, float]:
    """AUC, GAUC, NDCG@10, recall@10, NE and calibration of one task.

    Args:
        request: [M] request number of each candidate.
        logit: [M] float32.
        label: [M] 0 or 1.
        probabilities: whether the logits claim to be log odds; counts and the like do not, and
            get no NE and no calibration.

    Returns:
        "auc" (1.0 is best), "gauc", "ndcg@10", "recall@10", "requests_ranked"; and "ne", the log
        loss over that of the mean label (below 1 is better than no model), and "calibration",
        mean prediction over mean label. Where all labels are equal the first four are NaN and the
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
    bad = np.flatnonzero(~np.isfinite(logit))
    if len(bad):
        raise ValueError(f"request {request[bad[0]]}: a score is {logit[bad[0]]}, not a finite number")
    labels = torch.from_numpy(label.astype(np.int64))
    both = 0 < label.sum() < len(label)  # else there is nothing to rank or to predict
    totals = np.bincount(request, weights=label, minlength=1)
    sizes = np.bincount(request, minlength=1)
    result = {
        # torchmetrics squashes scores outside [0, 1] by a sigmoid, which makes ties of large
        # counts; ranks keep the order
        "auc": float(binary_auroc(torch.from_numpy(_ranks01(logit)), labels)) if both else np.nan,
        "gauc": gauc(request, logit, label),
        "ndcg@10": ndcg(request, logit, label),
        "recall@10": recall(request, logit, label),
        "requests_ranked": int(((totals > 0) & (totals < sizes)).sum()),
    }
    if probabilities and both:
        prediction = torch.from_numpy(logit.astype(np.float64)).sigmoid()
        target = labels.double()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.from_numpy(logit.astype(np.float64)), target, reduction="sum"
        )
        count = torch.tensor(float(len(label)), dtype=torch.float64)
        # compute_ne takes the entropy in bits
        bits = entropy / np.log(2)
        result["ne"] = float(compute_ne(bits, count, target.sum(), count - target.sum(), eta=1e-12))
        result["calibration"] = float(prediction.mean() / target.mean())
    return result


def set_metrics(
    chosen: JaggedTensor, candidates: JaggedTensor, label: np.ndarray, category: np.ndarray
) -> dict[str, float]:
    """How good the sets are that ``generate_set`` gave.

    Args:
        chosen: of B requests; its values are rows of the candidates, best first, k of each request
            or all it has.
        candidates: of the same B requests; its lengths say which rows belong together.
        label: [M] 0 or 1.
        category: [M], an id.

    Returns:
        "ndcg@k" and "recall@k" (of the positives that k places can hold), means over the requests
        whose labels are not all equal; "diversity", the share of a set's pairs that are of
        different categories, the mean over the sets of two or more. NaN where there is none.

    Example:
        >>> import numpy as np, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import generate_set
        >>> from ifa_torchrec.training.metrics import set_metrics
        >>> candidates = JaggedTensor(torch.zeros(3, 8), lengths=torch.tensor([3]))
        >>> chosen = generate_set(torch.tensor([2.0, 1.0, 0.0]), candidates, k=2)
        >>> metrics = set_metrics(chosen, candidates, np.array([1, 0, 1]), np.array([5, 5, 6]))
        >>> metrics["recall@k"], metrics["diversity"]
        (0.5, 0.0)
    """
    gains, recalls, diversities = [], [], []
    ends = candidates.offsets().tolist()
    sets = chosen.values().cpu().numpy()
    bounds = chosen.offsets().tolist()
    for b in range(len(bounds) - 1):
        rows = sets[bounds[b] : bounds[b + 1]]
        every = label[ends[b] : ends[b + 1]]
        discount = 1 / np.log2(np.arange(len(rows)) + 2)
        best = int(min(every.sum(), len(rows)))
        if 0 < every.sum() < len(every) and len(rows):
            gains.append((label[rows] * discount).sum() / discount[:best].sum())
            recalls.append(label[rows].sum() / best)
        if len(rows) > 1:
            pair = np.triu_indices(len(rows), 1)
            diversities.append((category[rows][pair[0]] != category[rows][pair[1]]).mean())

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else np.nan

    return {"ndcg@k": mean(gains), "recall@k": mean(recalls), "diversity": mean(diversities)}


def _ranks01(score: np.ndarray) -> np.ndarray:
    return (pd.Series(score).rank(method="dense") / (len(score) + 1)).to_numpy(copy=True)
