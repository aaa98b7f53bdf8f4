"""Serving: user states in a store, scores from states, events added to states, and an HTTP service."""

from ifa_torchrec.errors import require

require("serve", "pandas", "pyarrow", "lmdb", "prometheus_client", "redis")

# ruff: noqa: E402 (missing packages are named before an import fails)
from ifa_torchrec.serving.errors import RequestError, StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.export import ScoringGraph, export_scorer
from ifa_torchrec.serving.quantize import quantize_tables
from ifa_torchrec.serving.requests import EventResult, Ranking, RankingRequest
from ifa_torchrec.serving.scorer import Scorer
from ifa_torchrec.serving.states.forgetting import Forgotten, forget
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.layout import StateLayout
from ifa_torchrec.serving.states.opening import open_key_value_store
from ifa_torchrec.serving.states.retention import Trimmed, drop, trim_journal
from ifa_torchrec.serving.states.shared import forgotten_until
from ifa_torchrec.serving.states.store import StateStore
from ifa_torchrec.serving.states.versions import versions

__all__ = [
    "Event",
    "EventResult",
    "Forgotten",
    "KeyValueStore",
    "Ranking",
    "RankingRequest",
    "RequestError",
    "Scorer",
    "ScoringGraph",
    "StateError",
    "StateLayout",
    "StateStore",
    "StoreError",
    "Trimmed",
    "UnknownUserError",
    "drop",
    "export_scorer",
    "forget",
    "forgotten_until",
    "open_key_value_store",
    "quantize_tables",
    "trim_journal",
    "versions",
]
