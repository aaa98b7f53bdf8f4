"""Deleting what a store no longer needs: dropping a version, and trimming the journal.

A version that is built later cannot get deleted events from the journal. So before any are deleted, a
record notes up to which positions; a build from a log that ends before them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.journal import journal_records, unpack_event
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import (
    BLOCK,
    JOURNAL,
    STATE_KINDS,
    Keys,
    Place,
    has_bit,
    place_of,
    tag_in,
)
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.states.shared import journal_start_key, pack_starts, unpack_starts
from ifa_torchrec.serving.states.versions import FORMAT, check_formats, pack_header, versions


@dataclass(frozen=True)
class Trimmed:
    """The result of trimming a journal.

    Args:
        deleted: number of old events deleted.
        kept: number of old events kept because a version in the store does not have them yet.

    Example:
        >>> from ifa_torchrec.serving import Trimmed
        >>> Trimmed(deleted=3, kept=0).deleted
        3
    """

    deleted: int
    kept: int


def drop(key_values: KeyValueStore, version: str) -> None:
    """Delete a version's states, and the journal's events that no other version needs; with the last
    version, the whole journal. Which users were forgotten stays recorded.

    Raises:
        StateError: the store has no states of this version.
    """
    there = versions(key_values)
    if version not in there:
        raise StateError(f"no states of weights {version!r} here; there are {sorted(there)}")
    # The header is marked as dropped first, since a half-dropped version must not look complete, and is
    # deleted last, since nothing may be built on the remains.
    keys = Keys(version, key_values.tags)
    dropped = pack_header({**there[version], "complete": False, "dropped": True})
    headers = [keys.header(tag) for tag in keys.tags]
    for header in headers:
        key_values.update([header], lambda _, header=header: {header: dropped})
    for kind in STATE_KINDS:
        _delete(key_values, [key for key in key_values.scan(kind) if keys.are_of(key)])
    _drop_from_journal(key_values, version)
    key_values.delete(headers)


def _drop_from_journal(key_values: KeyValueStore, version: str) -> None:
    def unwanted() -> tuple[list[bytes], bool]:
        headers = {name: h for name, h in versions(key_values).items() if name != version}
        others = [RecordCodec(key_values, h) for h in headers.values() if h.get("format") == FORMAT]
        keys = key_values.scan(JOURNAL)
        return [k for k in keys if all(codec.in_log(place_of(k)) for codec in others)], bool(others)

    _start_after(key_values, unwanted()[0])
    # again: a version begun before the record was written is seen now, and a later one is refused
    keys, others = unwanted()
    _delete(key_values, keys)
    if not others:
        key_values.delete([journal_start_key(tag) for tag in key_values.tags])


def trim_journal(key_values: KeyValueStore, before: int) -> Trimmed:
    """Delete the journal's events before a time that are in every version's states.

    Their positions stay taken, so an event that arrives again still counts as a duplicate; but a
    different event at the same position is no longer noticed.

    Args:
        key_values: the store.
        before: microseconds since 1970.

    Raises:
        StateError: the store has states of another format.
        StoreError: a record is damaged, or the store fails.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store, trim_journal
        >>> trim_journal(open_key_value_store(tempfile.mkdtemp()), before=1_700_000_000_000_000)
        Trimmed(deleted=0, kept=0)
    """
    there = versions(key_values)
    check_formats(key_values, there)
    if not there:
        return Trimmed(0, 0)
    codecs = {name: RecordCodec(key_values, header) for name, header in there.items()}
    old = list(_before(key_values, next(iter(codecs.values())), before))
    had = _had_by_all(key_values, old, list(codecs.values()))
    _start_after(key_values, had)
    # versions that were begun before _start_after wrote its records
    later = {name: header for name, header in versions(key_values).items() if name not in there}
    check_formats(key_values, later)
    had = _had_by_all(key_values, had, [RecordCodec(key_values, h) for h in later.values()])
    _delete(key_values, had)
    return Trimmed(len(had), len(old) - len(had))


def _before(key_values: KeyValueStore, codec: RecordCodec, time: int) -> Iterator[bytes]:
    """The keys of the journal's events before a time."""
    for key, value in journal_records(key_values):
        if unpack_event(place_of(key), codec.open(key, value)).time < time:
            yield key


def _had_by_all(
    key_values: KeyValueStore, journal_keys: Sequence[bytes], codecs: Sequence[RecordCodec]
) -> list[bytes]:
    """The journal keys whose events are in the states of all these versions."""
    had = list(journal_keys)
    for codec in codecs:
        blocks: dict[bytes, bytes] = {}
        places = [place_of(key) for key in had]
        tags = [tag_in(codec.keys.tags, key) for key in had]
        wanted = [codec.keys.block(*of_event) for of_event in zip(places, tags, strict=True)]
        distinct = list(dict.fromkeys(wanted))
        for first in range(0, len(distinct), 1024):
            some = distinct[first : first + 1024]
            for key, value in zip(some, key_values.read(some), strict=True):
                blocks[key] = codec.bits(key, value)
        had = [
            key
            for key, place, block in zip(had, places, wanted, strict=True)
            if codec.in_log(place) or has_bit(blocks[block], place.position % BLOCK)
        ]
    return had


def _start_after(key_values: KeyValueStore, journal_keys: Sequence[bytes]) -> None:
    """Record that the journal may lack events up to these keys (ascending) in their partitions."""
    starts: dict[bytes, dict[int, int]] = {}
    for key in journal_keys:
        place = place_of(key)
        starts.setdefault(tag_in(key_values.tags, key), {})[place.partition] = place.position + 1
    for tag, of_tag in starts.items():
        record = journal_start_key(tag)

        def raised(
            found: list[bytes | None], record: bytes = record, of_tag: dict[int, int] = of_tag
        ) -> Mapping[bytes, bytes]:
            before = unpack_starts(key_values.name, record, found[0])
            later = {partition: max(p, before.get(partition, 0)) for partition, p in of_tag.items()}
            return {record: pack_starts(record, before | later)}

        key_values.update([record], raised)


def check_journal(
    key_values: KeyValueStore, key: bytes, found: bytes | None, positions: Mapping[int, int]
) -> None:
    """Check that the journal has all events after the end of a version's log.

    Args:
        key_values: the store, for its name in messages.
        key, found: key and value of the record of where the journal begins.
        positions: for each partition the first position that the log lacks; 0 for others.

    Raises:
        StateError: the journal may lack some of them.
    """
    for partition, start in unpack_starts(key_values.name, key, found).items():
        position = positions.get(partition, 0)
        if position < start:
            raise StateError(
                f"{key_values.name}: the journal no longer has the events before "
                f"{Place(partition, start)}, and the log has only those before {position}, so states "
                f"would lack the events between. Build from a log that has them, with --position {start}"
                " or higher; or drop all versions (which deletes the journal), build, and send the "
                f"events from {position} on again"
            )


def _delete(key_values: KeyValueStore, keys: Sequence[bytes]) -> None:
    for first in range(0, len(keys), 10_000):
        key_values.delete(keys[first : first + 10_000])
