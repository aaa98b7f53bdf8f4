"""KuaiRand and RecFlow, in files of their published columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.feather
import pytest

from ifa_torchrec.data import kuairand, recflow

pytest.importorskip("duckdb", reason="the extra `data` is not installed")


def test_kuairand(tmp_path: Path) -> None:
    """Three days of two users: a sitting in one tab, of which a video is random, and one in another."""
    days = pd.to_datetime(["2022-04-10", "2022-05-04", "2022-05-07"])
    rows = [
        {
            "user_id": user, "video_id": 100 + place, "date": 20220410, "hourmin": 400,
            "time_ms": day.value // 1_000_000 + 20_000 * place + user,
            "is_click": int(place == user), "is_like": 0, "is_follow": 0, "is_comment": 0,
            "is_forward": 0, "is_hate": 0, "long_view": int(place == 2), "play_time_ms": 5000,
            "duration_ms": 10_000 * (1 + place), "profile_stay_time": 0, "comment_stay_time": 0,
            "is_profile_enter": 0, "is_rand": int(place == 2),
            "tab": 4 if place < 3 else 1,
        }
        for day in days for user in (0, 1) for place in range(4)
    ]  # fmt: skip
    log = pd.DataFrame(rows)
    log[log["is_rand"] == 0].to_csv(tmp_path / "log_standard_4_08_to_4_21_pure.csv", index=False)
    log[log["is_rand"] == 1].to_csv(tmp_path / "log_random_4_22_to_5_08_pure.csv", index=False)
    videos = {
        "video_id": range(100, 104), "author_id": [5, 5, 6, 7], "video_type": ["NORMAL", "AD"] * 2,
        "upload_dt": "2022-04-01", "upload_type": "ShortImport", "visible_status": 1.0,
        "video_duration": 17200.0, "server_width": 720, "server_height": 1280, "music_id": 9,
        "music_type": [9.0, None, 4.0, 9.0], "tag": ["12,65", "12", None, "8"],
    }  # fmt: skip
    pd.DataFrame(videos).to_csv(tmp_path / "video_features_basic_pure.csv", index=False)
    users = {
        "user_id": [0, 1], "user_active_degree": ["full_active", "UNKNOWN"], "is_lowactive_period": 0,
        "is_live_streamer": [-124, 0], "is_video_author": 0, "follow_user_num": 5,
        "follow_user_num_range": "(0,10]", "fans_user_num": 1, "fans_user_num_range": "[1,10)",
        "friend_user_num": 0, "friend_user_num_range": "0", "register_days": 400,
        "register_days_range": "366-730", **{f"onehot_feat{n}": 0 for n in range(18)},
    }  # fmt: skip
    pd.DataFrame(users).to_csv(tmp_path / "user_features_pure.csv", index=False)

    log = kuairand.prepare(tmp_path, tmp_path / "log")
    assert log.schema.tasks == kuairand.TASKS
    assert log.schema.item_features["author_id"] == 4 and log.items["music_type"].tolist() == [
        2,
        0,
        1,
        2,
    ]
    assert log.splits == ["train", "valid", "test"]
    for split in log.splits:
        requests = log.requests(split)
        # of each user: the three videos of tab 4, then the one of tab 1
        assert requests["candidates"].tolist() == [0, 1, 2, 0, 1, 2, 3, 3]
        assert requests["tab"].tolist() == [2, 2, 1, 1]
        assert requests["user_active_degree"].tolist() == [2, 1, 2, 1]
        assert requests["is_click"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
        assert requests["long_view"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
        np.testing.assert_allclose(requests["log_duration"][:2], np.log1p([10_000, 20_000]), rtol=1e-6)
    assert log.events["item"].tolist() == [0, 0, 0, 1, 1, 1]
    report = json.loads((log.path / "report.json").read_text())
    assert report["refused"]["requests"] == {"rows": 24, "refused": 0, "reasons": {}}


def test_recflow(tmp_path: Path) -> None:
    """A request a day of one user: six videos, of which two were shown and one was watched."""
    for folder in ("all_stage", "realshow"):
        (tmp_path / folder).mkdir()
    for number, day in enumerate(["2024-01-13", "2024-02-12", "2024-02-18"]):
        videos = np.arange(6)
        shown = (videos < 2).astype(int)
        frame = pd.DataFrame(
            {
                "request_id": 50 + number, "user_id": 3,
                "request_timestamp": pd.Timestamp(day).value // 1_000_000, "device_id": 8, "age": 2,
                "gender": 1, "province": 4, "video_id": videos * 10, "author_id": videos // 2,
                "category_level_one": 1, "category_level_two": 2, "upload_type": 0,
                "upload_timestamp": 1700000000, "duration": 9000, "realshow": shown, "rerank_pos": 0,
                "rerank_neg": 0, "rank_pos": 0, "rank_neg": 1 - shown, "coarse_neg": 0,
                "prerank_neg": 0, "rank_index": 0, "rerank_index": 0, "playing_time": 0,
                "long_view": 0, "like": 0, "follow": 0, "forward": 0, "comment": 0,
                "effective_view": (videos == 1).astype(int),
            }
        )  # fmt: skip
        pyarrow.feather.write_feather(frame, tmp_path / "all_stage" / f"{day}.feather")
        pyarrow.feather.write_feather(
            frame[frame["realshow"] == 1], tmp_path / "realshow" / f"{day}.feather"
        )

    log = recflow.prepare(tmp_path, tmp_path / "log")
    assert log.events["item"].tolist() == [1, 1, 1]
    assert log.items["author_id"].tolist() == [1, 1, 2, 2, 3, 3]
    for split in ("train", "valid", "test"):
        requests = log.requests(split)
        assert requests["candidates"].tolist() == [0, 1, 2, 3, 4, 5]
        assert requests["exposed"].tolist() == [True, True, False, False, False, False]
        assert requests["effective_view"].tolist() == [0, 1, 0, 0, 0, 0]
    start, end = log.history_range(requests["user"], requests["time"])
    assert (end - start).tolist() == [2]  # not its own view
