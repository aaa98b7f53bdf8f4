"""Events added to states: what one transaction makes of the records that it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.states.dense import Head, Latest, Sums
from ifa_torchrec.serving.states.journal import Event, Journal
from ifa_torchrec.serving.states.pages import Rows, page_parts, pages_of, quotient
from ifa_torchrec.serving.states.records import Before, RecordCodec, weight_and_mean
from ifa_torchrec.serving.states.shared import tombstone_key, unpack_number


class Addition:
    """Events that are added to their users' states in one transaction.

    Args:
        codec: of the version's records.
        events: E of them, at least one, of users whose keys have one tag.
        state: of each event alone, at age 0; UserState of E requests.

    Attributes:
        keys: of the records that it reads first.
        new: whether each event was new, once ``apply`` was called; None of an event whose user was
            forgotten after it.
    """

    def __init__(self, codec: RecordCodec, events: Sequence[Event], state: UserState) -> None:
        self._codec, self._events = codec, events
        self._sums = EventSums(codec, events, state)
        self._tombstones = {e.user: tombstone_key(e.user, codec.keys.tags) for e in events}
        self._of_user = {
            user: np.array([e for e, event in enumerate(events) if event.user == user])
            for user in self._tombstones
        }
        heads = [key(user) for user in self._of_user for key in (codec.keys.head, codec.keys.before)]
        journal = dict.fromkeys(key for event in events for key in Journal.keys_of(codec, event))
        self.keys = [*self._tombstones.values(), *heads, *journal]
        self._pages: list[bytes] = []
        self.new: list[bool | None] = []

    def pages(self, values: Sequence[bytes | None]) -> list[bytes]:
        """The keys of the pages that it reads besides.

        Args:
            values: the records under ``keys``.

        Raises:
            StoreError: a head is damaged.
        """
        codec, found = self._codec, dict(zip(self.keys, values, strict=True))
        self._pages = []
        for user, events in self._of_user.items():
            key = codec.keys.head(user)
            if (value := found[key]) is not None:
                pages = codec.unpack_pages(codec.open(key, value))
                self._pages += codec.keys.pages(user, pages_of(pages, self._sums.keys_of(events)))
        return self._pages

    def apply(self, values: Sequence[bytes | None]) -> dict[bytes, bytes]:
        """The records that are new or changed, by their keys.

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
        self.new = [journal.take(event, forgotten[event.user]) for event in self._events]
        taken = np.array(self.new) == True  # noqa: E712  None is not
        seed = np.random.default_rng(self._events[0].position)
        bodies = journal.changed()
        found = {key: codec.open(key, value) for key, value in there.items() if key[:1] in b"sui"}
        for user, events in self._of_user.items():
            if len(new := events[taken[events]]):
                draft = StateDraft(codec, user, found)
                draft.add(self._sums, new)
                bodies |= draft.records(seed)
        return {key: codec.seal(key, body) for key, body in bodies.items()}


class Progress:
    """Where a consumer of the stream goes on, written in one transaction; no partition goes back.

    Args:
        codec: of the version's records.
        positions: by partition.

    Attributes:
        keys: of the records that it reads.
    """

    def __init__(self, codec: RecordCodec, positions: Mapping[int, int]) -> None:
        self._codec, self._positions = codec, positions
        self.keys = [codec.keys.stream(partition) for partition in positions]

    def apply(self, values: Sequence[bytes | None]) -> dict[bytes, bytes]:
        """The records that are new or changed, by their keys; ``values`` lie under ``keys``."""
        codec, changed = self._codec, dict[bytes, bytes]()
        for key, value, position in zip(self.keys, values, self._positions.values(), strict=True):
            if position > codec.position(key, value):
                changed[key] = codec.seal(key, codec.pack_position(position))
        return changed


class EventSums:
    """What each of E events adds by itself; arguments as ``Addition``'s."""

    def __init__(self, codec: RecordCodec, events: Sequence[Event], state: UserState) -> None:
        self._codec = codec
        self.times = np.array([event.time for event in events], np.int64)
        self._weight = state.key_sum.double().numpy()  # [E, H, F]
        # an event has one value in all features of a head: that of its heaviest is the nearest
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
        """The head of some events together, as of the latest of their times."""
        if not len(events):
            return self._codec.dense.no_head
        time = int(self.times[events].max())
        days = (time - self.times[events]) / MICROSECONDS_PER_DAY
        factor = np.exp(-days[:, None] * self._codec.decay)  # [e, H]
        weights = (factor[..., None] * self._weight[events]).transpose(1, 2, 0)  # [H, F, e]
        weight, total = weights.sum(-1), weights @ self._value[events].transpose(1, 0, 2)
        return Head(Sums(time, weight, quotient(total, weight[..., None])), len(events))

    def latest(self, events: np.ndarray) -> Latest:
        """The dense heads of some events, which are of one time."""
        if not len(events):
            return self._codec.dense.no_latest
        each = self._weight[events].transpose(1, 2, 0)  # [H, F, e]
        weight = each.sum(-1)
        share = quotient(each, weight[..., None])
        time, value = int(self.times[events[0]]), self._value[events].transpose(1, 0, 2)
        return Latest(time, len(events), weight, share, value)

    def rows(self, events: np.ndarray) -> Rows:
        """One row for each key that some events have, as of the latest of these events' times."""
        return self._rows[self._places(events)].by_key(self._codec.identity_decay)

    def keys_of(self, events: np.ndarray) -> np.ndarray:
        """The keys of some events' rows, ascending, each once."""
        return np.unique(self._rows.key[self._places(events)])

    def _places(self, events: np.ndarray) -> np.ndarray:
        lengths = self._lengths[events]
        begins = np.repeat(self._offsets[events] - np.cumsum(lengths) + lengths, lengths)
        return begins + np.arange(len(begins))


class StateDraft:
    """One user's state while a transaction's events are added to it.

    The dense heads of the events of its last time stand apart, and so do the rows that these changed, as
    they were before.

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
        none = np.empty(0, np.int64)
        self._head, self._latest = codec.dense.no_head, codec.dense.no_latest
        self._pages, self._before = none, Before(Rows.none(codec.layout), none)
        if head is not None and before is not None:
            self._head, self._latest = codec.dense.unpack(head)
            self._pages = codec.unpack_pages(head)
            self._before = codec.unpack_before(user, before, head)
        self._changed: dict[int, Rows] = {}
        """By the first keys of pages."""

    def add(self, sums: EventSums, events: np.ndarray) -> None:
        """Add events, at least one; called once."""
        decay = self._codec.identity_decay
        last = max(int(sums.times[events].max()), self._latest.time)
        at_last = sums.times[events] == last
        early, late = events[~at_last], events[at_last]
        added = sums.rows(events)
        early_rows, late_rows = sums.rows(early), sums.rows(late) if len(early) else added
        page_rows, first = self._page_rows(added.key)
        place = page_rows.find(added.key)
        touched = page_rows[place[place < len(page_rows)]]
        if last > self._latest.time:
            rows, keys = touched, late_rows.key
            self._head = self._head.plus(self._latest.head, self._codec.decay)
            self._latest = self._codec.dense.no_latest
        else:
            # a row that was not changed at the last time is now as it was before
            known = np.concatenate([self._before.rows.key, self._before.absent])
            same = touched[~np.isin(touched.key, known)]
            rows = Rows.cat([self._before.rows, same])
            keys = np.union1d(known, late_rows.key)
        rows = Rows.cat([rows, early_rows]).by_key(decay)
        place = rows.find(keys)
        there = place < len(rows)
        self._before = Before(rows[place[there]], keys[~there])
        self._head = self._head.plus(sums.head(early), self._codec.decay)
        self._latest = self._latest.plus(sums.latest(late))
        self._split(page_rows.plus(added, decay), first)

    def records(self, seed: np.random.Generator) -> dict[bytes, bytes]:
        """The bodies of its records that are new or changed, by their keys."""
        codec, keys, user = self._codec, self._codec.keys, self._user
        head = codec.pack_head(self._head, self._latest, self._pages, seed)
        before = codec.pack_before(self._before, head, seed)
        bodies = {keys.head(user): head, keys.before(user): before}
        if self._changed:
            first = np.array(list(self._changed))
            rows = Rows.cat(list(self._changed.values()))
            bounds = np.cumsum([0, *(len(page) for page in self._changed.values())])
            pages = codec.rows.pack(rows, bounds, first, seed)
            bodies |= dict(zip(keys.pages(user, first), pages, strict=True))
        return bodies

    def _page_rows(self, keys: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The rows of the pages that these keys lie in, and the pages' first keys."""
        first = pages_of(self._pages, keys)
        bodies = [self._found.get(key) for key in self._codec.keys.pages(self._user, first)]
        there = [body for body in bodies if body is not None]
        if len(there) < len(bodies):
            raise self._codec.lost(self._user)
        if not there:
            return Rows.none(self._codec.layout), np.zeros(min(len(keys), 1), np.int64)
        return self._codec.rows.unpack(there, first)[0], first

    def _split(self, rows: Rows, first: np.ndarray) -> None:
        """Put rows into the pages that begin with these keys, and new ones where they are too many."""
        bounds = np.append(np.searchsorted(rows.key, first), len(rows))
        for page, begin, end in zip(first.tolist(), bounds[:-1], bounds[1:], strict=True):
            for number, part in enumerate(page_parts(begin, end)):
                of_part = rows[part]
                self._changed[page if number == 0 else int(of_part.key[0])] = of_part
        self._pages = np.union1d(self._pages, np.array(list(self._changed), np.int64))
