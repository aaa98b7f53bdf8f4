"""``prepare``: an event log of any CSV, Parquet or Feather files that a schema describes."""

from ifa_torchrec.data.prepare.ids import hash_row
from ifa_torchrec.data.prepare.loading import load_schema
from ifa_torchrec.data.prepare.preparation import prepare
from ifa_torchrec.data.prepare.schema import (
    Events,
    Hashed,
    Items,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
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
