"""Adding events to states: how one transaction changes the records that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.states.dense import Head, Latest, Sums
from ifa_torchrec.serving.states.journal import Event, Journal
from ifa_torchrec.serving.states.pages import Rows, page_parts, pages_of, quotient
from ifa_torchrec.serving.states.records import RecordCodec, weight_and_mean
from ifa_torchrec.serving.states.shared import tombstone_key, unpack_number


class Addition:
    """Adds events to their users' states in one transaction.

    Args:
        codec: codec of the version's records.
        events: E events, at least one; their users' keys have the same tag.
        state: the state of each event on its own, at age 0; UserState of E requests.

    Attributes:
        keys: keys of the records to read first.
        new: after ``apply``, whether each event was new; None if its user was forgotten after it.
    """

    def __init__(self, codec: RecordCodec, events: Sequence[Event], state: UserState) -> None:
        self._codec, self._events = codec, events
        self._sums = EventSums(codec, events, state)
        of_user: dict[int | str, list[int]] = {}
        for e, event in enumerate(events):
            of_user.setdefault(event.user, []).append(e)
        self._of_user = {user: np.array(places) for user, places in of_user.items()}
        self._tombstones = {user: tombstone_key(user, codec.keys.tags) for user in of_user}
        heads = [key(user) for user in of_user for key in (codec.keys.head, codec.keys.before)]
        self._journal_keys = [Journal.keys_of(codec, event) for event in events]
        journal = dict.fromkeys(key for of_event in self._journal_keys for key in of_event)
        self.keys = [*self._tombstones.values(), *heads, *journal]
        self._pages: list[bytes] = []
        self._heads: dict[bytes, tuple[bytes, bytes]] = {}
        """The record and the body of each head, by key, as ``pages`` found them."""
        self.new: list[bool | None] = []

    def pages(self, values: Sequence[bytes | None]) -> list[bytes]:
        """The keys of the pages to read as well.

        Args:
            values: the records under ``keys``.

        Raises:
            StoreError: a head is damaged.
        """
        codec, found = self._codec, dict(zip(self.keys, values, strict=True))
        self._pages, self._heads = [], {}
        for user, events in self._of_user.items():
            key = codec.keys.head(user)
            if (value := found[key]) is not None:
                self._heads[key] = value, codec.open(key, value)
                pages = codec.unpack_pages(self._heads[key][1])
                self._pages += codec.keys.pages(user, pages_of(pages, self._sums.keys_of(events)))
        return self._pages

    def apply(self, values: Sequence[bytes | None]) -> dict[bytes, bytes]:
        """The new and changed records, by key.

        Args:
            values: the records under ``keys`` and ``pages``.

        Raises:
            StateError, StoreError: as ``StateStore.append``.
        """
        codec, read = self._codec, dict(zip([*self.keys, *self._pages], values, strict=True))
        forgotten = {
            user: unpack_number(codec.store, key, read.pop(key))
            for user, key in self._tombstones.items()
        }
        there = {key: value for key, value in read.items() if value is not None}
        journal = Journal(codec, there)
        of_events = zip(self._events, self._journal_keys, strict=True)
        self.new = [journal.take(event, keys, forgotten[event.user]) for event, keys in of_events]
        taken = np.array(self.new) == True  # noqa: E712  an element None counts as False
        seed = np.random.default_rng(self._events[0].position)
        bodies = journal.changed()
        found = {key: self._open(key, value) for key, value in there.items() if key[:1] in b"sui"}
        new = {user: events[taken[events]] for user, events in self._of_user.items()}
        if new := {user: events for user, events in new.items() if len(events)}:
            drafts = StateDrafts(codec, list(new), found)
            drafts.add(self._sums, list(new.values()))
            bodies |= drafts.records(seed)
        return {key: codec.seal(key, body) for key, body in bodies.items()}

    def _open(self, key: bytes, value: bytes) -> bytes:
        """The body of a record; a head, the longest kind, is not checksummed a second time."""
        record, body = self._heads.get(key, (None, b""))
        return body if record is value else self._codec.open(key, value)


class Progress:
    """Writes the positions where a stream consumer resumes, in one transaction. They never decrease.

    Args:
        codec: codec of the version's records.
        positions: position by partition.

    Attributes:
        keys: keys of the records to read.
    """

    def __init__(self, codec: RecordCodec, positions: Mapping[int, int]) -> None:
        self._codec, self._positions = codec, positions
        self.keys = [codec.keys.stream(partition) for partition in positions]

    def apply(self, values: Sequence[bytes | None]) -> dict[bytes, bytes]:
        """The new and changed records, by key; ``values`` are the records under ``keys``."""
        codec, changed = self._codec, dict[bytes, bytes]()
        for key, value, position in zip(self.keys, values, self._positions.values(), strict=True):
            if position > codec.position(key, value):
                changed[key] = codec.seal(key, codec.pack_position(position))
        return changed


class EventSums:
    """What each of E events adds on its own; the arguments are those of ``Addition``."""

    def __init__(self, codec: RecordCodec, events: Sequence[Event], state: UserState) -> None:
        self._codec = codec
        self.times = np.array([event.time for event in events], np.int64)
        self._weight = state.key_sum.double().numpy()  # [E, H, F]
        # an event has one value per head, shared by its features; the heaviest feature's is most exact
        heaviest = state.key_sum.argmax(-1, keepdim=True)
        weight = state.key_sum.gather(-1, heaviest)
        place = heaviest[..., None].expand(-1, -1, -1, codec.layout.head_dim)
        self._value = weight_and_mean(weight, state.key_value.gather(2, place))[1][:, :, 0]  # [E, H, d]
        self._rows, self._offsets = Rows.none(codec.layout), np.zeros(len(events) + 1, np.int64)
        if state.identity_offsets is not None:
            offsets, key, value, total = state.identity_tables()
            self._offsets = offsets.numpy()
            time = np.repeat(self.times, np.diff(self._offsets))
            self._rows = Rows(key.numpy(), time, *weight_and_mean(total, value))
        self._lengths = np.diff(self._offsets)

    def head(self, events: np.ndarray) -> Head:
        """The head of some events combined, as of the latest of their times."""
        if not len(events):
            return self._codec.dense.no_head
        time = int(self.times[events].max())
        days = (time - self.times[events]) / MICROSECONDS_PER_DAY
        factor = np.exp(-days[:, None] * self._codec.decay)  # [e, H]
        weights = (factor[..., None] * self._weight[events]).transpose(1, 2, 0)  # [H, F, e]
        weight, total = weights.sum(-1), weights @ self._value[events].transpose(1, 0, 2)
        return Head(Sums(time, weight, quotient(total, weight[..., None])), len(events))

    def latest(self, events: np.ndarray) -> Latest:
        """The dense heads of some events that share one time."""
        if not len(events):
            return self._codec.dense.no_latest
        each = self._weight[events].transpose(1, 2, 0)  # [H, F, e]
        weight = each.sum(-1)
        share = quotient(each, weight[..., None])
        time, value = int(self.times[events[0]]), self._value[events].transpose(1, 0, 2)
        return Latest(time, len(events), weight, share, value)

    def rows(self, events: Sequence[np.ndarray], shift: np.ndarray) -> Rows:
        """One row per key of some users' events, as of the latest time of the key's events.

        Args:
            events: the events of each of U users.
            shift: [U] int64, added to each user's keys so that they differ from other users' keys.
        """
        together = np.concatenate(events)
        rows = self._rows[self._places(together)]
        shifts = shift.repeat([len(of_user) for of_user in events]).repeat(self._lengths[together])
        return replace(rows, key=rows.key + shifts).by_key(self._codec.identity_decay)

    def keys_of(self, events: np.ndarray) -> np.ndarray:
        """The distinct keys of some events' rows, ascending."""
        return np.unique(self._rows.key[self._places(events)])

    def _places(self, events: np.ndarray) -> np.ndarray:
        lengths = self._lengths[events]
        begins = np.repeat(self._offsets[events] - np.cumsum(lengths) + lengths, lengths)
        return begins + np.arange(len(begins))


class StateDrafts:
    """Some users' states while a transaction adds events to them.

    The dense heads of the events at a user's last time are kept separate, as are the earlier versions of
    the rows that these events changed. The rows of all users form one table, in which each user's keys
    are shifted past those of the users before, so that row operations run once instead of per user.

    Args:
        codec: codec of the version's records.
        users: U external ids.
        found: bodies of the existing records, by key.

    Raises:
        StoreError: one of a user's records is missing.
    """

    def __init__(
        self, codec: RecordCodec, users: Sequence[int | str], found: Mapping[bytes, bytes]
    ) -> None:
        self._codec, self._users, self._found = codec, users, found
        self._shift = np.arange(len(users)) * codec.layout.identity_key_range
        none = np.empty(0, np.int64)
        self._heads = [codec.dense.no_head] * len(users)
        self._latest = [codec.dense.no_latest] * len(users)
        self._pages, self._absent = [none] * len(users), [none] * len(users)
        befores: dict[int, bytes] = {}
        for u, user in enumerate(users):
            head, before = found.get(codec.keys.head(user)), found.get(codec.keys.before(user))
            if (head is None) != (before is None):
                raise codec.lost(user)
            if head is not None and before is not None:
                self._heads[u], self._latest[u] = codec.dense.unpack(head)
                self._pages[u] = codec.unpack_pages(head)
                self._absent[u], befores[u] = codec.split_before(user, before, head)
        there = np.array(list(befores), np.int64)
        self._before, counts = codec.rows.unpack(list(befores.values()), self._shift[there])
        self._user_of_before = there.repeat(counts)
        self._rows, self._first, self._bounds_of_pages = self._before[:0], none, np.zeros(1, np.int64)

    def add(self, sums: EventSums, events: Sequence[np.ndarray]) -> None:
        """Add events, at least one per user; call this only once."""
        decay, codec = self._codec.identity_decay, self._codec
        last = [int(sums.times[of_user].max()) for of_user in events]
        later = np.array([t > latest.time for t, latest in zip(last, self._latest, strict=True)])
        last = [max(t, latest.time) for t, latest in zip(last, self._latest, strict=True)]
        early = [e[sums.times[e] != t] for e, t in zip(events, last, strict=True)]
        late = [e[sums.times[e] == t] for e, t in zip(events, last, strict=True)]
        for u in range(len(events)):
            if later[u]:
                self._heads[u] = self._heads[u].plus(self._latest[u].head, codec.decay)
                self._latest[u] = codec.dense.no_latest
            self._heads[u] = self._heads[u].plus(sums.head(early[u]), codec.decay)
            self._latest[u] = self._latest[u].plus(sums.latest(late[u]))
        added, early_rows = sums.rows(events, self._shift), sums.rows(early, self._shift)
        late_rows = sums.rows(late, self._shift) if len(early_rows) else added
        rows, first = self._page_rows(added.key)
        place = rows.find(added.key)
        touched = rows[place[place < len(rows)]]
        # if a user's last time stays, rows that were not changed at that time are as they were before
        before = self._before[~later[self._user_of_before]]
        absent = zip(self._absent, self._shift, later, strict=True)
        known = np.concatenate([before.key, *(keys + n for keys, n, is_later in absent if not is_later)])
        same = touched[~np.isin(touched.key, known)]
        self._set_before(
            Rows.cat([before, same, early_rows]).by_key(decay), np.union1d(known, late_rows.key)
        )
        self._split(rows.plus(added, decay), first)

    def records(self, seed: np.random.Generator) -> dict[bytes, bytes]:
        """The bodies of the new and changed records, by key."""
        codec, keys = self._codec, self._codec.keys
        pages = codec.rows.pack(self._rows, self._bounds_of_pages, self._first, seed)
        befores = codec.rows.pack(self._before, self._bounds(self._before.key), self._shift, seed)
        bodies: dict[bytes, bytes] = {}
        for u, (begin, end) in enumerate(pairwise(self._bounds(self._first).tolist())):
            user, first = self._users[u], self._first[begin:end] - self._shift[u]
            bodies |= zip(keys.pages(user, first), pages[begin:end], strict=True)
            of_all = np.union1d(self._pages[u], first)
            head = codec.pack_head(self._heads[u], self._latest[u], of_all, seed)
            bodies[keys.head(user)] = head
            bodies[keys.before(user)] = codec.pack_before(befores[u], self._absent[u], head)
        return bodies

    def _bounds(self, keys: np.ndarray) -> np.ndarray:
        """[U + 1] bounds of each user's keys among ascending shifted keys."""
        return np.append(keys.searchsorted(self._shift), len(keys))

    def _page_rows(self, keys: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The rows of the pages that these keys lie in, and the pages' first keys."""
        bodies: list[bytes] = []
        there: list[np.ndarray] = []
        first: list[np.ndarray] = []
        for u, (begin, end) in enumerate(pairwise(self._bounds(keys).tolist())):
            user, pages = self._users[u], pages_of(self._pages[u], keys[begin:end] - self._shift[u])
            for key in self._codec.keys.pages(user, pages):
                if (body := self._found.get(key)) is None:
                    raise self._codec.lost(user)
                bodies.append(body)
            there.append(pages + self._shift[u])
            # the first page of a user who has none begins with key 0
            first.append(there[-1] if len(pages) else self._shift[u : u + (begin < end)])
        return self._codec.rows.unpack(bodies, np.concatenate(there))[0], np.concatenate(first)

    def _set_before(self, rows: Rows, keys: np.ndarray) -> None:
        """Keep the rows as before each user's last time, and which of these keys had no row then."""
        place = rows.find(keys)
        there = place < len(rows)
        self._before, absent = rows[place[there]], keys[~there]
        bounds = pairwise(self._bounds(absent).tolist())
        self._absent = [
            absent[slice(*of_user)] - n for of_user, n in zip(bounds, self._shift, strict=True)
        ]

    def _split(self, rows: Rows, first: np.ndarray) -> None:
        """Split rows into the pages that begin with these keys, and split pages that grow too long."""
        self._rows = rows
        bounds = np.append(rows.key.searchsorted(first), len(rows)).tolist()
        parts = [page_parts(*of_page) for of_page in pairwise(bounds)]
        begins = [part.start for of_page in parts for part in of_page]
        self._bounds_of_pages = np.array([*begins, len(rows)], np.int64)
        self._first = rows.key[begins]
        # an existing page keeps its first key, even if its first row has another key
        self._first[np.cumsum([0, *(len(of_page) for of_page in parts[:-1])])[: len(first)]] = first
