"""Bytes per event of the states in a store, part by part.

    make demo
    ifa build-states --run runs/demo/ifa --store runs/bytes --position 0
    python benchmarks/state_bytes.py runs/bytes

Prints a column of "Fewer bytes" of docs/serving.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Annotated

import tyro

from ifa_torchrec.serving import KeyValueStore, open_key_value_store, versions
from ifa_torchrec.serving.states.layout import Keys
from ifa_torchrec.serving.states.records import RecordCodec

PARTS = ("dense heads before the last time", "the last time's events", "identity rows", "the rest")


def records(store: KeyValueStore, keys: Keys) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of all records of a version's states, read in batches."""
    for kind in (b"s", b"u", b"i"):
        of_version = (key for key in store.scan(kind) if keys.are_of(key))
        while some := list(islice(of_version, 1000)):
            for key, value in zip(some, store.read(some), strict=True):
                assert value is not None
                yield key, value


def measure(store: KeyValueStore, header: dict) -> tuple[int, int, Counter[str]]:
    """The numbers of users and events, and the bytes of each part."""
    codec = RecordCodec(store, header)
    before, last, rows, rest = PARTS
    users, events, size = 0, 0, Counter[str]()
    for key, value in records(store, codec.keys):
        body = codec.open(key, value)
        size[rest] += len(key) + len(value) - len(body)  # with the checksum
        if key[:1] == b"i":
            size[rows] += len(body)
        elif key[:1] == b"u":
            size[rest] += len(body)
        else:
            earlier, latest = codec.dense.unpack(body)
            users, events = users + 1, events + earlier.count + latest.count
            without = len(codec.dense.pack(earlier, codec.dense.no_latest))
            size[before] += without
            size[last] += codec.dense.size(body) - without
            size[rest] += len(body) - codec.dense.size(body)
    return users, events, size


def main(store: Annotated[str, tyro.conf.Positional]) -> None:
    """The command line.

    Args:
        store: a folder of states, or redis://HOST:PORT/NUMBER.
    """
    key_values = open_key_value_store(store)
    for version, header in versions(key_values).items():
        users, events, size = measure(key_values, header)
        print(
            f"{version}, {header['layout']['dtype']}: {users:,} users, {events / users:.0f} events each"
        )
        for part in PARTS:
            print(f"| {part} | {size[part] / events:.1f} |")
        print(f"| all | {size.total() / events:.1f} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
