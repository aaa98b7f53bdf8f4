"""Events, and which of them were taken.

Each event has a position in its partition of the event stream. A version's states keep one bit per
position that they include, 4,096 positions per record. The journal, which all versions share, keeps the
events themselves: when a position arrives again its event is compared, and states that are built later
get the events that they missed from the journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import (
    BLOCK,
    JOURNAL,
    Place,
    has_bit,
    journal_key,
    set_bit,
    tag_of,
)
from ifa_torchrec.serving.states.pages import zstd
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.times import utc

_FORMAT = b"\x80"
"""First byte of an event's record; a record that begins with another byte has another format."""
_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Event:
    """Something a user did.

    Ids are external ids, strings or 64-bit integers. An id that the vocabulary does not know is encoded
    as "unknown", row 0. The journal keeps the id itself, for versions whose vocabulary has it.

    Args:
        position: 0 to 2**63 - 2, the event's offset in its partition. It tells a repeated event from two
            equal events.
        user, item: ids.
        time: microseconds since 1970, UTC.
        features: one id per event feature of the schema.
        numbers: one number per event_dense column of the schema; None where it is missing.
        weight: a_i >= 0 if the schema has an event_weight; otherwise None.
        partition: 0 to 2**32 - 1, the partition of the stream that the event came from.

    Example:
        >>> from ifa_torchrec.serving import Event
        >>> Event(position=1017, user="anna", item=55, time=1_700_000_000_000_000,
        ...       features={"action": "buy"}, numbers={"amount": None}).item
        55
    """

    position: int
    user: int | str
    item: int | str
    time: int
    features: Mapping[str, int | str] = field(default_factory=dict)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    weight: float | None = None
    partition: int = 0

    @property
    def place(self) -> Place:
        """The event's place in the stream."""
        return Place(self.partition, self.position)

    def __str__(self) -> str:
        text = f"user {self.user!r}, item {self.item!r} at {utc(self.time)}"
        others = {**self.features, **self.numbers}
        others |= {} if self.weight is None else {"weight": self.weight}
        return text + "".join(f", {name} {value!r}" for name, value in others.items())


def pack_event(event: Event) -> bytes:
    """An event as a record of the journal, without its place, which is in the record's key."""
    numbers = {name: None if x is None else float(x) for name, x in event.numbers.items()}
    weight = None if event.weight is None else float(event.weight)
    fields = [event.user, event.item, event.time, dict(event.features), numbers, weight]
    return _FORMAT + _json(fields).encode()


def journal_records(key_values: KeyValueStore, tag: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of all events in a store's journal, or of one tag, read in batches.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> from ifa_torchrec.serving.states.journal import journal_records
        >>> list(journal_records(open_key_value_store(tempfile.mkdtemp())))
        []
    """
    keys = key_values.scan(JOURNAL + tag)
    while some := list(islice(keys, 1024)):
        for key, value in zip(some, key_values.read(some), strict=True):
            if value is not None:
                yield key, value


def user_prefix(user: int | str) -> bytes:
    """The bytes that the journal records of this user's events, and no other user's, begin with."""
    return _FORMAT + b"[" + json.dumps(user).encode() + b","


def unpack_event(place: Place, body: bytes) -> Event:
    """Decode the event of a journal record.

    Raises:
        StateError: the record was not written by ``pack_event``.
    """
    try:
        if body[:1] != _FORMAT:
            raise ValueError
        user, item, time, features, numbers, weight = json.loads(body[1:])
        event = Event(place.position, user, item, time, features, numbers, weight, place.partition)
        ids, amounts = (user, item, *features.values()), (*numbers.values(), weight)
        if not all(_is_id(i) for i in ids) or not _is_id(time) or isinstance(time, str):
            raise ValueError
        if not all(x is None or (isinstance(x, float) and math.isfinite(x)) for x in amounts):
            raise ValueError
        return event
    except (ValueError, AttributeError, TypeError):
        raise StateError(
            f"the journal's event at {place} was written by another version of this package; build "
            "states into an empty store (ifa build-states) from a log that has the events"
        ) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)


class Journal:
    """The journal and the taken positions, as one transaction reads and changes them.

    Args:
        codec: codec of the version's records.
        found: the existing records by key; ``keys_of`` returns an event's keys.
    """

    def __init__(self, codec: RecordCodec, found: Mapping[bytes, bytes]) -> None:
        self._codec, self._found = codec, found
        self._events: dict[bytes, Event] = {}
        self._positions: dict[bytes, bytearray] = {}

    @staticmethod
    def keys_of(codec: RecordCodec, event: Event) -> tuple[bytes, bytes]:
        """The keys of an event's block of positions and of its journal entry."""
        place, tag = event.place, tag_of(codec.keys.tags, event.user)
        return codec.keys.block(place, tag), journal_key(place, tag)

    def take(self, event: Event, keys: tuple[bytes, bytes], forgotten: int | None = None) -> bool | None:
        """Mark an event's position as taken, if the event is new; return whether it is.

        Args:
            event: the event.
            keys: the event's ``keys_of``.
            forgotten: time up to which its user's events do not count, or None. For such an event
                nothing is stored and None is returned.

        Raises:
            StateError: the position holds another event, or the log cannot have the event although its
                position is before the log's end.
        """
        codec, place = self._codec, event.place
        if forgotten is not None and event.time <= forgotten:
            return None
        block, entry = keys
        first = self._events.get(entry)
        if first is None and (record := self._found.get(entry)) is not None:
            first = unpack_event(place, codec.open(entry, record))
        if first is not None and first != event:
            raise StateError(
                f"{place} already holds {first}, but arrived again with {event}. Each event needs its "
                "own position; if the stream was recreated, build states into an empty store"
            )
        if codec.in_log(place):
            if first is None and codec.latest is not None and event.time > codec.latest:
                raise StateError(
                    f"{place} is before {codec.positions[place.partition]}, the first position that the "
                    f"log lacks, but its event at {utc(event.time)} is after the log's last event at "
                    f"{utc(codec.latest)}. Check --position of ifa build-states: it may be too high, or "
                    "the stream has several partitions that --position or the events do not name"
                )
            return False
        if block not in self._positions:
            self._positions[block] = bytearray(codec.bits(block, self._found.get(block)))
        if has_bit(self._positions[block], place.position % BLOCK):
            return False
        set_bit(self._positions[block], place.position % BLOCK)
        self._events[entry] = event
        return True

    def changed(self) -> dict[bytes, bytes]:
        """The bodies of the new and changed records, by key."""
        bodies = {entry: pack_event(event) for entry, event in self._events.items()}
        return bodies | {
            block: zstd.compress(bytes(bits), asbytes=True) for block, bits in self._positions.items()
        }
