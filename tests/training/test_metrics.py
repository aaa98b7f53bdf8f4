"""Ranking metrics against counting pairs and summing gains by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ifa_torchrec.training.metrics import (
    correlation,
    decile_cuts,
    gauc,
    ndcg,
    ranking_metrics,
    recall,
    regression_metrics,
    why_unranked,
)


def random_requests(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """40 requests with 1 to 12 candidates; fewer score levels give more ties."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(40), rng.integers(1, 13, 40))
    score = rng.integers(0, levels, len(request)).astype(np.float32)
    return request, score, (rng.random(len(request)) < 0.3).astype(np.float32)


def naive_auc(score: np.ndarray, label: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order; a tie is half right."""
    pairs = [(p, n) for p in score[label == 1] for n in score[label == 0]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def naive_ndcg(score: np.ndarray, label: np.ndarray, k: int) -> float:
    """Candidates with equal scores share the gain of their positions evenly."""
    discount = [1 / math.log2(place + 2) if place < k else 0.0 for place in range(len(score))]
    gain, place = 0.0, 0
    for value in sorted(set(score), reverse=True):
        tied = score == value
        shared = discount[place : place + tied.sum()]
        gain += label[tied].sum() * sum(shared) / len(shared)
        place += tied.sum()
    return gain / sum(discount[: int(label.sum())])


def split(request: np.ndarray, *columns: np.ndarray) -> list[tuple]:
    """The requests with positives and negatives."""
    parts = [tuple(c[request == r] for c in columns) for r in np.unique(request)]
    return [part for part in parts if 0 < part[-1].sum() < len(part[-1])]


@pytest.mark.parametrize("levels", [2, 4, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_gauc_is_the_mean_share_of_ordered_pairs(seed: int, levels: int) -> None:
    request, score, label = random_requests(seed, levels)
    ranked = split(request, score, label)
    assert 5 < len(ranked) < 40, "some requests must have labels that are all equal"
    wanted = np.mean([naive_auc(*part) for part in ranked])
    assert gauc(request, score, label) == pytest.approx(wanted, abs=1e-12)


def test_gauc_does_not_depend_on_the_order_of_rows() -> None:
    request, score, label = random_requests(0, 4)
    order = np.random.default_rng(1).permutation(len(request))
    assert gauc(request[order], score[order], label[order]) == pytest.approx(gauc(request, score, label))


def test_gauc_of_a_constant_is_a_half() -> None:
    request, score, label = random_requests(0, 4)
    assert gauc(request, np.zeros_like(score), label) == 0.5


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("levels", [2, 4, 10**6])
def test_ndcg_is_the_mean_gain_over_the_best_gain(levels: int, k: int) -> None:
    request, score, label = random_requests(0, levels)
    wanted = np.mean([naive_ndcg(*part, k) for part in split(request, score, label)])
    assert ndcg(request, score, label, k) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("levels", [2, 1000], ids=["many ties", "few ties"])
def test_recall_is_the_mean_share_of_positives_found(levels: int, k: int) -> None:
    """Tied candidates are equally likely to be among the k best: simulated by a thousand draws."""
    request, score, label = random_requests(2, levels)
    rng = np.random.default_rng(0)
    drawn = []
    for s, y in split(request, score, label):
        shares = []
        for _ in range(1000):
            order = np.lexsort((rng.random(len(s)), -s))[:k]
            shares.append(y[order].sum() / min(k, y.sum()))
        drawn.append(np.mean(shares))
    tolerance = 0.005 if levels == 2 else 1e-3
    assert recall(request, score, label, k) == pytest.approx(np.mean(drawn), abs=tolerance)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_a_request_of_equal_labels_is_left_out(labels: list[int]) -> None:
    request = np.array([0, 0, 0, 1, 1, 1])
    score = np.array([1.0, 2.0, 3.0, 2.0, 3.0, 1.0], dtype=np.float32)
    label = np.array([*labels, 1, 0, 0])
    assert gauc(request, score, label) == 0.5
    assert ndcg(request, score, label) == pytest.approx(1 / math.log2(3))
    assert ranking_metrics(request, score, label)["requests_ranked"] == 1


def test_without_a_request_to_rank_there_is_no_number() -> None:
    request, score, label = (
        np.array([0, 0, 1]),
        np.array([1.0, 2.0, 3.0], np.float32),
        np.array([0, 0, 1]),
    )
    assert math.isnan(gauc(request, score, label)) and math.isnan(ndcg(request, score, label))
    assert ranking_metrics(request, score, label)["requests_ranked"] == 0


class TestRankingMetrics:
    LOGIT = np.array([0.3, -1.2, 2.0, -0.4, 0.0], dtype=np.float32)
    LABEL = np.array([1, 0, 1, 0, 0], dtype=np.float32)
    REQUEST = np.array([0, 0, 1, 1, 1])

    def test_normalised_entropy_by_hand(self) -> None:
        p = 1 / (1 + np.exp(-self.LOGIT.astype(float)))
        loss = -np.mean(np.where(self.LABEL == 1, np.log(p), np.log(1 - p)))
        no_model = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
        metrics = ranking_metrics(self.REQUEST, self.LOGIT, self.LABEL)
        assert metrics["ne"] == pytest.approx(loss / no_model, rel=1e-6)

    def test_predicting_the_mean_label_is_as_good_as_no_model(self) -> None:
        logit = np.full(5, math.log(0.4 / 0.6), np.float32)
        metrics = ranking_metrics(self.REQUEST, logit, self.LABEL)
        assert metrics["ne"] == pytest.approx(1, rel=1e-6)
        assert metrics["calibration"] == pytest.approx(1, rel=1e-6)
        assert metrics["auc"] == metrics["gauc"] == 0.5

    def test_calibration_is_mean_prediction_over_mean_label(self) -> None:
        wanted = np.mean(1 / (1 + np.exp(-self.LOGIT.astype(float)))) / 0.4
        metrics = ranking_metrics(self.REQUEST, self.LOGIT, self.LABEL)
        assert metrics["calibration"] == pytest.approx(wanted, rel=1e-6)

    def test_scores_that_are_no_log_odds_have_neither(self) -> None:
        metrics = ranking_metrics(self.REQUEST, self.LOGIT, self.LABEL, probabilities=False)
        assert set(metrics) == {"auc", "gauc", "ndcg@10", "recall@10", "requests_ranked"}

    @pytest.mark.parametrize("levels", [3, 10**6])
    def test_auc_is_over_all_pairs_of_all_requests(self, levels: int) -> None:
        request, score, label = random_requests(2, levels)
        metrics = ranking_metrics(request, score - score.mean(), label)
        assert metrics["auc"] == pytest.approx(naive_auc(score, label), abs=1e-6)
        assert metrics["gauc"] == gauc(request, score, label)
        assert metrics["ndcg@10"] == ndcg(request, score, label)

    def test_large_counts_are_not_ties(self) -> None:
        """The sigmoid of 40, 41, ... is 1.0 in float32."""
        count = np.arange(40, 45, dtype=np.float32)
        label = np.array([0, 0, 0, 1, 1])
        assert ranking_metrics(np.zeros(5, np.int64), count, label, probabilities=False)["auc"] == 1.0

    def test_close_scores_are_not_ties(self) -> None:
        """1,000 candidates, one float apart: rounding must not make their ranks equal."""
        score = np.ones(1000, np.float32)
        for i in range(1, 1000):
            score[i] = np.nextafter(score[i - 1], np.float32(2))
        label = (np.arange(1000) >= 500).astype(np.int64)
        assert ranking_metrics(np.zeros(1000, np.int64), score, label)["auc"] == 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_equal_have_no_auc_and_no_ne(label: int) -> None:
    metrics = ranking_metrics(np.zeros(3, int), np.array([1.0, 2.0, 3.0], np.float32), np.full(3, label))
    assert np.isnan([metrics["auc"], metrics["gauc"], metrics["ndcg@10"], metrics["recall@10"]]).all()
    assert metrics["requests_ranked"] == 0 and "ne" not in metrics and "calibration" not in metrics


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=r"request 7.*finite"):
        ranking_metrics(np.array([3, 7]), np.array([1.0, score], np.float32), np.array([1, 0]))


class TestRegression:
    @pytest.mark.parametrize("levels", [2, 3, 10**6])
    def test_correlation_is_the_mean_of_numpys(self, levels: int) -> None:
        request, label, _ = random_requests(4, levels)
        score = np.random.default_rng(5).integers(0, levels, len(request)).astype(np.float32)
        label = 1000 * label + 7
        each = []
        for s, y in ((score[request == r], label[request == r]) for r in np.unique(request)):
            if len(set(y)) > 1:
                each.append(np.corrcoef(s, y)[0, 1] if len(set(s)) > 1 else 0.0)
        assert len(each) < 40, "some requests must have labels that are all equal"
        assert correlation(request, score, label) == pytest.approx(np.mean(each), abs=1e-9)

    def test_correlation_does_not_depend_on_unit_and_order(self) -> None:
        request, score, _ = random_requests(0, 10**6)
        label = score + np.random.default_rng(1).normal(size=len(score)) * 1e5
        wanted = correlation(request, score, label)
        assert 0.5 < wanted < 1
        assert correlation(request, 3 * score - 5, label / 3600) == pytest.approx(wanted)
        order = np.random.default_rng(1).permutation(len(request))
        assert correlation(request[order], score[order], label[order]) == pytest.approx(wanted)

    def test_errors_are_in_the_labels_unit(self) -> None:
        request, label, _ = random_requests(1, 10**6)
        prediction = label + np.random.default_rng(2).normal(size=len(label))
        metrics = regression_metrics(request, prediction, label)
        missed = prediction - label.astype(float)
        assert metrics["mae"] == pytest.approx(np.abs(missed).mean())
        assert metrics["rmse"] == pytest.approx(np.sqrt((missed**2).mean()))
        assert metrics["correlation"] == correlation(request, prediction, label)
        sizes = np.bincount(request)
        assert metrics["requests_ranked"] == (sizes > 1).sum() < 40

    def test_no_candidates(self) -> None:
        none = np.empty(0)
        metrics = regression_metrics(none.astype(int), none, none)
        assert np.isnan([metrics["mae"], metrics["rmse"], metrics["correlation"]]).all()
        assert metrics["requests_ranked"] == 0

    def test_one_candidate_a_request_has_errors_and_no_order(self) -> None:
        metrics = regression_metrics(np.array([0, 1]), np.array([1.0, 2.0]), np.array([3.0, 3.0]))
        assert metrics["mae"] == 1.5 and math.isnan(metrics["correlation"])

    def test_a_prediction_that_is_no_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"request 7.*inf"):
            regression_metrics(np.array([3, 7]), np.array([1.0, np.inf]), np.array([1.0, 0.0]))


@pytest.mark.parametrize(
    ("request_", "label", "told"),
    [
        ([], [], "there is no candidate"),
        ([0, 1, 4], [1, 0, 1], "only one candidate"),
        ([0, 0, 1], [1, 1, 0], "all labels are equal"),
        ([0, 0, 1], [1, 0, 0], None),
        ([0, 0], [2.5, 2.6], None),
    ],
)
def test_why_nothing_can_be_ranked(request_: list[int], label: list[float], told: str | None) -> None:
    request, labels = np.array(request_, int), np.array(label, np.float32)
    reason = why_unranked(request, labels)
    assert (reason is None) == (told is None) and (told or "") in (reason or "")
    if set(label) <= {0, 1}:
        score = np.zeros(len(label), np.float32)
        assert (ranking_metrics(request, score, labels)["requests_ranked"] == 0) == (told is not None)
        assert math.isnan(gauc(request, score, labels)) == (told is not None)


@pytest.mark.parametrize("seed", range(5))
def test_decile_cuts_are_numpys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for size in (1, 2, 9, 10, 11, 200):
        drawn = rng.integers(0, 30, size)
        values, counts = np.unique(drawn, return_counts=True)
        wanted = np.unique(np.quantile(drawn, np.arange(1, 10) / 10, method="higher"))
        assert np.array_equal(values[decile_cuts(np.cumsum(counts))], wanted)
