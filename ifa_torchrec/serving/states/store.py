"""The states of one version of the weights: building them, reading them, adding events to them.

Every read and update also reads the header, so that it never mixes in another build of the states than
the one that was opened.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.errors import StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.states.appending import Addition, Progress
from ifa_torchrec.serving.states.beginning import begin
from ifa_torchrec.serving.states.building import Unchanged, of_others, whole_records
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.key_value import Follow, KeyValueStore, no_more
from ifa_torchrec.serving.states.layout import StateLayout, format_positions, tag_in, tag_of
from ifa_torchrec.serving.states.missing import Missing
from ifa_torchrec.serving.states.pages import distinct
from ifa_torchrec.serving.states.reading import Lookup, UserRecords, state_of
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.states.shared import tombstone_key, unpack_number
from ifa_torchrec.serving.states.versions import (
    FORMAT,
    pack_header,
    read_header,
    unpack_header,
    versions,
)

Made = TypeVar("Made")
_Users = Sequence[int | str]
_Until = Sequence[int | None] | None


class StateStore:
    """The states of one version of the weights.

    Args:
        key_values: the store that holds them.
        version: version of the weights.
        whole: refuse states whose build is not complete.

    Raises:
        StateError: the store has no states of this version, or their build is not complete; the message
            lists the versions that are.

    Attributes:
        whole: whether the build was complete when its header was last read.
        source: identifies the log that the states are built from.
        mark: identifies this build of the states.
        layout: StateLayout.
        positions: by partition, the first position of the stream that is not in the log that the states
            were built from; the log has no events of other partitions.
        latest: time of the log's last event; None if not known.
        vocabulary: digest of the vocabulary that mapped the log's ids to table rows.

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

    def __init__(self, key_values: KeyValueStore, version: str, whole: bool = True) -> None:
        key_values.check()
        self.key_values, self.version = key_values, version
        header = read_header(key_values, version)
        if header is None or (whole and not header["complete"]):
            ready = [v for v, found in versions(key_values).items() if found["complete"]]
            what = "no" if header is None else "incomplete"
            raise StateError(
                f"{key_values.name}: {what} states of weights {version!r} here; run ifa build-states. "
                f"Complete versions: {ready or 'none'}"
            )
        self._configure(header)
        self._read([])

    def _configure(self, header: dict[str, Any]) -> None:
        self._header = pack_header(header)
        self._whole = pack_header({**header, "complete": True})
        self.whole, self.source, self.mark = header["complete"], header["source"], header["mark"]
        self._codec = codec = RecordCodec(self.key_values, header)
        self.layout, self.positions, self.latest = codec.layout, codec.positions, codec.latest
        self.vocabulary = codec.vocabulary

    # -------------------------------------------------------------------------------- building

    @classmethod
    def begin(
        cls,
        key_values: KeyValueStore,
        version: str,
        layout: StateLayout,
        position: int | Mapping[int, int],
        source: str = "",
        latest: int | None = None,
        vocabulary: str = "",
    ) -> StateStore:
        """Begin or resume a build of a version's states; they cannot be opened before ``finish``.

        Args:
            key_values: the store to build into.
            version: version of the weights.
            layout: StateLayout.
            position: the first position of the event stream that is not in the log. For a stream of
                several partitions, a map from partition to position, 0 for those not in it. A single
                number is partition 0's position.
            source: identifies the log; resuming requires the same value.
            latest: time of the log's last event, if known. An event before ``position`` and after this
                time is refused, since the log cannot have it.
            vocabulary: digest of the log's vocabulary.

        Raises:
            StateError: the states are complete, or were begun with another layout, position, source,
                latest or vocabulary; or the journal may lack events from ``position`` on.
            StoreError: the store may lose keys.
        """
        key_values.check()
        positions = {0: position} if isinstance(position, int) else dict(sorted(position.items()))
        header = {
            "format": FORMAT,
            "version": version,
            "layout": dataclasses.asdict(layout),
            "positions": positions,
            "source": source,
            "latest": latest,
            "vocabulary": vocabulary,
            "mark": secrets.token_hex(8),
            "complete": False,
        }
        header = json.loads(json.dumps(header))  # tuples become lists, and partitions strings
        header = begin(key_values, header)
        store = cls.__new__(cls)
        store.key_values, store.version = key_values, version
        store._configure(header)
        return store

    def finish(self) -> None:
        """Mark the build as complete, when every state is written.

        Raises:
            StoreError: the build is no longer in the store.
        """
        # the first part last: its header says whether the build is complete
        for tag in reversed(self.key_values.tags):
            header = self._codec.keys.header(tag)
            self.key_values.update([header], self._if_unchanged(lambda _, h=header: {h: self._whole}, 1))

    def write(
        self,
        users: Sequence[int | str],
        earlier: UserState,
        earlier_times: Sequence[int],
        last: UserState,
        last_times: Sequence[int],
        forgotten: Sequence[int | None] | None = None,
    ) -> int:
        """Write whole states in one transaction (in a cluster, one per part), except for users who have
        a state by now or were forgotten meanwhile.

        Args:
            users: B external ids.
            earlier: their states from all events before the last event's time.
            earlier_times: B times in microseconds of the last event in ``earlier``; any value if there
                is none.
            last: their states from the events at the last event's time.
            last_times: B times in microseconds of the events in ``last``.
            forgotten: B times up to which each user's events are left out, from ``forgotten_until``;
                None means that none are. A user for whom the store has a later time by now is not
                written.

        Returns:
            The bytes written, keys included.

        Raises:
            StoreError: the build is no longer in the store, or the store fails.
        """
        written = whole_records(self._codec, users, earlier, earlier_times, last, last_times)
        return self._write(written, users, forgotten)

    def take_over(
        self, other: StateStore, users: _Users, events: Sequence[tuple[int, int]], forgotten: _Until
    ) -> tuple[np.ndarray, int]:
        """Copy another version's states of those users whose states consist of exactly these events.

        Args:
            other: states with the same layout.
            users, forgotten: see ``write``.
            events: B pairs: the user's number of events, and the last one's time in microseconds.

        Returns:
            Whether each user's state was copied, [B] bool; and the bytes written, keys included.

        Raises:
            StateError: the layouts differ.
            StoreError: as ``write``, for either version.
        """
        unchanged = Unchanged(other._codec, users, events)
        found = other._read(unchanged.keys, unchanged.pages)
        written = unchanged.records(found, self._codec)
        return unchanged.found, self._write(written, users, forgotten)

    def _write(self, written: dict[bytes, bytes], users: _Users, forgotten: _Until) -> int:
        tags = self.key_values.tags
        records: dict[bytes, dict[bytes, bytes]] = {tag: {} for tag in tags}
        for key, value in written.items():
            records[tag_in(tags, key)][key] = value
        left_out = forgotten or [None] * len(users)
        for mine in self.apart(users):
            some = [users[n] for n in mine]
            self._write_part(records[tag_of(tags, some[0])], some, [left_out[n] for n in mine])
        return sum(len(key) + len(value) for mine in records.values() for key, value in mine.items())

    def _write_part(
        self, records: dict[bytes, bytes], users: _Users, left_out: Sequence[int | None]
    ) -> None:
        """Write the records of users who may share a transaction, after removing those of users who have
        a state by now or were forgotten meanwhile."""
        tombstones = [tombstone_key(user, self.key_values.tags) for user in users]
        heads = [self._codec.keys.head(user) for user in users]

        def of_the_others(found: list[bytes | None]) -> Mapping[bytes, bytes]:
            name, of_users = self.key_values.name, zip(tombstones, found, strict=False)
            until = [unpack_number(name, *of_user) for of_user in of_users]
            return of_others(records, users, until, left_out, found[len(users) :])

        self._update([*tombstones, *heads], of_the_others)

    def apart(self, users: Sequence[int | str]) -> list[list[int]]:
        """The indices of users, grouped by who may share a transaction: all of them, except in a
        cluster. Empty for no users."""
        tags = self.key_values.tags
        if len(tags) == 1 and users:
            return [list(range(len(users)))]
        places: dict[bytes, list[int]] = {}
        for n, user in enumerate(users):
            places.setdefault(tag_of(tags, user), []).append(n)
        return list(places.values())

    def known(self, users: Sequence[int | str]) -> np.ndarray:
        """Which users have a state; [B] bool."""
        found = self._read([self._codec.keys.head(user) for user in users])
        return np.array([value is not None for value in found], dtype=bool)

    # --------------------------------------------------------------------------------- reading

    def check(self) -> None:
        """Check that the states that were opened are still in the store.

        Raises:
            StoreError: they are not, or the store is unreachable or may lose keys.
        """
        self.key_values.check()
        self._read([])

    def read(
        self,
        users: Sequence[int | str],
        times: Sequence[int | None],
        keys: Sequence[np.ndarray] | None = None,
        new_users: Sequence[bool] | None = None,
        strict: bool = False,
    ) -> tuple[UserState, np.ndarray]:
        """Read the states at some times, from the events before those times, with some identity rows.

        A state can leave out the events at its last event's time, but no more, so it can serve any time
        after the event before those. For an earlier time it is read as of just after that event.

        Args:
            users: B external ids.
            times: B times in microseconds; states decay up to them. None means now, or just after the
                user's last event if that lies in the future by this machine's clock.
            keys: B arrays of identity keys (IdentityHeads.keys of the candidates), in any order.
            new_users: B, whether to accept a user without a state, as one without events.
            strict: refuse a time that a state cannot go back to.

        Returns:
            UserState of B requests, float32; and the times [B] int64 that they are as of.

        Raises:
            UnknownUserError: a user has no state.
            StateError: ``strict`` is set, and a state cannot go back to the time.
            StoreError: states are lost or damaged, or the store fails.
        """
        wanted = [np.empty(0, np.int64)] * len(users)
        if keys is not None:
            bounds = np.array([0, self.layout.identity_key_range])
            sets = [distinct(np.sort(of_user, axis=None)) for of_user in keys]
            wanted = [of_user[slice(*of_user.searchsorted(bounds).tolist())] for of_user in sets]
        records = self._records(users, wanted)
        # users whose records u are needed too are read again, as one snapshot
        again = [b for b, at in enumerate(times) if not records[b].reaches(at)]
        if again:
            found = self._records([users[b] for b in again], [wanted[b] for b in again], True)
            for b, of_user in zip(again, found, strict=True):
                records[b] = of_user
        for b, of_user in enumerate(records):
            if of_user.earlier is None and not (new_users is not None and new_users[b]):
                raise UnknownUserError(
                    f"user {users[b]!r} has no state; if the user is new and has no events, set new_user"
                )
        now = time.time_ns() // 1000
        moments = zip(records, times, strict=True)
        as_of = np.array([of_user.go_to(at, now, strict) for of_user, at in moments], np.int64)
        return state_of(self._codec, records, as_of), as_of

    def _records(
        self, users: Sequence[int | str], wanted: Sequence[np.ndarray], with_before: bool = False
    ) -> list[UserRecords]:
        """The users' records as one snapshot; arguments as in Lookup."""
        lookup = Lookup(self._codec, users, wanted, with_before)
        return lookup.records(self._read(lookup.keys, lookup.pages))

    # ------------------------------------------------------------------------------- appending

    def append(
        self, events: Sequence[Event], encode: Callable[[Sequence[Event]], UserState]
    ) -> list[bool | None]:
        """Add events to their users' states in one transaction. An event given again is not added again.

        The order of the events does not matter, except for rounding. A user without a state gets one.

        Args:
            events: the events; their users may share a transaction (see ``apart``).
            encode: returns the state of each event on its own, at age 0, as UserState of len(events)
                requests.

        Returns:
            Whether each event was new; None for an event that does not count because its user was
            forgotten after it.

        Raises:
            StateError: an event's position already holds another event, or is before the log's end
                although the log cannot have the event. None of the events is added.
            StoreError: states are lost or damaged, or the store fails.
        """
        if not events:
            return []
        addition = Addition(self._codec, events, encode(events))
        self._update(addition.keys, addition.apply, addition.pages)
        return addition.new

    def missed(self) -> Iterator[list[Event]]:
        """The journal's events that these states lack, in batches.

        In each partition, the leading blocks of positions that these states have completely are skipped;
        beyond them each key is checked, and only the missing events are read.
        """
        return Missing(self._codec, self.key_values, self._read).events()

    def stream_positions(self, partitions: Sequence[int]) -> dict[int, int]:
        """Where a stream consumer resumes: for each partition, a position before which these states lack
        no event, except those that the consumer refused."""
        return Missing(self._codec, self.key_values, self._read).positions(partitions)

    def set_stream_positions(self, positions: Mapping[int, int]) -> None:
        """Record where a consumer resumes, by partition: the events before are added, or refused for
        good. A position never decreases.

        Raises:
            StoreError: the states are lost, or the store fails.
        """
        if positions:
            progress = Progress(self._codec, positions)
            self._update(progress.keys, progress.apply)

    # --------------------------------------------------------------------------------- records

    def _read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """The values of the keys, and of those that ``then`` returns for them, if these are still the
        states that were opened."""
        headers = self._headers(keys)
        count = len(headers)
        found = self.key_values.read([*headers, *keys], self._if_unchanged(then, count))
        self._check_headers(found[:count])
        return found[count:]

    def _update(
        self,
        keys: Sequence[bytes],
        change: Callable[[list[bytes | None]], Mapping[bytes, bytes | None]],
        then: Follow = no_more,
    ) -> None:
        header, checked = self._headers(keys[:1]), self._if_unchanged
        self.key_values.update([*header, *keys], checked(change, 1), checked(then, 1))

    def _headers(self, keys: Sequence[bytes]) -> list[bytes]:
        """The header keys of the parts that some keys are in; of all parts if there are no keys."""
        tags = self.key_values.tags
        if keys and len(tags) > 1:
            tags = dict.fromkeys(tag_in(tags, key) for key in keys)
        return [self._codec.keys.header(tag) for tag in tags]

    def _if_unchanged(
        self, use: Callable[[list[bytes | None]], Made], headers: int
    ) -> Callable[..., Made]:
        """Wrap ``use`` to check the leading headers, and call it with the values after them."""

        def checked(found: list[bytes | None]) -> Made:
            self._check_headers(found[:headers])
            return use(found[headers:])

        return checked

    def _check_headers(self, headers: Sequence[bytes | None]) -> None:
        for found in headers:
            if found == self._whole:
                self.whole = True
            elif found != self._header:
                raise self._not_these(found)

    def _not_these(self, found: bytes | None) -> StoreError:
        """The error for a header that differs from that of the states that were opened."""
        states = f"{self.key_values.name}: the states of weights {self.version!r}"
        if found is None:
            return StoreError(
                f"{states} are gone: the store was emptied, or restarted without its data, or they were "
                "dropped. Rebuild them (ifa build-states), send the events from "
                f"{format_positions(self.positions)} on again, and restart the service"
            )
        header = unpack_header(self.key_values, found)
        if header.get("dropped"):
            return StoreError(
                f"{states} are being dropped; when that is done, rebuild them (ifa build-states)"
            )
        return StoreError(
            f"{states} were dropped and rebuilt since this process opened them; when the build is "
            "complete, restart the service or send it SIGHUP"
        )
