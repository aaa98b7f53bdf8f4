"""Forgetting a user: deletes the state in all versions and the journal's events in one transaction.

The deleting transaction leaves a tombstone, which every later append and build reads in its own
transaction. So the user is never partly deleted, and a concurrent event is either deleted or not taken.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ifa_torchrec.serving.errors import StateError, StoreError
from ifa_torchrec.serving.states.journal import journal_records, unpack_event, user_prefix
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import CHECKSUM_BYTES, JOURNAL, Keys, place_of, tag_of
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.states.shared import pack_number, tombstone_key, unpack_number
from ifa_torchrec.serving.states.versions import check_formats, marks_of, versions


@dataclass(frozen=True)
class Forgotten:
    """What was removed about a user.

    Args:
        user: external id.
        until: microseconds; the user's events up to then no longer count.
        versions: versions that had a state of the user.
        records: number of state records removed, in all versions.
        events: number of events removed from the journal.

    Example:
        >>> from ifa_torchrec.serving import Forgotten
        >>> Forgotten("anna", 0, (), 0, 0).anything
        False
    """

    user: int | str
    until: int
    versions: tuple[str, ...]
    records: int
    events: int

    @property
    def anything(self) -> bool:
        """Whether there was anything to remove."""
        return bool(self.records or self.events)


def id_of(text: str) -> int | str:
    """The external id that a text names: a 64-bit integer or a string, with or without JSON quotes.

    Example:
        >>> from ifa_torchrec.serving.states.forgetting import id_of
        >>> [id_of(text) for text in ("7", '"7"', "anna", "007")]
        [7, '7', 'anna', '007']
    """
    if re.fullmatch(r"-?(0|[1-9]\d{0,18})", text, re.ASCII) and -(2**63) <= int(text) < 2**63:
        return int(text)
    if text.startswith('"'):
        try:
            named = json.loads(text)
            named.encode()
            return named
        except ValueError:  # not JSON: take the text itself
            pass
    return text


def forget(key_values: KeyValueStore, user: int | str) -> Forgotten:
    """Remove everything that a store has about a user, and ignore the user's events up to now from then
    on, whenever they arrive.

    Afterwards the user is like one never seen; later events begin a new state. "Now" is at least the
    time of the user's last event in the store, which may be ahead of this machine's clock. In an LMDB
    file the deleted bytes stay on disk, as free space, until ``KeyValueStore.compact``.

    This reads the whole journal once, and in Redis scans all keys; rankings do not wait for that.

    Args:
        key_values: the store.
        user: external id under which the states are stored.

    Raises:
        StateError: the store has states of another format.
        StoreError: the store fails.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import forget, open_key_value_store
        >>> forget(open_key_value_store(tempfile.mkdtemp()), "anna").records
        0
    """
    removed: set[bytes] = set()
    had_state: dict[str, None] = {}
    until, done = time.time_ns() // 1000, None
    # repeated if a version was begun meanwhile: it may have written before the tombstone existed
    while (marks := marks_of(there := versions(key_values))) != done:
        removal = _Removal(key_values, there, user, until)
        key_values.update(removal.watched, removal.apply)
        if removal.applied:
            done, until = marks, removal.until
            removed |= removal.found
            had_state |= dict.fromkeys(removal.had_state)
    events = sum(key[:1] == JOURNAL for key in removed)
    return Forgotten(user, until, tuple(had_state), len(removed) - events, events)


class _Removal:
    """The keys to delete, and the transaction that deletes them.

    Args:
        key_values, user: see ``forget``.
        there: the headers by version.
        until: the earliest time for the tombstone.

    Attributes:
        watched: keys of the records that the transaction reads.
        found: keys of the user's records.
        had_state: versions with a state of the user.
        until: the tombstone's time.
        applied: whether the transaction found the user unchanged, and removed it.
    """

    def __init__(
        self, key_values: KeyValueStore, there: Mapping[str, dict[str, Any]], user: int | str, until: int
    ) -> None:
        check_formats(key_values, there)
        self._name = key_values.name
        self._tombstone = tombstone_key(user, key_values.tags)
        self.applied, self.until = False, until
        codecs = {v: RecordCodec(key_values, header) for v, header in there.items()}
        heads = [codec.keys.head(user) for codec in codecs.values()]
        self.watched = [self._tombstone, *heads]
        # read the heads first: any event added to the user later changes one of them
        self._heads = key_values.read(heads)
        self.had_state = [v for v, head in zip(codecs, self._heads, strict=True) if head is not None]
        self.found: set[bytes] = set()
        for codec, key, head in zip(codecs.values(), heads, self._heads, strict=True):
            self.found |= _records_of(key_values, codec.keys, user)
            if head is not None:
                self.until = max(self.until, _time_of(codec, key, head))
        for key, value in _journal_of(key_values, user):
            self.found.add(key)
            self.until = max(self.until, _time_of_event(key, value))

    def apply(self, values: list[bytes | None]) -> Mapping[bytes, bytes | None]:
        """The tombstone, and None for each key to delete; nothing if the user changed meanwhile."""
        self.applied = values[1:] == self._heads
        if not self.applied:
            return {}
        self.until = max(self.until, unpack_number(self._name, self._tombstone, values[0]) or self.until)
        return {self._tombstone: pack_number(self._tombstone, self.until)} | dict.fromkeys(self.found)


def _records_of(key_values: KeyValueStore, keys: Keys, user: int | str) -> set[bytes]:
    """The keys of all of a version's records of a user, including pages that no head names."""
    found = key_values.scan(keys.all_pages(user))
    single = [keys.head(user), keys.before(user)]
    values = zip(single, key_values.read(single), strict=True)
    return {*found, *(key for key, value in values if value is not None)}


def _journal_of(key_values: KeyValueStore, user: int | str) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a user's events in the journal."""
    prefix = user_prefix(user)
    return (
        (key, value)
        for key, value in journal_records(key_values, tag_of(key_values.tags, user))
        if value.startswith(prefix)
    )


def _time_of(codec: RecordCodec, key: bytes, head: bytes) -> int:
    """The time of a user's last event; 0 for a damaged head, which is deleted all the same."""
    try:
        return codec.dense.unpack(codec.open(key, head))[1].time
    except StoreError:
        return 0


def _time_of_event(key: bytes, value: bytes) -> int:
    """The time of an event in the journal; 0 for a damaged one."""
    try:
        return unpack_event(place_of(key), value[:-CHECKSUM_BYTES]).time
    except StateError:
        return 0
