"""Records that all versions share beside the journal: which users were forgotten, and from where on the
journal is whole.

A tombstone says until when a user's events count no more, in states that are there and in those that
are built later. It lies under a digest of the user, so that it does not hold the id itself; who guesses
the id can still find it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence

from ifa_torchrec.serving.errors import StoreError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import user_key

JOURNAL_START = b"w"
"""The key of the position before which events may be gone from the journal."""
_RECORD = struct.Struct("<qI")  # a number, checksum


def tombstone_key(user: int | str) -> bytes:
    """The key of a user's tombstone.

    Example:
        >>> from ifa_torchrec.serving.states.layout import user_key
        >>> from ifa_torchrec.serving.states.shared import tombstone_key
        >>> user_key(7) in tombstone_key(7), len(tombstone_key("anna"))
        (False, 17)
    """
    return b"t" + hashlib.blake2b(user_key(user), digest_size=16, person=b"ifa-forgotten").digest()


def pack_number(key: bytes, number: int) -> bytes:
    """The record of a number: a tombstone's time, in microseconds, or a position."""
    return _RECORD.pack(number, _checksum(key, number))


def unpack_number(store: str, key: bytes, value: bytes | None) -> int | None:
    """The number of a record; None where there is none.

    Args:
        store: its name, for messages.
        key, value: of the record.

    Raises:
        StoreError: the record is damaged.
    """
    if value is None:
        return None
    if len(value) == _RECORD.size:
        number, checksum = _RECORD.unpack(value)
        if checksum == _checksum(key, number):
            return number
    raise StoreError(
        f"{store}: the record under key {key.hex()} is damaged, which says whom to forget or where the "
        "journal begins; bring the store back from a copy"
    )


def forgotten_until(key_values: KeyValueStore, users: Sequence[int | str]) -> list[int | None]:
    """Until when each user's events do not count, microseconds; None for those who were never forgotten.

    Args:
        key_values: the store.
        users: external ids.

    Raises:
        StoreError: a record is damaged, or the store fails.
    """
    keys = [tombstone_key(user) for user in users]
    found = zip(keys, key_values.read(keys), strict=True)
    return [unpack_number(key_values.name, key, value) for key, value in found]


def _checksum(key: bytes, number: int) -> int:
    return zlib.crc32(number.to_bytes(8, "little", signed=True), zlib.crc32(key))
