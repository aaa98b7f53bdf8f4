"""Finds the events of the journal, or of the stream, that a version's states lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from ifa_torchrec.serving.states.journal import Event, unpack_event
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import (
    BLOCK,
    JOURNAL,
    Place,
    has_bit,
    journal_key,
    place_of,
    tag_in,
)
from ifa_torchrec.serving.states.records import RecordCodec


class Missing:
    """The events that one version's states lack.

    Args:
        codec: codec of the version's records.
        key_values: the store.
        read: returns the records under some keys, if the states are still those that were opened.
    """

    def __init__(
        self,
        codec: RecordCodec,
        key_values: KeyValueStore,
        read: Callable[[Sequence[bytes]], list[bytes | None]],
    ) -> None:
        self._codec, self._key_values, self._read = codec, key_values, read

    def events(self) -> Iterator[list[Event]]:
        """The journal's events that the states lack, in batches, in order of their places."""
        keys = self._key_values.scan(JOURNAL, self._taken_before())
        while some := list(islice(keys, 1024)):
            if events := self._not_taken(some):
                yield events

    def positions(self, partitions: Sequence[int]) -> dict[int, int]:
        """For each partition, a position before which the states lack no event."""
        codec, keys = self._codec, [self._codec.keys.stream(partition) for partition in partitions]
        found: dict[int, int] = {}
        for partition, key, value in zip(partitions, keys, self._read(keys), strict=True):
            # beyond the consumer's recorded position, blocks filled by other routes may be complete
            first = Place(partition, max(codec.positions.get(partition, 0), codec.position(key, value)))
            found[partition] = self._low_water(first, codec.keys.tags[0]).position
        return found

    def _taken_before(self) -> Callable[[bytes], bytes]:
        """A Skip that skips the log's events, and then a partition's first blocks as far as the states
        have them completely."""
        codec = self._codec
        low: dict[tuple[bytes, int], bytes] = {}

        def skip(key: bytes) -> bytes:
            place, tag = place_of(key), tag_in(codec.keys.tags, key)
            if codec.in_log(place):
                return journal_key(Place(place.partition, codec.positions[place.partition]), tag)
            of_stream = tag, place.partition
            if of_stream not in low:
                low[of_stream] = journal_key(self._low_water(place, tag), tag)
            return max(key, low[of_stream])

        return skip

    def _low_water(self, first: Place, tag: bytes) -> Place:
        """The first place, not before ``first``, in a block that the states do not have completely."""
        codec, block = self._codec, first.position // BLOCK
        whole = (1 << BLOCK) - 1
        taken = (1 << first.position % BLOCK) - 1  # positions before ``first`` count as taken
        some = 1
        while True:
            places = [Place(first.partition, n * BLOCK) for n in range(block, block + some)]
            keys = [codec.keys.block(place, tag) for place in places]
            for place, key, value in zip(places, keys, self._read(keys), strict=True):
                if int.from_bytes(codec.bits(key, value), "little") | taken != whole:
                    return max(first, place)
                taken = 0
            block, some = block + some, 256  # read more at once, now that one block was complete

    def _not_taken(self, journal_keys: Sequence[bytes]) -> list[Event]:
        """The events under these journal keys whose positions are not taken."""
        codec = self._codec
        block_of = {
            key: codec.keys.block(place_of(key), tag_in(codec.keys.tags, key)) for key in journal_keys
        }
        blocks = list(dict.fromkeys(block_of.values()))
        read = zip(blocks, self._read(blocks), strict=True)
        bits = {key: codec.bits(key, value) for key, value in read}
        keys = [k for k in journal_keys if not has_bit(bits[block_of[k]], place_of(k).position % BLOCK)]
        events = zip(keys, self._read(keys), strict=True)
        return [
            unpack_event(place_of(key), codec.open(key, event))
            for key, event in events
            if event is not None
        ]
