"""Dense columns that were never scaled: told by the report of ``prepare``, and as a training starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

LARGEST = 100.0
"""Greatest mean and standard deviation, in absolute value, that a dense column has without a warning."""
_SAMPLE = 100_000


def unscaled(name: str, mean: float, deviation: float) -> str | None:
    """A sentence about a dense column whose numbers are too large to train on, or None.

    Example:
        >>> from ifa_torchrec.data.scales import unscaled
        >>> unscaled("hour", 0.5, 0.3) is None
        True
        >>> unscaled("clock", 1.7145576e9, 86400.0)
        "dense column 'clock' has mean 1.71456e+09 and standard deviation 86400: it was never scaled, \
and the loss will be as far out; bring it to a mean near 0 and a deviation near 1, or take its logarithm"
    """
    if abs(mean) <= LARGEST and deviation <= LARGEST:
        return None
    return (
        f"dense column {name!r} has mean {mean:.6g} and standard deviation {deviation:.6g}: it was "
        "never scaled, and the loss will be as far out; bring it to a mean near 0 and a deviation near "
        "1, or take its logarithm"
    )


def warn_of_unscaled(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Warn of each dense column that was never scaled, as far as 100,000 of its values tell.

    Args:
        columns: of a split, as ``EventLog.requests`` gives them.
        names: the dense columns among them: float32, of any length.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.scales import warn_of_unscaled
        >>> warn_of_unscaled({"hour": np.array([0.1, 0.9], np.float32)}, ["hour"])
    """
    for name in names:
        values = columns[name]
        if len(values) > _SAMPLE:  # at random: each so many-th could be the same place of each request
            chosen = np.random.default_rng(0).integers(0, len(values), _SAMPLE)
            values = values[np.sort(chosen)]
        sample = values.astype(np.float64)
        if len(sample) and (told := unscaled(name, float(sample.mean()), float(sample.std()))):
            warnings.warn(told, stacklevel=2)
