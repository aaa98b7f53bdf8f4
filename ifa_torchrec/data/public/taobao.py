"""Taobao's UserBehavior (Alibaba) as an event log, from UserBehavior.csv of the unpacked archive.

A row is a user action: viewing an item's page (pv), buying it, adding it to the cart or to the
favourites. The data do not record what was shown and ignored. So we construct the requests: the pages
that a user viewed in one session, at most half an hour apart, from 1 December 2017 on. For each viewed
page four other items are drawn (``Requests.negatives``), and the label `viewed` distinguishes them: the
model learns to rank what a user views above what is popular. An item viewed twice in a session occurs
twice.

Events are all actions from 25 November on, with their kind as the event feature `action` (pv, cart, fav,
buy); an item's feature is its category. The days before December are only history; training is 1
December, validation 2 December, test 3 December, all in China's time zone.

The file has some rows with other times. They are refused; LOG/report.json has their count and examples.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import Events, Items, PrepareSchema, Requests
from ifa_torchrec.data.prepare import prepare as write_log

TASKS = ("viewed",)
"""The tasks."""

_COLUMNS = ("user_id", "item_id", "category_id", "behavior_type", "timestamp")


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    r"""Write the event log of UserBehavior.

    Args:
        folder: contains UserBehavior.csv.
        out: the folder of the log; it must not exist yet.

    Raises:
        LogError: the file is missing, more than 1 % of its rows have other times, or a day has none.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.data.public import taobao
        >>> folder = Path(tempfile.mkdtemp())
        >>> noons = [1511582400 + 86_400 * day for day in range(9)]  # 25 November to 3 December
        >>> rows = [f"1,{item},7,pv,{noon + item}" for noon in noons for item in (20, 30)]
        >>> _ = (folder / "UserBehavior.csv").write_text("\n".join(rows))
        >>> log = taobao.prepare(folder, folder / "log")
        >>> log.splits, log.requests("test")["candidates"].tolist(), len(log.events["item"])
        (['train', 'valid', 'test'], [1, 2], 18)
    """
    file: dict[str, Any] = {"files": str(Path(folder) / "UserBehavior.csv"), "columns": _COLUMNS}
    seconds = 'TRY_CAST("timestamp" AS BIGINT)'
    rows: dict[str, Any] = {
        **file,
        "user": "user_id",
        "item": "item_id",
        # a time that cannot be read is refused, and this text becomes the example in the report
        "time": f"""CASE WHEN {seconds} >= {_start("2017-11-25")} AND {seconds} < {_start("2017-12-04")}
            THEN "timestamp" ELSE "timestamp" || ' is not from 25 November to 3 December 2017' END""",
        "unit": "s",
    }
    schema = PrepareSchema(
        events=Events(**rows, features={"action": "behavior_type"}),
        requests=Requests(
            **rows,
            where=f"behavior_type = 'pv' AND {seconds} >= {_start('2017-12-01')}",
            labels={"viewed": "1"},
            gap_seconds=1800,
            negatives=4,
        ),
        splits={"valid": "2017-12-02 00:00:00+08", "test": "2017-12-03 00:00:00+08"},
        items=Items(**file, item="item_id", features={"category": "category_id"}),
    )
    return write_log(schema, out)


def _start(day: str) -> int:
    """The start of a day in China, in seconds since 1970."""
    return int(datetime.fromisoformat(f"{day}T00:00:00+08:00").timestamp())
