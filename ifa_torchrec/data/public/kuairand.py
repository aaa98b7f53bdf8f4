"""KuaiRand (Kuaishou) as event logs: Pure, 1K and 27K, from the folder `data` of the unpacked archive.

Every row of the logs is a video that was shown, so all candidates are exposed. We construct the
requests: the videos shown to a user in one tab, at most a minute apart. Labels are seven kinds of
feedback, and `play_seconds`, a regression. Events are all videos that were shown, skipped or not: each
kind of feedback is an event feature, and `played` is the time played in seconds. Both logs are read, the
standard log and that of videos shown at random.

Context features are the tab and the user's features; a video's features are its author, type, upload
type, music type, tags (a list) and duration. The statistics of the videos are left out: they are
averages over the whole month, so they would leak the future into training. Validation is from 4 May 2022
on, test from 6 to 8 May.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import (
    Events,
    Items,
    Listed,
    PrepareSchema,
    Regression,
    Requests,
    Users,
)
from ifa_torchrec.data.prepare import prepare as write_log
from ifa_torchrec.data.public.common import as_named, pattern_of

FEEDBACK = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate")
"""What a user did with a video: labels of 0 and 1, and features of an event."""
TASKS = (*FEEDBACK, "play_seconds")
"""The tasks."""

_VIDEO = ("author_id", "video_type", "upload_type", "music_type")
_PLAYED = "play_time_ms::FLOAT / 1000"
_USER = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    """Write the event log of KuaiRand.

    Args:
        folder: contains log_standard_*.csv, log_random_*.csv, user_features_*.csv and
            video_features_basic_*.csv.
        out: the folder of the log; it must not exist yet.

    Raises:
        LogError: files are missing.

    Example:
        >>> from ifa_torchrec.data.public import kuairand
        >>> log = kuairand.prepare("KuaiRand-Pure/data", "runs/data/kuairand_pure")  # doctest: +SKIP
    """
    folder = pattern_of(folder)
    rows: dict[str, Any] = {
        "files": [str(folder / "log_standard_*.csv"), str(folder / "log_random_*.csv")],
        "user": "user_id",
        "item": "video_id",
        "time": "time_ms",
        "unit": "ms",
    }
    schema = PrepareSchema(
        events=Events(
            **rows,
            features={f"was_{name.removeprefix('is_')}": name for name in FEEDBACK},
            dense={"played": _PLAYED},
        ),
        requests=Requests(
            **rows,
            labels={**as_named(FEEDBACK), "play_seconds": Regression(_PLAYED)},
            context=as_named(["tab"]),
            request="tab",
            gap_seconds=60,
        ),
        # in the time zone of the app, like its dates
        splits={"valid": "2022-05-04 00:00:00+08", "test": "2022-05-06 00:00:00+08"},
        items=Items(
            files=str(folder / "video_features_basic_*.csv"),
            item="video_id",
            features=as_named(_VIDEO),
            lists={"tag": Listed("tag", delimiter=",")},
            dense={"duration": "video_duration::FLOAT / 1000"},
        ),
        users=Users(
            files=str(folder / "user_features_*.csv"),
            user="user_id",
            features=as_named(_USER),
        ),
        log_scaled=("played", "play_seconds", "duration"),
    )
    return write_log(schema, out)
