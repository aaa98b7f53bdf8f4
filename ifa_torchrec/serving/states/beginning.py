"""The header of states that are begun to be built, in each part of a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ifa_torchrec.serving.errors import StateError, StoreError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import Keys
from ifa_torchrec.serving.states.retention import check_journal
from ifa_torchrec.serving.states.shared import journal_start_key
from ifa_torchrec.serving.states.versions import pack_header, read_header, unpack_header


def begin(key_values: KeyValueStore, header: dict[str, Any]) -> dict[str, Any]:
    """Write a header, or find the one that is there since a building was begun before.

    Args:
        key_values: the store.
        header: of the states that are to be built.

    Returns:
        The header that is there: of several ranks that begin together the first one's mark stays.

    Raises:
        StateError: the states are finished, or were begun as something else; or the journal may lack
            events that the log has not.
        StoreError: what is written is not kept.
    """
    first, *others = key_values.tags
    _write(key_values, first, header)
    there = _begun(key_values, header)
    for tag in others:
        _write(key_values, tag, there)
    keys = Keys(header["version"], key_values.tags)
    if set(key_values.read([keys.header(tag) for tag in others])) - {pack_header(there)}:
        raise StateError(
            f"{key_values.name}: parts of it have states of weights {there['version']!r} of another "
            f"building; drop them first (ifa states --drop {there['version']})"
        )
    return there


def _write(key_values: KeyValueStore, tag: bytes, header: dict[str, Any]) -> None:
    """Write a part's header, but over no other building's."""
    key, start = Keys(header["version"], key_values.tags).header(tag), journal_start_key(tag)
    positions = {int(partition): position for partition, position in header["positions"].items()}

    def written(found: list[bytes | None]) -> Mapping[bytes, bytes]:
        if found[0] is None:
            check_journal(key_values, start, found[1], positions)
        elif unpack_header(key_values, found[0]).get("mark") != header["mark"]:
            return {}
        return {key: pack_header(header)}

    key_values.update([key, start], written)


def _begun(key_values: KeyValueStore, header: dict[str, Any]) -> dict[str, Any]:
    """The header that is there; arguments and errors as ``begin``'s."""
    states = f"states of weights {header['version']!r}"
    found = read_header(key_values, header["version"])
    if found is None:
        raise StoreError(f"{key_values.name}: what is written here is not kept")
    if found["complete"]:
        raise StateError(
            f"{states} are built; new events are added to them as they come. To build them anew, drop "
            "them first (ifa states)"
        )
    differing = [name for name in header if header[name] != found.get(name) and name != "mark"]
    if differing:
        raise StateError(
            f"{states} were begun with another {' and '.join(differing)}; go on with the same, or drop "
            "them first (ifa states)"
        )
    return found
