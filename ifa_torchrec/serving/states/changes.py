""""""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.layout import _Place
from ifa_torchrec.serving.states.records import (
    _BLOCK,
    _BUILD,
    _EVENT,
    Event,
    _bit,
    _Format,
    _Head,
    _journal_key,
    _packed_before,
    _set_bit,
    _Sums,
    utc,
)


class _Draft:
    """What a transaction makes of the records it found, each decoded once."""

    def __init__(self, form: _Format, found: Mapping[bytes, bytes]) -> None:
        self._format, self._found = form, found
        self._journal: dict[int, Event] = {}
        self._positions: dict[bytes, bytearray] = {}
        self._heads: dict[int, _Head] = {}
        self._before: dict[int, tuple[_Head, dict[int, _Sums | None]]] = {}
        self._blocks: dict[int, bytearray] = {}
        self._members: dict[tuple[int, int], bytearray] = {}
        self._rows: dict[tuple[int, int], _Sums | None] = {}

    def take(self, event: Event) -> bool:
        """Whether an event is new; its position is then taken.

        Raises:
            StateError: its position is another event's.
        """
        form, position = self._format, event.position
        first = self._journal.get(position)
        if first is None and (value := self._found.get(_journal_key(position))) is not None:
            first = Event(position, *_EVENT.unpack(value))
        if first is not None and first != event:
            raise StateError(
                f"position {position} is of user {first.user}, item {first.item} at {utc(first.time)}, "
                f"and comes again with user {event.user}, item {event.item} at {utc(event.time)}. Each "
                "event has a position of its own; for a stream that was made anew build states in an "
                "empty store"
            )
        if position < form.position:
            if first is None and form.latest is not None and event.time > form.latest:
                raise StateError(
                    f"position {position} is before {form.position}, where the stream goes on from the "
                    f"log, but its event at {utc(event.time)} is after the log's last one at "
                    f"{utc(form.latest)}. Was --position of {_BUILD} too high, or are there several "
                    "streams (then it can only be 0)?"
                )
            return False
        key = form.block_key(position)
        if key not in self._positions:
            self._positions[key] = bytearray(self._found.get(key, form.no_bits))
        if _bit(self._positions[key], position % _BLOCK):
            return False
        _set_bit(self._positions[key], position % _BLOCK)
        self._journal[position] = event
        return True

    def add(self, user: int, event: _Sums, rows: Sequence[tuple[int, _Sums]]) -> None:
        """Add an event, its dense heads and its rows, to a user's state."""
        head = self._open(user)
        before, rows_before = self._before[user]
        there = [self._row(user, key) for key, _ in rows]
        if event.time > head.sums.time or not head.count:
            before, rows_before = self._before[user] = dataclasses.replace(head), {}
            before.sums = dataclasses.replace(head.sums)
        elif event.time < head.sums.time:
            before.add(event, self._format.decay)
        for (key, row), found in zip(rows, there, strict=True):
            if event.time >= head.sums.time or not head.count:
                rows_before.setdefault(key, None if found is None else dataclasses.replace(found))
            elif key in rows_before:
                rows_before[key] = self._sum(rows_before[key], row)
            self._rows[user, key] = self._sum(found, row)
            _set_bit(self._member(user, key // _BLOCK), key % _BLOCK)
            _set_bit(self._blocks[user], key // _BLOCK)
        head.add(event, self._format.decay)

    def written(self, seed: np.random.Generator) -> dict[bytes, bytes]:
        """The records that are new or changed, by their keys."""
        form = self._format
        bodies = {_journal_key(p): _EVENT.pack(e.user, e.item, e.time) for p, e in self._journal.items()}
        bodies |= {key: bytes(bits) for key, bits in self._positions.items()}
        for user, head in self._heads.items():
            bodies[form.user_key(b"s", user)] = form.pack_head(head, seed) + self._blocks[user]
            before, rows = self._before[user]
            packed = self._packed(rows, seed)
            places = _packed_before({key: packed.get(key, b"") for key in rows})
            bodies[form.user_key(b"u", user)] = form.pack_head(before, seed) + places
        for (user, block), bits in self._members.items():
            bodies[form.member_key(user, block)] = zlib.compress(bits)
        packed = self._packed(self._rows, seed)
        bodies |= {form.row_key(*place): row for place, row in packed.items()}
        return {key: form.sealed(key, body) for key, body in bodies.items()}

    def _open(self, user: int) -> _Head:
        """The user's head; what was before and which blocks there are beside it."""
        if user not in self._heads:
            form = self._format
            value, before = (self._found.get(form.user_key(kind, user)) for kind in (b"s", b"u"))
            if (value is None) != (before is None):
                raise form.lost(user)
            if value is None or before is None:
                shape = (form.layout.num_heads, form.layout.feature_dim)
                empty = _Sums(0, np.zeros(shape), np.zeros((*shape, form.layout.head_dim)))
                self._heads[user], blocks = _Head(empty, 0), form.no_blocks
                self._before[user] = _Head(empty, 0), {}
            else:
                self._heads[user], blocks = form.unpack_head(value)
                head, rows = form.unpack_before(before)
                self._before[user] = head, {key: self._unpacked(row) for key, row in rows.items()}
            self._blocks[user] = bytearray(blocks)
        return self._heads[user]

    def _member(self, user: int, block: int) -> bytearray:
        """Which keys of a block have a row."""
        if (user, block) not in self._members:
            value = self._found.get(self._format.member_key(user, block))
            if (value is not None) != _bit(self._blocks[user], block):
                raise self._format.lost(user)
            bits = self._format.no_bits if value is None else zlib.decompress(value)
            self._members[user, block] = bytearray(bits)
        return self._members[user, block]

    def _row(self, user: int, key: int) -> _Sums | None:
        if (user, key) not in self._rows:
            value = self._found.get(self._format.row_key(user, key))
            if (value is not None) != _bit(self._member(user, key // _BLOCK), key % _BLOCK):
                raise self._format.lost(user)
            self._rows[user, key] = self._unpacked(value or b"")
        return self._rows[user, key]

    def _sum(self, row: _Sums | None, event: _Sums) -> _Sums:
        result = dataclasses.replace(event if row is None else row)
        if row is not None:
            result.add(event, self._format.identity_decay)
        return result

    def _unpacked(self, row: bytes) -> _Sums | None:
        if not row:
            return None
        time, *sums = self._format.unpack_rows([row])
        return _Sums(int(time[0]), *(column[0] for column in sums))

    def _packed(
        self, rows: Mapping[_Place, _Sums | None], seed: np.random.Generator
    ) -> dict[_Place, bytes]:
        there = {place: row for place, row in rows.items() if row is not None}
        if not there:
            return {}
        time = np.array([row.time for row in there.values()])
        weight = np.stack([row.weight for row in there.values()])
        mean = np.stack([row.mean for row in there.values()])
        return dict(zip(there, self._format.pack_rows(time, weight, mean, seed), strict=True))
