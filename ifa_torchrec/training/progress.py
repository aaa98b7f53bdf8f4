"""The bar that shows how far a loop is."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(rank: int, *arguments: Any, **options: Any) -> tqdm[Any]:
    """tqdm's bar, shown on rank 0 alone, and there unless the environment's TQDM_DISABLE says no.

    Args:
        rank: this process's.
        arguments, options: tqdm's; without ``disable``, which given would overrule the environment.

    Example:
        >>> from ifa_torchrec.training.progress import progress_bar
        >>> list(progress_bar(1, [3, 4], desc="nothing is shown on rank 1"))
        [3, 4]
    """
    return tqdm(*arguments, **options, **({"disable": True} if rank else {}))
