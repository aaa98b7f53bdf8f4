"""What a store no longer needs: a version dropped, the journal kept for some time.

What the journal loses, a version that is built later cannot get from it. So before anything goes, a mark
says up to which position; a build of a log that ends before it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.journal import journal_records, unpack_event
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import (
    BLOCK,
    STATE_KINDS,
    Keys,
    has_bit,
    journal_key,
    position_of,
)
from ifa_torchrec.serving.states.records import RecordCodec
from ifa_torchrec.serving.states.shared import JOURNAL_START, pack_number, unpack_number
from ifa_torchrec.serving.states.versions import check_formats, pack_header, versions


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
    keys = Keys(version)
    dropped = pack_header({**there[version], "complete": False, "dropped": True})
    key_values.update([], lambda _: {keys.header: dropped})
    for kind in STATE_KINDS:
        _delete(key_values, list(key_values.scan(kind + keys.id)))
    _drop_from_journal(key_values, version)
    key_values.delete([keys.header])


def _drop_from_journal(key_values: KeyValueStore, version: str) -> None:
    def unwanted() -> tuple[list[bytes], bool]:
        others = [h["position"] for name, h in versions(key_values).items() if name != version]
        first = journal_key(min(others)) if others else None
        keys: list[bytes] = []
        for key in key_values.scan(b"j"):
            if first is not None and key >= first:
                break
            keys.append(key)
        return keys, bool(others)

    _start_after(key_values, unwanted()[0])
    keys, others = unwanted()  # again: a version begun before the mark is seen now, a later one refused
    _delete(key_values, keys)
    if not others:
        key_values.delete([JOURNAL_START])


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
    codecs = {name: RecordCodec(key_values.name, header) for name, header in there.items()}
    old = list(_before(key_values, next(iter(codecs.values())), before))
    had = _had_by_all(key_values, old, list(codecs.values()))
    _start_after(key_values, had)
    # those that were begun before the mark
    later = {name: header for name, header in versions(key_values).items() if name not in there}
    check_formats(key_values, later)
    had = _had_by_all(key_values, had, [RecordCodec(key_values.name, h) for h in later.values()])
    _delete(key_values, had)
    return Trimmed(len(had), len(old) - len(had))


def _before(key_values: KeyValueStore, codec: RecordCodec, time: int) -> Iterator[bytes]:
    """The keys of the journal's events before a time."""
    for key, value in journal_records(key_values):
        if unpack_event(position_of(key), codec.open(key, value)).time < time:
            yield key


def _had_by_all(
    key_values: KeyValueStore, journal_keys: Sequence[bytes], codecs: Sequence[RecordCodec]
) -> list[bytes]:
    """Of the journal's events under these keys, those that are in all these versions' states."""
    had = list(journal_keys)
    for codec in codecs:
        blocks: dict[bytes, bytes] = {}
        wanted = [codec.keys.positions(position_of(key)) for key in had]
        distinct = list(dict.fromkeys(wanted))
        for first in range(0, len(distinct), 1024):
            some = distinct[first : first + 1024]
            for key, value in zip(some, key_values.read(some), strict=True):
                blocks[key] = codec.no_bits if value is None else codec.open(key, value)
        had = [
            key
            for key, block in zip(had, wanted, strict=True)
            if position_of(key) < codec.position or has_bit(blocks[block], position_of(key) % BLOCK)
        ]
    return had


def _start_after(key_values: KeyValueStore, journal_keys: Sequence[bytes]) -> None:
    """Say that the journal may lack all events up to the last of these keys, ascending."""
    if not journal_keys:
        return
    start = position_of(journal_keys[-1]) + 1

    def raised(found: list[bytes | None]) -> Mapping[bytes, bytes]:
        before = unpack_number(key_values.name, JOURNAL_START, found[0])
        return {JOURNAL_START: pack_number(JOURNAL_START, max(start, before or 0))}

    key_values.update([JOURNAL_START], raised)


def check_journal(key_values: KeyValueStore, found: bytes | None, position: int) -> None:
    """See that the journal has what a version lacks whose log ends at a position.

    Args:
        key_values: the store, for messages.
        found: the record under JOURNAL_START.
        position: the first position whose event the log has not.

    Raises:
        StateError: it may lack some of it.
    """
    start = unpack_number(key_values.name, JOURNAL_START, found)
    if start is not None and position < start:
        raise StateError(
            f"{key_values.name}: events before position {start} are gone from the journal, and the log "
            f"has those before {position} alone, so states of it would lack some. Build from a log that "
            f"has them, with --position {start} or above; or drop all versions, which ends the journal, "
            f"build, and send the events from {position} on again"
        )


def _delete(key_values: KeyValueStore, keys: Sequence[bytes]) -> None:
    for first in range(0, len(keys), 10_000):
        key_values.delete(keys[first : first + 10_000])
