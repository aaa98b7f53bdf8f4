"""Event logs, and the loader that turns their requests into RankingBatches."""

from ifa_torchrec.data.dataset import EventBudgetSampler, RankingDataset, make_loader
from ifa_torchrec.data.event_log import EventLog, LogError, LogSchema

__all__ = [
    "EventBudgetSampler",
    "EventLog",
    "LogError",
    "LogSchema",
    "RankingDataset",
    "make_loader",
]
