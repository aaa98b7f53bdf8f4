"""Which versions' states a store holds: their headers.

A header says by its mark which building of a version it is of, and whether that is whole. A store that
was emptied, or whose states were dropped and built anew, is so no longer the one that was opened.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ifa_torchrec.serving.errors import StateError, StoreError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import Keys

FORMAT = "ifa-states/8"


def versions(key_values: KeyValueStore) -> dict[str, dict[str, Any]]:
    """The versions whose states a store holds, each with its header; one that not all parts of the store
    have alike is not complete.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store, versions
        >>> versions(open_key_value_store(tempfile.mkdtemp()))
        {}
    """
    found = [value for value in key_values.read(list(key_values.scan(b"v"))) if value is not None]
    there: dict[str, dict[str, Any]] = {}
    for value, count in Counter(found).items():
        header = unpack_header(key_values, value)
        whole = count == len(key_values.tags)
        there[header["version"]] = header if whole else {**header, "complete": False}
    return there


def marks_of(headers: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Each version's build mark; None for states of another format, which may have none."""
    return {version: header.get("mark") for version, header in headers.items()}


def check_formats(key_values: KeyValueStore, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """See that all versions are of this format.

    Raises:
        StateError: one is not.
    """
    for version, header in headers.items():
        _check_format(key_values, version, header)


def _check_format(key_values: KeyValueStore, version: str, header: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are of format {header.get('format')!r}, "
            f"this version of the package reads {FORMAT!r}; drop them (ifa states --drop {version}) and "
            "build them anew (ifa build-states)"
        )


def read_header(key_values: KeyValueStore, version: str) -> dict[str, Any] | None:
    """A version's header; None where there is none.

    Raises:
        StateError: it is of another format, or its states are half dropped.
        StoreError: it is damaged.
    """
    tags = key_values.tags
    (value,) = key_values.read([Keys(version, tags).header(tags[0])])
    if value is None:
        return None
    header = unpack_header(key_values, value)
    _check_format(key_values, version, header)
    if header.get("dropped"):
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are half dropped; drop them to the end "
            f"(ifa states --drop {version}) and build them anew (ifa build-states)"
        )
    return header


def pack_header(header: Mapping[str, Any]) -> bytes:
    """A header as JSON, a line, and its checksum."""
    text = json.dumps(header).encode()
    return text + b"\n%08x" % zlib.crc32(text)


def unpack_header(key_values: KeyValueStore, value: bytes) -> dict[str, Any]:
    """A header from its bytes.

    Raises:
        StoreError: it is damaged.
    """
    text, _, checksum = value.rpartition(b"\n")
    try:
        if b"%08x" % zlib.crc32(text) != checksum:
            raise ValueError
        header = json.loads(text)
    except ValueError:
        raise StoreError(
            f"{key_values.name}: the header of a version's states is damaged. Bring the store back "
            "from a copy, or build the states in an empty one (ifa build-states)"
        ) from None
    return header
