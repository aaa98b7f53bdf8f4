"""External ids become rows and numbers, and requests and events the features that a model takes."""

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
"""Numbers that ids which no vocabulary knows are given, behind those that one knows."""


@dataclass(frozen=True)
class EncodedEvents:
    """Features of events, and how many ids in them the vocabulary does not know.

    Args:
        features: of N events, each a request with a history of one.
        items: [N], unknown items of each.
        values: [N], other unknown ids of each.
    """

    features: RankingFeatures
    items: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class EncodedRequests:
    """What B requests ask for, of M candidates together, as rows and numbers.

    Args:
        items: [M] int64, the candidates' items, by the numbers that identity heads compare.
        described: [M] int64, the same, 0 where the log does not know the item.
        lengths: [B] int64, candidates of each request.
        ids: of each item and candidate feature, [M] int64.
        context: of each context feature and context list its ids [L] int64, and how many each request
            has, [B] int64.
        dense: [B, F] and candidate_dense: [M, Fc], float32, NaN where a number is missing.
        unknown_items, unknown_values: [B] int64, of how many candidates, and of how many other ids, the
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
    """What external ids mean to a model: the schema that names its features, the items, the vocabulary.

    An id that the vocabulary does not know is row 0, "unknown". An item still has a number that tells it
    apart in the identity heads: behind the numbers of all items, from a hash of its id.

    Args:
        log: of which schema, items and vocabulary are taken; an EventLog, or what a bundle has of one.

    Attributes:
        schema: LogSchema.
        items: the columns of the log's items.
        digest: of the vocabulary.

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
        """The one name of a user: of users that are integers, the integer of a string of digits."""
        number = integer_of(user) if self._integer_users else None
        return user if number is None else number

    def item_numbers(self, items: Sequence[Id]) -> np.ndarray:
        """The number of each item, [n] int64: that of the log, or one from a hash; 0 is "unknown"."""
        ids = self._vocabulary[self.schema.item]
        numbers = ids.rows_of(items)
        for n in np.flatnonzero(numbers == 0).tolist():
            if ids.kind != "numbered" or str(items[n]) != "0":
                digest = hashlib.blake2b(str(items[n]).encode(), digest_size=8).digest()
                numbers[n] = self._hashed_from + int.from_bytes(digest, "big") % _HASHES
        return numbers

    def encode_requests(self, requests: Sequence[RankingRequest]) -> EncodedRequests:
        """What B checked requests ask for, as rows and numbers.

        Raises:
            RequestError: a number is none.
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
        """The features of these requests, whose histories are empty."""
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
        """The features of N events, each a request of its own, made at the event's time.

        Of an event that stands in the journal since another version took it, ids that it has not are
        unknown and numbers that it has not are missing.

        Raises:
            RequestError: the logarithm is taken of one of its numbers, which is negative.
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
        """Rows of ids, each of a request, whose unknown ones are added up."""
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
        """Of each item feature, the rows of items that the log describes."""
        ids = {f: self.items[f][described] for f in self.schema.item_features}
        ids[self.schema.item] = self._item_rows(described)
        return ids

    def _sequences(
        self, prefix: str, items: np.ndarray, lengths: np.ndarray, own: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """The fields that say what events are of, or what the candidates are; the other side is empty.

        Args:
            prefix: which of the two.
            items: their items' numbers.
            lengths: [B], how many each request has.
            own: ids of their own by feature.
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
    """The ids of a context feature, which has one, or of a context list."""
    return [value] if isinstance(value, (int, str)) else value
