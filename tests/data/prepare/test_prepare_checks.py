"""What ``prepare`` refuses or reports, so that it does not silently write a wrong log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.feather
import pyarrow.parquet
import pytest

from ifa_torchrec.data import EventLog, LogError, LogSchema, RankingDataset
from ifa_torchrec.data.prepare import Hashed, load_schema, prepare
from ifa_torchrec.data.vocabulary import Vocabulary

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

COLUMNS = {"user": "u", "item": "i", "time": "t"}
BUYS = {"files": "buys.csv", **COLUMNS, "within_seconds": 60}
HASHED = {"column": "u", "hash": 9}


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def write(
    folder: Path,
    requests: dict[str, Any] | None = None,
    events: dict[str, Any] | None = None,
    **parts: Any,
) -> Path:
    """A schema of three users and 20 days, with 3 candidates per day; the clicks are the events.

    Its files are written where they are not there yet.
    """
    rows = ["u,i,t,c"]
    rows += [
        f"{10 + u},{i},2024-05-{d:02d} 10:00:00,{int(i == d % 3)}"
        for d in range(1, 21)
        for u in range(3)
        for i in range(3)
    ]
    texts = {"log.csv": "\n".join(rows), "buys.csv": "\n".join(rows)}
    texts["users.csv"] = "u,age\n10,30\n11,31\n12,32\n"
    texts["items.csv"] = "i,kind\n0,a\n1,b\n2,a\n"
    for name, text in texts.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    schema = {
        "events": {"files": "log.csv", **COLUMNS, "where": "c = 1", **(events or {})},
        "requests": {"files": "log.csv", **COLUMNS, "labels": {"c": "c"}, **(requests or {})},
        "splits": {},
        **parts,
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "schema.json"


def prepared(folder: Path, **changes: Any) -> tuple[EventLog, dict[str, Any]]:
    log = prepare(load_schema(write(folder, **changes)), folder / "log")
    return log, json.loads((folder / "log" / "report.json").read_text())


USERS = {"files": "users.csv", "user": "u", "features": {"age": "age"}}
ITEMS = {"files": "items.csv", "item": "i", "features": {"kind": "kind"}}


class TestValuesOfTheSchema:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            *(({"requests": {"context": {"x": {**HASHED, "hash": rows}}}}, ["'u'", "hash", repr(rows)])
              for rows in (0, 1, -5, "50", 2.5, True, None, 2**61)),
            ({"events": {"item": {"column": "i", "hash": 1}}}, ["'i'", "hash"]),
            ({"requests": {"item": {"column": "i", "hash": 7}}}, ["requests.item", "7", "events.item"]),
            *(({"requests": {"gap_seconds": gap}}, ["requests.gap_seconds", repr(gap)])
              for gap in ("60", -1, True, [60], 1e11, float("nan"), float("inf"), 10**400)),
            *(({"requests": {"labels": {"buy": {**BUYS, "within_seconds": n}}}},
               ["requests.labels.buy.within_seconds", repr(n)]) for n in ("60", -1, None, 1e300)),
            ({"requests": {"labels": ["c"]}}, ["requests.labels", "an object", "['c']"]),
            ({"requests": {"labels": {"c": 5}}}, ["labels.c", "5"]),
            ({"requests": {"labels": {}}}, ["tasks is empty"]),
            ({"requests": {"labels": {"c": ""}}}, ["requests.labels.c is empty"]),
            ({"requests": {"context": ["u"]}}, ["requests.context", "an object"]),
            ({"requests": {"context": {"x": 5}}}, ["requests.context.x", "a string or a column", "5"]),
            ({"requests": {"dense": {"x": HASHED}}}, ["requests.dense.x", "a string"]),
            *(({"requests": {name: ""}}, [f"requests.{name} is empty"])
              for name in ("exposed", "where", "request", "user")),
            *(({"requests": {name: 1}}, [f"requests.{name}", "a string", "1"])
              for name in ("exposed", "where", "request", "user", "item", "time", "unit")),
            ({"requests": {"negatives": "2"}}, ["negatives", "'2'"]),
            ({"events": {"unit": "ns"}}, ["events.unit", "'s', 'ms', 'us'", "'ns'"]),
            ({"events": {"files": 5}}, ["events.files", "5"]),
            ({"events": {"files": ["log.csv", 5]}}, ["events.files", "5"]),
            ({"events": {"columns": "u,i,t,c"}}, ["events.columns", "a list"]),
            ({"items": {**ITEMS, "item": HASHED}}, ["items.item", "a string"]),
            ({"items": {**ITEMS, "name": ""}}, ["items.name is empty"]),
            ({"users": {**USERS, "features": None}}, ["users.features", "an object"]),
            ({"splits": []}, ["splits", "an object"]),
            *(({"splits": {"test": start}}, ["splits.test", repr(start)]) for start in (2, -0.1, True)),
            ({"splits": {"../test": 0.5}}, ["splits", "'../test'"]),
        ],
        ids=str,
    )  # fmt: skip
    def test_are_named(self, tmp_path: Path, change: dict, words: list[str]) -> None:
        path = write(tmp_path, **change)
        with refused(*words):
            prepare(load_schema(path), tmp_path / "log")

    def test_in_python_as_well(self, tmp_path: Path) -> None:
        schema = load_schema(write(tmp_path))
        with refused("requests.context.x", "5"):
            replace(schema, requests=replace(schema.requests, context={"x": 5}))
        with refused("events must be", "Events"):
            replace(schema, events=None)
        assert Hashed("u", hash=np.int64(8)).hash == 8

    @pytest.mark.parametrize("max_refused", [-0.1, 5, float("nan")])
    def test_the_share_of_refused_rows(self, tmp_path: Path, max_refused: float) -> None:
        with refused("max_refused", repr(max_refused)):
            prepare(load_schema(write(tmp_path)), tmp_path / "log", max_refused=max_refused)

    def test_memory(self, tmp_path: Path) -> None:
        with refused("memory must be a size", "'4GB'", "'much'"):
            prepare(load_schema(write(tmp_path)), tmp_path / "log", memory="much")

    def test_a_key_given_twice(self, tmp_path: Path) -> None:
        path = write(tmp_path)
        path.write_text(path.read_text().replace('"splits"', '"splits": {}, "splits"'))
        with refused("schema.json", "duplicate key", "splits"):
            load_schema(path)


class TestNames:
    @pytest.mark.parametrize(
        "change",
        [
            *({"requests": {"context": {name: "u"}}}
              for name in ("Time", "USER", "Item", "Exposed", "candidates", "C")),
            {"requests": {"context": {"a": "u", "A": "i"}}},
            {"requests": {"context": {"a": "u"}, "dense": {"A": "i"}}},
            {"requests": {"dense": {"a": "u"}, "candidate_dense": {"A": "i"}}},
            {"requests": {"labels": {"c": "c", "Item": "c"}}},
            {"requests": {"context": {"age": "u"}}, "users": USERS},
            {"requests": {"context": {"Age": "u"}}, "users": USERS},
            {"requests": {"context": {"Kind": "u"}}, "items": ITEMS},
            {"items": {**ITEMS, "features": {"item": "kind"}}},
            {"items": {**ITEMS, "features": {"Name": "kind"}}},
            {"requests": {"context": {"_row": "u"}}},
            {"splits": {"a": 0.5, "A": 0.8}},
        ],
        ids=str,
    )  # fmt: skip
    def test_that_are_the_same_in_sql(self, tmp_path: Path, change: dict) -> None:
        """Names of the schema; using `age` twice would silently drop one of the two."""
        with refused("name"):
            load_schema(write(tmp_path, **change))

    @pytest.mark.parametrize("kind", ["csv", "parquet", "feather"])
    def test_of_a_files_columns(self, tmp_path: Path, kind: str) -> None:
        """DuckDB ignores case: from Parquet and Feather it would read `T` instead of `t`."""
        frame = pd.DataFrame({"u": ["10"], "i": ["0"], "T": ["2024-05-01"], "t": ["2024-05-02"], "c": 1})
        file = tmp_path / f"log.{kind}"
        {
            "csv": lambda: frame.to_csv(file, index=False),
            "parquet": lambda: frame.to_parquet(file),
            "feather": lambda: pyarrow.feather.write_feather(frame, file),
        }[kind]()
        events = {"files": file.name, "user": "u", "item": "i", "time": "t"}
        log, _ = prepared(tmp_path, events=events)
        assert log.events["time"].tolist() == [pd.Timestamp("2024-05-02").value // 1000]

    def test_that_are_words_of_sql_or_ours(self, tmp_path: Path) -> None:
        users = {**USERS, "features": dict.fromkeys(["row", "code", "id", "order", "u"], "age")}
        items = {**ITEMS, "features": dict.fromkeys(["range", "known", "described", "r"], "kind")}
        labels = {"labels": dict.fromkeys(["hash", "n", "events"], "c")}
        log, _ = prepared(tmp_path, users=users, items=items, requests=labels)
        train = log.requests("train")
        assert all(train[name][:3].tolist() == [1, 2, 3] for name in users["features"])
        assert all(log.items[name].tolist() == [0, 1, 2, 1] for name in items["features"])
        assert all(train[name][:3].tolist() == [0, 1, 0] for name in labels["labels"])


class TestJoins:
    def test_that_find_all(self, tmp_path: Path) -> None:
        _, report = prepared(tmp_path, users=USERS, requests={"labels": {"buy": BUYS}})
        assert report["joins"] == {
            "users_with_events": {"of": 3, "found": 3},
            "items_with_events": {"of": 3, "found": 3},
            "users_described": {"of": 3, "found": 3},
            "label_buy": {
                "rows": 180, "of_a_user_of_the_requests": 180, "of_a_candidate": 180, "in_time": 180,
                "of_several_candidates": 0,
            },
        }  # fmt: skip
        assert report["warnings"] == []

    def test_that_find_some(self, tmp_path: Path) -> None:
        (tmp_path / "users.csv").write_text("u,age\n10,30\n77,31\n")
        (tmp_path / "buys.csv").write_text(
            "u,i,t\n10,0,2024-05-01 10:00:20\n10,0,2024-05-01 09:00:00\n10,7,2024-05-01 10:00:00\n"
            "77,0,2024-05-01 10:00:00\n"
        )
        log, report = prepared(tmp_path, users=USERS, requests={"labels": {"buy": BUYS}})
        assert report["joins"]["users_described"] == {"of": 3, "found": 1}
        assert list(report["joins"]["label_buy"].values()) == [4, 3, 2, 1, 0]
        assert log.requests("train")["buy"].sum() == 1

    @pytest.mark.parametrize(
        ("file", "change", "words"),
        [
            ("users.csv", {"users": USERS}, ["users: none of them", "'10'", "'10.0'"]),
            ("buys.csv", {"requests": {"labels": {"buy": BUYS}}},
             ["requests.labels.buy", "none of its 180 rows", "0 have a user", "'10.0'", "'10'"]),
            ("other.csv", {"events": {"files": "other.csv"}},
             ["none of their users has an event", "'10.0'"]),
        ],
    )  # fmt: skip
    def test_of_users_in_another_format(
        self, tmp_path: Path, file: str, change: dict, words: list[str]
    ) -> None:
        """Pandas writes integers as 10.0 if the column has a missing value."""
        write(tmp_path)
        text = (tmp_path / ("users.csv" if file == "users.csv" else "log.csv")).read_text()
        (tmp_path / file).write_text(re.sub(r"^(\d+),", r"\1.0,", text, flags=re.MULTILINE))
        with refused(*words):
            prepared(tmp_path, **change)

    def test_of_items_in_another_format(self, tmp_path: Path) -> None:
        with refused("none of their candidates", "'0'", "'i0'", "add `items`"):
            prepared(tmp_path, events={"item": "'i' || i"})
        with refused(
            "requests.labels.buy", "180 have a user", "0 an item that is this user's candidate", "'i0'"
        ):
            prepared(tmp_path, requests={"labels": {"buy": {**BUYS, "item": "'i' || i"}}})
        # with described items, the histories may have other items than the candidates
        (tmp_path / "items.csv").write_text("i,kind\n0,a\n1,b\n2,a\ni0,a\ni1,b\ni2,c\n")
        log, _ = prepared(tmp_path, events={"item": "'i' || i"}, items=ITEMS)
        assert not set(log.events["item"]) & set(log.requests("train")["candidates"])

    def test_of_labels_in_another_time_zone(self, tmp_path: Path) -> None:
        label = {**BUYS, "time": "t || '+08'"}
        with refused(
            "180 an item that is this user's candidate, and none is within 60 seconds", "time zone"
        ):
            prepared(tmp_path, requests={"labels": {"buy": label}})

    def test_with_nothing(self, tmp_path: Path) -> None:
        with refused("none of their users has an event", "nothing, since there are no rows"):
            prepared(tmp_path, events={"where": "c = 7"})


def from_events(folder: Path, time: Callable[[int, int], str], clock: str = "10:00:00") -> dict:
    """The report of a log whose events are its positives, at other times; all items differ."""
    rows = [(u, d, 100 * d + 10 * u + i) for d in range(1, 21) for u in range(3) for i in range(3)]
    shown = ["u,i,t,c"] + [f"{u},{i},2024-05-{d:02d} {clock},{int(i % 3 == 0)}" for u, d, i in rows]
    (folder / "shown.csv").write_text("\n".join(shown).replace(" ,", ","))
    events = ["u,i,t"] + [f"{u},{i},{time(d, i)}" for u, d, i in rows if i % 3 == 0]
    (folder / "events.csv").write_text("\n".join(events))
    _, report = prepared(
        folder, events={"files": "events.csv", "where": "true"}, requests={"files": "shown.csv"}
    )
    return report


class TestLeaks:
    @pytest.mark.parametrize(
        ("clock", "shortest"),
        [("09:59:59.5", "second"), ("09:59:58", "minute"), ("09:55:00", "hour"), ("02:00:00", "day"),
         ("00:00:00", "day")],
        ids=["half a second", "2 seconds", "5 minutes", "another zone", "only dates"],
    )  # fmt: skip
    def test_whatever_the_clock(self, tmp_path: Path, clock: str, shortest: str) -> None:
        report = from_events(tmp_path, lambda day, item: f"2024-05-{day:02d} {clock}")
        train, spans = report["requests"]["train"], ["second", "minute", "hour", "day"]
        for span in spans:
            leaks = spans.index(span) >= spans.index(shortest)
            assert train[f"positives_in_last_{span}"] == leaks
        assert train["positives_seen_before"] == 1 and train["positives_in_next_day"] == 0
        assert "train: 100.0% of the positives have an event of their item" in report["warnings"][0]

    @pytest.mark.parametrize("clock", ["10:00:03", "10:00:00"])
    def test_an_honest_log(self, tmp_path: Path, clock: str) -> None:
        report = from_events(tmp_path, lambda day, item: f"2024-05-{day:02d} {clock}")
        train = report["requests"]["train"]
        assert train["positives_in_last_day"] == 0 and train["positives_in_next_day"] == 1
        assert report["warnings"] == []

    def test_daily_repeats_are_not_leaks(self, tmp_path: Path) -> None:
        """The same item every day: before each request, and as often after it."""
        rows = [f"u,tea,2024-05-{d:02d} 10:00:0{n},1" for d in range(1, 21) for n in (0, 5)]
        (tmp_path / "log.csv").write_text("\n".join(["u,i,t,c", *rows]))
        _, report = prepared(tmp_path)
        train = report["requests"]["train"]
        assert train["positives_in_last_day"] > 0.9 and train["positives_in_next_day"] == 1
        assert report["warnings"] == []

    def test_a_few_within_the_last_second(self, tmp_path: Path) -> None:
        """One in twenty positives; the others have their event after the request."""
        report = from_events(
            tmp_path, lambda d, item: f"2024-05-{d:02d} {'09:59:59.5' if d == 3 else '10:00:01'}"
        )
        assert report["requests"]["train"]["positives_in_last_second"] == pytest.approx(0.05)
        assert "5.0% within the second before" in report["warnings"][0]


class TestTimes:
    def test_of_an_event_and_a_request(self, tmp_path: Path) -> None:
        """Each day one event at exactly the time of its request, and one later on that day."""
        hours = ["10:00:00", "23:59:59", "10:00:00"]
        report = from_events(
            tmp_path, lambda d, item: f"2024-05-{d + item % 3 + (d == 20):02d} {hours[d % 3]}"
        )
        train = report["requests"]["train"]
        rows = 60  # one positive per user and day
        assert (
            train["events_on_the_day_of_a_request"] == rows - 3
        )  # the event of the last day is a day late
        at_once = sum(hours[d % 3] == "10:00:00" for d in range(1, 20)) * 3
        assert train["events_at_the_time_of_a_request"] == at_once
        assert report["times_at_midnight"] == {"events": 0, "requests": 0}

    def test_only_dates(self, tmp_path: Path) -> None:
        """With only dates no event of the same day is in a history, and nothing leaks; but it is
        reported."""
        report = from_events(tmp_path, lambda d, item: f"2024-05-{d:02d}", clock="")
        assert report["times_at_midnight"] == {"events": 1, "requests": 1}
        assert report["requests"]["train"]["events_at_the_time_of_a_request"] == 60
        assert [w.split(":")[0] for w in report["warnings"]] == ["events", "requests"]
        assert "100.0% of the times are midnight" in report["warnings"][0]
        assert "60 events are on the day of a request" in report["warnings"][0]

    @pytest.mark.parametrize("there", ["s", "ms", "us", "ns"])
    @pytest.mark.parametrize("unit", ["s", "ms", "us", None])
    def test_in_the_wrong_unit(self, tmp_path: Path, there: str, unit: str | None) -> None:
        frame = pd.DataFrame({"u": ["a", "a"], "i": ["x", "y"], "c": [1, 0]})
        frame["t"] = 1714557600 * 10 ** {"s": 0, "ms": 3, "us": 6, "ns": 9}[there]
        frame.to_parquet(tmp_path / "log.parquet")
        change = {"files": "log.parquet", **({"unit": unit} if unit else {})}
        if there == unit:
            log, _ = prepared(tmp_path, events=change, requests=change)
            assert log.events["time"].tolist() == [1714557600_000000]
        else:
            with refused("events: 1 of 1 rows", "time "):
                prepared(tmp_path, events=change, requests=change)


class TestDuplicateRows:
    def test_are_counted(self, tmp_path: Path) -> None:
        write(tmp_path)
        lines = (tmp_path / "log.csv").read_text().splitlines()
        # a click of user 10 twice more, and the candidate next to it once more with another label
        (tmp_path / "log.csv").write_text("\n".join([*lines, lines[2], lines[2], lines[1][:-1] + "1"]))
        (tmp_path / "buys.csv").write_text("\n".join([*lines, lines[1]]))
        assert lines[1:3] == ["10,0,2024-05-01 10:00:00,0", "10,1,2024-05-01 10:00:00,1"]
        log, report = prepared(tmp_path, requests={"labels": {"c": "c", "buy": BUYS}})
        assert report["doubled_rows"] == {
            "events": {"rows": 63, "doubled": 2},
            "requests": {"rows": 183, "doubled": 2},
            "label_buy": {"rows": 181, "doubled": 1},
        }
        assert report["requests"]["train"]["candidates_given_again"] == 3
        assert report["warnings"] == [
            "events: 2 of 63 rows equal an earlier row; all of them are used",
            "requests: 2 of 183 rows equal an earlier row; all of them are used",
        ]
        assert len(log.events["item"]) == 63  # counted, not dropped


def test_scales_of_dense_columns_are_in_the_report(tmp_path: Path) -> None:
    write(tmp_path)
    dense = {"dense": {"day": "day(t::TIMESTAMP)"}, "candidate_dense": {"c_": "nullif(i, '2')"}}
    log, report = prepared(tmp_path, requests=dense, splits={"test": 0.5})
    for split in log.splits:
        columns, scales = log.requests(split), report["requests"][split]["dense"]
        for name in ("day", "c_"):
            values = columns[name].astype(np.float64)
            missing = np.isnan(values)
            there = values[~missing]
            wanted = [there.mean(), there.std(), there.min(), there.max(), missing.mean()]
            np.testing.assert_allclose(list(scales[name].values()), wanted, rtol=1e-9)
        assert scales["c_"]["missing"] > 0.3


class TestUserIds:
    def histories(self, folder: Path, users: np.ndarray | list) -> dict[int, list[int]]:
        """The items of each user's history; items 1 to 4 are in the order of the users' rows."""
        asked = np.unique(np.array(users))
        days = pd.date_range("2024-01-01", periods=4)
        requests = pd.DataFrame({"user": asked, "time": pd.Timestamp("2024-02-01")})
        requests["candidates"], requests["exposed"] = [[1]] * len(asked), [[True]] * len(asked)
        requests["label"] = [[1]] * len(asked)
        events = pd.DataFrame({"user": users, "item": [1, 2, 3, 4], "time": days})
        schema = LogSchema(item_features={"item": 9})
        log = EventLog.from_pandas(folder / "log", events, schema, requests={"train": requests})
        data = RankingDataset(log, "train")
        return {
            int(user): data[[row]].sequence_features["history_item"].values().tolist()
            for row, user in enumerate(asked)
        }

    @pytest.mark.parametrize(
        "users",
        [
            np.array([2**63 + 5, 2**63 + 5, 7, 7], np.uint64),
            np.array([2**64 - 1, 1, 7, 7], np.uint64),
            pd.Series([2**64, 2**70, 7, 7], dtype=object),
            np.array([1e300, 1, 7, 7]),
            np.array([1.0, 1, 7, 7]),
        ],
        ids=["uint64", "uint64, -1 in int64", "object", "float", "whole floats"],
    )
    def test_that_do_not_fit_an_int64(self, tmp_path: Path, users) -> None:
        schema = LogSchema(item_features={"item": 9})
        days = pd.date_range("2024-01-01", periods=4)
        events = pd.DataFrame({"user": users, "item": [1, 2, 3, 4], "time": days})
        with refused("events", "integer" if events["user"].dtype == float else "fit an int64"):
            EventLog.from_pandas(tmp_path / "log", events, schema)

    def test_of_any_spread(self, tmp_path: Path) -> None:
        users = np.array([2**62 + 1, -(2**62) - 5, -(2**63), 2**63 - 1], np.int64)
        wanted = {int(user): [item] for item, user in enumerate(users, start=1)}
        assert self.histories(tmp_path, users) == wanted

    def test_uint64_that_fits(self, tmp_path: Path) -> None:
        users = np.array([2**63 - 1, 3, 3, 0], np.uint64)
        assert self.histories(tmp_path, users) == {2**63 - 1: [1], 3: [2, 3], 0: [4]}

    def test_times_out_of_order_are_still_found(self, tmp_path: Path) -> None:
        log, _ = prepared(tmp_path)
        file = log.path / "events.parquet"
        pd.read_parquet(file)[::-1].to_parquet(file)
        with refused("out of order at row 1"):
            EventLog(log.path)

    def test_times_that_do_not_fit_an_int64_of_microseconds(self, tmp_path: Path) -> None:
        times = np.array([10**13], dtype="datetime64[s]")
        events = pd.DataFrame({"user": [1], "item": [1], "time": times})
        with refused("events", "'time'", "290,000"):
            EventLog.from_pandas(tmp_path / "log", events, LogSchema(item_features={"item": 9}))

    @pytest.mark.parametrize("kind", ["uint64", "huge", "text"])
    def test_are_kept_apart_by_prepare(self, tmp_path: Path, kind: str) -> None:
        ids: Any = {
            "uint64": np.array([2**63 + 5, 5, 2**64 - 1], np.uint64),
            "huge": ["123456789012345678901", "123456789012345678902", "5"],
            "text": ["007", "7", "7.0"],
        }[kind]
        frame = pd.DataFrame({"u": ids, "i": ["x", "y", "z"], "t": pd.Timestamp("2024-05-01"), "c": 1})
        frame.to_parquet(tmp_path / "log.parquet")
        log, _ = prepared(tmp_path, events={"files": "log.parquet"}, requests={"files": "log.parquet"})
        users = Vocabulary.load(log.path)["user"]
        item_of = dict(zip(log.users.tolist(), log.events["item"].tolist(), strict=True))
        rows = users.rows_of([str(user) for user in ids])
        assert [item_of[row] for row in rows] == [1, 2, 3]

    @pytest.mark.parametrize("column", ["u", "i"])
    @pytest.mark.parametrize("number", [2.0**53, 1e300, float("nan"), np.float32(2**24)])
    def test_floats_that_merge_several_ids(self, tmp_path: Path, column: str, number) -> None:
        kind = np.float32 if isinstance(number, np.float32) else np.float64
        frame = pd.DataFrame({"u": [1], "i": [1], "t": pd.Timestamp("2024-05-01"), "c": 1})
        table = pyarrow.Table.from_pandas(frame)
        there = table.column_names.index(column)
        # in Arrow, since pandas converts nan to null
        table = table.set_column(there, column, pyarrow.array(np.array([number], kind)))
        pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
        with refused("events: 1 of 1", "is a float in which ids are not exact"):
            prepared(tmp_path, events={"files": "log.parquet"})
