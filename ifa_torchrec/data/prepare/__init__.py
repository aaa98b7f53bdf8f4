"""``prepare``: an event log of any CSV, Parquet or Feather files that a schema describes."""

from ifa_torchrec.data.prepare.preparation import hash_row, prepare
from ifa_torchrec.data.prepare.schema import (
    Events,
    Hashed,
    Items,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
    load_schema,
)

__all__ = [
    "Events",
    "Hashed",
    "Items",
    "JoinedLabel",
    "PrepareSchema",
    "Requests",
    "Users",
    "hash_row",
    "load_schema",
    "prepare",
]
