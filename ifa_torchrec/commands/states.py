"""List the versions whose states a store holds, or drop one.

ifa states --store runs/states
ifa states --store runs/states --drop VERSION
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ifa_torchrec.serving import drop, open_key_value_store, versions
from ifa_torchrec.serving.states.versions import FORMAT


@dataclass(frozen=True)
class StatesConfig:
    """Options of ``ifa states``."""

    store: str = field(repr=False)
    """A folder, or redis://HOST:PORT/NUMBER."""
    drop: str | None = None
    """Delete this version's states, and the events of the journal that no other version can want."""


def main(config: Annotated[StatesConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    key_values = open_key_value_store(config.store, create=False)
    if config.drop is not None:
        drop(key_values, config.drop)
    for version, header in versions(key_values).items():
        if header.get("format") != FORMAT:
            print(
                f"{version}: of format {header.get('format')!r}, this version reads {FORMAT!r}; drop it"
            )
            continue
        built = "whole" if header["complete"] else "half built"
        print(
            f"{version}: {built}, {header['layout']['dtype']}, of a log up to position "
            f"{header['position']}, of the vocabulary {header['vocabulary']}"
        )
    key_values.close()


main.__doc__ = __doc__
