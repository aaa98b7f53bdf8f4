"""Bytes by key, and what every store of them does; ``opening`` opens one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

Change = Callable[[list[bytes | None]], Mapping[bytes, bytes | None]]
"""Makes of the values of some keys the records that are new or changed; None of those to delete."""
Follow = Callable[[list[bytes | None]], Sequence[bytes]]
"""Makes of the values of some keys the further keys that these name."""


def no_more(_: list[bytes | None]) -> Sequence[bytes]:
    """That they name none."""
    return ()


Skip = Callable[[bytes], bytes]
"""Of a key that was found, the first one that is wanted from there on: itself, or a later one."""


def no_skip(key: bytes) -> bytes:
    """The key itself."""
    return key


class KeyValueStore(ABC):
    """Bytes by key. What is read is of one moment, and what is updated is so whole or not at all,
    whatever other processes do and wherever this one dies. Where the store itself fails, every method
    raises StoreError.

    All that holds of keys with one tag, in a store that has several: there what is read is of one moment
    for each tag, and what is updated has one.

    Attributes:
        name: the store in messages: its address, without a password.
        tags: what stands in a key behind its first byte, all of one length. Most stores have but one,
            which is empty.
    """

    name: str
    tags: tuple[bytes, ...] = (b"",)

    @abstractmethod
    def check(self) -> None:
        """Raise StoreError if the store is out of reach, or may lose keys by itself."""

    @abstractmethod
    def read(self, keys: Sequence[bytes], then: Follow = no_more) -> list[bytes | None]:
        """The values of the keys, and of those that ``then`` makes of these values, all of one moment;
        None where there is none. ``then`` may be called again with newer values."""

    @abstractmethod
    def update(self, keys: Sequence[bytes], change: Change, then: Follow = no_more) -> None:
        """Read as ``read`` does, and write what ``change`` makes of the values, with nothing between.

        A key whose new value is None is deleted. ``change`` may be called again with newer values where
        another writer came first.
        """

    @abstractmethod
    def scan(self, prefix: bytes, skip: Skip = no_skip) -> Iterator[bytes]:
        """The keys that begin with ``prefix``, in order, but those that ``skip`` passes over."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these keys, where they are there."""

    @abstractmethod
    def compact(self) -> None:
        """Leave no byte of what was deleted in the store's file. No one else may have the store open.

        Raises:
            StateError: it has no file of its own to write anew.
            StoreError: another process has it open, or the file cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file or the connection."""
