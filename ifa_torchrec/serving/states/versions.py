""""""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from ifa_torchrec.serving.errors import StateError, StoreError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.records import _BUILD, _DROP, FORMAT, _version_id


def versions(key_values: KeyValueStore) -> dict[str, dict[str, Any]]:
    """The versions whose states a store holds, each with its header.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store, versions
        >>> versions(open_key_value_store(tempfile.mkdtemp()))
        {}
    """
    values = key_values.read(list(key_values.scan(b"v")))
    headers = [_unpacked_header(key_values, value) for value in values if value is not None]
    return {header["version"]: header for header in headers}


def drop(key_values: KeyValueStore, version: str) -> None:
    """Delete a version's states, and what of the journal no other version can want.

    Raises:
        StateError: there are none of this version.
    """
    there = versions(key_values)
    if version not in there:
        raise StateError(f"no states of weights {version!r} here; there are {sorted(there)}")
    # the header first says so, since half a version must not look whole, and is deleted last, since what
    # it leaves must not be built upon
    header = b"v" + _version_id(version)
    dropped = _packed_header({**there[version], "complete": False, "dropped": True})
    key_values.update([], lambda _: {header: dropped})
    for kind in (b"s", b"u", b"i", b"k", b"a"):
        _delete_all(key_values, kind + _version_id(version))
    key_values.delete([header])
    rest = [header["position"] for name, header in there.items() if name != version]
    if rest:
        _delete_all(key_values, b"j", until=b"j" + struct.pack(">q", min(rest)))


def _delete_all(key_values: KeyValueStore, prefix: bytes, until: bytes | None = None) -> None:
    keys = []
    for key in key_values.scan(prefix):
        if until is not None and key >= until:
            break
        keys.append(key)
    for first in range(0, len(keys), 10_000):
        key_values.delete(keys[first : first + 10_000])


def _header(key_values: KeyValueStore, version: str) -> dict[str, Any] | None:
    (value,) = key_values.read([b"v" + _version_id(version)])
    if value is None:
        return None
    header = _unpacked_header(key_values, value)
    if header.get("format") != FORMAT:
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are of format {header.get('format')!r}, "
            f"this version of the package reads {FORMAT!r}; drop them ({_DROP} {version}) and "
            f"build them anew ({_BUILD})"
        )
    if header.get("dropped"):
        raise StateError(
            f"{key_values.name}: states of weights {version!r} are half dropped; drop them to the end "
            f"({_DROP} {version}) and build them anew ({_BUILD})"
        )
    return header


def _packed_header(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return text + b"\n%08x" % zlib.crc32(text)


def _unpacked_header(key_values: KeyValueStore, value: bytes) -> dict[str, Any]:
    text, _, checksum = value.rpartition(b"\n")
    try:
        # that of format 1 had no checksum
        header = json.loads(text or value)
        if (text and b"%08x" % zlib.crc32(text) != checksum) or not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise StoreError(
            f"{key_values.name}: the header of a version's states is damaged. Bring the store back "
            f"from a copy, or build the states in an empty one ({_BUILD})"
        ) from None
    return header
