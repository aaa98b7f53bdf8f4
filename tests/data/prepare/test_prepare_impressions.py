"""Impressions and histories as lists in a row, and labels joined from another file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.data.vocabulary import Vocabulary

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

BEHAVIORS = """1\tU1\t11/11/2019 9:05:58 AM\tN5 N6 N7\tN1-0 N2-1 N3-0
2\tU2\t11/11/2019 9:10:00 AM\t\tN1-1 N4-0
3\tU1\t11/12/2019 6:00:00 PM\tN5 N6 N7\tN4-1
4\tU2\t11/14/2019 1:00:00 PM\t\tN2-0 N8-1
"""
NEWS = "".join(f"N{n}\t{'sports' if n % 2 else 'news'}\tTitle {n}\n" for n in range(1, 9))
MIND: dict[str, Any] = {
    "files": "behaviors.tsv", "delimiter": "\t", "quote": "",
    "columns": ["impression", "user", "at", "history", "impressions"], "user": "user",
}  # fmt: skip
MIND_SCHEMA = {
    "events": {**MIND, "each": {"read": {"column": "history", "delimiter": " "}}, "item": "read"},
    "requests": {
        **MIND, "each": {"shown": {"column": "impressions", "delimiter": " "}},
        "time": "strptime(\"at\", '%m/%d/%Y %I:%M:%S %p')", "item": "split_part(shown, '-', 1)",
        "labels": {"click": "split_part(shown, '-', 2)"},
    },
    "items": {
        "files": "news.tsv", "delimiter": "\t", "quote": "", "columns": ["id", "category", "title"],
        "item": "id", "features": {"category": "category"}, "name": "title",
    },
    "splits": {"test": "2019-11-14"},
}  # fmt: skip


def written(folder: Path, schema: dict[str, Any]) -> Path:
    (folder / "news.tsv").write_text(NEWS)
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "schema.json"


def changed(schema: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {**schema, **{name: {**schema[name], **part} for name, part in sections.items()}}


def report(log: EventLog) -> dict[str, Any]:
    return json.loads((log.path / "report.json").read_text())


def requests_of(log: EventLog, split: str, task: str = "click") -> list[tuple]:
    """(user, {item: label}) of each request."""
    ids, columns = Vocabulary.load(log.path), log.requests(split)
    ends = columns["candidate_offsets"][1:-1]
    items, labels = (np.split(columns[name], ends) for name in ("candidates", task))
    return [
        (user, dict(zip(ids["item"].at(i), map(int, label), strict=True)))
        for user, i, label in zip(ids["user"].at(columns["user"]), items, labels, strict=True)
    ]


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


class TestMind:
    """The layout of MIND's behaviors.tsv: N1-0 N2-1, and a history without times."""

    def test_impressions(self, tmp_path: Path) -> None:
        (tmp_path / "behaviors.tsv").write_text(BEHAVIORS)
        log = prepare(load_schema(written(tmp_path, MIND_SCHEMA)), tmp_path / "log")
        assert requests_of(log, "train") == [
            ("U1", {"N1": 0, "N2": 1, "N3": 0}),
            ("U2", {"N1": 1, "N4": 0}),
            ("U1", {"N4": 1}),
        ]
        assert requests_of(log, "test") == [("U2", {"N2": 0, "N8": 1})]
        # N8 is new in the test split
        assert log.schema.item_features == {"item": 8, "category": 3} and log.num_items == 9

    def test_history(self, tmp_path: Path) -> None:
        """In order, a second apart, before the user's first request; once, though it is given twice."""
        (tmp_path / "behaviors.tsv").write_text(BEHAVIORS)
        log = prepare(load_schema(written(tmp_path, MIND_SCHEMA)), tmp_path / "log")
        assert Vocabulary.load(log.path)["item"].at(log.events["item"]) == ["N5", "N6", "N7"]
        first = pd.Timestamp("2019-11-11 09:05:58")
        seconds = [pd.Timedelta(seconds=3 - place) for place in range(3)]
        assert log.events["time"].tolist() == [(first - s).value // 1000 for s in seconds]
        requests = log.requests("train")
        start, end = log.history_range(requests["user"], requests["time"])
        assert (end - start).tolist() == [3, 0, 3]
        figures = report(log)
        assert figures["refused"]["events"] == {
            "rows": 6, "refused": 0, "reasons": {}, "rows_of_empty_lists": 2,
        }  # fmt: skip
        assert figures["histories_without_times"] == {
            "users": 1, "lists": 2, "users_with_lists_of_several_lengths": 0,
        }  # fmt: skip

    def test_the_shorter_of_two_histories(self, tmp_path: Path) -> None:
        """The longer one contains what was clicked in between."""
        lines = BEHAVIORS.splitlines()
        lines[2] = lines[2].replace("N5 N6 N7", "N5 N6 N7 N2")
        (tmp_path / "behaviors.tsv").write_text("\n".join(lines[::-1]))
        log = prepare(load_schema(written(tmp_path, MIND_SCHEMA)), tmp_path / "log")
        assert Vocabulary.load(log.path)["item"].at(log.events["item"]) == ["N5", "N6", "N7"]
        assert any("1 of 1 users have lists of several lengths" in w for w in report(log)["warnings"])

    def test_without_users(self, tmp_path: Path) -> None:
        """An unknown user has no history; and rows with the same time stay separate requests."""
        lines = BEHAVIORS.replace("2\tU2\t11/11/2019 9:10:00 AM", "2\t\t11/11/2019 9:05:58 AM")
        lines += "5\t\t11/11/2019 9:05:58 AM\tN5\tN3-1\n"
        (tmp_path / "behaviors.tsv").write_text(lines)
        with refused("events: 1 of", "user is empty"):
            prepare(load_schema(written(tmp_path, MIND_SCHEMA)), tmp_path / "log")
        known = changed(MIND_SCHEMA, events={"where": "user IS NOT NULL"})
        log = prepare(load_schema(written(tmp_path, known)), tmp_path / "log")
        assert requests_of(log, "train") == [
            (None, {"N1": 1, "N4": 0}),
            (None, {"N3": 1}),
            ("U1", {"N1": 0, "N2": 1, "N3": 0}),
            ("U1", {"N4": 1}),
        ]
        assert report(log)["requests"]["train"]["requests_without_user"] == 2
        requests = log.requests("train")
        start, end = log.history_range(requests["user"], requests["time"])
        assert (end - start).tolist() == [0, 0, 3, 3]

    def test_what_is_not_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "behaviors.tsv").write_text(BEHAVIORS)
        bad = changed(MIND_SCHEMA, requests={"each": {"shown": "impressions"}})
        with refused("requests: 4 of 4", "`each` is not a list", "`delimiter`", "N1-0 N2-1"):
            prepare(load_schema(written(tmp_path, bad)), tmp_path / "log")
        bad = changed(MIND_SCHEMA, requests={"each": {"at": "impressions"}})
        with refused("requests.each", "already have a column 'at'"):
            prepare(load_schema(written(tmp_path, bad)), tmp_path / "log")
        bad = changed(MIND_SCHEMA, requests={"each": {"shown": {"column": "impressions", "hash": 9}}})
        with refused("requests.each.shown", "must not have a hash"):
            load_schema(written(tmp_path, bad))


DAY = pd.Timestamp("2023-05-18 08:00:00")
IMPRESSIONS = {
    "impression_id": [1, 2, 3, 4],
    "user_id": [10, 11, 10, 11],
    "impression_time": [
        DAY,
        DAY + pd.Timedelta("1h"),
        DAY + pd.Timedelta("5h"),
        DAY + pd.Timedelta("9h"),
    ],
    "article_ids_inview": [[7, 8, 9], [8, 7], [9], [7, 5]],
    "article_ids_clicked": [[8], [7, 8], [], [5]],
    "read_time": [12.5, 3.0, 0.0, 8.0],
}
HISTORIES = {
    "user_id": [10, 11, 12],
    "article_id_fixed": [[1, 2], [7], []],
    "impression_time_fixed": [[DAY - pd.Timedelta("2D"), DAY - pd.Timedelta("1D")], [DAY], []],
    "scroll_percentage_fixed": [[100.0, None], [25.0], []],
}
EB_NERD: dict[str, Any] = {
    "events": {
        "files": "history.parquet", "user": "user_id", "item": "article", "time": "seen",
        "each": {"article": "article_id_fixed", "seen": "impression_time_fixed",
                 "scrolled": "scroll_percentage_fixed"},
        "dense": {"scroll": "scrolled"},
    },
    "requests": {
        "files": "behaviors.parquet", "user": "user_id", "item": "shown", "time": "impression_time",
        "each": {"shown": "article_ids_inview", "place": "range(len(article_ids_inview))"},
        "request": "impression_id", "labels": {"click": {"column": "article_ids_clicked"}},
        "candidate_features": {"position": "place"},
    },
    "splits": {"test": 0.75},
}  # fmt: skip


def write_eb_nerd(folder: Path, schema: dict[str, Any] | None = None, **columns: list[Any]) -> Path:
    impressions = {**IMPRESSIONS, **{name: c for name, c in columns.items() if name in IMPRESSIONS}}
    histories = {**HISTORIES, **{name: c for name, c in columns.items() if name in HISTORIES}}
    pq.write_table(pa.table(impressions), folder / "behaviors.parquet")
    pq.write_table(pa.table(histories), folder / "history.parquet")
    return written(folder, schema or EB_NERD)


class TestEbNerd:
    """The layout of EB-NeRD: list columns of an impression, and of a user's history, with times."""

    def test_impressions(self, tmp_path: Path) -> None:
        log = prepare(load_schema(write_eb_nerd(tmp_path)), tmp_path / "log")
        assert requests_of(log, "train") == [
            (10, {7: 0, 8: 1, 9: 0}),
            (11, {7: 1, 8: 1}),
            (10, {9: 0}),
        ]
        assert requests_of(log, "test") == [(11, {7: 0, 5: 1})]
        places = Vocabulary.load(log.path)["position"].at(log.requests("train")["position"])
        assert places == [0, 1, 2, 1, 0, 0]
        assert report(log)["joins"]["label_click"] == {"listed": 4, "found": 4}

    def test_histories(self, tmp_path: Path) -> None:
        log = prepare(load_schema(write_eb_nerd(tmp_path)), tmp_path / "log")
        assert Vocabulary.load(log.path)["item"].at(log.events["item"]) == [1, 2, 7]
        np.testing.assert_array_equal(log.events["scroll"], np.float32([100, np.nan, 25]))
        assert log.events["time"].tolist()[-1] == DAY.value // 1000
        assert report(log)["refused"]["events"]["rows_of_empty_lists"] == 1

    def test_clicks_that_were_not_shown_are_counted(self, tmp_path: Path) -> None:
        path = write_eb_nerd(tmp_path, article_ids_clicked=[[8, 3], [7, 8], [], None])
        log = prepare(load_schema(path), tmp_path / "log")
        assert report(log)["joins"]["label_click"] == {"listed": 4, "found": 3}
        with refused("requests.labels.click", "none of the 2 items", "'5'"):
            path = write_eb_nerd(tmp_path, article_ids_clicked=[[1], [], [], [2]])
            prepare(load_schema(path), tmp_path / "other")

    def test_lists_of_several_lengths(self, tmp_path: Path) -> None:
        """The row is refused once, and named."""
        times = [[DAY], [DAY], []]
        schema = load_schema(write_eb_nerd(tmp_path, impression_time_fixed=times))
        with refused(
            "events: 1 of 2", "lists of `each` differ in length", "history.parquet", "'_row': 0"
        ):
            prepare(schema, tmp_path / "log")
        log = prepare(schema, tmp_path / "log", max_refused=0.5)
        assert len(log.events["item"]) == 1


SHOWN = "u,i,t\n" + "".join(
    f"ann,{i},2024-05-01 10:0{m}:00\n" for m in (0, 2, 5) for i in ("tea", "cup")
)
JOINED: dict[str, Any] = {
    "events": {"files": "shown.csv", "user": "u", "item": "i", "time": "t"},
    "requests": {
        "files": "shown.csv", "user": "u", "item": "i", "time": "t",
        "labels": {
            "buy": {"files": "buys.csv", "user": "u", "item": "i", "time": "t", "within_seconds": 600}
        },
    },
    "splits": {},
}  # fmt: skip


class TestJoinedLabels:
    """An item is shown at 10:00, 10:02 and 10:05, and bought within ten minutes of all three."""

    def test_mark_only_the_latest(self, tmp_path: Path) -> None:
        (tmp_path / "shown.csv").write_text(SHOWN)
        (tmp_path / "buys.csv").write_text("u,i,t\nann,tea,2024-05-01 10:04:00\n")
        log = prepare(load_schema(written(tmp_path, JOINED)), tmp_path / "log")
        assert [labels["tea"] for _, labels in requests_of(log, "train", "buy")] == [0, 1, 0]
        figures = report(log)
        assert figures["joins"]["label_buy"]["of_several_candidates"] == 1
        assert any(
            "label_buy: 1 of 1 rows may belong to several candidates" in w for w in figures["warnings"]
        )

    def test_or_all(self, tmp_path: Path) -> None:
        (tmp_path / "shown.csv").write_text(SHOWN)
        (tmp_path / "buys.csv").write_text("u,i,t\nann,tea,2024-05-01 10:04:00\n")
        schema = json.loads(json.dumps(JOINED))
        schema["requests"]["labels"]["buy"]["mark_all"] = True
        log = prepare(load_schema(written(tmp_path, schema)), tmp_path / "log")
        assert [labels["tea"] for _, labels in requests_of(log, "train", "buy")] == [1, 1, 0]

    def test_are_those_of_a_plain_loop(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        shown, buys = (
            pd.DataFrame(rng.integers(0, [3, 3, 5000], (n, 3)), columns=["u", "i", "s"])
            for n in (150, 40)
        )
        for name, frame in {"shown": shown, "buys": buys}.items():
            times = pd.Timestamp("2024-05-01") + pd.to_timedelta(frame["s"], unit="s")
            frame[["u", "i"]].assign(t=times).to_csv(tmp_path / f"{name}.csv", index=False)
        log = prepare(load_schema(written(tmp_path, JOINED)), tmp_path / "log")
        wanted, ambiguous = set(), 0
        for buy in buys.itertuples():
            mine = shown[(shown["u"] == buy.u) & (shown["i"] == buy.i) & (shown["s"] <= buy.s)]
            near = mine.loc[mine["s"] >= buy.s - 600, "s"]
            ambiguous += near.nunique() > 1
            wanted |= {(buy.u, buy.i, near.max())} if len(near) else set()
        found = {
            (user, item, (time // 1_000_000) - pd.Timestamp("2024-05-01").value // 10**9)
            for (user, labels), time in zip(
                requests_of(log, "train", "buy"), log.requests("train")["time"], strict=True
            )
            for item, label in labels.items()
            if label
        }
        assert found == wanted and len(wanted) > 10
        assert report(log)["joins"]["label_buy"]["of_several_candidates"] == ambiguous > 0
