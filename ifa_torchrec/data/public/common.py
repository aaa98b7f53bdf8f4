"""What the readers of public data sets share."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ifa_torchrec.data.prepare import Events, Items, PrepareSchema, Requests, Users


def pattern_of(folder: str | Path) -> Path:
    """A folder, to make patterns of files with: its own name is none.

    Example:
        >>> from ifa_torchrec.data.public.common import pattern_of
        >>> str(pattern_of("logs [old]") / "*.csv")
        'logs [[]old]/*.csv'
    """
    return Path(glob.escape(str(folder)))


def as_named(columns: Iterable[str]) -> dict[str, str]:
    """Features that are called as their columns are.

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
    """The schema of a log of ratings, which has no requests: pages of ratings stand for them.

    A page is what a user rated with no more than a minute between one and the next; the events are all
    ratings. 80 % of the pages are for training, 10 % each for validation and test, by time.

    Args:
        rows: files, columns and unit of the ratings.
        liked: SQL condition under which a rating is a positive.
        of_events: what an event has, beside user, item and time: fields of Events.
        items: what is known of the items.
        users: what is known of the users.

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
