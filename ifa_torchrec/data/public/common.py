"""Helpers shared by the readers of public data sets."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ifa_torchrec.data.prepare import Events, Items, PrepareSchema, Requests, Users


def pattern_of(folder: str | Path) -> Path:
    """Escape a folder's name, to build glob patterns in it.

    Example:
        >>> from ifa_torchrec.data.public.common import pattern_of
        >>> str(pattern_of("logs [old]") / "*.csv")
        'logs [[]old]/*.csv'
    """
    return Path(glob.escape(str(folder)))


def as_named(columns: Iterable[str]) -> dict[str, str]:
    """Features with the names of their columns.

    Example:
        >>> from ifa_torchrec.data.public.common import as_named
        >>> as_named(["age", "gender"])
        {'age': 'age', 'gender': 'gender'}
    """
    return {column: column for column in columns}


def rated_pages(
    rows: Mapping[str, Any],
    liked: str,
    of_events: Mapping[str, Any],
    items: Items | None,
    users: Users | None = None,
) -> PrepareSchema:
    """The schema of a log of ratings without requests; pages of ratings are used as requests.

    A page is a run of a user's ratings at most a minute apart; the events are all ratings. 80 % of the
    pages are for training, 10 % each for validation and test, by time.

    Args:
        rows: files, columns and unit of the ratings.
        liked: SQL condition under which a rating is a positive.
        of_events: further fields of Events, besides user, item and time.
        items: the description of the items.
        users: the description of the users.

    Example:
        >>> from ifa_torchrec.data.public.common import rated_pages
        >>> rows = dict(files="ratings.csv", user="user", item="film", time="time", unit="s")
        >>> stars = {"features": {"stars": "stars"}}
        >>> rated_pages(rows, "stars::FLOAT >= 4", stars, items=None).requests.labels
        {'liked': 'stars::FLOAT >= 4'}
    """
    return PrepareSchema(
        events=Events(**rows, **of_events),
        requests=Requests(**rows, labels={"liked": liked}, gap_seconds=60),
        splits={"valid": 0.8, "test": 0.9},
        items=items,
        users=users,
    )
