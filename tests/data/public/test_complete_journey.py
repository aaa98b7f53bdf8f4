"""The recipe of The Complete Journey, on small synthetic tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ifa_torchrec.data import EventLog
from ifa_torchrec.data.public import complete_journey
from ifa_torchrec.data.public.complete_journey import (
    BASKET,
    BUY_AGAIN,
    SOURCES,
    WEEKS,
    CompleteJourneyConfig,
    _Recipe,
    item_order,
    prepare,
)
from ifa_torchrec.errors import ConfigError

HOUSEHOLDS, STORES, PRODUCTS = (3, 7, 20, 31), (330, 406), 300
TWICE = 31  # makes two baskets at exactly the same time, every week
SILENT = 20  # has no demographics
FIRST_PRODUCT = 5000
UNDESCRIBED = FIRST_PRODUCT + 1  # is bought, but not in the products table
NO_CATEGORY = FIRST_PRODUCT + 2
NOVELTIES = [6000 + week for week in range(1, 54)]  # a product is new each week
BIG, SMALL = 55, 14  # products in a basket; a big one has more than the 40 positives allowed
ALL_PRODUCTS = [*range(FIRST_PRODUCT, FIRST_PRODUCT + PRODUCTS), *NOVELTIES]
CONFIG = CompleteJourneyConfig(train=60, valid=12, test=16, seed=0)


def make_tables() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    lines, basket = [], 90_000
    for week in range(1, 54):
        for household in HOUSEHOLDS:
            # each household buys from its own shelf, so that many products are bought again
            shelf = FIRST_PRODUCT + (np.arange(160) + 40 * HOUSEHOLDS.index(household)) % PRODUCTS
            time = pd.Timestamp(2017, 1, 1, 8 + household % 12) + pd.Timedelta(days=7 * (week - 1))
            for _ in range(2 if household == TWICE else 1):
                basket += 1
                size = BIG if rng.random() < 0.3 else SMALL
                chosen = rng.choice(shelf, size, replace=False).tolist()
                if household == TWICE:
                    # in both baskets at once, so that neither bought it before the other
                    chosen.append(NOVELTIES[week - 1])
                for product in chosen:
                    lines.append((household, STORES[week % 2], basket, product, week, time))
    transactions = pd.DataFrame(
        lines,
        columns=["household_id", "store_id", "basket_id", "product_id", "week", "transaction_timestamp"],
    )
    # a product that is in a basket twice is one event
    transactions = pd.concat([transactions, transactions[::50]], ignore_index=True)

    number = np.arange(PRODUCTS + len(NOVELTIES))
    products = pd.DataFrame(
        {
            "product_id": ALL_PRODUCTS,
            "manufacturer_id": number % 11,
            "product_category": [f"CATEGORY {n % 7}" for n in number],
            "product_type": [f"TYPE {n % 30}" for n in number],
            "package_size": [None if n % 3 else f"{n} OZ" for n in number],
        }
    )
    products.loc[products["product_id"] == NO_CATEGORY, ["product_category", "product_type"]] = None
    products = products[products["product_id"] != UNDESCRIBED].sample(frac=1, random_state=0)

    promotions = pd.DataFrame(
        [
            (product, store, week)
            for week in range(1, 54)
            for store in STORES
            if week % 5  # in some weeks nothing is promoted
            for product in FIRST_PRODUCT + rng.permutation(PRODUCTS)[:60]
        ],
        columns=["product_id", "store_id", "week"],
    )
    demographics = pd.DataFrame(
        {
            "household_id": [h for h in HOUSEHOLDS if h != SILENT],
            "age": ["25-34", "65+", "25-34"],
            "income": ["35-49K", "Under 15K", None],
            "household_size": ["1", "2", "5+"],
            "kids_count": ["0", "1", "3+"],
        }
    )
    return {
        "transactions": transactions,
        "products": products,
        "promotions": pd.concat([promotions, promotions[::9]]),
        "demographics": demographics,
    }


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return make_tables()


@pytest.fixture(scope="module")
def log(tables, tmp_path_factory) -> EventLog:
    return _Recipe(tables, CONFIG).write(tmp_path_factory.mktemp("journey") / "log")


@pytest.fixture(scope="module")
def requests(tables, log: EventLog) -> pd.DataFrame:
    """All requests in the log, with products instead of items, and their week."""
    product = item_order(tables["transactions"], tables["products"])
    frames = []
    for split in WEEKS:
        columns = log.requests(split)
        bounds = columns["candidate_offsets"][1:-1]
        frame = pd.DataFrame(
            {
                "split": split,
                **{
                    c: columns[c]
                    for c in ("user", "surface", "store", "hour", "weekday", "age", "income")
                },
                "time": pd.to_datetime(columns["time"], unit="us"),
                "products": np.split(product[columns["candidates"]], bounds),
                **{c: np.split(columns[c], bounds) for c in ("source", "bought", "exposed")},
                **{
                    c: np.split(columns[c], bounds) for c in ("log_popularity", "log_popularity_4_weeks")
                },
            }
        )
        frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    frame["week"] = (frame["time"] - pd.Timestamp(2017, 1, 1)).dt.days // 7 + 1
    return frame


@pytest.fixture(scope="module")
def baskets(tables) -> dict[tuple, list[set]]:
    """What each household bought at each time, one set per basket."""
    result: dict[tuple, list[set]] = {}
    by = ["household_id", "transaction_timestamp", "basket_id"]
    for (household, time, _), lines in tables["transactions"].groupby(by):
        result.setdefault((household, time), []).append(set(lines["product_id"]))
    return result


@pytest.fixture(scope="module")
def promoted(tables) -> dict[tuple, set]:
    return {
        place: set(lines["product_id"])
        for place, lines in tables["promotions"].groupby(["store_id", "week"])
    }


def of_source(request, name: str) -> set:
    return set(request.products[request.source == SOURCES.index(name)].tolist())


def test_as_many_requests_as_asked_for_half_of_each_kind(requests: pd.DataFrame) -> None:
    counts = requests.groupby(["split", "surface"]).size().to_dict()
    assert counts == {
        (split, surface): getattr(CONFIG, split) // 2
        for split in WEEKS
        for surface in (BASKET, BUY_AGAIN)
    }


def test_splits_are_of_their_weeks_and_ordered_by_time(requests: pd.DataFrame) -> None:
    for split, frame in requests.groupby("split"):
        assert frame["week"].between(*WEEKS[split]).all()
        assert frame["time"].is_monotonic_increasing


def test_60_to_100_candidates_without_duplicates(requests: pd.DataFrame) -> None:
    sizes = requests["products"].map(len)
    assert sizes.between(60, 100).all() and sizes.nunique() > 10
    assert (requests["products"].map(lambda p: len(set(p))) == sizes).all()


def test_the_order_of_candidates_reveals_nothing(requests: pd.DataFrame) -> None:
    place = requests["bought"].map(lambda b: np.flatnonzero(b).mean() / len(b))
    assert 0.4 < place.mean() < 0.6


def test_basket_positives_are_what_that_basket_bought(requests: pd.DataFrame, baskets) -> None:
    big = 0
    for request in requests[requests["surface"] == BASKET].itertuples():
        positives = of_source(request, "bought")
        fitting = [b for b in baskets[request.user, request.time] if positives <= b]
        assert fitting and len(positives) in {min(len(b), 40) for b in fitting}
        # products bought beyond the 40 are not negatives either
        negatives = set(request.products.tolist()) - positives
        assert any(not negatives & b for b in fitting)
        big += len(positives) == 40
    assert big > 3, "the tables must have baskets of more than 40 products"


def test_basket_negatives_are_half_promoted_half_popular(
    requests: pd.DataFrame, tables, promoted
) -> None:
    sold = tables["transactions"]
    sold = set(sold.loc[sold["week"] <= WEEKS["train"][1], "product_id"])
    seen = 0
    for request in requests[requests["surface"] == BASKET].itertuples():
        of_promotion, popular = of_source(request, "promoted"), of_source(request, "popular")
        assert of_promotion <= promoted.get((STORES[request.store - 1], request.week), set())
        assert popular <= sold
        missing = len(request.products) - len(of_source(request, "bought"))
        assert len(of_promotion) + len(popular) == missing
        if request.week % 5:
            assert len(of_promotion) == missing // 2
        else:
            assert not of_promotion
        seen += len(of_promotion)
    assert seen > 100


def test_every_buy_again_candidate_was_bought_strictly_before(requests: pd.DataFrame, tables) -> None:
    lines = tables["transactions"]
    for request in requests[requests["surface"] == BUY_AGAIN].itertuples():
        own = lines[lines["household_id"] == request.user]
        past = set(own.loc[own["transaction_timestamp"] < request.time, "product_id"])
        assert set(request.products.tolist()) <= past
        assert of_source(request, "popular") == of_source(request, "promoted") == set()


def test_buy_again_positives_are_what_that_basket_bought_again(
    requests: pd.DataFrame, tables, baskets
) -> None:
    lines = tables["transactions"]
    twice = 0
    for request in requests[requests["surface"] == BUY_AGAIN].itertuples():
        own = lines[lines["household_id"] == request.user]
        past = set(own.loc[own["transaction_timestamp"] < request.time, "product_id"])
        positives, negatives = of_source(request, "bought"), of_source(request, "buy_again")
        assert positives
        # of two baskets at the same time it may be either
        assert any(
            positives <= b & past and len(positives) == min(len(b & past), 40) and not negatives & b
            for b in baskets[request.user, request.time]
        )
        twice += request.user == TWICE
    assert twice > 5, "the tables must have requests of the household with two baskets at a time"


def test_bought_is_the_label(requests: pd.DataFrame) -> None:
    for request in requests.itertuples():
        assert (request.bought == (request.source == SOURCES.index("bought"))).all()


def test_all_candidates_are_exposed(requests: pd.DataFrame) -> None:
    assert requests["exposed"].map(all).all()


def test_popularity_counts_earlier_weeks_only(requests: pd.DataFrame, tables) -> None:
    lines = tables["transactions"].drop_duplicates(["basket_id", "product_id"])
    for request in requests[::9].itertuples():
        for column, since in (("log_popularity", 1), ("log_popularity_4_weeks", request.week - 4)):
            counted = lines[lines["week"].between(since, request.week - 1)]["product_id"].value_counts()
            wanted = np.log1p(counted.reindex(request.products, fill_value=0))
            np.testing.assert_allclose(getattr(request, column), wanted, rtol=1e-6)


def test_context(requests: pd.DataFrame, tables) -> None:
    # row 0 is "unknown"
    assert (requests["hour"] == requests["time"].dt.hour + 1).all()
    assert (requests["weekday"] == requests["time"].dt.weekday + 1).all()
    assert (requests["store"] == requests["week"] % 2 + 1).all()
    of_household = requests.groupby("user")["age"].unique().map(list).to_dict()
    # 3 and 31 have the same age, 7 another; 0 is for households without demographics
    assert of_household == {3: [1], 7: [2], 20: [0], 31: [1]}
    assert set(requests.loc[requests["user"] == 31, "income"]) == {0}


def test_one_event_per_product_and_basket(tables, log: EventLog) -> None:
    lines = tables["transactions"].drop_duplicates(["basket_id", "product_id"])
    assert len(lines) < len(tables["transactions"])
    assert len(log.events["item"]) == len(lines)
    product = item_order(tables["transactions"], tables["products"])
    counts = pd.Series(product[log.events["item"]]).value_counts().sort_index()
    assert counts.equals(lines["product_id"].value_counts().sort_index())


def test_items_are_numbered_by_purchases_up_to_week_44(tables) -> None:
    order = item_order(tables["transactions"], tables["products"])
    assert order[0] == 0 and sorted(order[1:]) == ALL_PRODUCTS
    order = order[1:]
    sold = tables["transactions"]
    counts = sold.loc[sold["week"] <= 44, "product_id"].value_counts().reindex(order, fill_value=0)
    assert counts.is_monotonic_decreasing


def test_products_first_bought_after_week_44_are_new_items(tables, log: EventLog) -> None:
    sold = tables["transactions"]
    known = sold.loc[sold["week"] <= 44, "product_id"].nunique()
    assert log.schema.item_features["item"] == known + 1
    assert log.num_items == len(ALL_PRODUCTS) + 1
    assert (log.events["item"] > known).any()


def test_item_features_keep_row_0_for_the_unknown(tables, log: EventLog) -> None:
    order = item_order(tables["transactions"], tables["products"]).tolist()
    undescribed, no_category = order.index(UNDESCRIBED), order.index(NO_CATEGORY)
    for feature in ("type", "category", "manufacturer"):
        assert log.items[feature][undescribed] == 0
    assert log.items["category"][no_category] == log.items["type"][no_category] == 0
    assert log.items["manufacturer"][no_category] > 0
    assert (log.items["category"] == 0).sum() == 3 and log.items["category"][0] == 0
    described = tables["products"].set_index("product_id").reindex(order)
    # the same number for the same category, another for another
    pairs = {
        (n, c) for n, c in zip(log.items["category"], described["product_category"], strict=True) if n
    }
    assert len(pairs) == 7 == log.schema.item_features["category"] - 1


def test_item_names(tables, log: EventLog) -> None:
    order = item_order(tables["transactions"], tables["products"]).tolist()
    names = log.item_names()
    assert names[0] == "unknown"
    assert names[order.index(UNDESCRIBED)] == "UNKNOWN"
    assert names[order.index(FIRST_PRODUCT + 3)] == "TYPE 3 3 OZ"
    assert names[order.index(FIRST_PRODUCT + 4)] == "TYPE 4"


def test_the_seed_decides_everything(tables, log: EventLog, tmp_path: Path) -> None:
    same = _Recipe(tables, CONFIG).write(tmp_path / "same")
    other = _Recipe(tables, CompleteJourneyConfig(60, 12, 16, seed=1)).write(tmp_path / "other")
    for split in WEEKS:
        columns, again = log.requests(split), same.requests(split)
        for name, values in columns.items():
            np.testing.assert_array_equal(again[name], values, err_msg=f"{split} {name}")
        assert not np.array_equal(other.requests(split)["candidates"], columns["candidates"])


def test_more_requests_than_there_are(tables, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="valid: 500 basket requests were asked for, but only 20 can be drawn"
    ):
        _Recipe(tables, CompleteJourneyConfig(train=4, valid=1000, test=4)).write(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_prepare_opens_an_existing_log(log: EventLog) -> None:
    assert len(prepare(log.path).events["item"]) == len(log.events["item"])


def test_a_log_with_another_config_is_refused(tmp_path: Path) -> None:
    asked = {"train": 20, "valid": 5, "test": 5, "seed": 0}
    (tmp_path / "complete_journey.json").write_text(json.dumps(asked))
    with pytest.raises(
        ConfigError, match=r"was written with train 20, not 30, seed 0, not 1; delete it"
    ):
        complete_journey.prepare(tmp_path, CompleteJourneyConfig(train=30, valid=5, test=5, seed=1))
