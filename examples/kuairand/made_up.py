"""A synthetic log in the published layout of KuaiRand-Pure.

The example reads it if the real files are not given; the reader's test writes its files with it too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

# The columns of each file in order, with default values.
_LOG = {
    "user_id": 0, "video_id": 0, "date": 0, "hourmin": 0, "time_ms": 0, "is_click": 0, "is_like": 0,
    "is_follow": 0, "is_comment": 0, "is_forward": 0, "is_hate": 0, "long_view": 0, "play_time_ms": 5000,
    "duration_ms": 10_000, "profile_stay_time": 0, "comment_stay_time": 0, "is_profile_enter": 0,
    "is_rand": 0, "tab": 1,
}  # fmt: skip
_VIDEOS = {
    "video_id": 0, "author_id": 0, "video_type": "NORMAL", "upload_dt": "2022-04-01",
    "upload_type": "ShortImport", "visible_status": 1.0, "video_duration": 10_000.0, "server_width": 720,
    "server_height": 1280, "music_id": 9, "music_type": 9.0, "tag": "12",
}  # fmt: skip
_USERS = {
    "user_id": 0, "user_active_degree": "full_active", "is_lowactive_period": 0, "is_live_streamer": 0,
    "is_video_author": 0, "follow_user_num": 5, "follow_user_num_range": "(0,10]", "fans_user_num": 1,
    "fans_user_num_range": "[1,10)", "friend_user_num": 0, "friend_user_num_range": "0",
    "register_days": 400, "register_days_range": "366-730", **{f"onehot_feat{n}": 0 for n in range(18)},
}  # fmt: skip

DAYS = pd.date_range("2022-04-08", "2022-05-08", tz="Asia/Shanghai")
"""The days of KuaiRand."""
AUTHORS, VIDEOS_EACH, LIKED, SHOWN = 20, 10, 4, 10
"""Numbers of authors, videos per author, authors that a user likes, and videos per sitting."""


def write_archive(folder: Path, log: pd.DataFrame, videos: pd.DataFrame, users: pd.DataFrame) -> Path:
    """Write the files of KuaiRand-Pure.

    Args:
        folder: the folder to create.
        log, videos, users: some or all columns of the published files. The log's date and hourmin are
            computed from time_ms.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    local = pd.to_datetime(log["time_ms"], unit="ms", utc=True).dt.tz_convert(DAYS.tz)
    hourmin = 100 * local.dt.hour + local.dt.minute
    log = log.assign(date=local.dt.strftime("%Y%m%d").astype(int), hourmin=hourmin)
    random, late = log.get("is_rand", 0) == 1, log["date"] >= 20220422
    for name, frame, columns in (
        ("log_standard_4_08_to_4_21", log[~random & ~late], _LOG),
        ("log_standard_4_22_to_5_08", log[~random & late], _LOG),
        ("log_random_4_22_to_5_08", log[random], _LOG),
        ("video_features_basic", videos, _VIDEOS),
        ("user_features", users, _USERS),
    ):
        whole = pd.DataFrame({c: frame.get(c, value) for c, value in columns.items()}, frame.index)
        whole.to_csv(folder / f"{name}_pure.csv", index=False)
    return folder


def make(folder: Path, users: int) -> Path:
    """Write a log in which only the history distinguishes users.

    Each user likes LIKED authors, which are not in any feature. A user is shown SHOWN videos per day, a
    third of them by liked authors. Those are clicked, watched for long and liked more often; some videos
    are clicked more often by everybody. From 22 April on, one sitting in ten is random.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(0)
    videos = np.arange(AUTHORS * VIDEOS_EACH)
    author = videos // VIDEOS_EACH
    quality = rng.normal(0, 0.7, len(videos))
    likes = rng.permuted(np.tile(np.arange(AUTHORS) < LIKED, (users, 1)), axis=1)

    shape = (users, len(DAYS), SHOWN)
    user = np.broadcast_to(np.arange(users)[:, None, None], shape)
    random = (rng.random(shape[:2]) < 0.1) & (DAYS >= "2022-04-22")
    # replace some of the uniformly drawn videos by a liked author's
    liked_authors = np.nonzero(likes)[1].reshape(users, LIKED)
    chosen = liked_authors[user, rng.integers(LIKED, size=shape)]
    video = chosen * VIDEOS_EACH + rng.integers(VIDEOS_EACH, size=shape)
    even = (rng.random(shape) > 1 / 3) | random[..., None]
    video = np.where(even, rng.integers(len(videos), size=shape), video)
    liked = likes[user, author[video]]

    def happens(unliked: float, where_liked: float, extra: np.ndarray | float = 0.0) -> np.ndarray:
        """Draw events with these log odds."""
        odds = np.exp(np.where(liked, where_liked, unliked) + extra)
        return rng.random(shape) < odds / (1 + odds)

    click = happens(-2.5, 1.5, quality[video])
    long = click & happens(-1.0, 1.0)
    evening = DAYS.tz_convert("UTC").as_unit("ms").asi8 + 72_000_000  # eight o'clock
    start = evening + rng.integers(3_600_000, size=shape[:2])
    columns = {
        "user_id": user,
        "video_id": video,
        "time_ms": start[..., None] + 20_000 * np.arange(SHOWN),
        "is_click": click,
        "long_view": long,
        "play_time_ms": np.where(long, 9000, np.where(click, 4000, 500)) + rng.integers(500, size=shape),
        "is_like": click & happens(-4.0, -1.0),
        "is_follow": click & happens(-6.0, -4.0),
        "is_rand": np.broadcast_to(random[..., None], shape),
    }
    log = pd.DataFrame({name: values.astype(np.int64).ravel() for name, values in columns.items()})
    types = {
        "video_id": videos,
        "author_id": author,
        "tag": rng.integers(1, 40, len(videos)).astype(str),
    }
    people = {"user_id": range(users), "onehot_feat1": rng.integers(0, 7, users)}
    return write_archive(folder, log, pd.DataFrame(types), pd.DataFrame(people))
