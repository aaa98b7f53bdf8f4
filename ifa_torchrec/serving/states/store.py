"""States in a key-value store: one record a user, one an identity bucket that the user has.

Keys, of one version of the weights (VVVVVVVV, the first 8 bytes of the version's hash):

    v VVVVVVVV                header: the version, its layout and a mark of this building of it, JSON
    s VVVVVVVV user           head: time of the last event, count, dense heads, which blocks k there are
    u VVVVVVVV user           what the last event changed as it was before: the head, and rows
    i VVVVVVVV user key       one row of the identity tables, with its own time
    k VVVVVVVV user block     which of a block of keys have a row, a bit each
    a VVVVVVVV block          which positions of the event stream are in the states, a bit each
    j position                the event itself, for versions that are built later

An event touches its user's records but the other rows, one block and one journal entry, in one
transaction. So the cost does not depend on the history, and an event is in the states exactly if its bit
is set. Numbers are big endian, so that keys sort by them.

A request sees the events strictly before its time, as in training. The last event may not be before it:
therefore the records u, which take back all events of the last one's time, and so serve every time after
the event before those.

Nothing is read that could be wrong in silence. A record ends with a checksum of itself, its key and the
header's mark, so that damage, and what is left of another building, are seen. The header is read with
every record: a store that was emptied, or dropped and built anew, is no longer the one that was opened.
A row that is lost is missed by the bit of its key, and its block by the head.

Sums are kept as mean and weight: S = mean * z. Decay then touches the weights alone, a mean fits
float16 whatever the length of the history, and a bucket whose events all have one value (every item,
unless two collide) needs that value once, not once a half-life.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.errors import StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.states.changes import _Draft
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import StateLayout
from ifa_torchrec.serving.states.records import (
    _BLOCK,
    _BUILD,
    _EVENT,
    FORMAT,
    Event,
    _bit,
    _Format,
    _Head,
    _journal_key,
    _packed_before,
    _Records,
    _request_and_key,
    _set_bit,
    _Sums,
    _tensor,
    _version_id,
    _weight_and_mean,
    utc,
)
from ifa_torchrec.serving.states.versions import _header, _packed_header, _unpacked_header, versions


class StateStore:
    """The states that one version of the weights made.

    Args:
        key_values: where they lie.
        version: of the weights.

    Raises:
        StateError: there are no states of this version, or they were not built to the end; the
            message says which there are.

    Attributes:
        layout: StateLayout.
        position: events of the stream before this one are in the log that the states were built from.
        latest: time of the last event of that log; None if it is not known.

    Example:
        >>> import tempfile, torch
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout, StateStore, open_key_value_store
        >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2, half_lives=(7.0, 90.0)))
        >>> lmdb = open_key_value_store(tempfile.mkdtemp())
        >>> store = StateStore.begin(lmdb, "weights-1", StateLayout.of(ifa), position=0)
        >>> earlier = JaggedTensor(torch.randn(3, 8), lengths=torch.tensor([2, 1]))
        >>> last = JaggedTensor(torch.randn(2, 8), lengths=torch.tensor([1, 1]))
        >>> _ = store.write([70, 71], ifa.encode(earlier), [0, 0], ifa.encode(last), [5, 5])
        >>> store.finish()
        >>> store = StateStore(lmdb, "weights-1")
        >>> [store.read([70], times=[time])[0].count.tolist() for time in (5, 6)]
        [[2], [3]]
    """

    def __init__(self, key_values: KeyValueStore, version: str) -> None:
        key_values.check()
        self.key_values, self.version = key_values, version
        header = _header(key_values, version)
        if header is None or not header["complete"]:
            ready = [v for v, found in versions(key_values).items() if found["complete"]]
            missing = "there are none" if header is None else "they were not built to the end"
            raise StateError(
                f"states of weights {version!r}: {missing}; build them with {_BUILD}. The store "
                f"{key_values.name} has those of {ready or 'no weights'}"
            )
        self._configure(header)

    def _configure(self, header: dict[str, Any]) -> None:
        self._header = _packed_header(header)
        self._format = _Format(self.key_values.name, header)
        self.layout, self.position, self.latest = (
            self._format.layout,
            self._format.position,
            self._format.latest,
        )

    # -------------------------------------------------------------------------------- building

    @classmethod
    def begin(
        cls,
        key_values: KeyValueStore,
        version: str,
        layout: StateLayout,
        position: int,
        source: str = "",
        latest: int | None = None,
    ) -> StateStore:
        """Begin to build a version's states, or go on; none can be read before ``finish``.

        Args:
            key_values: where they go.
            version: of the weights.
            layout: StateLayout.
            position: the first position of the event stream that is not in the log they are built
                from.
            source: says which log; going on must say the same.
            latest: time of that log's last event, if it is known: an event before ``position`` and
                after this time is refused, since the log cannot have it.

        Raises:
            StateError: they are finished, or were begun with another layout, position or source.
            StoreError: the store may lose keys.
        """
        key_values.check()
        header = {
            "format": FORMAT,
            "version": version,
            "layout": dataclasses.asdict(layout),
            "position": position,
            "source": source,
            "latest": latest,
            "mark": secrets.token_hex(8),
            "complete": False,
        }
        header = json.loads(json.dumps(header))  # tuples become lists
        key = b"v" + _version_id(version)
        # of several ranks the first one's mark stays
        key_values.update([key], lambda found: {} if found[0] else {key: _packed_header(header)})
        found = _header(key_values, version)
        if found is None:
            raise StoreError(f"{key_values.name}: what is written here is not kept")
        if found["complete"]:
            raise StateError(
                f"states of weights {version!r} are built; new events are added to them as they "
                "come. To build them anew, drop them first (ifa states)"
            )
        differing = [name for name in header if header[name] != found.get(name) and name != "mark"]
        if differing:
            raise StateError(
                f"states of weights {version!r} were begun with another {' and '.join(differing)}; "
                "go on with the same, or drop them first (ifa states)"
            )
        store = cls.__new__(cls)
        store.key_values, store.version = key_values, version
        store._configure(found)
        return store

    def finish(self) -> None:
        """Say that every state is written.

        Raises:
            StoreError: what was begun is no longer there.
        """
        whole = {**_unpacked_header(self.key_values, self._header), "complete": True}
        self._update([], lambda _: {b"v" + self._format.id: _packed_header(whole)})
        self._header = _packed_header(whole)

    def write(
        self,
        users: Sequence[int],
        earlier: UserState,
        earlier_times: Sequence[int],
        last: UserState,
        last_times: Sequence[int],
    ) -> int:
        """Write whole states, in one transaction.

        Args:
            users: B ids.
            earlier: their states of all events but those of the last event's time.
            earlier_times: B, microseconds, of the last event in these; of any value where there is none.
            last: their states of the events of the last event's time.
            last_times: B, microseconds, of these.

        Returns:
            The bytes written, keys included.

        Raises:
            StoreError: what was begun is no longer there, or the store fails.
        """
        written: dict[bytes, bytes] = {}
        early, late = np.asarray(earlier_times, np.int64), np.asarray(last_times, np.int64)
        days = torch.from_numpy((late - early) / MICROSECONDS_PER_DAY * (earlier.count.numpy() > 0))
        whole = self._aged(earlier, days) + self._aged(last, 0 * days)
        rows_before: list[dict[int, bytes]] = [{} for _ in users]
        blocks = [self._format.no_blocks] * len(users)
        if whole.identity_offsets is not None:
            touched = _request_and_key(last)
            before = self._row_table(earlier, early, set(touched))
            for b, key in touched:
                rows_before[b][key] = before.get((b, key), b"")
            table = self._row_table(whole, late)
            member: dict[int, dict[int, bytearray]] = {}
            for (b, key), row in table.items():
                place = self._format.row_key(users[b], key)
                written[place] = self._format.sealed(place, row)
                bits = member.setdefault(b, {}).setdefault(key // _BLOCK, bytearray(_BLOCK // 8))
                _set_bit(bits, key % _BLOCK)
            for b, of_user in member.items():
                for block, bits in of_user.items():
                    place = self._format.member_key(users[b], block)
                    written[place] = self._format.sealed(place, zlib.compress(bits))
                there = bytearray(self._format.no_blocks)
                for block in of_user:
                    _set_bit(there, block)
                blocks[b] = bytes(there)
        for state, times, kind in (whole, late, b"s"), (earlier, early, b"u"):
            weight, mean = _weight_and_mean(state.key_sum, state.key_value)
            for b, user in enumerate(users):
                head = _Head(_Sums(int(times[b]), weight[b], mean[b]), int(state.count[b]))
                body = self._format.pack_head(head)
                body += blocks[b] if kind == b"s" else _packed_before(rows_before[b])
                key = self._format.user_key(kind, user)
                written[key] = self._format.sealed(key, body)
        self._update([], lambda _: written)
        return sum(len(key) + len(value) for key, value in written.items())

    def _aged(self, state: UserState, days: torch.Tensor) -> UserState:
        """A state some days [B] later, in float64."""
        decay = torch.from_numpy(self._format.decay)
        factor = torch.exp(-days[:, None] * decay)[..., None]
        aged = dataclasses.replace(
            state,
            key_sum=state.key_sum.double() * factor,
            key_value=state.key_value.double() * factor[..., None],
        )
        if state.identity_offsets is None:
            return aged
        offsets, _, value, total = state.identity_tables()
        factor = torch.exp(
            -days[request_of_row(offsets)][:, None] * torch.tensor(self._format.identity_decay)
        )
        return dataclasses.replace(
            aged,
            identity_sum=total.double() * factor,
            identity_value=value.double() * factor[..., None],
        )

    def _row_table(
        self, state: UserState, times: np.ndarray, among: set[tuple[int, int]] | None = None
    ) -> dict[tuple[int, int], bytes]:
        """A state's identity rows, packed, by request and key; all, or those ``among`` some."""
        offsets, _, value, total = state.identity_tables()
        place = _request_and_key(state)
        rows = [n for n, of_row in enumerate(place) if among is None or of_row in among]
        weight, mean = _weight_and_mean(total[rows], value[rows])
        time = times[request_of_row(offsets).numpy()[rows]]
        packed = self._format.pack_rows(time, weight, mean)
        return {place[n]: row for n, row in zip(rows, packed, strict=True)}

    def known(self, users: Sequence[int]) -> np.ndarray:
        """Which users have a state; [B] bool."""
        found = self._read([self._format.user_key(b"s", user) for user in users])
        return np.array([value is not None for value in found], dtype=bool)

    # --------------------------------------------------------------------------------- reading

    def check(self) -> None:
        """See that the states which this object was opened for are there.

        Raises:
            StoreError: they are not, or the store is out of reach or may lose keys.
        """
        self.key_values.check()
        self._read([])

    def read(
        self,
        users: Sequence[int],
        times: Sequence[int | None],
        keys: Sequence[np.ndarray] | None = None,
        new_users: Sequence[bool] | None = None,
        strict: bool = False,
    ) -> tuple[UserState, np.ndarray]:
        """The states at some times, of the events before these, with the identity rows asked for.

        A state can leave out the events of its last event's time, no more: it serves any time after the
        event before those. An earlier time is answered as of the first moment after that event.

        Args:
            users: B ids.
            times: B, microseconds; elapsed time decays each state. None is now, or just after the
                user's last event where the clock that stamped it is ahead.
            keys: B arrays of identity keys (IdentityHeads.keys of the candidates), in any order.
            new_users: B, whether a user may have no state, and then has had no event.
            strict: refuse an earlier time.

        Returns:
            UserState of B requests, float32; and the times [B] int64 that they are as of.

        Raises:
            UnknownUserError: a user has no state.
            StateError: ``strict``, and a state cannot go back to the time.
            StoreError: states are lost or damaged, or the store fails.
        """
        layout = self.layout
        none = np.empty(0, np.int64)
        asked = [none] * len(users) if keys is None else [np.unique(of_user) for of_user in keys]
        records = self._records(users, asked, with_before=False)
        # where more is needed it is all read again, at one moment
        again = [
            b
            for b, (of_user, at) in enumerate(zip(records, times, strict=True))
            if of_user.head is None or (at is not None and at <= of_user.head.sums.time)
        ]
        if again:
            found = self._records([users[b] for b in again], [asked[b] for b in again], with_before=True)
            for b, of_user in zip(again, found, strict=True):
                records[b] = of_user
        weight = np.zeros((len(users), layout.num_heads, layout.feature_dim))
        mean = np.zeros((*weight.shape, layout.head_dim))
        count = np.zeros(len(users), np.int64)
        now = time.time_ns() // 1000
        as_of = np.array([now if at is None else at for at in times], np.int64)
        for b, (user, of_user) in enumerate(zip(users, records, strict=True)):
            if of_user.head is None:
                if new_users is not None and new_users[b]:
                    continue
                raise UnknownUserError(
                    f"user {user} has no state; for one who is new and has had no event give new_user"
                )
            head, last = of_user.head, of_user.head.sums.time
            if times[b] is None:
                as_of[b] = max(now, last + 1)
            if as_of[b] <= last:
                head = of_user.go_back()
                if head.count and as_of[b] <= head.sums.time:
                    if strict:
                        raise StateError(
                            f"user {user} has events at {utc(head.sums.time)} and {utc(last)}, "
                            f"neither before the request's time {utc(int(as_of[b]))}; a state can go "
                            "back behind the last of them alone"
                        )
                    as_of[b] = head.sums.time + 1
            if head.count:
                weight[b], mean[b] = head.sums.at(int(as_of[b]), self._format.decay), head.sums.mean
                count[b] = head.count
        dense = (_tensor(mean * weight[..., None]), _tensor(weight), torch.from_numpy(count))
        if not layout.identity_key_range:
            return UserState(*dense), as_of
        request = np.repeat(np.arange(len(users)), [len(of_user.rows) for of_user in records])
        key = np.concatenate([none, *(list(of_user.rows) for of_user in records)]).astype(np.int64)
        row_time, sums, means = self._format.unpack_rows(
            [r for of_user in records for r in of_user.rows.values()]
        )
        days = (as_of[request] - row_time) / MICROSECONDS_PER_DAY
        sums = sums * np.exp(-days[:, None] * self._format.identity_decay)
        state = UserState(
            *dense,
            torch.from_numpy(np.searchsorted(request, np.arange(len(users) + 1))),
            torch.from_numpy(key),
            _tensor(means * sums[..., None]),
            _tensor(sums),
            layout.identity_key_range,
        )
        return state, as_of

    def _records(
        self, users: Sequence[int], asked: Sequence[np.ndarray], with_before: bool
    ) -> list[_Records]:
        """The users' records, of the identity rows those asked for (sorted, without repetition)."""
        heads = [self._format.user_key(b"s", user) for user in users]
        befores = [self._format.user_key(b"u", user) for user in users if with_before]
        blocks = [np.unique(of_user // _BLOCK).tolist() for of_user in asked]
        members = [
            [self._format.member_key(u, block) for block in bs]
            for u, bs in zip(users, blocks, strict=True)
        ]
        user_of_row = np.repeat(np.asarray(users, np.int64), [len(of_user) for of_user in asked])
        rows = self._format.row_keys(user_of_row, np.concatenate([np.empty(0, np.int64), *asked]))
        wanted = [*heads, *befores, *(key for of_user in members for key in of_user), *rows]
        found = zip(wanted, self._read(wanted), strict=True)
        opened = iter(
            [None if value is None else self._format.opened(key, value) for key, value in found]
        )
        head_values = [next(opened) for _ in heads]
        before_values = [next(opened) for _ in befores] or [None] * len(users)
        member_values = [[next(opened) for _ in of_user] for of_user in members]
        records: list[_Records] = []
        for b, user in enumerate(users):
            head, there = None, self._format.no_blocks
            if (value := head_values[b]) is not None:
                head, there = self._format.unpack_head(value)
            if with_before and (before_values[b] is None) != (head is None):
                raise self._format.lost(user)
            if [value is not None for value in member_values[b]] != [_bit(there, n) for n in blocks[b]]:
                raise self._format.lost(user)
            keys = asked[b].tolist()
            rows_of_user = [next(opened) for _ in keys]
            bits = [self._format.no_bits if v is None else zlib.decompress(v) for v in member_values[b]]
            table = np.frombuffer(b"".join(bits), np.uint8).reshape(-1, _BLOCK // 8)
            block = np.searchsorted(blocks[b], asked[b] // _BLOCK)
            wanted_rows = table[block, asked[b] % _BLOCK // 8] >> (asked[b] % 8).astype(np.uint8) & 1
            if [row is not None for row in rows_of_user] != wanted_rows.astype(bool).tolist():
                raise self._format.lost(user)
            of_key = {key: row for key, row in zip(keys, rows_of_user, strict=True) if row is not None}
            value = before_values[b]
            before = None if value is None else self._format.unpack_before(value)
            records.append(_Records(head, of_key, before))
        return records

    # ------------------------------------------------------------------------------- appending

    def append(
        self, events: Sequence[Event], encode: Callable[[Sequence[Event]], UserState]
    ) -> list[bool]:
        """Add events to their users' states, each once however often it is given.

        All of them in one transaction. They may come in any order: what is added does not depend
        on it, but for rounding. A user without a state gets one.

        Args:
            events: the events.
            encode: gives a state of each event alone, at age 0, as UserState of len(events)
                requests.

        Returns:
            Whether each event was new.

        Raises:
            StateError: an event's position was another event's, or is one of the log's, which cannot
                have it. None of the events is added.
            StoreError: states are lost or damaged, or the store fails.
        """
        if not events:
            return []
        state = encode(events)
        weight, mean = _weight_and_mean(state.key_sum, state.key_value)
        heads = [_Sums(event.time, weight[e], mean[e]) for e, event in enumerate(events)]
        rows: list[list[tuple[int, _Sums]]] = [[] for _ in events]
        if state.identity_offsets is not None:
            *_, value, total = state.identity_tables()
            weight, mean = _weight_and_mean(total, value)
            for row, (e, key) in enumerate(_request_and_key(state)):
                rows[e].append((key, _Sums(events[e].time, weight[row], mean[row])))
        keys: dict[bytes, None] = {}  # in order, each once
        for event, of_event in zip(events, rows, strict=True):
            user = event.user
            keys |= dict.fromkeys([self._format.block_key(event.position), _journal_key(event.position)])
            keys |= dict.fromkeys([self._format.user_key(b"s", user), self._format.user_key(b"u", user)])
            keys |= dict.fromkeys(self._format.row_key(user, key) for key, _ in of_event)
            keys |= dict.fromkeys(self._format.member_key(user, key // _BLOCK) for key, _ in of_event)
        new: list[bool] = []

        def change(values: list[bytes | None]) -> dict[bytes, bytes]:
            new.clear()
            found = {
                key: self._format.opened(key, value)
                for key, value in zip(keys, values, strict=True)
                if value is not None
            }
            draft = _Draft(self._format, found)
            for event, head, of_event in zip(events, heads, rows, strict=True):
                new.append(draft.take(event))
                if new[-1]:
                    draft.add(event.user, head, of_event)
            return draft.written(np.random.default_rng(events[0].position))

        self._update(list(keys), change)
        return new

    def missed(self) -> Iterator[list[Event]]:
        """Events that this store's journal has and these states have not, some at a time."""
        found: list[bytes] = []
        for key in self.key_values.scan(b"j", _journal_key(self.position)[1:]):
            found.append(key)
            if len(found) == 1024:
                yield self._not_applied(found)
                found = []
        yield self._not_applied(found)

    def _not_applied(self, journal_keys: list[bytes]) -> list[Event]:
        positions = [struct.unpack(">q", key[1:])[0] for key in journal_keys]
        block_keys = [self._format.block_key(position) for position in positions]
        blocks, events = self._read(block_keys), self._read(journal_keys)
        result: list[Event] = []
        for n, (position, block, value) in enumerate(zip(positions, blocks, events, strict=True)):
            bits = self._format.no_bits if block is None else self._format.opened(block_keys[n], block)
            if value is not None and not _bit(bits, position % _BLOCK):
                result.append(
                    Event(position, *_EVENT.unpack(self._format.opened(journal_keys[n], value)))
                )
        return result

    # --------------------------------------------------------------------------------- records

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What lies under the keys, if these are still the states that were opened."""
        header, *found = self.key_values.read([b"v" + self._format.id, *keys])
        self._check_header(header)
        return found

    def _update(
        self, keys: Sequence[bytes], change: Callable[[list[bytes | None]], Mapping[bytes, bytes]]
    ) -> None:
        def checked(found: list[bytes | None]) -> Mapping[bytes, bytes]:
            self._check_header(found[0])
            return change(found[1:])

        self.key_values.update([b"v" + self._format.id, *keys], checked)

    def _check_header(self, found: bytes | None) -> None:
        if found == self._header:
            return
        states = f"{self.key_values.name}: the states of weights {self.version!r}"
        if found is None:
            raise StoreError(
                f"{states} are gone: the store was emptied, or restarted without its data, or they were "
                f"dropped. Build them anew ({_BUILD}), send the events from position {self.position} on "
                "again, and start again what served them"
            )
        header = _unpacked_header(self.key_values, found)
        if header.get("dropped"):
            raise StoreError(f"{states} are being dropped; build them anew ({_BUILD}) when they are")
        raise StoreError(
            f"{states} were dropped and built anew since this process opened them; start it again, or "
            "send it SIGHUP, when they are whole"
        )
