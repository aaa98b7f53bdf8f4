"""Report the ids that are not in the training split: new items, users and values, by split."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.splits import Splits
from ifa_torchrec.data.prepare.sql import quoted
from ifa_torchrec.data.prepare.tallies import Share, share, shares

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


class NewIds:
    """Computes the shares of new ids.

    Args:
        sql: contains the tables of the other steps.
        schema: the schema of the log.
        splits: the splits of its requests.
        known: the number of rows of the item table; items from this number on are new.
    """

    def __init__(
        self, sql: DuckDBPyConnection, schema: PrepareSchema, splits: Splits, known: int
    ) -> None:
        self.sql, self.schema, self.splits, self.known = sql, schema, splits.numbers, known
        lasts = ["'-infinity'::TIMESTAMP", *splits.lasts.values()]
        events = [f"time >= {first} AND time < {last}" for first, last in pairwise(lasts)]
        self.events = dict(zip(splits.lasts, events, strict=True))
        train = f"_number < {self.splits['train'].stop}"
        sql.execute(
            f"""CREATE TABLE users_of_training AS
            SELECT "user" FROM events WHERE time < {lasts[1]}
            UNION SELECT "user" FROM requests WHERE {train}"""
        )

    def figures(self, split: str) -> dict[str, Any]:
        """The shares in a split of new items (in candidates and events), new users (in requests and
        events) and new values of each feature.

        Events of a split are those after the last request of the previous split, up to its own.
        """
        mine, events = self.splits[split], f"FROM events WHERE {self.events[split]}"
        requests = f"_number BETWEEN {mine.start} AND {mine.stop - 1}"
        item = f"_row.item >= {self.known}"
        stranger = '"user" NOT IN (FROM users_of_training)'
        return {
            "items": {
                "candidates": self._share(item, f"FROM candidates WHERE {requests}"),
                "events": self._share(f"item >= {self.known}", events),
            },
            "users": {
                "requests": self._share(stranger, f"FROM requests WHERE {requests}"),
                "events": self._share(stranger, events),
            },
            "values": self._values(requests, self.events[split]),
        }

    def _values(self, requests: str, events: str) -> dict[str, Share]:
        """The share of the values of each feature that are not in the vocabulary, without missing
        values."""
        schema, items = self.schema, self.schema.described_items
        candidates = f"FROM candidates JOIN items ON items.item = _row.item WHERE {requests}"
        new: dict[str, Share] = {}
        for form, features, rows in (
            ("{0}", items.features, candidates),
            ("unnest({0})", items.lists, candidates),
            ("{0}", schema.events.features, f"FROM events_rows WHERE {events}"),
            ("{0}", schema.context, f"FROM requests WHERE {requests}"),
            ("unnest({0})", schema.context_lists, f"FROM requests WHERE {requests}"),
            ("{0}", schema.requests.candidate_features, f"FROM sessions WHERE {requests}"),
        ):
            for name in features:
                given = f"(SELECT {form.format(quoted(name))} AS id {rows})"
                known = f"LEFT JOIN {quoted(f'codes_{name}')} USING (id) WHERE id IS NOT NULL"
                new[name] = self._share("code IS NULL", f"FROM {given} {known}")
        return new

    def _share(self, condition: str, rows: str) -> Share:
        return shares(self.sql, f"SELECT {share(condition)} {rows}")[0]
