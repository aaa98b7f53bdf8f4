"""Events, and which of them were taken.

Each event has a position in the stream of all events. A version's states keep a bit for each position
that is in them, 4,096 positions a record. The journal, which all versions share, keeps the events
themselves: a position that comes again is compared with its event, and states that are built later get
from it what they have missed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ifa_torchrec.serving.errors import BUILD_COMMAND, StateError
from ifa_torchrec.serving.states.layout import BLOCK, has_bit, journal_key, set_bit
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.times import utc

_EVENT = struct.Struct(">qqq")  # user, item, time


@dataclass(frozen=True)
class Event:
    """Something a user did.

    Args:
        position: 0 or more, its place in the stream of all events; what tells an event that comes
            twice from two alike. Several streams share the range, e.g. PARTITION * 2**40 + OFFSET.
        user, item: ids.
        time: microseconds since 1970, UTC.

    Example:
        >>> from ifa_torchrec.serving import Event
        >>> Event(position=1017, user=7, item=55, time=1_700_000_000_000_000).item
        55
    """

    position: int
    user: int
    item: int
    time: int


def unpack_event(position: int, body: bytes) -> Event:
    """The event of a record of the journal."""
    return Event(position, *_EVENT.unpack(body))


class Journal:
    """The journal and the positions taken, as a transaction finds and changes them.

    Args:
        codec: of the version's records.
        found: bodies of the records that there are, by their keys; ``keys_of`` has an event's.
    """

    def __init__(self, codec: RecordCodec, found: Mapping[bytes, bytes]) -> None:
        self._codec, self._found = codec, found
        self._events: dict[int, Event] = {}
        self._positions: dict[bytes, bytearray] = {}

    @staticmethod
    def keys_of(codec: RecordCodec, event: Event) -> tuple[bytes, bytes]:
        """The keys of the records that say whether an event was taken."""
        return codec.keys.positions(event.position), journal_key(event.position)

    def take(self, event: Event) -> bool:
        """Whether an event is new; its position is then taken.

        Raises:
            StateError: its position is another event's.
        """
        codec, position = self._codec, event.position
        first = self._events.get(position)
        if first is None and (body := self._found.get(journal_key(position))) is not None:
            first = unpack_event(position, body)
        if first is not None and first != event:
            raise StateError(
                f"position {position} is of user {first.user}, item {first.item} at {utc(first.time)}, "
                f"and comes again with user {event.user}, item {event.item} at {utc(event.time)}. Each "
                "event has a position of its own; for a stream that was made anew build states in an "
                "empty store"
            )
        if position < codec.position:
            if first is None and codec.latest is not None and event.time > codec.latest:
                raise StateError(
                    f"position {position} is before {codec.position}, where the stream goes on from the "
                    f"log, but its event at {utc(event.time)} is after the log's last one at "
                    f"{utc(codec.latest)}. Was --position of {BUILD_COMMAND} too high, or are there "
                    "several streams (then it can only be 0)?"
                )
            return False
        key = codec.keys.positions(position)
        if key not in self._positions:
            self._positions[key] = bytearray(self._found.get(key, codec.no_bits))
        if has_bit(self._positions[key], position % BLOCK):
            return False
        set_bit(self._positions[key], position % BLOCK)
        self._events[position] = event
        return True

    def changed(self) -> dict[bytes, bytes]:
        """The bodies of the records that are new or changed, by their keys."""
        bodies = {
            journal_key(position): _EVENT.pack(event.user, event.item, event.time)
            for position, event in self._events.items()
        }
        return bodies | {key: bytes(bits) for key, bits in self._positions.items()}
