"""Event logs, and the loader that turns their requests into RankingBatches."""

from ifa_torchrec.errors import require

require("data", "pandas", "pyarrow")

# ruff: noqa: E402 (what is not installed is named before an import fails on it)
from ifa_torchrec.data.dataset import RankingDataset
from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.loader import make_loader
from ifa_torchrec.data.sampler import EventBudgetSampler
from ifa_torchrec.data.schema import LogError, LogSchema

__all__ = [
    "EventBudgetSampler",
    "EventLog",
    "LogError",
    "LogSchema",
    "RankingDataset",
    "make_loader",
]
