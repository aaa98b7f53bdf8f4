"""Compute the scales that standardise columns of numbers, from the training split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ifa_torchrec.batch import Scale
from ifa_torchrec.data.schema import EXPOSED, TIME

if TYPE_CHECKING:
    from ifa_torchrec.data.event_log import EventLog

_TRAIN = "train"

_BLOCK = 1 << 22  # numbers per block: a mapped column need not fit in memory


def scales_of(log: EventLog) -> dict[str, Scale]:
    """The scale of each of ``schema.scaled``, from the split `train`, or from all splits without it.

    Uses the requests and candidates of the split; the events before its last request; the items that
    have a row in the item table; and, for a regression task, the labels of exposed candidates.

    Example:
        >>> import pandas as pd, tempfile
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.data.scales import scales_of
        >>> log = EventLog.from_pandas(
        ...     tempfile.mkdtemp() + "/log",
        ...     events=pd.DataFrame({"user": [1, 1], "item": [1, 1], "time": pd.Timestamp(2024, 1, 1),
        ...                          "amount": [2.0, 6.0]}),
        ...     schema=LogSchema(item_features={"item": 2}, event_dense=("amount",)))
        >>> scales_of(log)
        {'amount': Scale(mean=4.0, deviation=2.0, log=False)}
    """
    schema = log.schema
    if not schema.scaled:
        return {}
    splits = [log.requests(s) for s in log.splits if s == _TRAIN or _TRAIN not in log.splits]
    times = log.events[TIME]
    last = splits[0][TIME].max() if _TRAIN in log.splits else None

    def seen(rows: slice) -> np.ndarray:
        return times[rows] < last

    def kept(name: str) -> Callable[[slice], np.ndarray] | None:
        return seen if name in schema.event_dense and last is not None else None

    def numbers(name: str) -> np.ndarray:
        if name in schema.event_dense:
            return log.events[name]
        if name in schema.item_dense:
            return log.items[name][: schema.item_features[schema.item]]
        parts = [s[name][s[EXPOSED]] if name in schema.tasks else s[name] for s in splits]
        return np.concatenate([np.empty(0, np.float32), *parts])

    return {
        name: scale_of(numbers(name), name in schema.log_scaled, kept(name)) for name in schema.scaled
    }


def scale_of(
    values: np.ndarray,
    log: bool = False,
    kept: Callable[[slice], np.ndarray] | None = None,
) -> Scale:
    """Mean and deviation of the numbers that are not missing.

    Args:
        values: [n] float32; NaN where one is missing.
        log: take log(1 + x) of each number first.
        kept: given the rows of a block, a mask of the numbers to use; None uses all.

    Returns:
        Their Scale; deviation 1 if all numbers are equal, and mean 0 if there are none.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.scales import scale_of
        >>> scale_of(np.array([1.0, np.nan, 3.0], np.float32))
        Scale(mean=2.0, deviation=1.0, log=False)
    """

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(values), _BLOCK):
            rows = slice(start, start + _BLOCK)
            block = values[rows] if kept is None else values[rows][kept(rows)]
            block = block.astype(np.float64)
            block = block[~np.isnan(block)]
            yield np.log1p(block) if log else block

    sums = [(block.sum(), len(block)) for block in blocks()]
    count = sum(n for _, n in sums)
    if not count:
        return Scale(log=log)
    mean = float(sum(total for total, _ in sums)) / count
    variance = float(sum(((block - mean) ** 2).sum() for block in blocks())) / count
    # equal numbers have deviation 0 up to rounding
    alike = variance <= (1e-12 * mean) ** 2
    return Scale(mean, 1.0 if alike else variance**0.5, log)
