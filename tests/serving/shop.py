"""A shop: a log with every kind of column that a schema can have, by external ids, and its model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from helpers import randomised
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.modules.embedding_configs import PoolingType

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
from ifa_torchrec.data import EventLog, LogSchema
from ifa_torchrec.data.vocabulary import Vocabulary
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import Event, RankingRequest

DIM, TABLE_ITEMS, ITEMS = 8, 11, 14
"""The last three items are new: the table has no rows for them."""
SHOP = LogSchema(
    item_features={"item": TABLE_ITEMS, "category": 4},
    item_lists={"genre": 5},
    item_dense=("price",),
    item_vectors={"text": 3},
    event_features={"action": 4, "device": 3},
    event_dense=("dwell", "amount"),
    event_weight="weight",
    context_features={"store": 3},
    context_lists={"interest": 5},
    dense_features=("hour",),
    candidate_features={"place": 4},
    candidate_dense=("bid",),
    log_scaled=("dwell",),
)
VOCABULARY = Vocabulary.of(
    {
        "user": ["anna", "bob", "7"],
        "item": [f"item {n}" for n in range(1, ITEMS)],
        "category": [100, 200, 300],
        "genre": ["noir", "epic", "farce", "saga"],
        "action": ["view", "buy", "skip"],
        "device": ["phone", "desk"],
        "store": [-5, 9],
        "interest": ["tea", "jazz", "chess", "golf"],
        "place": ["top", "middle", "end"],
    }
)
SHOP_IFA = IFAConfig(
    DIM,
    num_heads=2,
    half_lives=(math.inf, 2.0),
    identity_features=("item", "category"),
    identity_buckets=64,
    identity_half_lives=(math.inf, 3.0),
    gates={"action": 4},
    readout="softmax",  # the default of `ifa train`
)
START = pd.Timestamp(2024, 1, 1)


@dataclass
class Shop:
    """The log, the frames that it was made from, and a model for its schema."""

    log: EventLog
    events: pd.DataFrame
    items: pd.DataFrame
    requests: pd.DataFrame
    model: DLRM_IFA

    def events_before(self, n: int) -> list[Event]:
        """The events of the n-th request's user before the request."""
        request = self.requests.iloc[n]
        mine = self.events["user"] == request["user"]
        return [
            self.event(row) for row in np.flatnonzero(mine & (self.events["time"] < request["time"]))
        ]

    def event(self, row: int) -> Event:
        """A row of the events, as a stream event."""
        found = self.events.iloc[row]
        return Event(
            row,
            found["user"],
            found["item"],
            found["time"].value // 1000,
            {name: found[name] for name in SHOP.event_features},
            {name: _number(found[name]) for name in SHOP.event_dense},
            float(found["weight"]),
        )

    def request(self, n: int) -> RankingRequest:
        """The n-th request, as sent to a server."""
        found = self.requests.iloc[n]
        return RankingRequest(
            found["user"],
            found["candidates"],
            found["time"].value // 1000,
            context={"store": int(found["store"]), "interest": found["interest"]},
            dense={"hour": _number(found["hour"])},
            candidate_dense={"bid": [_number(x) for x in found["bid"]]},
            candidate_features={"place": found["place"]},
            new_user=True,
        )


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _some(rng: np.random.Generator, values: list, most: int) -> list:
    return [values[i] for i in rng.permutation(len(values))[: rng.integers(0, most + 1)]]


def make_shop(folder: Path) -> Shop:
    rng = np.random.default_rng(0)
    ids = {name: VOCABULARY[name].ids.to_pylist() for name in VOCABULARY.names}
    items = pd.DataFrame({"item": ids["item"]})
    items["category"] = rng.choice(ids["category"], ITEMS - 1)
    items["genre"] = [_some(rng, ids["genre"], 3) for _ in range(ITEMS - 1)]
    items["price"] = np.where(rng.random(ITEMS - 1) < 0.3, np.nan, rng.normal(size=ITEMS - 1))
    items["text"] = [rng.normal(size=3).tolist() for _ in range(ITEMS - 1)]
    count = 60
    events = pd.DataFrame({"user": rng.choice(["anna", "bob"], count)})
    events["item"] = rng.choice(ids["item"], count)
    events["time"] = START + pd.to_timedelta(rng.permutation(count), unit="h")
    events["action"] = rng.choice(ids["action"], count)
    events["device"] = rng.choice([*ids["device"], "watch"], count)  # "watch" is an unknown device
    events["dwell"] = np.where(rng.random(count) < 0.3, np.nan, rng.exponential(50, count))
    events["amount"] = np.where(rng.random(count) < 0.3, np.nan, rng.normal(5, 2, count))
    events["weight"] = rng.integers(0, 3, count).astype(float)
    rows: list[dict[str, Any]] = []
    for user in ("anna", "bob", "7") * 3:
        m = int(rng.integers(1, 6))
        candidates = [ids["item"][i] for i in rng.permutation(ITEMS - 1)[:m]]
        row = {"user": user, "time": START + pd.Timedelta(int(rng.integers(0, count + 3)), "h")}
        row |= {"store": rng.choice(ids["store"]), "interest": _some(rng, ids["interest"], 3)}
        row |= {"hour": rng.choice([np.nan, 0.5, 3.0]), "candidates": candidates}
        row |= {"bid": np.where(rng.random(m) < 0.3, np.nan, rng.normal(size=m)).tolist()}
        row |= {"place": rng.choice([*ids["place"], "side"], m).tolist(), "exposed": [True] * m}
        rows.append({**row, "label": rng.integers(0, 2, m).tolist()})
    requests = pd.DataFrame(rows)
    log = EventLog.from_pandas(
        folder,
        events=events,
        schema=SHOP,
        items=items,
        requests={"train": requests},
        vocabulary=VOCABULARY,
    )
    return Shop(log, events, items, requests, shop_model(log))


def shop_model(
    log: EventLog, seed: int = 0, candidate_set: CandidateSetConfig | None = None
) -> DLRM_IFA:
    """A model for the shop with random weights, unlike any initialisation."""
    schema = log.schema

    def scales(names: tuple[str, ...]) -> tuple:
        return tuple(log.scales[name] for name in names)

    config = DLRM_IFAConfig(
        tuple(schema.item_features),
        dense_in_features=1,
        candidate_dense_in_features=1,
        item_dense_in_features=1,
        event_dense_in_features=len(schema.event_dense),
        event_features=tuple(schema.event_features),
        candidate_features=tuple(schema.candidate_features),
        item_vectors=schema.item_vectors,
        scales={
            "dense_features": scales(schema.dense_features),
            "candidate_dense": scales(schema.candidate_dense),
            "item_dense": scales(schema.item_dense),
            "history_dense": scales(schema.event_dense),
        },
        ifa=SHOP_IFA,
        candidate_set=candidate_set or CandidateSetConfig(),
    )
    sequences = [
        EmbeddingConfig(
            name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=[p + name for p in prefixes]
        )
        for prefixes, table in (
            (("history_", "candidate_"), schema.item_features),
            (("history_",), schema.event_features),
            (("candidate_",), schema.candidate_features),
        )
        for name, rows in table.items()
    ]

    def bags(table: dict[str, int], width: int = DIM) -> list[EmbeddingBagConfig]:
        return [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=width,
                num_embeddings=rows,
                feature_names=[name],
                pooling=PoolingType.MEAN,
            )
            for name, rows in table.items()
        ]

    context = EmbeddingBagCollection(tables=bags({**schema.context_features, **schema.context_lists}))
    lists = EmbeddingBagCollection(tables=bags(schema.item_lists, 4))
    torch.manual_seed(seed)
    model = DLRM_IFA((context, lists), EmbeddingCollection(tables=sequences), config)
    return randomised(model).eval()
