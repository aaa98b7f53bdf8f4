"""Records that all versions share besides the journal: forgotten users, and where the journal begins.

A tombstone holds the time up to which a user's events do not count, in existing states and in those
built later. Its key is a digest of the user, so that it does not reveal the id; but anyone who guesses
the id can find the tombstone.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence

from ifa_torchrec.serving.errors import StoreError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import tag_of, user_key

_NUMBER = struct.Struct("<q")
_START = struct.Struct("<Iq")  # partition, position
_CHECKSUM = struct.Struct("<I")


def journal_start_key(tag: bytes = b"") -> bytes:
    """The key of the record of positions before which the journal may lack events."""
    return b"b" + tag


def tombstone_key(user: int | str, tags: tuple[bytes, ...] = (b"",)) -> bytes:
    """The key of a user's tombstone in a store with these tags.

    Example:
        >>> from ifa_torchrec.serving.states.layout import tag_of, user_key
        >>> from ifa_torchrec.serving.states.shared import tombstone_key
        >>> user_key(7) in tombstone_key(7), len(tombstone_key("anna"))
        (False, 17)
    """
    digest = hashlib.blake2b(user_key(user), digest_size=16, person=b"ifa-forgotten").digest()
    return b"t" + tag_of(tags, user) + digest


def pack_number(key: bytes, number: int) -> bytes:
    """Encode a number, a tombstone's time in microseconds."""
    return _sealed(key, _NUMBER.pack(number))


def unpack_number(store: str, key: bytes, value: bytes | None) -> int | None:
    """Decode a number; None if there is no record.

    Args:
        store: the store's name, for messages.
        key, value: key and value of the record.

    Raises:
        StoreError: the record is damaged.
    """
    if value is None:
        return None
    return _NUMBER.unpack(_opened(store, key, value))[0]


def pack_starts(key: bytes, starts: Mapping[int, int]) -> bytes:
    """Encode the positions, by partition, before which the journal may lack events."""
    return _sealed(key, b"".join(_START.pack(*start) for start in sorted(starts.items())))


def unpack_starts(store: str, key: bytes, value: bytes | None) -> dict[int, int]:
    """Decode what ``pack_starts`` encoded; empty if there is no record.

    Args:
        store: the store's name, for messages.
        key, value: key and value of the record.

    Raises:
        StoreError: the record is damaged.
    """
    if value is None:
        return {}
    return dict(_START.iter_unpack(_opened(store, key, value)))


def forgotten_until(key_values: KeyValueStore, users: Sequence[int | str]) -> list[int | None]:
    """The time up to which each user's events do not count, in microseconds; None if never forgotten.

    Args:
        key_values: the store.
        users: external ids.

    Raises:
        StoreError: a record is damaged, or the store fails.
    """
    keys = [tombstone_key(user, key_values.tags) for user in users]
    found = zip(keys, key_values.read(keys), strict=True)
    return [unpack_number(key_values.name, key, value) for key, value in found]


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key)))


def _opened(store: str, key: bytes, value: bytes) -> bytes:
    body = value[: -_CHECKSUM.size]
    if value == _sealed(key, body):
        return body
    raise StoreError(
        f"{store}: the record under key {key.hex()} is damaged; it says which user to forget or where "
        "the journal begins. Restore the store from a copy"
    )
