"""Batches of a log with every kind of column, compared with its DataFrames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from every_field import KNOWN_ITEMS, RICH_SCHEMA, make_rich
from toy import Toy, make_toy

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.batches import Ranges
from ifa_torchrec.data.sampler import EMPTY_REQUEST

REQUESTS = [17, EMPTY_REQUEST, 3, 40, 4, 0, 47, 12]
REAL = [request for request in REQUESTS if request != EMPTY_REQUEST]


@pytest.fixture(scope="module")
def rich() -> Toy:
    return make_rich()


@pytest.fixture(scope="module")
def log(rich: Toy, tmp_path_factory) -> EventLog:
    return rich.write(tmp_path_factory.mktemp("rich") / "log")


@pytest.fixture(scope="module")
def batch(log: EventLog) -> RankingBatch:
    return RankingDataset(log, "train")[REQUESTS]


@pytest.fixture(scope="module")
def events(rich: Toy) -> pd.DataFrame:
    """The events of the batch, history by history."""
    requests = rich.requests["train"].iloc[REAL]
    own = [
        rich.events[(rich.events["user"] == r.user) & (rich.events["time"] < r.time)]
        for r in requests.itertuples()
    ]
    return pd.concat(history.sort_values("time", kind="stable") for history in own)


@pytest.fixture(scope="module")
def requests(rich: Toy) -> pd.DataFrame:
    return rich.requests["train"].iloc[REAL]


def flat(lists: pd.Series) -> np.ndarray:
    return np.concatenate([np.asarray(values) for values in lists])


def assert_same(mine: torch.Tensor, wanted: object) -> None:
    """Assert equality as float32, with NaN equal to NaN."""
    np.testing.assert_array_equal(mine.numpy(), np.asarray(wanted, np.float32))


@pytest.mark.parametrize(
    "ranges",
    [[], [(4, 4)], [(0, 1), (9, 9), (3, 7)], [(5, 1000)], [(0, 1), (8, 1000), (2, 2), (0, 999)]],
)
@pytest.mark.parametrize("dtype", [np.int64, np.float32, bool])
def test_copied_ranges_equal_gathered_ranges(ranges: list[tuple[int, int]], dtype: type) -> None:
    column = (np.arange(1000) % 251).astype(dtype)
    start, end = np.array(ranges, np.int64).reshape(-1, 2).T
    found = Ranges(start, end)
    wanted = np.array([column[row] for a, b in ranges for row in range(a, b)], dtype)
    out = np.empty(found.total, dtype)
    for values in (found.of(column), found.of(column, out), column[found.rows]):
        assert values.dtype == dtype and np.array_equal(values, wanted)
    assert np.array_equal(out, wanted)


class TestOfEventsAndCandidates:
    def test_features_of_events(self, batch: RankingBatch, events: pd.DataFrame) -> None:
        for name in RICH_SCHEMA.event_features:
            feature = batch.sequence_features[f"history_{name}"]
            assert feature.values().tolist() == events[name].tolist()
            lengths = batch.sequence_features["history_item"].lengths()
            assert torch.equal(feature.lengths(), lengths)

    def test_numbers_and_weights_of_events(self, batch: RankingBatch, events: pd.DataFrame) -> None:
        assert_same(batch.history_dense, events[["dwell", "rating"]])
        assert batch.history_dense.isnan().any() and not batch.history_dense.isnan().all()
        assert_same(batch.history_weight, events["importance"])

    def test_of_candidates(self, batch: RankingBatch, requests: pd.DataFrame) -> None:
        place = batch.sequence_features["candidate_place"]
        assert place.values().tolist() == flat(requests["place"]).tolist()
        assert torch.equal(place.lengths(), batch.sequence_features["candidate_item"].lengths())
        assert_same(batch.candidate_dense[:, 0], flat(requests["price"]))
        assert batch.candidate_dense.isnan().any()
        assert_same(batch.labels, np.stack([flat(requests["label"]), flat(requests["watch"])], axis=1))

    def test_keys(self, batch: RankingBatch) -> None:
        assert batch.sequence_features.keys() == [
            *("history_item", "history_category", "history_action", "history_device"),
            *("candidate_item", "candidate_category", "candidate_place"),
        ]

    def test_lists_of_requests(self, batch: RankingBatch, requests: pd.DataFrame) -> None:
        assert batch.context_features.keys() == ["store", "weekday", "interest"]
        interest = batch.context_features["interest"]
        lengths = requests["interest"].map(len).tolist()
        lengths.insert(1, 0)  # the empty request
        assert interest.lengths().tolist() == lengths and 0 in lengths
        assert interest.values().tolist() == flat(requests["interest"]).tolist()


class TestOfItems:
    def test_each_item_once(
        self, batch: RankingBatch, events: pd.DataFrame, requests: pd.DataFrame
    ) -> None:
        candidates = flat(requests["candidates"])
        assert batch.history_item_ids.tolist() == events["item"].tolist()
        assert batch.candidate_item_ids.tolist() == candidates.tolist()
        distinct = np.full(len(batch.item_dense), -1)
        distinct[batch.history_items] = events["item"]
        distinct[batch.candidate_items] = candidates
        assert len(set(distinct)) == len(distinct) == len(set(events["item"]) | set(candidates))
        assert (distinct[batch.history_items] == events["item"]).all()

    def test_features(self, rich: Toy, batch: RankingBatch) -> None:
        distinct = np.empty(len(batch.item_dense), int)
        distinct[batch.history_items] = batch.history_item_ids
        distinct[batch.candidate_items] = batch.candidate_item_ids
        items = rich.items.iloc[distinct]
        assert_same(batch.item_dense, items[["weight", "year"]])
        vectors = [np.stack(items[name]) for name in ("text", "image")]
        assert_same(batch.item_vectors, np.concatenate(vectors, axis=1))
        assert batch.item_lists.keys() == ["genre", "tag"]
        assert batch.item_lists.stride() == len(distinct)
        for name in ("genre", "tag"):
            assert batch.item_lists[name].lengths().tolist() == items[name].map(len).tolist()
            assert batch.item_lists[name].values().tolist() == flat(items[name]).tolist()

    def test_new_ones_have_row_0_and_their_other_features(self, rich: Toy, batch: RankingBatch) -> None:
        category = rich.items["category"].to_numpy()
        for side, ids in (
            ("history", batch.history_item_ids),
            ("candidate", batch.candidate_item_ids),
        ):
            new = ids >= KNOWN_ITEMS
            assert new.any() and not new.all()
            rows = batch.sequence_features[f"{side}_item"].values()
            assert torch.equal(rows, torch.where(new, 0, ids))
            categories = batch.sequence_features[f"{side}_category"].values()
            assert categories.tolist() == category[ids].tolist()

    def test_their_share(self, rich: Toy, log: EventLog) -> None:
        whole = RankingDataset(log, "test")[list(range(12))]
        wanted = {
            "candidates": flat(rich.requests["test"]["candidates"]),
            "events": whole.history_item_ids.numpy(),
        }
        share = log.new_items("test")
        assert {*share} == {*wanted}
        for name, items in wanted.items():
            assert share[name] == pytest.approx(((items >= KNOWN_ITEMS) | (items == 0)).mean())
            assert 0.1 < share[name] < 0.6


def test_what_the_schema_lacks_is_none(tmp_path: Path) -> None:
    batch = RankingDataset(make_toy().write(tmp_path / "log"), "train")[[0, 17]]
    for name in (
        *("history_weight", "history_dense", "item_lists", "item_dense", "item_vectors"),
        *("history_items", "candidate_items", "history_item_ids", "candidate_item_ids"),
    ):
        assert getattr(batch, name) is None, name


def test_only_empty_requests(log: EventLog) -> None:
    batch = RankingDataset(log, "train")[[EMPTY_REQUEST] * 2]
    # the unknown item is a placeholder: a KJT needs a row
    assert batch.item_dense.isnan().tolist() == [[True, True]]
    assert batch.item_vectors.tolist() == [[0.0] * 5]
    assert batch.item_lists.stride() == 1 and len(batch.item_lists.values()) == 0
    assert len(batch.history_items) == 0 and batch.history_dense.shape == (0, 2)
    assert batch.context_features["interest"].lengths().tolist() == [0, 0]


def test_only_histories(log: EventLog) -> None:
    """As used by ``build-states``."""
    histories = RankingDataset.of_users(log, log.users, np.full(len(log.users), 2**62))
    batch = histories[list(range(len(log.users)))]
    assert batch.history_weight.tolist() == log.events["importance"].tolist()
    assert batch.history_item_ids.tolist() == log.events["item"].tolist()
    assert len(batch.candidate_items) == 0 and batch.labels.shape == (0, 2)
    assert batch.sequence_features["candidate_place"].values().dtype == torch.int64


class TestUnknownItems:
    SHARE = 0.3

    def masked(self, log: EventLog, epoch: int = 0, seed: int = 0, split: str = "train") -> RankingBatch:
        dataset = RankingDataset(log, split, unknown_items=self.SHARE, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[list(range(len(dataset)))]

    def hidden(self, batch: RankingBatch, side: str) -> np.ndarray:
        """Whether each item of the table was made unknown; -1 for items that do not occur."""
        ids = getattr(batch, f"{side}_item_ids")
        rows = batch.sequence_features[f"{side}_item"].values()
        assert ((rows == 0) | (rows == ids)).all()
        return torch.where((ids > 0) & (ids < KNOWN_ITEMS), (rows == 0).long(), -1).numpy()

    def test_about_the_requested_share_and_all_else_stays(self, log: EventLog) -> None:
        batch = self.masked(log)
        plain = RankingDataset(log, "train")[list(range(48))]
        for side in ("history", "candidate"):
            hidden = self.hidden(batch, side)
            assert (hidden == 1).sum() / (hidden >= 0).sum() == pytest.approx(self.SHARE, abs=0.08)
        for name in ("history_item_ids", "candidate_item_ids", "history_items", "item_dense"):
            mine, wanted = getattr(batch, name), getattr(plain, name)
            torch.testing.assert_close(mine, wanted, equal_nan=True, rtol=0, atol=0)
        for key in set(plain.sequence_features.keys()) - {"history_item", "candidate_item"}:
            mine, wanted = batch.sequence_features[key], plain.sequence_features[key]
            assert torch.equal(mine.values(), wanted.values())

    def test_the_same_within_a_request_but_not_between_requests(self, log: EventLog) -> None:
        batch = self.masked(log)
        drawn: dict[tuple[int, int], set[int]] = {}
        for side in ("history", "candidate"):
            lengths = batch.sequence_features[f"{side}_item"].lengths().numpy()
            request = np.repeat(np.arange(len(lengths)), lengths)
            ids = getattr(batch, f"{side}_item_ids").tolist()
            for key, hidden in zip(
                zip(request.tolist(), ids, strict=True), self.hidden(batch, side), strict=True
            ):
                drawn.setdefault(key, set()).add(int(hidden))
        assert all(len(ways) == 1 for ways in drawn.values())
        of_item: dict[int, set[int]] = {}
        for (_, item), ways in drawn.items():
            of_item.setdefault(item, set()).update(ways)
        both = [item for item, ways in of_item.items() if ways == {0, 1}]
        assert len(both) > KNOWN_ITEMS // 2

    def test_depends_on_seed_and_epoch_but_not_on_the_batch(self, log: EventLog) -> None:
        def rows(**given) -> list[int]:
            return self.masked(log, **given).sequence_features["candidate_item"].values().tolist()

        first = rows()
        assert rows() == first
        assert rows(epoch=1) != first != rows(seed=1) != rows(epoch=1)
        dataset = RankingDataset(log, "train", unknown_items=self.SHARE)
        alone = [dataset[[row]].sequence_features["candidate_item"].values() for row in range(48)]
        assert torch.cat(alone).tolist() == first

    def test_nearly_all(self, log: EventLog) -> None:
        batch = RankingDataset(log, "train", unknown_items=0.95)[REQUESTS]
        assert (self.hidden(batch, "history") == 1).mean() > 0.5
        assert batch.num_requests == len(REQUESTS)

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_no_share(self, log: EventLog, share: float) -> None:
        with pytest.raises(ValueError, match="unknown_items must be at least 0"):
            RankingDataset(log, "train", unknown_items=share)

    def test_ids_are_given_even_if_none_is_new(self, tmp_path: Path) -> None:
        log = make_toy().write(tmp_path / "log")
        batch = RankingDataset(log, "train", unknown_items=0.5)[[17]]
        plain = RankingDataset(log, "train")[[17]]
        for side in ("history", "candidate"):
            wanted = plain.sequence_features[f"{side}_item"].values()
            assert torch.equal(getattr(batch, f"{side}_item_ids"), wanted)
