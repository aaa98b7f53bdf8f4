"""Encodes requests and events as model features: external ids become table rows and item numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.data.batches import item_fields, jagged, stacked, tensor
from ifa_torchrec.data.log_items import LogItems
from ifa_torchrec.data.vocabulary import integer_of
from ifa_torchrec.serving.requests import Id, RankingRequest, float32s
from ifa_torchrec.serving.states.journal import Event

_HISTORY, _CANDIDATE = "history_", "candidate_"
_HASHES = 2**62
"""How many item numbers, after those of the log's items, unknown ids are hashed into."""


@dataclass(frozen=True)
class EncodedEvents:
    """N events as features, and how many of their ids the vocabulary does not know.

    Args:
        features: each event is a request with a history of one event.
        items: [N], unknown items per event (0 or 1).
        values: [N], other unknown ids per event.
    """

    features: RankingFeatures
    items: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class EncodedRequests:
    """B requests with M candidates in total, as table rows and numbers.

    Args:
        items: [M] int64, the candidates' item numbers, which identity heads compare.
        described: [M] int64, the same, but 0 for items that the log does not know.
        lengths: [B] int64, candidates per request.
        ids: rows of each item and candidate feature, [M] int64.
        context: for each context feature and context list, its rows [L] int64 and the number of rows
            per request [B] int64.
        dense: [B, F] and candidate_dense: [M, Fc], float32; NaN where a number is missing.
        unknown_items, unknown_values: [B] int64, how many candidates, and how many other ids, the
            vocabulary does not know.
    """

    items: np.ndarray
    described: np.ndarray
    lengths: np.ndarray
    ids: dict[str, np.ndarray]
    context: dict[str, tuple[np.ndarray, np.ndarray]]
    dense: torch.Tensor
    candidate_dense: torch.Tensor
    unknown_items: np.ndarray
    unknown_values: np.ndarray


class Catalogue:
    """Maps external ids to what a model takes, by a log's schema, items and vocabulary.

    An id that the vocabulary does not know becomes row 0, "unknown". An unknown item still gets a number
    that tells it apart in the identity heads: a hash of its id, above the numbers of the log's items.

    Args:
        log: provides the schema, items and vocabulary; an EventLog, or the part of one in a bundle.

    Attributes:
        schema: LogSchema.
        items: the columns of the log's items.
        digest: the vocabulary's digest.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.serving.catalogue import Catalogue
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [7], "item": [1], "time": [pd.Timestamp(2024, 1, 1)]}),
        ...     schema=LogSchema(item_features={"item": 3}))
        >>> first, never_seen = Catalogue(log).item_numbers([1, "new"]).tolist()
        >>> first, never_seen > 3
        (1, True)
    """

    def __init__(self, log: LogItems) -> None:
        self.schema, self.items, self._vocabulary = log.schema, log.items, log.vocabulary
        self.digest = self._vocabulary.digest
        self._num_items = log.num_items
        self._item_rows = log.item_rows
        self._hashed_from = max(self.schema.item_features[self.schema.item], self._num_items)
        names = self._vocabulary.names
        self._integer_users = "user" not in names or self._vocabulary["user"].integers

    def user(self, user: Id) -> Id:
        """The id under which a user's state is stored: where users are integers, "7" becomes 7."""
        number = integer_of(user) if self._integer_users else None
        return user if number is None else number

    def item_numbers(self, items: Sequence[Id]) -> np.ndarray:
        """Each item's number, [n] int64: the log's, or a hash for unknown items; 0 is "unknown"."""
        ids = self._vocabulary[self.schema.item]
        numbers = ids.rows_of(items)
        for n in np.flatnonzero(numbers == 0).tolist():
            if ids.kind != "numbered" or str(items[n]) != "0":
                digest = hashlib.blake2b(str(items[n]).encode(), digest_size=8).digest()
                numbers[n] = self._hashed_from + int.from_bytes(digest, "big") % _HASHES
        return numbers

    def encode_requests(self, requests: Sequence[RankingRequest]) -> EncodedRequests:
        """Encode B checked requests.

        Raises:
            RequestError: a value is not a number, or is out of range.
        """
        schema, count = self.schema, len(requests)
        lengths = np.array([len(request.candidates) for request in requests], np.int64)
        items = self.item_numbers([item for request in requests for item in request.candidates])
        of_request = np.repeat(np.arange(count), lengths)
        values = np.zeros(count, np.int64)
        described = np.where(items < self._num_items, items, 0)
        ids = self._ids_of_items(described)
        for name in schema.candidate_features:
            given = [value for request in requests for value in request.candidate_features[name]]
            ids[name] = self._rows_of(name, given, of_request, values)
        dense = [
            float32s(f"dense.{f}", [r.dense[f] for r in requests], f in schema.log_scaled)
            for f in schema.dense_features
        ]
        candidate_dense = [
            float32s(
                f"candidate_dense.{f}",
                [x for request in requests for x in request.candidate_dense[f]],
                f in schema.log_scaled,
            )
            for f in schema.candidate_dense
        ]
        return EncodedRequests(
            items,
            described,
            lengths,
            ids,
            self._context(requests, values),
            stacked(dense, count),
            stacked(candidate_dense, len(items)),
            np.bincount(of_request[self._is_unknown(items)], minlength=count),
            values,
        )

    def features(self, encoded: EncodedRequests) -> RankingFeatures:
        """The requests' features, with empty histories."""
        ids = {name: encoded.ids[name] for name in self.schema.candidate_features}
        context = {name: values for name, (values, _) in encoded.context.items()}
        return RankingFeatures(
            dense_features=encoded.dense,
            context_features=jagged(context, [lengths for _, lengths in encoded.context.values()]),
            candidate_dense=encoded.candidate_dense,
            history_age=torch.empty(0),
            **self._sequences(_CANDIDATE, encoded.items, encoded.lengths, ids),
        )

    def encode_events(self, events: Sequence[Event]) -> EncodedEvents:
        """Encode N events, each as its own request at the event's time.

        An event from the journal may have been added under another version's schema: ids that it lacks
        become unknown, and numbers that it lacks are missing.

        Raises:
            RequestError: a number that the schema log-scales is negative.
        """
        schema, count = self.schema, len(events)
        items, values = self.item_numbers([event.item for event in events]), np.zeros(count, np.int64)
        event_ids: dict[str, np.ndarray] = {}
        for name in schema.event_features:
            given = [event.features.get(name) for event in events]
            has = np.flatnonzero([value is not None for value in given])
            event_ids[name] = np.zeros(count, np.int64)
            ids = [value for value in given if value is not None]
            event_ids[name][has] = self._rows_of(name, ids, has, values)
        dense = [
            float32s(f"numbers.{f}", [event.numbers.get(f) for event in events], f in schema.log_scaled)
            for f in schema.event_dense
        ]
        weight = None
        if schema.event_weight is not None:
            weight = torch.tensor([1.0 if e.weight is None else e.weight for e in events])
        features = RankingFeatures(
            dense_features=torch.zeros(count, len(schema.dense_features)),
            context_features=jagged({}, []),
            candidate_dense=torch.empty(0, len(schema.candidate_dense)),
            history_age=torch.zeros(count),
            history_weight=weight,
            history_dense=stacked(dense, count) if dense else None,
            **self._sequences(_HISTORY, items, np.ones(count, np.int64), event_ids),
        )
        return EncodedEvents(features, self._is_unknown(items).astype(np.int64), values)

    def _is_unknown(self, items: np.ndarray) -> np.ndarray:
        return (items == 0) | (items >= self._num_items)

    def _rows_of(
        self, name: str, ids: Sequence[Id], of_request: np.ndarray, unknown: np.ndarray
    ) -> np.ndarray:
        """The rows of ids; unknown ids are counted per request in ``unknown``, in place."""
        rows = self._vocabulary[name].rows_of(ids)
        np.add.at(unknown, of_request[rows == 0], 1)
        return rows

    def _context(
        self, requests: Sequence[RankingRequest], unknown: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        context: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in (*self.schema.context_features, *self.schema.context_lists):
            given = [_listed(request.context[name]) for request in requests]
            lengths = np.array([len(ids) for ids in given], np.int64)
            of_request = np.repeat(np.arange(len(requests)), lengths)
            rows = self._rows_of(name, [i for ids in given for i in ids], of_request, unknown)
            context[name] = rows, lengths
        return context

    def _ids_of_items(self, described: np.ndarray) -> dict[str, np.ndarray]:
        """The row of each item feature, for items that the log describes."""
        ids = {f: self.items[f][described] for f in self.schema.item_features}
        ids[self.schema.item] = self._item_rows(described)
        return ids

    def _sequences(
        self, prefix: str, items: np.ndarray, lengths: np.ndarray, own: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """The RankingFeatures fields for history events or for candidates; the other side is empty.

        Args:
            prefix: which side: _HISTORY or _CANDIDATE.
            items: item numbers.
            lengths: [B], how many each request has.
            own: rows of the event or candidate features, by name.
        """
        schema = self.schema
        described = np.where(items < self._num_items, items, 0)
        of_items = self._ids_of_items(described)
        none = np.empty(0, np.int64)
        values: dict[str, np.ndarray] = {}
        for side, features in (
            (_HISTORY, (*schema.item_features, *schema.event_features)),
            (_CANDIDATE, (*schema.item_features, *schema.candidate_features)),
        ):
            there = {**of_items, **own} if side == prefix else dict.fromkeys(features, none)
            values |= {side + f: there[f] for f in features}
        counts = {key: lengths if key.startswith(prefix) else 0 * lengths for key in values}
        of_events, of_candidates = (described, none) if prefix == _HISTORY else (none, described)
        numbers = tensor(items), tensor(none)
        history, candidates = numbers if prefix == _HISTORY else numbers[::-1]
        return {
            "sequence_features": jagged(values, list(counts.values())),
            "history_item_ids": history,
            "candidate_item_ids": candidates,
            **item_fields(self.items, schema, of_events, of_candidates),
        }


def _listed(value: Id | Sequence[Id]) -> Sequence[Id]:
    """The ids of a context list, or the single id of a context feature as a list."""
    return [value] if isinstance(value, (int, str)) else value
