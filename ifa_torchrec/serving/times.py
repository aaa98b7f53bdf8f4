"""Times as text: RFC 3339 in, ISO 8601 out. Internally, times are microseconds since 1970, UTC."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import numpy as np

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?(?:[Zz]|([+-]\d\d:\d\d))", re.ASCII
)


def utc(time: int) -> str:
    """Format a time in microseconds as ISO 8601.

    Example:
        >>> from ifa_torchrec.serving.times import utc
        >>> utc(1_700_000_000_000_000)
        '2023-11-14T22:13:20.000000Z'
    """
    return str(np.datetime64(time, "us")) + "Z"


def microseconds(text: object) -> int:
    """Parse an RFC 3339 time into microseconds; finer digits are cut off.

    Raises:
        ValueError: the text is not an RFC 3339 time, has no zone, or is before 1970.

    Example:
        >>> from ifa_torchrec.serving.times import microseconds
        >>> microseconds("1970-01-01T01:00:00.25+01:00")
        250000
    """
    found = _RFC3339.fullmatch(text) if isinstance(text, str) else None
    if found is not None:
        date, clock, fraction, offset = found.groups()
        # a leap second, which occurs only at the end of a UTC day, becomes the start of the next second
        leap = clock.endswith(":60")
        clock = clock[:-2] + "59" if leap else clock
        moment = datetime.fromisoformat(f"{date}T{clock}{offset or '+00:00'}")
        whole = (moment - _EPOCH) // timedelta(microseconds=1)
        if leap and (whole + 1_000_000) % MICROSECONDS_PER_DAY == 0:
            return whole + 1_000_000
        if whole >= 0 and not leap:
            return whole + int((fraction or "").ljust(6, "0")[:6])
    raise ValueError('should be a time since 1970 with a zone, such as "2024-05-01T12:30:00.25Z"')
