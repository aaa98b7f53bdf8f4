"""Whole states as records, which a build writes from histories or from another version's states."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.dense import Head, Latest, Sums
from ifa_torchrec.serving.states.layout import key_user, user_key
from ifa_torchrec.serving.states.pages import Rows, page_parts
from ifa_torchrec.serving.states.records import RecordCodec, weight_and_mean


def whole_records(
    codec: RecordCodec,
    users: Sequence[int | str],
    earlier: UserState,
    earlier_times: Sequence[int],
    last: UserState,
    last_times: Sequence[int],
) -> dict[bytes, bytes]:
    """The records of B users' states, by key; arguments as in ``StateStore.write``."""
    early, late = np.asarray(earlier_times, np.int64), np.asarray(last_times, np.int64)
    days = torch.from_numpy((late - early) / MICROSECONDS_PER_DAY * (earlier.count.numpy() > 0))
    whole = _aged(codec, earlier, days) + _aged(codec, last, 0 * days)
    rows, rows_earlier = _rows(codec, whole, late), _rows(codec, earlier, early)
    changed = _rows(codec, last, late)
    heads, heads_earlier = _heads(last, late), _heads(earlier, early)
    bodies: dict[bytes, bytes] = {}
    for b, user in enumerate(users):
        pages = _pages(codec, user, rows[b], bodies)
        head = codec.pack_head(heads_earlier[b], Latest.of(heads[b]), pages)
        bodies[codec.keys.head(user)] = head
        place = rows_earlier[b].find(changed[b].key)
        there = place < len(rows_earlier[b])
        before = rows_earlier[b][place[there]]
        (page,) = codec.rows.pack(before, [0, len(before)], [0])
        bodies[codec.keys.before(user)] = codec.pack_before(page, changed[b].key[~there], head)
    return {key: codec.seal(key, body) for key, body in bodies.items()}


def of_others(
    records: dict[bytes, bytes],
    users: Sequence[int | str],
    until: Sequence[int | None],
    left_out: Sequence[int | None],
    there: Sequence[bytes | None],
) -> dict[bytes, bytes]:
    """Remove from ``records``, in place, those of users who already have a state, or were forgotten
    after the records were made.

    Args:
        records: records of the users' states, by key.
        users: B external ids.
        until: B times up to which each user is forgotten; None if not forgotten.
        left_out: B times up to which each user's events were left out of the records.
        there: B heads that the store has; None where it has none.
    """
    looked_up = zip(users, until, left_out, there, strict=True)
    gone = {
        user_key(user)
        for user, now, then, head in looked_up
        if head is not None or (now is not None and now != then)
    }
    for key in [key for key in records if key_user(key) in gone]:
        del records[key]
    return records


class Unchanged:
    """The records of users whose states consist of exactly the given events.

    Args:
        codec: codec of the version's records.
        users: B external ids.
        events: B pairs: the user's number of events, and the last one's time in microseconds.

    Attributes:
        keys: keys of the records to read first.
        found: [B] bool, whether each user's state matches; known after ``pages``.
    """

    def __init__(
        self,
        codec: RecordCodec,
        users: Sequence[int | str],
        events: Sequence[tuple[int, int]],
    ) -> None:
        self._codec, self._users, self._events = codec, users, events
        self.keys = [codec.keys.head(user) for user in users]
        self.keys += [codec.keys.before(user) for user in users]
        self.found = np.zeros(len(users), bool)
        self._pages: list[np.ndarray] = []

    def pages(self, values: Sequence[bytes | None]) -> list[bytes]:
        """The keys of the pages to read.

        Args:
            values: the records under ``keys``.

        Raises:
            StoreError: a record is damaged.
        """
        codec, heads = self._codec, self.keys[: len(self._users)]
        opened = codec.open_all(heads, values[: len(heads)])
        self._pages = [np.empty(0, np.int64) for _ in self._users]
        self.found[:] = False  # pages may be called again with newer values
        for b, body in enumerate(opened):
            if body is not None:
                earlier, latest = codec.dense.unpack(body)
                self.found[b] = (earlier.count + latest.count, latest.time) == self._events[b]
                if self.found[b]:
                    self._pages[b] = codec.unpack_pages(body)
        users = zip(self._users, self._pages, strict=True)
        return [key for user, first in users for key in codec.keys.pages(user, first)]

    def records(self, values: Sequence[bytes | None], to: RecordCodec) -> dict[bytes, bytes]:
        """The same records for another version, by key.

        Args:
            values: the records under ``keys``, then the pages.
            to: the other version's codec.

        Raises:
            StateError: the two versions' layouts differ.
            StoreError: a record is damaged or missing.
        """
        codec, count = self._codec, len(self._users)
        if codec.layout != to.layout:
            raise StateError(
                f"states of weights {codec.version!r} have another layout than those of "
                f"{to.version!r}; build all states again, without --unchanged-from"
            )
        places = list(accumulate((len(first) for first in self._pages), initial=2 * count))
        result: dict[bytes, bytes] = {}
        for b in np.flatnonzero(self.found).tolist():
            user, first = self._users[b], self._pages[b]
            mine = [values[b], values[count + b], *values[places[b] : places[b + 1]]]
            keys = [codec.keys.head(user), codec.keys.before(user), *codec.keys.pages(user, first)]
            others = [to.keys.head(user), to.keys.before(user), *to.keys.pages(user, first)]
            for key, other, value in zip(keys, others, mine, strict=True):
                if value is None:
                    raise codec.lost(user)
                result[other] = to.seal(other, codec.open(key, value))
        return result


def _aged(codec: RecordCodec, state: UserState, days: torch.Tensor) -> UserState:
    """The state ``days`` [B] later, in float64."""
    factor = torch.exp(-days[:, None] * torch.from_numpy(codec.decay))[..., None]
    aged = dataclasses.replace(
        state,
        key_sum=state.key_sum.double() * factor,
        key_value=state.key_value.double() * factor[..., None],
    )
    if state.identity_offsets is None:
        return aged
    offsets, _, value, total = state.identity_tables()
    days = days[request_of_row(offsets)]
    factor = torch.exp(-days[:, None] * torch.from_numpy(codec.identity_decay))
    return dataclasses.replace(
        aged,
        identity_sum=total.double() * factor,
        identity_value=value.double() * factor[..., None],
    )


def _heads(state: UserState, times: np.ndarray) -> list[Head]:
    weight, mean = weight_and_mean(state.key_sum, state.key_value)
    sums = [Sums(*of_user) for of_user in zip(times.tolist(), weight, mean, strict=True)]
    return [Head(*of_user) for of_user in zip(sums, state.count.tolist(), strict=True)]


def _rows(codec: RecordCodec, state: UserState, times: np.ndarray) -> list[Rows]:
    """Each request's identity rows, as of ``times`` [B]."""
    if state.identity_offsets is None:
        return [Rows.none(codec.layout)] * len(times)
    offsets, key, value, total = state.identity_tables()
    time = times[request_of_row(offsets).numpy()]
    rows = Rows(key.numpy(), time, *weight_and_mean(total, value))
    bounds = offsets.tolist()
    return [rows[begin:end] for begin, end in pairwise(bounds)]


def _pages(codec: RecordCodec, user: int | str, rows: Rows, bodies: dict[bytes, bytes]) -> np.ndarray:
    """Add a user's pages to ``bodies``, and return their first keys."""
    bounds = np.array([0, *(part.stop for part in page_parts(0, len(rows)))])
    first = rows.key[bounds[:-1]] if len(rows) else rows.key
    first[:1] = 0
    pages = codec.rows.pack(rows, bounds, first)
    bodies |= dict(zip(codec.keys.pages(user, first), pages, strict=True))
    return first
