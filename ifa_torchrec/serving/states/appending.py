"""Events added to states: what one transaction makes of the records that it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.states.journal import Event, Journal
from ifa_torchrec.serving.states.layout import BLOCK, has_bit, set_bit
from ifa_torchrec.serving.states.records import RecordCodec, Sums, weight_and_mean
from ifa_torchrec.serving.states.shared import tombstone_key, unpack_number

Place = TypeVar("Place")


class Addition:
    """Events that are added to their users' states in one transaction.

    Args:
        codec: of the version's records.
        events: E of them, at least one.
        state: of each event alone, at age 0; UserState of E requests.

    Attributes:
        keys: of all records that it reads.
        new: whether each event was new, once ``apply`` was called; None of an event whose user was
            forgotten after it.
    """

    def __init__(self, codec: RecordCodec, events: Sequence[Event], state: UserState) -> None:
        self._codec, self._events = codec, events
        weight, mean = weight_and_mean(state.key_sum, state.key_value)
        self._heads = [Sums(event.time, weight[e], mean[e]) for e, event in enumerate(events)]
        self._rows: list[dict[int, Sums]] = [{} for _ in events]
        if state.identity_offsets is not None:
            offsets, key, value, total = state.identity_tables()
            weight, mean = weight_and_mean(total, value)
            places = zip(request_of_row(offsets).tolist(), key.tolist(), strict=True)
            for row, (e, k) in enumerate(places):
                self._rows[e][k] = Sums(events[e].time, weight[row], mean[row])
        self._tombstones = {event.user: tombstone_key(event.user) for event in events}
        keys: dict[bytes, None] = {}  # in order, each once
        for event, rows in zip(events, self._rows, strict=True):
            keys |= dict.fromkeys(Journal.keys_of(codec, event))
            keys |= dict.fromkeys(StateDraft.keys_of(codec, event.user, rows))
        self.keys = [*self._tombstones.values(), *keys]
        self.new: list[bool | None] = []

    def apply(self, values: Sequence[bytes | None]) -> dict[bytes, bytes]:
        """The records that are new or changed, by their keys.

        Args:
            values: the records under ``keys``.

        Raises:
            StateError, StoreError: as ``StateStore.append``.
        """
        codec, read = self._codec, dict(zip(self.keys, values, strict=True))
        forgotten = {
            user: unpack_number(codec.store, key, read.pop(key))
            for user, key in self._tombstones.items()
        }
        found = {key: codec.open(key, value) for key, value in read.items() if value is not None}
        journal, drafts = Journal(codec, found), dict[int | str, StateDraft]()
        self.new = []
        for event, head, rows in zip(self._events, self._heads, self._rows, strict=True):
            self.new.append(journal.take(event, forgotten[event.user]))
            if self.new[-1]:
                if event.user not in drafts:
                    drafts[event.user] = StateDraft(codec, event.user, found)
                drafts[event.user].add(head, rows)
        seed = np.random.default_rng(self._events[0].position)
        bodies = journal.changed()
        for draft in drafts.values():
            bodies |= draft.changed_heads(seed)
        changed = {k: row for draft in drafts.values() for k, row in draft.changed_rows().items()}
        bodies |= _packed(codec, changed, seed)
        return {key: codec.seal(key, body) for key, body in bodies.items()}


class StateDraft:
    """One user's state while events are added to it; each record is decoded once.

    Beside the state stands what it was before the events of its last time: the head, and the rows that
    these changed.

    Args:
        codec: of the version's records.
        user: external id.
        found: bodies of the records that there are, by their keys.

    Raises:
        StoreError: one of the user's records is gone.
    """

    def __init__(self, codec: RecordCodec, user: int | str, found: Mapping[bytes, bytes]) -> None:
        self._codec, self._user, self._found = codec, user, found
        head, before = found.get(codec.keys.head(user)), found.get(codec.keys.before(user))
        if (head is None) != (before is None):
            raise codec.lost(user)
        self._head = self._before = codec.no_head()
        self._rows_before: dict[int, Sums | None] = {}
        blocks = codec.no_blocks
        if head is not None and before is not None:
            self._head, blocks = codec.unpack_head(head)
            self._before, rows = codec.unpack_before(before)
            self._rows_before = {key: codec.unpack_row(row) for key, row in rows.items()}
        self._blocks = bytearray(blocks)
        self._members: dict[int, bytearray] = {}
        self._rows: dict[int, Sums | None] = {}

    @staticmethod
    def keys_of(codec: RecordCodec, user: int | str, rows: Mapping[int, Sums]) -> list[bytes]:
        """The keys of the records that an event with these rows touches."""
        keys = codec.keys
        of_rows = [keys.row(user, key) for key in rows]
        of_blocks = [keys.members(user, key // BLOCK) for key in rows]
        return [keys.head(user), keys.before(user), *of_rows, *of_blocks]

    def add(self, event: Sums, rows: Mapping[int, Sums]) -> None:
        """Add an event: its dense heads and its rows, by key."""
        head, decay = self._head, self._codec.decay
        there = {key: self._row(key) for key in rows}
        if event.time > head.sums.time or not head.count:
            self._before, self._rows_before = head, {}
        elif event.time < head.sums.time:
            self._before = self._before.plus(event, decay)
        for key, row in rows.items():
            if event.time >= head.sums.time or not head.count:
                self._rows_before.setdefault(key, there[key])
            elif key in self._rows_before:
                self._rows_before[key] = self._sum(self._rows_before[key], row)
            self._rows[key] = self._sum(there[key], row)
            set_bit(self._members_of(key // BLOCK), key % BLOCK)
            set_bit(self._blocks, key // BLOCK)
        self._head = head.plus(event, decay)

    def changed_heads(self, seed: np.random.Generator) -> dict[bytes, bytes]:
        """The bodies of all its records but the rows, by their keys."""
        codec, keys, user = self._codec, self._codec.keys, self._user
        before = {key: b"" for key in self._rows_before} | _packed(codec, self._rows_before, seed)
        bodies = {
            keys.head(user): codec.pack_head(self._head, seed) + self._blocks,
            keys.before(user): codec.pack_head(self._before, seed) + codec.pack_row_list(before),
        }
        for block, bits in self._members.items():
            bodies[keys.members(user, block)] = codec.pack_members(bits)
        return bodies

    def changed_rows(self) -> dict[bytes, Sums | None]:
        """Its rows, by their records' keys."""
        return {self._codec.keys.row(self._user, key): row for key, row in self._rows.items()}

    def _members_of(self, block: int) -> bytearray:
        """Which keys of a block have a row."""
        if block not in self._members:
            body = self._found.get(self._codec.keys.members(self._user, block))
            if (body is not None) != has_bit(self._blocks, block):
                raise self._codec.lost(self._user)
            self._members[block] = bytearray(self._codec.unpack_members(body))
        return self._members[block]

    def _row(self, key: int) -> Sums | None:
        if key not in self._rows:
            body = self._found.get(self._codec.keys.row(self._user, key))
            if (body is not None) != has_bit(self._members_of(key // BLOCK), key % BLOCK):
                raise self._codec.lost(self._user)
            self._rows[key] = None if body is None else self._codec.unpack_row(body)
        return self._rows[key]

    def _sum(self, row: Sums | None, event: Sums) -> Sums:
        return event if row is None else row.plus(event, self._codec.identity_decay)


def _packed(
    codec: RecordCodec, rows: Mapping[Place, Sums | None], seed: np.random.Generator
) -> dict[Place, bytes]:
    """The rows that there are, as bytes."""
    there = {place: row for place, row in rows.items() if row is not None}
    if not there:
        return {}
    time = np.array([row.time for row in there.values()])
    weight = np.stack([row.weight for row in there.values()])
    mean = np.stack([row.mean for row in there.values()])
    return dict(zip(there, codec.pack_rows(time, weight, mean, seed), strict=True))
