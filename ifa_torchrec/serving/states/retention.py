"""What a store no longer needs: a version dropped, the journal kept for some time.

What the journal loses, a version that is built later cannot get from it. So before anything goes, a mark
says up to which positions; a build of a log that ends before it is refused.
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
    """What became of the old events of a journal.

    Args:
        deleted: how many are gone.
        kept: how many stay, since a version that is there has not had them.

    Example:
        >>> from ifa_torchrec.serving import Trimmed
        >>> Trimmed(deleted=3, kept=0).deleted
        3
    """

    deleted: int
    kept: int


def drop(key_values: KeyValueStore, version: str) -> None:
    """Delete a version's states, and what of the journal no other version can want: with the last
    version all of it. Whom to forget stays known.

    Raises:
        StateError: there are none of this version.
    """
    there = versions(key_values)
    if version not in there:
        raise StateError(f"no states of weights {version!r} here; there are {sorted(there)}")
    # the header first says so, since half a version must not look whole, and is deleted last, since what
    # it leaves must not be built upon
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
    keys, others = unwanted()  # again: a version begun before the mark is seen now, a later one refused
    _delete(key_values, keys)
    if not others:
        key_values.delete([journal_start_key(tag) for tag in key_values.tags])


def trim_journal(key_values: KeyValueStore, before: int) -> Trimmed:
    """Delete the journal's events before a time that every version there has had.

    Their positions stay taken, so an event that comes again still counts as a duplicate; but one of
    another content at its position is no longer noticed.

    Args:
        key_values: the store.
        before: microseconds since 1970.

    Raises:
        StateError: there are states of another format.
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
    # those that were begun before the mark
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
    """Of the journal's events under these keys, those that are in all these versions' states."""
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
    """Say that the journal may lack all events of their partitions up to these keys, ascending."""
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
    """See that the journal has what a version lacks whose log ends at some positions.

    Args:
        key_values: the store, for messages.
        key, found: the record of where the journal begins.
        positions: of each partition the first position whose event the log has not; 0 of others.

    Raises:
        StateError: it may lack some of it.
    """
    for partition, start in unpack_starts(key_values.name, key, found).items():
        position = positions.get(partition, 0)
        if position < start:
            raise StateError(
                f"{key_values.name}: events before {Place(partition, start)} are gone from the journal, "
                f"and the log has those before {position} alone, so states of it would lack some. Build "
                f"from a log that has them, with --position {start} or above there; or drop all "
                f"versions, which ends the journal, build, and send the events from {position} on again"
            )


def _delete(key_values: KeyValueStore, keys: Sequence[bytes]) -> None:
    for first in range(0, len(keys), 10_000):
        key_values.delete(keys[first : first + 10_000])
