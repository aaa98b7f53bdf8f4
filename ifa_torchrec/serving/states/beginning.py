"""Writes the header that begins a build of states, in each part of a store."""

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
    """Write a header, or find the header of a build that began earlier.

    Args:
        key_values: the store.
        header: header of the states to build.

    Returns:
        The header in the store. If several ranks begin together, it has the first one's mark.

    Raises:
        StateError: the states are complete, or were begun with other settings; or the journal may lack
            events that the log lacks too.
        StoreError: the store did not keep the header.
    """
    first, *others = key_values.tags
    _write(key_values, first, header)
    there = _begun(key_values, header)
    for tag in others:
        _write(key_values, tag, there)
    keys = Keys(header["version"], key_values.tags)
    if set(key_values.read([keys.header(tag) for tag in others])) - {pack_header(there)}:
        raise StateError(
            f"{key_values.name}: some of its parts have states of weights {there['version']!r} from "
            f"another build; drop them first (ifa states --drop {there['version']})"
        )
    return there


def _write(key_values: KeyValueStore, tag: bytes, header: dict[str, Any]) -> None:
    """Write a part's header, unless it has another build's header."""
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
    """The header in the store; arguments and errors as in ``begin``."""
    states = f"states of weights {header['version']!r}"
    found = read_header(key_values, header["version"])
    if found is None:
        raise StoreError(
            f"{key_values.name}: the store did not keep what was written; check its memory and eviction "
            "settings"
        )
    if found["complete"]:
        raise StateError(
            f"{states} are already built; new events are added to them as they arrive. To rebuild them, "
            f"drop them first (ifa states --drop {header['version']})"
        )
    differing = [name for name in header if header[name] != found.get(name) and name != "mark"]
    if differing:
        raise StateError(
            f"{states} were begun with another {' and '.join(differing)}; continue with the same, or "
            f"drop them first (ifa states --drop {header['version']})"
        )
    return found
