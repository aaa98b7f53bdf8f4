"""The layout of a store: the shape of a version's states, and which record is stored under which key.

For each version of the weights (VVVVVVVV, the first 8 bytes of the version's hash) there are:

    v VVVVVVVV                header, JSON: the version, its layout, the vocabulary's digest and a mark
                              that identifies this build of it
    s VVVVVVVV user           head: dense heads of the events at the last time and of those before, with
                              times and counts; and the first keys of the user's pages i
    u VVVVVVVV user           the rows that the last time's events changed, as they were before
    i VVVVVVVV user key       page: the rows of the identity tables from this key up to the next page's
    a VVVVVVVV partition block    which positions of a partition of the event stream are in the states,
                              one bit each
    p VVVVVVVV partition      where a consumer of that partition resumes

For all versions together there are:

    e partition position      the event itself, for versions that are built later
    t DIGEST                  time up to which a forgotten user's events do not count (``shared``)
    b                         for each partition, the position before which the journal may lack events

An event changes its user's head, the rows before it, the pages of its keys, one block and one journal
entry, in one transaction, which also reads its user's tombstone. Since the rows per page are limited
(``pages``), the cost hardly depends on the length of the history. An event is in the states if and only
if its bit is set. Numbers are big endian, so that keys sort by them. A user is 16 bytes: see
``user_key``.

In a Redis Cluster users are divided into parts. The first byte of each key is followed by the hash tag
of its part, so that a part lies in one slot, which a transaction cannot leave. Each part has all records
of its users, and its own header, positions, journal and journal start.
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
"""Positions per block."""
STATE_KINDS = (b"s", b"u", b"i", b"a", b"p")
"""First bytes of the keys of a version's records, except the header's."""
JOURNAL = b"e"
"""First byte of the keys of the journal's events."""
USER_BYTES = 16
CHECKSUM_BYTES = 4
"""Length of the checksum at the end of each record."""
_NUMBER = struct.Struct(">q")
_PARTITION = struct.Struct(">I")
_PLACE = struct.Struct(">Iq")  # partition, and position or block
_INTEGER_USER = struct.Struct(">QQ")
_SIGN = 2**63  # sign bit of an int64; flipped, so that negative numbers sort before others as bytes


class Place(NamedTuple):
    """An event's place in the stream.

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
    """Positions by partition, as text for messages.

    Example:
        >>> from ifa_torchrec.serving.states.layout import format_positions
        >>> format_positions({0: 7, 3: 9})
        'position 7, position 9 of partition 3'
    """
    return ", ".join(str(Place(*of_partition)) for of_partition in positions.items())


@dataclass(frozen=True)
class StateLayout:
    """The shape of the states of one configuration.

    Args:
        num_heads: H; feature_dim: d_phi; head_dim: d.
        identity_key_range: K R; 0 without identity features.
        decay: decay rate per day of each dense head, [H].
        identity_decay: decay rate per day of each identity half-life, [L].
        dtype: type of stored means, and precision of the identity rows' weights; other weights are
            float32 and counts int64. With float16 both are rounded to nearest when built, and
            stochastically, without bias, when events are added.
        gates: the gates that weight events, number of values by name.
        identity_head_dim: width of the identity tables' means; None means head_dim.

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
        """The layout of a module's states; the module's ages are in days."""
        if dtype not in ("float32", "float16"):
            raise StateError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
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
    """The 16 bytes that represent a user, by external id, in keys.

    An integer is encoded as itself, so that keys sort by it. A string becomes its digest with the first
    bit set, so that it never equals an integer's bytes.

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
        version: version of the weights.
        tags: the store's tags.

    Attributes:
        id: the bytes that represent the version.
        tags: the store's tags.

    Example:
        >>> from ifa_torchrec.serving.states.layout import Keys, user_of
        >>> user_of(Keys("weights-1").head(-3))
        -3
    """

    def __init__(self, version: str, tags: tuple[bytes, ...] = (b"",)) -> None:
        self.id, self.tags = hashlib.sha256(version.encode()).digest()[:8], tags

    def header(self, tag: bytes = b"") -> bytes:
        """The key of a part's header."""
        return b"v" + tag + self.id

    def head(self, user: int | str) -> bytes:
        """The key of a user's head."""
        return self._of_user(b"s", user)

    def before(self, user: int | str) -> bytes:
        """The key of the rows that a user's last events changed, as they were before."""
        return self._of_user(b"u", user)

    def pages(self, user: int | str, first: np.ndarray) -> list[bytes]:
        """The keys of a user's pages, from the first identity key of each, [n] int64."""
        prefix = self.all_pages(user)
        return [prefix + number for number in pieces(first.astype(">i8"))]

    def all_pages(self, user: int | str) -> bytes:
        """The prefix of the keys of a user's pages."""
        return self._of_user(b"i", user)

    def block(self, place: Place, tag: bytes = b"") -> bytes:
        """The key of the bits of a place's block."""
        return b"a" + tag + self.id + _PLACE.pack(place.partition, place.position // BLOCK)

    def stream(self, partition: int) -> bytes:
        """The key of the position where a partition's consumer resumes; it is in the first part."""
        return b"p" + self.tags[0] + self.id + _PARTITION.pack(partition)

    def are_of(self, key: bytes) -> bool:
        """Whether a key belongs to this version."""
        return key.startswith(self.id, 1 + len(self.tags[0]))

    def _of_user(self, kind: bytes, user: int | str) -> bytes:
        return kind + tag_of(self.tags, user) + self.id + user_key(user)


def tag_of(tags: tuple[bytes, ...], user: int | str) -> bytes:
    """The one of a store's tags that a user's keys have.

    Example:
        >>> from ifa_torchrec.serving.states.layout import tag_of
        >>> [tag_of((b"{0}", b"{1}"), user) for user in (7, 8, "anna")]
        [b'{0}', b'{1}', b'{0}']
    """
    return tags[zlib.crc32(user_key(user)) % len(tags) if len(tags) > 1 else 0]


def tag_in(tags: tuple[bytes, ...], key: bytes) -> bytes:
    """The tag in a key of a store with these tags."""
    return key[1 : 1 + len(tags[0])]


def journal_key(place: Place, tag: bytes = b"") -> bytes:
    """The key of the journal's event at a place; all versions share it."""
    return JOURNAL + tag + _PLACE.pack(*place)


def place_of(journal_key: bytes) -> Place:
    """The place of the event under a journal key."""
    return Place(*_PLACE.unpack_from(journal_key, len(journal_key) - _PLACE.size))


def key_user(key: bytes) -> bytes:
    """The 16 bytes in a state record's key that represent its user."""
    end = len(key) - (_NUMBER.size if key[:1] == b"i" else 0)
    return key[end - USER_BYTES : end]


def user_of(key: bytes) -> int | None:
    """The user in a state record's key; None if it is a string, of which the key has only a digest."""
    high, low = _INTEGER_USER.unpack(key_user(key))
    return None if high else low - _SIGN


def pieces(records: np.ndarray) -> list[bytes]:
    """The bytes of each element of an array."""
    return records.view(f"V{records.dtype.itemsize}").tolist()


def has_bit(bits: bytes | bytearray, number: int) -> bool:
    """Whether a bit is set."""
    return bool(bits[number // 8] >> number % 8 & 1)


def set_bit(bits: bytearray, number: int) -> None:
    """Set a bit."""
    bits[number // 8] |= 1 << number % 8
