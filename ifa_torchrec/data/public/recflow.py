"""RecFlow (Kuaishou) as an event log: requests with the videos that each ranking stage dropped.

The requests are those of the data set. The candidates of a request are all of its rows in `all_stage`,
where `realshow` marks the exposed candidates; only these have labels: six kinds of feedback, and
`playing_time`, a regression. Events are the rows of the files `realshow`, viewed or not, with the time
of their request, so a request never sees its own; each kind of feedback is an event feature, and
`played` is the time played. A video's features are its author, both categories, its upload type and its
duration; the context is the user's device, age, gender and province. Validation is from 11 February 2024
on, test from 15 to 18 February.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import Events, Items, PrepareSchema, Regression, Requests
from ifa_torchrec.data.prepare import prepare as write_log
from ifa_torchrec.data.public.common import as_named, pattern_of

FEEDBACK = ("effective_view", "long_view", "like", "follow", "forward", "comment")
"""What a user did with a video: labels of 0 and 1, and features of an event."""
TASKS = (*FEEDBACK, "playing_time")
"""The tasks."""

_VIDEO = ("author_id", "category_level_one", "category_level_two", "upload_type")
_CONTEXT = ("device_id", "age", "gender", "province")


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    """Write the event log of RecFlow.

    Args:
        folder: contains all_stage/DAY.feather and realshow/DAY.feather.
        out: the folder of the log; it must not exist yet.

    Raises:
        LogError: files are missing.

    Example:
        >>> from ifa_torchrec.data.public import recflow
        >>> log = recflow.prepare("RecFlow", "runs/data/recflow")  # doctest: +SKIP
    """
    folder = pattern_of(folder)
    all_stage = str(folder / "all_stage" / "*.feather")
    rows: dict[str, Any] = {
        "user": "user_id",
        "item": "video_id",
        "time": "request_timestamp",
        "unit": "ms",
    }
    schema = PrepareSchema(
        events=Events(
            **rows,
            files=str(folder / "realshow" / "*.feather"),
            features={f"was_{name}": name for name in FEEDBACK},
            dense={"played": "playing_time"},
        ),
        requests=Requests(
            **rows,
            files=all_stage,
            request="request_id",
            exposed="realshow",
            labels={**as_named(FEEDBACK), "playing_time": Regression("playing_time")},
            context=as_named(_CONTEXT),
        ),
        # in the time zone of the app, like the days of its files
        splits={"valid": "2024-02-11 00:00:00+08", "test": "2024-02-15 00:00:00+08"},
        items=Items(
            files=all_stage,
            item="video_id",
            features=as_named(_VIDEO),
            dense={"duration": "duration"},
        ),
        log_scaled=("played", "playing_time", "duration"),
    )
    return write_log(schema, out)
