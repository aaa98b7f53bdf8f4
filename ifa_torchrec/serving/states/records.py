"""The contents of records, and their bytes.

Damage never goes unnoticed. A record ends with a checksum of itself, its key and the header's mark,
which reveals damage and records of another build. A head names the user's pages, so that a lost page is
noticed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ifa_torchrec.serving.errors import StoreError
from ifa_torchrec.serving.states.dense import DenseCodec, Head, Latest
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import BLOCK, JOURNAL, Keys, Place, StateLayout, user_of
from ifa_torchrec.serving.states.pages import RowCodec, Rows, quotient, zstd

_BEFORE = struct.Struct("<II")  # CRC of the record s, absent keys
_POSITION = struct.Struct("<q")
_CHECKSUM = struct.Struct("<I")
_RESIDUE = zlib.crc32(_CHECKSUM.pack(zlib.crc32(b"")))
"""The CRC of any bytes followed by their own CRC."""


@dataclass(frozen=True)
class Before:
    """The rows that the events at a user's last time changed, as they were before.

    Args:
        rows: the rows that existed then.
        absent: keys, ascending, of the rows that did not exist.
    """

    rows: Rows
    absent: np.ndarray


def weight_and_mean(sums: torch.Tensor, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*, F] and means [*, F, d], 0 where the weight is 0, in float64.

    Args:
        sums: z, [*, F].
        totals: S, [*, F, d].
    """
    weight, total = sums.detach().double().numpy(), totals.detach().double().numpy()
    return weight, quotient(total, weight[..., None])


class RecordCodec:
    """Encodes the records of one build of a version's states as bytes.

    Args:
        key_values: the store; provides the name for messages and the tags.
        header: the version's header.

    Attributes:
        store: the store's name.
        keys: Keys.
        layout, positions, latest, vocabulary: see StateStore.
        decay, identity_decay: the layout's, as arrays.
        dense: DenseCodec.
        rows: RowCodec.
    """

    def __init__(self, key_values: KeyValueStore, header: dict[str, Any]) -> None:
        self.store = key_values.name
        layout = dict(header["layout"])
        for name in ("decay", "identity_decay"):
            layout[name] = tuple(layout[name])
        self.layout = StateLayout(**layout)
        self.version: str = header["version"]
        self.positions = {int(p): first for p, first in header["positions"].items()}
        self.latest: int | None = header["latest"]
        self.vocabulary: str = header["vocabulary"]
        self.keys = Keys(self.version, key_values.tags)
        self.decay = np.array(self.layout.decay)
        self.identity_decay = np.array(self.layout.identity_decay)
        self._mark = zlib.crc32(bytes.fromhex(header["mark"]))
        self.dense = DenseCodec(self.layout)
        self.rows = RowCodec(self.layout)

    def in_log(self, place: Place) -> bool:
        """Whether the event at a place is in the log that the states were built from."""
        return place.position < self.positions.get(place.partition, 0)

    # ------------------------------------------------------------------------------- checksums

    def seal(self, key: bytes, body: bytes) -> bytes:
        """A record's body with its checksum."""
        return body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key, self._start(key))))

    def open(self, key: bytes, value: bytes) -> bytes:
        """The body of the record under a key.

        Raises:
            StoreError: the checksum does not match.
        """
        if zlib.crc32(value, zlib.crc32(key, self._start(key))) != _RESIDUE:
            raise self._damaged(key)
        return value[: -_CHECKSUM.size]

    def open_all(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> list[bytes | None]:
        """``open`` for many state records (not journal records); None stays None."""
        crc32, mark = zlib.crc32, self._mark
        opened: list[bytes | None] = []
        for key, value in zip(keys, values, strict=True):
            if value is None:
                opened.append(None)
                continue
            if crc32(value, crc32(key, mark)) != _RESIDUE:
                raise self._damaged(key)
            opened.append(value[:-4])
        return opened

    def lost(self, user: int | str) -> StoreError:
        """The error for a missing record of a user."""
        return StoreError(
            f"{self.store}: part of the state of user {user!r} is missing; something deleted it or "
            f"damaged its key. {self._advice()}"
        )

    def _start(self, key: bytes) -> int:
        # all versions share the journal
        return 0 if key[:1] == JOURNAL else self._mark

    def _damaged(self, key: bytes) -> StoreError:
        what = ""
        if key[:1] in b"sui":
            user = user_of(key)
            what = "of a user " if user is None else f"of user {user} "
        return StoreError(
            f"{self.store}: a record {what}(key {key.hex()}) is damaged or from another build: its "
            f"checksum does not match. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            "Restore the store from a copy, or drop the states (ifa states --drop "
            f"{self.version}) and rebuild them (ifa build-states)"
        )

    # ------------------------------------------------------------------------------- positions

    def bits(self, key: bytes, value: bytes | None) -> bytes:
        """The bits of a block's record; all zero if there is no record."""
        if value is None:
            return bytes(BLOCK // 8)
        return zstd.decompress(self.open(key, value), BLOCK // 8, asbytes=True)

    def pack_position(self, position: int) -> bytes:
        """Encode a record p."""
        return _POSITION.pack(position)

    def position(self, key: bytes, value: bytes | None) -> int:
        """The position in a record p; 0 if there is no record."""
        return 0 if value is None else _POSITION.unpack(self.open(key, value))[0]

    # ------------------------------------------------------------------------------- states

    def pack_head(
        self,
        before: Head,
        latest: Latest,
        pages: np.ndarray,
        seed: np.random.Generator | None = None,
    ) -> bytes:
        """Encode a record s: dense heads, and the first keys of the user's pages; other arguments as in
        ``DenseCodec.pack``."""
        return self.dense.pack(before, latest, seed) + pages.astype("<i8").tobytes()

    def unpack_pages(self, body: bytes) -> np.ndarray:
        """The first keys of the user's pages, from the body of a record s."""
        return np.frombuffer(body, "<i8", offset=self.dense.size(body))

    def pack_before(self, page: bytes, absent: np.ndarray, head: bytes) -> bytes:
        """Encode a record u.

        Args:
            page: the rows of a Before, from ``RowCodec.pack`` with first key 0.
            absent: see Before.
            head: the body of the same user's record s.
        """
        keys = absent.astype("<i8").tobytes()
        return _BEFORE.pack(zlib.crc32(head), len(absent)) + keys + page

    def split_before(self, user: int | str, body: bytes, head: bytes) -> tuple[np.ndarray, bytes]:
        """The absent keys and the page that ``pack_before`` encoded; ``head`` is the record s's body.

        Raises:
            StoreError: the two records were not written together.
        """
        crc, absent = _BEFORE.unpack_from(body)
        if crc != zlib.crc32(head):
            raise self.lost(user)
        keys = np.frombuffer(body, "<i8", absent, _BEFORE.size)
        return keys, body[_BEFORE.size + keys.nbytes :]

    def unpack_before(self, user: int | str, body: bytes, head: bytes) -> Before:
        """Decode a record u; arguments and errors as in ``split_before``."""
        absent, page = self.split_before(user, body, head)
        return Before(self.rows.unpack([page], [0])[0], absent)
