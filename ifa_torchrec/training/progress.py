"""The progress bar of a loop."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(rank: int, *arguments: Any, **options: Any) -> tqdm[Any]:
    """tqdm's bar, shown only on rank 0, unless TQDM_DISABLE is set in the environment.

    Args:
        rank: this process's rank.
        arguments, options: tqdm's, except ``disable``, which would override the environment.

    Example:
        >>> from ifa_torchrec.training.progress import progress_bar
        >>> list(progress_bar(1, [3, 4], desc="nothing is shown on rank 1"))
        [3, 4]
    """
    return tqdm(*arguments, **options, **({"disable": True} if rank else {}))
