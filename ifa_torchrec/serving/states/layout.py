"""The layout of a store: the shape of a version's states, and which record lies under which key.

Of one version of the weights (VVVVVVVV, the first 8 bytes of the version's hash) there are:

    v VVVVVVVV                header: the version, its layout, the vocabulary's digest and a mark of this
                              building of it, JSON
    s VVVVVVVV user           head: dense heads of the events of the last time and of those before, times
                              and counts; which pages i there are
    u VVVVVVVV user           the rows that the last time's events changed, as they were before
    i VVVVVVVV user key       page: the rows of the identity tables from this key on to the next page's
    a VVVVVVVV partition block    which positions of a partition of the event stream are in the states,
                              a bit each
    p VVVVVVVV partition      where a consumer of that partition goes on

Of all versions there are:

    e partition position      the event itself, for versions that are built later
    t DIGEST                  until when a forgotten user's events do not count (``shared``)
    b                         of each partition the position before which events may be gone from the
                              journal

An event touches its user's head, the rows before it, the pages of its keys, one block and one journal
entry, in one transaction, which reads its user's tombstone, too. A page has at most some rows
(``pages``): so the cost hardly depends on the history. An event is in the states exactly if its bit is
set. Numbers are big endian, so that keys sort by them. A user is 16 bytes: see ``user_key``.

In a Redis Cluster users are divided into parts, and behind the first byte of each key stands the hash
tag of its part, so that all of a part lies in one slot, which a transaction cannot leave. A part has all
of its users, and a header, positions, a journal and its beginning of its own.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ifa_torchrec.modules import InteractionFidelityAttention
from ifa_torchrec.serving.errors import StateError

BLOCK = 4096
"""Positions a block."""
STATE_KINDS = (b"s", b"u", b"i", b"a", b"p")
"""First bytes of the keys of a version's records, except the header's."""
JOURNAL = b"e"
"""First byte of the keys of the journal's events."""
USER_BYTES = 16
CHECKSUM_BYTES = 4
"""At the end of each record."""
_NUMBER = struct.Struct(">q")
_PARTITION = struct.Struct(">I")
_PLACE = struct.Struct(">Iq")  # partition, and position or block
_INTEGER_USER = struct.Struct(">QQ")
_SIGN = 2**63  # of an int64; with it flipped, the bytes of negative numbers come before those of others


class Place(NamedTuple):
    """Where in the stream an event stands.

    Example:
        >>> from ifa_torchrec.serving.states.layout import Place
        >>> str(Place(0, 7)), str(Place(3, 7))
        ('position 7', 'position 7 of partition 3')
    """

    partition: int
    position: int

    def __str__(self) -> str:
        of_partition = f" of partition {self.partition}" if self.partition else ""
        return f"position {self.position}{of_partition}"


def format_positions(positions: Mapping[int, int]) -> str:
    """Positions by partition, in words.

    Example:
        >>> from ifa_torchrec.serving.states.layout import format_positions
        >>> format_positions({0: 7, 3: 9})
        'position 7, position 9 of partition 3'
    """
    return ", ".join(str(Place(*of_partition)) for of_partition in positions.items())


@dataclass(frozen=True)
class StateLayout:
    """What the states of one configuration look like.

    Args:
        num_heads: H; feature_dim: d_phi; head_dim: d.
        identity_key_range: K R, 0 without identity features.
        decay: rate a day of each dense head, [H].
        identity_decay: rate a day of each identity half-life, [L].
        dtype: how means are stored, and to how many digits the identity rows' weights; other weights
            and counts are float32 and int64. In float16 both are rounded to the nearest when built, and
            at random, without bias, when events are added.
        gates: those that the events were weighed by, the number of values by name; none for states that
            are older than gates.
        identity_head_dim: width of the identity tables' means; None for head_dim.

    Example:
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout
        >>> ifa = InteractionFidelityAttention(IFAConfig(64, num_heads=2))
        >>> StateLayout.of(ifa).feature_dim
        32
    """

    num_heads: int
    feature_dim: int
    head_dim: int
    identity_key_range: int
    decay: tuple[float, ...]
    identity_decay: tuple[float, ...]
    dtype: Literal["float32", "float16"] = "float32"
    gates: dict[str, int] = field(default_factory=dict[str, int])
    identity_head_dim: int | None = None

    @staticmethod
    def of(
        ifa: InteractionFidelityAttention, dtype: Literal["float32", "float16"] = "float32"
    ) -> StateLayout:
        """The layout of a module's states; its ages are in days."""
        if dtype not in ("float32", "float16"):
            raise StateError(f"states are stored as float32 or float16, not {dtype!r}")
        width, identity = ifa.config.head_width, ifa.config.identity_width
        return StateLayout(
            num_heads=ifa.config.num_heads,
            feature_dim=ifa.config.feature_width,
            head_dim=width,
            identity_key_range=ifa.config.identity_key_range,
            decay=tuple(ifa.decay.tolist()),
            identity_decay=() if ifa.identity is None else tuple(ifa.identity.decay.tolist()),
            dtype=dtype,
            gates=dict(ifa.config.gates),
            identity_head_dim=None if identity == width else identity,
        )

    @property
    def identity_width(self) -> int:
        """Width of the identity tables' means."""
        return self.head_dim if self.identity_head_dim is None else self.identity_head_dim


def user_key(user: int | str) -> bytes:
    """The 16 bytes that stand for a user in keys, by their external id.

    An integer is itself, so that keys sort by it; a string is its digest, whose first bit is set, so
    that the two never meet.

    Example:
        >>> from ifa_torchrec.serving.states.layout import user_key
        >>> user_key(-3) < user_key(2) < user_key("2"), len(user_key("anna"))
        (True, 16)
    """
    if isinstance(user, str):
        digest = bytearray(hashlib.blake2b(user.encode(), digest_size=USER_BYTES).digest())
        digest[0] |= 0x80
        return bytes(digest)
    return _INTEGER_USER.pack(0, user + _SIGN)


class Keys:
    """The keys of one version's records.

    Args:
        version: of the weights.
        tags: of the store.

    Attributes:
        id: the bytes that stand for the version.
        tags: of the store.

    Example:
        >>> from ifa_torchrec.serving.states.layout import Keys, user_of
        >>> user_of(Keys("weights-1").head(-3))
        -3
    """

    def __init__(self, version: str, tags: tuple[bytes, ...] = (b"",)) -> None:
        self.id, self.tags = hashlib.sha256(version.encode()).digest()[:8], tags

    def header(self, tag: bytes = b"") -> bytes:
        """Of a part's header."""
        return b"v" + tag + self.id

    def head(self, user: int | str) -> bytes:
        """Of a user's head."""
        return self._of_user(b"s", user)

    def before(self, user: int | str) -> bytes:
        """Of what a user's last event changed."""
        return self._of_user(b"u", user)

    def pages(self, user: int | str, first: np.ndarray) -> list[bytes]:
        """The keys of a user's pages, from the first identity key of each, [n] int64."""
        prefix = self.all_pages(user)
        return [prefix + number for number in pieces(first.astype(">i8"))]

    def all_pages(self, user: int | str) -> bytes:
        """What the keys of a user's pages begin with."""
        return self._of_user(b"i", user)

    def block(self, place: Place, tag: bytes = b"") -> bytes:
        """Of the bits of the block that a place is in."""
        return b"a" + tag + self.id + _PLACE.pack(place.partition, place.position // BLOCK)

    def stream(self, partition: int) -> bytes:
        """Of where a consumer of a partition goes on; it is in the first part."""
        return b"p" + self.tags[0] + self.id + _PARTITION.pack(partition)

    def are_of(self, key: bytes) -> bool:
        """Whether a record under a key is of this version."""
        return key.startswith(self.id, 1 + len(self.tags[0]))

    def _of_user(self, kind: bytes, user: int | str) -> bytes:
        return kind + tag_of(self.tags, user) + self.id + user_key(user)


def tag_of(tags: tuple[bytes, ...], user: int | str) -> bytes:
    """Of a store's tags the one in a user's keys.

    Example:
        >>> from ifa_torchrec.serving.states.layout import tag_of
        >>> [tag_of((b"{0}", b"{1}"), user) for user in (7, 8, "anna")]
        [b'{0}', b'{1}', b'{0}']
    """
    return tags[zlib.crc32(user_key(user)) % len(tags) if len(tags) > 1 else 0]


def tag_in(tags: tuple[bytes, ...], key: bytes) -> bytes:
    """The tag that a key of a store with these tags has."""
    return key[1 : 1 + len(tags[0])]


def journal_key(place: Place, tag: bytes = b"") -> bytes:
    """The key of the event at a place; all versions share it."""
    return JOURNAL + tag + _PLACE.pack(*place)


def place_of(journal_key: bytes) -> Place:
    """The place whose event lies under a key of the journal."""
    return Place(*_PLACE.unpack_from(journal_key, len(journal_key) - _PLACE.size))


def key_user(key: bytes) -> bytes:
    """The 16 bytes that stand for the user whose record of a state lies under a key."""
    end = len(key) - (_NUMBER.size if key[:1] == b"i" else 0)
    return key[end - USER_BYTES : end]


def user_of(key: bytes) -> int | None:
    """The user whose record lies under a key; None where it is a string, whose digest the key has."""
    high, low = _INTEGER_USER.unpack(key_user(key))
    return None if high else low - _SIGN


def pieces(records: np.ndarray) -> list[bytes]:
    """The bytes of each of an array's entries."""
    return records.view(f"V{records.dtype.itemsize}").tolist()


def has_bit(bits: bytes | bytearray, number: int) -> bool:
    """Whether a bit is set."""
    return bool(bits[number // 8] >> number % 8 & 1)


def set_bit(bits: bytearray, number: int) -> None:
    """Set a bit."""
    bits[number // 8] |= 1 << number % 8
