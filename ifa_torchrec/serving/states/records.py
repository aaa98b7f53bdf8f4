"""What a record holds, and its bytes.

Nothing is read that could be wrong in silence. A record ends with a checksum of itself, its key and the
header's mark, so that damage, and what is left of another building, are seen. The head names the pages
of the rows that there are: one that is lost is missed.
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
"""The CRC of whatever ends with its own CRC."""


@dataclass(frozen=True)
class Before:
    """The rows that the events of a user's last time changed, as they were before it.

    Args:
        rows: those that there were then.
        absent: keys, ascending, of those that there were not.
    """

    rows: Rows
    absent: np.ndarray


def weight_and_mean(sums: torch.Tensor, totals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [*, F] and means [*, F, d], 0 where there is no weight, in float64.

    Args:
        sums: z, [*, F].
        totals: S, [*, F, d].
    """
    weight, total = sums.detach().double().numpy(), totals.detach().double().numpy()
    return weight, quotient(total, weight[..., None])


class RecordCodec:
    """The records of one building of a version's states as bytes.

    Args:
        key_values: the store, for its name in messages and its tags.
        header: of the version.

    Attributes:
        store: its name.
        keys: Keys.
        layout, positions, latest, vocabulary: as in StateStore.
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
        """Whether the log that the states were built from has the event at a place."""
        return place.position < self.positions.get(place.partition, 0)

    # ------------------------------------------------------------------------------- checksums

    def seal(self, key: bytes, body: bytes) -> bytes:
        """A record's body with its checksum."""
        return body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key, self._start(key))))

    def open(self, key: bytes, value: bytes) -> bytes:
        """The body of the record under a key.

        Raises:
            StoreError: its checksum is not that of its bytes.
        """
        if zlib.crc32(value, zlib.crc32(key, self._start(key))) != _RESIDUE:
            raise self._damaged(key)
        return value[: -_CHECKSUM.size]

    def open_all(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> list[bytes | None]:
        """As ``open``, of many records of states (not of the journal); None stays None."""
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
        """What is raised where one of a user's records is not there."""
        return StoreError(
            f"{self.store}: a part of the state of user {user!r} is gone; something deleted it "
            f"or damaged its key. {self._advice()}"
        )

    def _start(self, key: bytes) -> int:
        # the journal is of all versions
        return 0 if key[:1] == JOURNAL else self._mark

    def _damaged(self, key: bytes) -> StoreError:
        what = ""
        if key[:1] in b"sui":
            user = user_of(key)
            what = "of a user " if user is None else f"of user {user} "
        return StoreError(
            f"{self.store}: a record {what}(key {key.hex()}) is damaged, or of another "
            f"building: its checksum is not that of its bytes. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            "Restore the store from a copy, or drop the states (ifa states --drop "
            f"{self.version}) and rebuild them (ifa build-states)"
        )

    # ------------------------------------------------------------------------------- positions

    def bits(self, key: bytes, value: bytes | None) -> bytes:
        """The bits of a block's record; none is set where there is no record."""
        if value is None:
            return bytes(BLOCK // 8)
        return zstd.decompress(self.open(key, value), BLOCK // 8, asbytes=True)

    def pack_position(self, position: int) -> bytes:
        """A record p."""
        return _POSITION.pack(position)

    def position(self, key: bytes, value: bytes | None) -> int:
        """What a record p holds; 0 where there is none."""
        return 0 if value is None else _POSITION.unpack(self.open(key, value))[0]

    # ------------------------------------------------------------------------------- states

    def pack_head(
        self,
        before: Head,
        latest: Latest,
        pages: np.ndarray,
        seed: np.random.Generator | None = None,
    ) -> bytes:
        """A record s: dense heads, and the first keys of the user's pages; arguments as
        ``DenseCodec.pack``'s."""
        return self.dense.pack(before, latest, seed) + pages.astype("<i8").tobytes()

    def unpack_pages(self, body: bytes) -> np.ndarray:
        """Of what a record s holds, the first keys of the user's pages."""
        return np.frombuffer(body, "<i8", offset=self.dense.size(body))

    def pack_before(self, page: bytes, absent: np.ndarray, head: bytes) -> bytes:
        """A record u.

        Args:
            page: of the rows of a Before, as ``RowCodec.pack`` gives it, of the first key 0.
            absent: as a Before's.
            head: the body of the record s of the same user.
        """
        keys = absent.astype("<i8").tobytes()
        return _BEFORE.pack(zlib.crc32(head), len(absent)) + keys + page

    def split_before(self, user: int | str, body: bytes, head: bytes) -> tuple[np.ndarray, bytes]:
        """The keys and the page that ``pack_before`` was given; ``head`` is the body of the record s.

        Raises:
            StoreError: they are not of one moment.
        """
        crc, absent = _BEFORE.unpack_from(body)
        if crc != zlib.crc32(head):
            raise self.lost(user)
        keys = np.frombuffer(body, "<i8", absent, _BEFORE.size)
        return keys, body[_BEFORE.size + keys.nbytes :]

    def unpack_before(self, user: int | str, body: bytes, head: bytes) -> Before:
        """What a record u holds; as ``split_before``."""
        absent, page = self.split_before(user, body, head)
        return Before(self.rows.unpack([page], [0])[0], absent)
