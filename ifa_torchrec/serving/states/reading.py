"""Reading states: the records of some users, and their states at the requests' times.

A request sees only events strictly before its time, as in training. The last event may not be before
it. The records u therefore undo all events at the last event's time, so that a state can serve any time
after the event before those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.dense import Head, Latest
from ifa_torchrec.serving.states.pages import Rows, pages_of
from ifa_torchrec.serving.states.records import Before, RecordCodec
from ifa_torchrec.serving.times import utc


@dataclass
class UserRecords:
    """The records that were read for a user.

    Args:
        user: external id.
        earlier: dense heads of the events before the last event's time; None if the user has no state.
        last: dense heads of the events at the last event's time; None once they are left out.
        rows: the requested identity rows that exist.
        before: rows as they were before the last event's time, if they were read.
    """

    user: int | str
    earlier: Head | None
    last: Latest | None
    rows: Rows
    before: Before | None = None

    def reaches(self, time: int | None) -> bool:
        """Whether all events are before a time, so that ``before`` is not needed."""
        return self.last is not None and (time is None or time > self.last.time)

    def go_to(self, time: int | None, now: int, strict: bool) -> int:
        """Take the state back to a time if needed; return the time that it is then as of.

        Args:
            time: microseconds; None for ``now``, or just after the last event if that is later.
            now: microseconds.
            strict: refuse a time that the state cannot go back to.

        Raises:
            StateError: the time is refused.
        """
        if self.earlier is None or self.last is None:
            return now if time is None else time
        earlier, last = self.earlier, self.last.time
        if time is None:
            return max(now, last + 1)
        if time > last:
            return time
        assert self.before is not None
        self.last, rows = None, self.before.rows
        changed = np.isin(self.rows.key, [*rows.key.tolist(), *self.before.absent.tolist()])
        wanted = np.isin(rows.key, self.rows.key)
        together = Rows.cat([self.rows[~changed], rows[wanted]])
        self.rows = together[np.argsort(together.key)]
        earliest = earlier.sums.time + 1
        if not earlier.count or time >= earliest:
            return time
        if strict:
            raise StateError(
                f"user {self.user!r} has events at {utc(earliest - 1)} and {utc(last)}, neither before "
                f"the request's time {utc(time)}, but a state can leave out only those at the last "
                "event's time; send a later time, or serve without --strict"
            )
        return earliest


class Lookup:
    """Looks up the records of some users' states: the heads, and then the pages that these name.

    Args:
        codec: codec of the version's records.
        users: B external ids.
        wanted: B arrays of identity keys, distinct, ascending and within the layout's range.
        with_before: whether to read the records u too.

    Attributes:
        keys: keys of the records to read first.
    """

    def __init__(
        self,
        codec: RecordCodec,
        users: Sequence[int | str],
        wanted: Sequence[np.ndarray],
        with_before: bool,
    ) -> None:
        self._codec, self._users, self._wanted = codec, users, wanted
        self.keys = [codec.keys.head(user) for user in users]
        if with_before:
            self.keys += [codec.keys.before(user) for user in users]
        self._records: list[UserRecords] = []
        self._first: list[np.ndarray] = []
        self._page_keys: list[bytes] = []

    def pages(self, values: Sequence[bytes | None]) -> list[bytes]:
        """The keys of the pages to read.

        Args:
            values: the records under ``keys``.

        Raises:
            StoreError: a record is damaged or missing.
        """
        codec, none = self._codec, Rows.none(self._codec.layout)
        opened = codec.open_all(self.keys, values)
        heads, befores = opened[: len(self._users)], opened[len(self._users) :]
        self._records, self._first, self._page_keys = [], [], []
        for b, (user, value) in enumerate(zip(self._users, heads, strict=True)):
            of_user = UserRecords(user, None, None, none)
            pages = none.key
            if value is not None:
                of_user.earlier, of_user.last = codec.dense.unpack(value)
                pages = codec.unpack_pages(value)
            if befores:
                if ((body := befores[b]) is None) != (value is None):
                    raise codec.lost(user)
                of_user.before = None if body is None else codec.unpack_before(user, body, value or b"")
            self._records.append(of_user)
            self._first.append(pages_of(pages, self._wanted[b]))
            self._page_keys += codec.keys.pages(user, self._first[b])
        return self._page_keys

    def records(self, values: Sequence[bytes | None]) -> list[UserRecords]:
        """Decode the records.

        Args:
            values: the records under ``keys``, then the pages.

        Raises:
            StoreError: a record is damaged or missing.
        """
        codec = self._codec
        opened = codec.open_all(self._page_keys, values[len(self.keys) :])
        user_of_page = np.repeat(np.arange(len(self._users)), [len(first) for first in self._first])
        bodies: list[bytes] = []
        for body, user in zip(opened, user_of_page.tolist(), strict=True):
            if body is None:
                raise codec.lost(self._users[user])
            bodies.append(body)
        if not bodies:
            return self._records
        # shift each user's keys past those of the users before, so that one search finds all of them
        before = np.arange(len(self._users)) * codec.layout.identity_key_range
        first = np.concatenate(self._first) + before[user_of_page]
        keys = np.concatenate([keys + n for keys, n in zip(self._wanted, before, strict=True)])
        rows = codec.rows.find(bodies, first, keys)
        ends = [*np.searchsorted(rows.key, before[1:]).tolist(), len(rows)]
        begin = 0
        for of_user, n, end in zip(self._records, before.tolist(), ends, strict=True):
            mine = rows[begin:end]
            of_user.rows = Rows(mine.key - n, mine.time, mine.weight, mine.mean)
            begin = end
        return self._records


def state_of(codec: RecordCodec, records: Sequence[UserRecords], as_of: np.ndarray) -> UserState:
    """The states of these records at the times ``as_of`` [B], float32."""
    layout = codec.layout
    weight = np.zeros((len(records), layout.num_heads, layout.feature_dim), np.float32)
    total = np.zeros((*weight.shape, layout.head_dim), np.float32)
    count = np.zeros(len(records), np.int64)
    for b, (of_user, time) in enumerate(zip(records, as_of.tolist(), strict=True)):
        if of_user.earlier is not None and of_user.earlier.count:
            of_user.earlier.sums.put(weight[b], total[b], time, codec.decay)
            count[b] += of_user.earlier.count
        if of_user.last is not None:
            of_user.last.add_to(weight[b], total[b], time, codec.decay)
            count[b] += of_user.last.count
    dense = (torch.from_numpy(total), torch.from_numpy(weight), torch.from_numpy(count))
    if not layout.identity_key_range:
        return UserState(*dense)
    lengths = [len(of_user.rows) for of_user in records]
    rows = Rows.cat([of_user.rows for of_user in records])
    weight = rows.at(np.repeat(as_of, lengths), codec.identity_decay)
    return UserState(
        *dense,
        torch.from_numpy(np.cumsum([0, *lengths])),
        torch.from_numpy(rows.key),
        _tensor(rows.mean * weight[..., None]),
        _tensor(weight),
        layout.identity_key_range,
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
