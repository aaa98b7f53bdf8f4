"""Events, and which of them were taken.

Each event has a position in its partition of the stream of all events. A version's states keep a bit for
each position that is in them, 4,096 positions a record. The journal, which all versions share, keeps
the events themselves: a position that comes again is compared with its event, and states that are built
later get from it what they have missed.
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

    Ids are external ids, strings or integers of 64 bits. What the vocabulary does not know is taken as
    "unknown", row 0; as what it stands in the journal, for versions whose vocabulary has it.

    Args:
        position: 0 to 2**63 - 2, its offset in its partition; what tells an event that comes twice from
            two alike.
        user, item: ids.
        time: microseconds since 1970, UTC.
        features: an id for each of the schema's event features.
        numbers: a number for each of its event_dense columns; None where it is missing.
        weight: a_i >= 0, where the schema has an event_weight; None where it has none.
        partition: 0 or more, below 2**32, which of the stream's partitions it came by.

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
        """Where in the stream it stands."""
        return Place(self.partition, self.position)

    def __str__(self) -> str:
        told = f"user {self.user!r}, item {self.item!r} at {utc(self.time)}"
        beside = {**self.features, **self.numbers}
        beside |= {} if self.weight is None else {"weight": self.weight}
        return told + "".join(f", {name} {value!r}" for name, value in beside.items())


def pack_event(event: Event) -> bytes:
    """An event as a record of the journal, which its key gives the place."""
    numbers = {name: None if x is None else float(x) for name, x in event.numbers.items()}
    weight = None if event.weight is None else float(event.weight)
    fields = [event.user, event.item, event.time, dict(event.features), numbers, weight]
    return _FORMAT + _json(fields).encode()


def journal_records(key_values: KeyValueStore, tag: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of all events of a store's journal, or of a tag's, read some at a time.

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
    """What the records of a user's events, and of no other's, begin with."""
    return _FORMAT + b"[" + json.dumps(user).encode() + b","


def unpack_event(place: Place, body: bytes) -> Event:
    """The event of a record of the journal.

    Raises:
        StateError: the record is not what ``pack_event`` gives.
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
            f"the journal's event at {place} is of another version of this package; build "
            "states in an empty store (ifa build-states), of a log that has the events"
        ) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)


class Journal:
    """The journal and the positions taken, as a transaction finds and changes them.

    Args:
        codec: of the version's records.
        found: records that there are, by their keys; ``keys_of`` has an event's.
    """

    def __init__(self, codec: RecordCodec, found: Mapping[bytes, bytes]) -> None:
        self._codec, self._found = codec, found
        self._events: dict[bytes, Event] = {}
        self._positions: dict[bytes, bytearray] = {}

    @staticmethod
    def keys_of(codec: RecordCodec, event: Event) -> tuple[bytes, bytes]:
        """The keys of the records that say whether an event was taken."""
        place, tag = event.place, tag_of(codec.keys.tags, event.user)
        return codec.keys.block(place, tag), journal_key(place, tag)

    def take(self, event: Event, keys: tuple[bytes, bytes], forgotten: int | None = None) -> bool | None:
        """Whether an event is new; its position is then taken.

        Args:
            event: the event.
            keys: its ``keys_of``.
            forgotten: until when its user's events do not count. Of such an event nothing is kept, and
                the answer is None.

        Raises:
            StateError: its position is another event's.
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
                f"{place} is of {first}, and comes again with {event}. Each event has a "
                "position of its own; for a stream that was made anew build states in an empty store"
            )
        if codec.in_log(place):
            if first is None and codec.latest is not None and event.time > codec.latest:
                raise StateError(
                    f"{place} is before {codec.positions[place.partition]}, where the stream goes on "
                    f"from the log, but its event at {utc(event.time)} is after the log's last one at "
                    f"{utc(codec.latest)}. Was --position of ifa build-states too high, or has the "
                    "stream several partitions, which events and --position do not name?"
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
        """The bodies of the records that are new or changed, by their keys."""
        bodies = {entry: pack_event(event) for entry, event in self._events.items()}
        return bodies | {
            block: zstd.compress(bytes(bits), asbytes=True) for block, bits in self._positions.items()
        }
