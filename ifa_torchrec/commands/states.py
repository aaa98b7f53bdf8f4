"""List the versions whose states a store has; drop a version, forget a user, or trim the journal.

    ifa states --store runs/states
    ifa states --store runs/states --drop VERSION
    ifa states --store runs/states --forget USER
    ifa states --store runs/states --trim-journal 90
    ifa states --store runs/states --compact

Without --drop, --forget, --trim-journal or --compact it changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    KeyValueStore,
    StateError,
    drop,
    forget,
    open_key_value_store,
    trim_journal,
    versions,
)
from ifa_torchrec.serving.states.forgetting import id_of
from ifa_torchrec.serving.states.layout import format_positions
from ifa_torchrec.serving.states.versions import FORMAT
from ifa_torchrec.serving.times import utc


@dataclass(frozen=True)
class StatesConfig:
    """Options of ``ifa states``."""

    store: str = field(repr=False)
    """A folder, or redis://HOST:PORT/NUMBER."""
    drop: str | None = None
    """Delete this version's states, and the journal's events that no other version needs: with the last
    version, all of them."""
    forget: str | None = None
    """Remove everything about this user, in all versions, and ignore the user's events up to now; then
    compact the store if it is a folder. Digits are an integer id; put a string of digits in double
    quotes."""
    trim_journal: float | None = None
    """Delete the journal's events that are older than this many days and that every version has."""
    compact: bool = False
    """Rewrite a folder's file without a byte of deleted records. No other process may have it open."""

    def __post_init__(self) -> None:
        if self.forget == "":
            raise ConfigError("--forget: give the id of a user")
        if self.trim_journal is not None and not 0 <= self.trim_journal < float("inf"):
            raise ConfigError(
                f"--trim-journal: got {self.trim_journal}; give a number of days, 0 or more"
            )


def main(config: Annotated[StatesConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    key_values = open_key_value_store(config.store, create=False)
    if config.drop is not None:
        drop(key_values, config.drop)
    if config.forget is not None:
        _forget(key_values, config.forget)
    if config.trim_journal is not None:
        _trim(key_values, config.trim_journal)
    if config.compact:
        key_values.compact()
    _list(key_values)
    key_values.close()


def _forget(key_values: KeyValueStore, text: str) -> None:
    user = id_of(text)
    gone = forget(key_values, user)
    print(
        f"user {user!r}: removed {gone.records} state records and {gone.events} journal events; events "
        f"up to {utc(gone.until)} no longer count"
    )
    if not gone.anything and isinstance(user, int):
        print(f"the store had nothing of the integer {user}; for the string of digits give '\"{user}\"'")
    try:
        key_values.compact()
    except StateError as error:
        print(f"bytes of the removed records may still be on disk: {error}")


def _trim(key_values: KeyValueStore, days: float) -> None:
    trimmed = trim_journal(key_values, time.time_ns() // 1000 - round(days * MICROSECONDS_PER_DAY))
    print(f"removed {trimmed.deleted} events older than {days:g} days from the journal")
    if trimmed.kept:
        print(
            f"kept {trimmed.kept} more: a version in this store lacks them; serve that version once, or "
            "drop it"
        )


def _list(key_values: KeyValueStore) -> None:
    for version, header in versions(key_values).items():
        if header.get("format") != FORMAT:
            print(f"{version}: format {header.get('format')!r}, this version reads {FORMAT!r}; drop it")
            continue
        positions = {int(partition): first for partition, first in header["positions"].items()}
        built = "complete" if header["complete"] else "incomplete"
        print(
            f"{version}: {built}, {header['layout']['dtype']}, from a log up to "
            f"{format_positions(positions)}, vocabulary {header['vocabulary']}"
        )


main.__doc__ = __doc__
