"""KuaiRand and RecFlow, in files of their published columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.feather
import pytest

from ifa_torchrec.data.public import kuairand, recflow

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "kuairand"))
from made_up import write_archive

pytest.importorskip("duckdb", reason="the extra `data` is not installed")


def test_kuairand(tmp_path: Path) -> None:
    """Three days of two users: a session in one tab, with one random video, and one in another tab."""
    days = pd.to_datetime(["2022-04-10", "2022-05-04", "2022-05-07"])
    rows = [
        {
            "user_id": user, "video_id": 100 + place,
            "time_ms": day.value // 1_000_000 + 20_000 * place + user, "is_click": int(place == user),
            "long_view": int(place == 2), "play_time_ms": 1500 * place,
            "is_rand": int(place == 2), "tab": 4 if place < 3 else 1,
        }
        for day in days for user in (0, 1) for place in range(4)
    ]  # fmt: skip
    videos = {
        "video_id": range(100, 104), "author_id": [5, 5, 6, 7], "video_type": ["NORMAL", "AD"] * 2,
        "music_type": [9.0, None, 4.0, 9.0], "tag": ["12,65", "12", None, "8"],
        "video_duration": [10_000.0, None, 5_000.0, 7_500.0],
    }  # fmt: skip
    degrees = ["full_active", "UNKNOWN"]
    users = {"user_id": [0, 1], "user_active_degree": degrees, "is_live_streamer": [-124, 0]}
    write_archive(tmp_path, pd.DataFrame(rows), pd.DataFrame(videos), pd.DataFrame(users))

    log = kuairand.prepare(tmp_path, tmp_path / "log")
    ids = log.vocabulary
    assert tuple(log.schema.tasks) == kuairand.TASKS
    assert log.schema.tasks["play_seconds"] == "regression"
    assert log.schema.item_features["author_id"] == 4
    assert log.items["music_type"].tolist() == [0, 2, 0, 1, 2]
    tags = np.split(log.items["tag"], log.items["tag_offsets"][1:-1])
    assert [ids["tag"].at(row) for row in tags] == [[], [12, 65], [12], [], [8]]
    np.testing.assert_array_equal(log.items["duration"], np.float32([np.nan, 10, np.nan, 5, 7.5]))
    assert log.splits == ["train", "valid", "test"]
    for split in log.splits:
        requests = log.requests(split)
        # for each user: the three videos of tab 4, then the one of tab 1
        assert requests["candidates"].tolist() == [1, 2, 3, 1, 2, 3, 4, 4]
        assert requests["tab"].tolist() == [2, 2, 1, 1]
        assert requests["user_active_degree"].tolist() == [2, 1, 2, 1]
        assert requests["is_click"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
        assert requests["long_view"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
        assert requests["play_seconds"].tolist() == [0, 1.5, 3, 0, 1.5, 3, 4.5, 4.5]
    # all that was shown is an event, with what the user did
    assert log.events["item"].tolist() == [1, 2, 3, 4] * 6
    clicked, viewed = (ids[name].at(log.events[name]) for name in ("was_click", "was_long_view"))
    assert clicked == [1, 0, 0, 0] * 3 + [0, 1, 0, 0] * 3 and viewed == [0, 0, 1, 0] * 6
    assert log.events["played"].tolist() == [0, 1.5, 3, 4.5] * 6
    report = json.loads((log.path / "report.json").read_text())
    assert report["refused"]["requests"] == {"rows": 24, "refused": 0, "reasons": {}}


def test_recflow(tmp_path: Path) -> None:
    """One request per day of one user: six videos, of which two were shown and one was watched."""
    for folder in ("all_stage", "realshow"):
        (tmp_path / folder).mkdir()
    for number, day in enumerate(["2024-01-13", "2024-01-14", "2024-02-12", "2024-02-18"]):
        videos = np.arange(6)
        shown = (videos < 2).astype(int)
        frame = pd.DataFrame(
            {
                "request_id": 50 + number, "user_id": 3,
                "request_timestamp": pd.Timestamp(day).value // 1_000_000, "device_id": 8, "age": 2,
                "gender": 1, "province": 4, "video_id": videos * 10, "author_id": videos // 2,
                "category_level_one": 1, "category_level_two": 2, "upload_type": 0,
                "upload_timestamp": 1700000000, "duration": 9000 + videos, "realshow": shown,
                "rerank_pos": 0, "rerank_neg": 0, "rank_pos": 0, "rank_neg": 1 - shown, "coarse_neg": 0,
                "prerank_neg": 0, "rank_index": 0, "rerank_index": 0, "playing_time": 700 * videos,
                "long_view": 0, "like": 0, "follow": 0, "forward": 0, "comment": 0,
                "effective_view": (videos == 1).astype(int),
            }
        )  # fmt: skip
        pyarrow.feather.write_feather(frame, tmp_path / "all_stage" / f"{day}.feather")
        pyarrow.feather.write_feather(
            frame[frame["realshow"] == 1], tmp_path / "realshow" / f"{day}.feather"
        )

    log = recflow.prepare(tmp_path, tmp_path / "log")
    # what was shown, viewed or not
    assert log.events["item"].tolist() == [1, 2] * 4 and log.events["played"].tolist() == [0, 700] * 4
    views = log.vocabulary["was_effective_view"].at(log.events["was_effective_view"])
    assert views == [0, 1] * 4
    assert log.items["author_id"].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert log.items["duration"][1:].tolist() == [9000 + n for n in range(6)]
    for split in ("train", "valid", "test"):
        requests = log.requests(split)
        assert requests["candidates"][:6].tolist() == [1, 2, 3, 4, 5, 6]
        assert requests["exposed"][:6].tolist() == [True, True, False, False, False, False]
        assert requests["effective_view"][:6].tolist() == [0, 1, 0, 0, 0, 0]
        assert requests["playing_time"].tolist()[:2] == [0, 700]
    start, end = log.history_range(requests["user"], requests["time"])
    assert (end - start).tolist() == [6]  # not its own two
