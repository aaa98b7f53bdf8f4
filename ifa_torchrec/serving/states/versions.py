"""The headers of a store: which versions' states it has.

A header's mark identifies one build of a version, and the header says whether that build is complete. So
a process notices if a store was emptied, or states were dropped and rebuilt, after it opened them.
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
    """The headers of a store's states, by version. A version whose header differs between the store's
    parts is reported as not complete.

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
    """Check that all versions have this package's format.

    Raises:
        StateError: a version has another format.
    """
    for version, header in headers.items():
        _check_format(key_values, version, header)


def _check_format(key_values: KeyValueStore, version: str, header: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise StateError(
            f"{key_values.name}: states of weights {version!r} have format {header.get('format')!r}, "
            f"this version reads {FORMAT!r}; drop them (ifa states --drop {version}) and rebuild them "
            "(ifa build-states)"
        )


def read_header(key_values: KeyValueStore, version: str) -> dict[str, Any] | None:
    """A version's header; None if there is none.

    Raises:
        StateError: the states have another format, or dropping them was interrupted.
        StoreError: the header is damaged.
    """
    tags = key_values.tags
    (value,) = key_values.read([Keys(version, tags).header(tags[0])])
    if value is None:
        return None
    header = unpack_header(key_values, value)
    _check_format(key_values, version, header)
    if header.get("dropped"):
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are only half dropped; finish dropping "
            f"them (ifa states --drop {version}) and rebuild them (ifa build-states)"
        )
    return header


def pack_header(header: Mapping[str, Any]) -> bytes:
    """Encode a header: a line of JSON, then its checksum."""
    text = json.dumps(header).encode()
    return text + b"\n%08x" % zlib.crc32(text)


def unpack_header(key_values: KeyValueStore, value: bytes) -> dict[str, Any]:
    """Decode a header.

    Raises:
        StoreError: the header is damaged.
    """
    text, _, checksum = value.rpartition(b"\n")
    try:
        if b"%08x" % zlib.crc32(text) != checksum:
            raise ValueError
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise StoreError(
            f"{key_values.name}: the header of a version's states is damaged. Restore the store from a "
            "copy, or build the states into an empty one (ifa build-states)"
        ) from None
    return header
