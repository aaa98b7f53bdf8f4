"""A torch DataLoader of a dataset and a sampler."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data.dataset import RankingDataset
from ifa_torchrec.data.sampler import EventBudgetSampler


def make_loader(dataset: RankingDataset, sampler: EventBudgetSampler) -> DataLoader[RankingBatch]:
    """A DataLoader over ``dataset`` in the sampler's batches.

    Batches are made by slicing memory-mapped columns, which is cheap enough to need no worker
    processes.

    Example:
        >>> from ifa_torchrec.data import EventBudgetSampler, make_loader
        >>> class Dataset:  # stands for a RankingDataset
        ...     def __getitem__(self, indices):
        ...         return len(indices)
        >>> list(make_loader(Dataset(), EventBudgetSampler([5, 5, 9], max_events=10, max_requests=8)))
        [2, 1]
    """
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from that of the model, once more in a resumed run
    )
