"""The interface of key-value stores of bytes; ``opening`` opens one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

Change = Callable[[list[bytes | None]], Mapping[bytes, bytes | None]]
"""Maps the values of some keys to the new and changed records; the value None deletes a key."""
Follow = Callable[[list[bytes | None]], Sequence[bytes]]
"""Maps the values of some keys to further keys that they name."""


def no_more(_: list[bytes | None]) -> Sequence[bytes]:
    """A Follow that names no further keys."""
    return ()


Skip = Callable[[bytes], bytes]
"""Maps a key that a scan found to the next key wanted: the same key, or a later one to skip to."""


def no_skip(key: bytes) -> bytes:
    """A Skip that skips nothing: returns the key itself."""
    return key


class KeyValueStore(ABC):
    """A key-value store of bytes. Each read is a consistent snapshot and each update is atomic, whatever
    other processes do and even if this one dies. If the store itself fails, every method raises
    StoreError.

    In a store with several tags this holds per tag: a read is a snapshot of each tag's keys, and an
    update may only use keys with the same tag.

    Attributes:
        name: the store's name in messages: its address, without a password.
        tags: the possible bytes after the first byte of a key, all of the same length. Most stores have
            only one tag, the empty one.
    """

    name: str
    tags: tuple[bytes, ...] = (b"",)

    @abstractmethod
    def check(self) -> None:
        """Raise StoreError if the store is unreachable, or may lose keys on its own."""

    @abstractmethod
    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """The values of the keys, then of the keys that ``then`` returns for these values, as one
        snapshot; None for a missing key. ``then`` may be called again with newer values."""

    @abstractmethod
    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """Atomically read as ``read`` does, and write what ``change`` returns for the values.

        A key whose new value is None is deleted. ``change`` may be called again with newer values if
        another writer came first.
        """

    @abstractmethod
    def scan(self, prefix: bytes, skip: Skip = no_skip) -> Iterator[bytes]:
        """The keys that begin with ``prefix``, in order, without those that ``skip`` skips."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these keys, if they exist."""

    @abstractmethod
    def compact(self) -> None:
        """Rewrite the store's file without a byte of deleted records. No other process may have it open.

        Raises:
            StateError: the store has no file of its own to rewrite.
            StoreError: another process has the store open, or the file cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file or the connection."""
