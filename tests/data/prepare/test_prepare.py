"""Preparing a log: grouping, numbering, splitting and refusing rows, and the report."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.feather
import pytest

from ifa_torchrec.data import EventLog, LogError, LogSchema
from ifa_torchrec.data.parts import file_of, part_of
from ifa_torchrec.data.prepare import (
    Events,
    Hashed,
    Items,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
    load_schema,
    prepare,
)
from ifa_torchrec.data.vocabulary import Vocabulary, hash_row

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

SHOWN = """user,item,time,page,clicked,price
ann,tea,2024-05-01 10:00:00,a,1,2.5
ann,cup,2024-05-01 10:00:00,a,0,4
bob,pot,2024-05-01 11:00:00,b,0,9
bob,tea,2024-05-01 11:00:30,b,1,2.5
ann,pot,2024-05-02 10:00:00,c,1,9
ann,tea,2024-05-02 10:00:40,c,0,2.5
bob,cup,2024-05-03 10:00:00,d,1,4
"""


def described(folder: Path, text: str = SHOWN, **changes) -> PrepareSchema:
    """A schema of the shown candidates; the clicks are the events."""
    (folder / "shown.csv").write_text(text)
    rows = {"files": str(folder / "shown.csv"), "user": "user", "item": "item", "time": "time"}
    whole = PrepareSchema(
        events=Events(**rows, where="clicked = 1"),
        requests=Requests(**rows, labels={"click": "clicked"}),
        splits={"test": "2024-05-03"},
    )
    requests = {k: v for k, v in changes.items() if k in Requests.__dataclass_fields__}
    parts = {k: v for k, v in changes.items() if k not in requests}
    return replace(whole, requests=replace(whole.requests, **requests), **parts)


def report(log: EventLog) -> dict:
    return json.loads((log.path / "report.json").read_text())


def requests_of(log: EventLog, split: str) -> list[tuple]:
    """(user, item names) of each request."""
    users = Vocabulary.load(log.path)["user"]
    columns, names = log.requests(split), np.array(log.item_names())
    offsets = columns["candidate_offsets"]
    lists = np.split(names[columns["candidates"]], offsets[1:-1])
    return [(u, list(items)) for u, items in zip(users.at(columns["user"]), lists, strict=True)]


def candidates(requests: dict[str, np.ndarray], row: int) -> list[tuple]:
    """(item, exposed, label of seen, of bought) of each candidate of a request."""
    mine = slice(*requests["candidate_offsets"][row : row + 2])
    lists = ("candidates", "exposed", "seen", "bought")
    return list(zip(*(requests[name][mine].tolist() for name in lists), strict=True))


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


class TestRequests:
    def test_by_user_and_time(self, tmp_path: Path) -> None:
        log = prepare(described(tmp_path), tmp_path / "log")
        assert requests_of(log, "train")[:3] == [
            ("ann", ["cup", "tea"]),
            ("bob", ["pot"]),
            ("bob", ["tea"]),
        ]
        assert requests_of(log, "train")[3:] == [("ann", ["pot"]), ("ann", ["tea"])]
        assert requests_of(log, "test") == [("bob", ["cup"])]
        assert log.requests("train")["click"].tolist() == [0, 1, 0, 1, 1, 0]

    @pytest.mark.parametrize("grouping", [{"gap_seconds": 30}, {"request": "page", "gap_seconds": 30}])
    def test_by_gap(self, tmp_path: Path, grouping: dict) -> None:
        log = prepare(described(tmp_path, **grouping), tmp_path / "log")
        train = requests_of(log, "train")
        assert train[:2] == [("ann", ["cup", "tea"]), ("bob", ["pot", "tea"])]
        assert train[2:] == [("ann", ["pot"]), ("ann", ["tea"])]  # 40 seconds apart

    def test_by_request_column(self, tmp_path: Path) -> None:
        log = prepare(described(tmp_path, request="page"), tmp_path / "log")
        assert requests_of(log, "train")[2] == ("ann", ["pot", "tea"])
        second = pd.Timestamp("2024-05-02 10:00:00").value // 1000
        assert log.requests("train")["time"][2] == second  # its first row's

    def test_many_at_a_time_and_few_are_the_same(self, tmp_path: Path, monkeypatch) -> None:
        one = prepare(described(tmp_path), tmp_path / "one")
        monkeypatch.setattr("ifa_torchrec.data.prepare.requests.REQUESTS_AT_ONCE", 2)
        two = prepare(described(tmp_path), tmp_path / "two")
        for column, values in one.requests("train").items():
            np.testing.assert_array_equal(values, two.requests("train")[column])

    def test_columns(self, tmp_path: Path) -> None:
        schema = described(
            tmp_path,
            request="page",
            context={"page": "page", "hashed": Hashed("page", hash=8)},
            dense={"hour": "hour(time::TIMESTAMP) / 24"},
            candidate_dense={"price": "price"},
            exposed="clicked",
        )
        log = prepare(schema, tmp_path / "log")
        train = log.requests("train")
        assert log.schema.context_features == {"page": 4, "hashed": 8}
        assert train["page"].tolist() == [1, 2, 3]
        assert train["hashed"].tolist() == [hash_row(page, 8) for page in "abc"]
        np.testing.assert_allclose(train["hour"], [10 / 24, 11 / 24, 10 / 24], rtol=1e-6)
        assert train["price"].tolist() == [4, 2.5, 9, 2.5, 9, 2.5]
        assert train["exposed"].tolist() == [False, True, False, True, True, False]

    def test_the_label_of_the_unexposed_may_be_empty(self, tmp_path: Path) -> None:
        text = SHOWN.replace(",a,0,", ",a,,")
        schema = described(tmp_path, text, exposed="clicked IS NOT NULL")
        schema = replace(schema, events=replace(schema.events, where="coalesce(clicked, '0') = 1"))
        train = prepare(schema, tmp_path / "log").requests("train")
        assert train["exposed"][:2].tolist() == [False, True]
        assert train["click"][:2].tolist() == [0, 1]
        with refused("requests: 1 of 7", "label click is not 0 or 1", "'item': cup"):
            prepare(replace(schema, requests=replace(schema.requests, exposed=None)), tmp_path / "all")

    def test_labels_of_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "buys.csv").write_text("u,i,t\nann,tea,1714557660\nann,cup,1714558000\n")
        buys = JoinedLabel(
            files=str(tmp_path / "buys.csv"), user="u", item="i", time="t", unit="s", within_seconds=60
        )
        log = prepare(described(tmp_path, labels={"click": "clicked", "buy": buys}), tmp_path / "log")
        assert list(log.schema.tasks) == ["click", "buy"]
        # tea after 60 seconds counts, the cup after 400 does not
        assert log.requests("train")["buy"].tolist() == [0, 1, 0, 0, 0, 0]


class TestNegatives:
    @pytest.mark.parametrize("start", ["2024-01-06", 0.6, None])
    def test_are_those_of_a_plain_loop(self, tmp_path: Path, start: str | float | None) -> None:
        """Requests with several positives, in a log whose popular items change on the sixth day."""
        rng = np.random.default_rng(0)
        rows = pd.DataFrame({"user": rng.integers(0, 5, 400), "time": rng.integers(0, 240, 400)})
        item = rng.geometric(0.2, 400) + 30 * (rows["time"] >= 120)
        rows = rows.assign(
            item=np.minimum(item, 50), hour=rows["time"] % 24, bought=rng.random(400) < 0.3
        )
        rows["time"] = pd.Timestamp("2024-01-01") + rows["time"] * pd.Timedelta(hours=1)
        rows.to_parquet(tmp_path / "rows.parquet")
        given = {"files": str(tmp_path / "rows.parquet")}
        given |= {column: column for column in ("user", "item", "time")}
        labels = {"seen": "item < 45", "bought": "bought"}
        schema = PrepareSchema(
            events=Events(**given),
            requests=Requests(
                **given, where="hour > 4", labels=labels, context={"hour": "hour"}, dense={"h": "hour"}
            ),
            splits={"test": start} if start else {},
        )
        without = prepare(schema, tmp_path / "without")
        with_them = replace(schema, requests=replace(schema.requests, negatives=3))
        log = prepare(with_them, tmp_path / "log")

        cut = np.inf
        if start:  # a share depends on the requests; a timestamp may be before the first one
            first = min(log.requests("test")["time"])
            cut = first if start == 0.6 else pd.Timestamp(start).value // 1000
        drawable = np.sort(log.events["item"][log.events["time"] < cut])
        number = 0
        for split in log.splits:
            old, new = without.requests(split), log.requests(split)
            for column in ("user", "time", "hour", "h"):
                np.testing.assert_array_equal(old[column], new[column])
            asked = added = 0
            for row in range(len(old["user"])):
                there = candidates(old, row)
                draws = 3 * sum(1 in labels for _, _, *labels in there)
                drawn = set()
                for draw in range(draws):
                    digest = hashlib.md5(f"{number} {draw}".encode()).hexdigest()
                    drawn.add(int(drawable[int(digest[:15], 16) % len(drawable)]))
                drawn -= {item for item, *_ in there}
                assert candidates(new, row) == sorted(there + [(item, True, 0, 0) for item in drawn])
                asked, added, number = asked + draws, added + len(drawn), number + 1
            assert report(log)["requests"][split]["negatives"] == {"asked_for": asked, "added": added}
            assert "negatives" not in report(without)["requests"][split]
            assert 0.5 * asked < added < asked

    def test_need_events_before_the_first_split(self, tmp_path: Path) -> None:
        schema = described(tmp_path, negatives=2)
        schema = replace(schema, events=replace(schema.events, where="page = 'd'"))
        with refused("negatives", "events before the first split", "none"):
            prepare(schema, tmp_path / "log")

    @pytest.mark.parametrize("negatives", [-1, 1.5, "2"])
    def test_are_a_whole_number(self, tmp_path: Path, negatives) -> None:
        with refused("negatives", "an integer", repr(negatives)):
            described(tmp_path, negatives=negatives)

    def test_have_no_numbers_of_their_own(self, tmp_path: Path) -> None:
        with refused("negatives=2", "candidate_dense ['price']"):
            described(tmp_path, negatives=2, candidate_dense={"price": "price"})


class TestIds:
    def test_are_coded_in_their_order(self, tmp_path: Path) -> None:
        text = SHOWN.replace("tea", "10").replace("cup", "9").replace("pot", "11")
        log = prepare(described(tmp_path, text), tmp_path / "log")
        ids = Vocabulary.load(log.path)
        assert ids["item"].rows_of([9, "10", 11, 12]).tolist() == [
            1,
            2,
            3,
            0,
        ]  # integers, so both find it
        assert ids["user"].at(range(3)) == [None, "ann", "bob"]

    def test_hashed_items(self, tmp_path: Path) -> None:
        schema = described(tmp_path)
        schema = replace(schema, events=replace(schema.events, item=Hashed("item", hash=3)))
        log = prepare(schema, tmp_path / "log")
        rows = {item: hash_row(item, 3) for item in ("cup", "pot", "tea")}
        assert log.requests("train")["candidates"].tolist()[:3] == [
            *sorted([rows["cup"], rows["tea"]]), rows["pot"]
        ]  # fmt: skip
        assert log.schema.item_features == {"item": 3} and log.num_items == 3
        share = sum(list(rows.values()).count(row) > 1 for row in rows.values()) / 3
        assert report(log)["vocabulary"]["item"] == {"ids": 3, "rows": 3, "ids_that_share_a_row": share}

    def test_item_and_user_features(self, tmp_path: Path) -> None:
        (tmp_path / "items.csv").write_text(
            "id|kind|title\ntea|drink|Tea\ncup||Cup\npot|ware|Pot\nurn|ware|\n"
        )
        (tmp_path / "users.csv").write_text("id,town\nann,Ulm\n")
        schema = described(
            tmp_path,
            items=Items(
                files=str(tmp_path / "items.csv"), delimiter="|", item="id", features={"kind": "kind"},
                name="title",
            ),
            users=Users(files=str(tmp_path / "users.csv"), user="id", features={"town": "town"}),
        )  # fmt: skip
        log = prepare(schema, tmp_path / "log")
        assert log.item_names() == ["unknown", "Cup", "Pot", "Tea", "urn"]
        assert log.items["kind"].tolist() == [0, 0, 2, 1, 2]  # 0 for unknown
        assert log.requests("train")["town"].tolist() == [1, 0, 0, 1, 1]

    def test_items_without_a_description_are_kept(self, tmp_path: Path) -> None:
        (tmp_path / "items.csv").write_text("id,kind\ntea,drink\ncup,ware\n")
        items = Items(files=str(tmp_path / "items.csv"), item="id", features={"kind": "kind"})
        log = prepare(described(tmp_path, items=items), tmp_path / "log")
        assert dict(zip(log.item_names(), log.items["kind"].tolist(), strict=True)) == {
            "unknown": 0, "cup": 2, "pot": 0, "tea": 1,
        }  # fmt: skip
        assert len(log.requests("train")["candidates"]) == 6
        figures = report(log)
        assert figures["joins"]["items_described"] == {"of": 3, "found": 2}
        assert figures["requests"]["train"]["candidates_not_described"] == pytest.approx(2 / 6)
        assert "33.3% of the candidates are not described" in figures["warnings"][0]

    def test_items_none_of_which_is_described(self, tmp_path: Path) -> None:
        (tmp_path / "items.csv").write_text("id\nT1\n")
        items = Items(files=str(tmp_path / "items.csv"), item="id")
        with refused("items: none of them is a candidate of the requests", "'T1'", "'cup'"):
            prepare(described(tmp_path, items=items), tmp_path / "log")


class TestFiles:
    @pytest.mark.parametrize("kind", ["parquet", "feather", "csv.gz", "several", "no header", "::"])
    def test_of_every_kind(self, tmp_path: Path, kind: str) -> None:
        expected = prepare(described(tmp_path), tmp_path / "expected")
        schema = described(tmp_path)
        frame = pd.read_csv(tmp_path / "shown.csv")
        lines = SHOWN.splitlines(keepends=True)
        change: dict = {"files": str(tmp_path / f"other.{kind}")}
        if kind == "parquet":
            frame.astype({"time": "datetime64[us]"}).to_parquet(change["files"])
        elif kind == "feather":
            pyarrow.feather.write_feather(frame, change["files"])
        elif kind == "csv.gz":
            Path(change["files"]).write_bytes(gzip.compress(SHOWN.encode()))
        elif kind == "several":
            (tmp_path / "part-1.csv").write_text("".join(lines[:4]))
            (tmp_path / "part-2.csv").write_text("".join([lines[0], *lines[4:]]))
            change = {"files": str(tmp_path / "part-*.csv")}
        elif kind == "no header":
            (tmp_path / "bare.csv").write_text("".join(lines[1:]))
            change = {"files": str(tmp_path / "bare.csv"), "columns": lines[0].strip().split(",")}
        else:
            (tmp_path / "colons.dat").write_text(SHOWN.replace(",", "::"))
            change = {"files": str(tmp_path / "colons.dat"), "delimiter": "::"}
        schema = replace(
            schema, events=replace(schema.events, **change), requests=replace(schema.requests, **change)
        )
        log = prepare(schema, tmp_path / "log")
        assert requests_of(log, "train") == requests_of(expected, "train")
        np.testing.assert_array_equal(log.events["time"], expected.events["time"])

    @pytest.mark.parametrize(
        ("first", "unit"),
        [("1714557600", "s"), ("1714557600.0", "s"), ("1714557600000", "ms"), ("1714557600000000", "us"),
         ("2024-05-01T10:00:00Z", None), ("2024-05-01 12:00:00+02", None)],
    )  # fmt: skip
    def test_times(self, tmp_path: Path, first: str, unit: str | None) -> None:
        text = f"user,item,time,clicked\na,x,{first},1\n"
        schema = described(tmp_path, text, unit=unit, splits={})
        log = prepare(replace(schema, events=replace(schema.events, unit=unit)), tmp_path / "log")
        assert log.events["time"].tolist() == [1714557600000000]

    def test_files_of_other_columns(self, tmp_path: Path) -> None:
        schema = described(tmp_path)
        (tmp_path / "shown-2.csv").write_text("item,user,time,page,clicked,price\n")
        with refused("events", "shown-2.csv", "item,user,time", "same columns"):
            prepare(
                replace(schema, events=replace(schema.events, files=str(tmp_path / "shown*.csv"))),
                tmp_path / "log",
            )

    def test_no_files(self, tmp_path: Path) -> None:
        with refused("requests: no file matches", "nothing-*.csv"):
            prepare(described(tmp_path, files=str(tmp_path / "nothing-*.csv")), tmp_path / "log")

    def test_unknown_column(self, tmp_path: Path) -> None:
        with refused("does not match its files", "klicked"):
            prepare(described(tmp_path, labels={"click": "klicked"}), tmp_path / "log")
        assert [f.name for f in tmp_path.iterdir()] == ["shown.csv"]  # no draft is left


BAD = {
    "user is empty": ",tea,2024-05-01 10:00:00,a,1,1",
    "item is empty": "ann,,2024-05-01 10:00:00,a,1,1",
    "time is empty": "ann,tea,,a,1,1",
    "time cannot be read": "ann,tea,yesterday,a,1,1",
    "time is not in 1971 to 2200": "ann,tea,1970-01-20 10:00:00,a,1,1",
    "label click is not 0 or 1": "ann,tea,2024-05-01 10:00:00,a,2,1",
    "price is not a finite number": "ann,tea,2024-05-01 10:00:00,a,1,cheap",
    "line cannot be read": "ann,tea",
}


class TestRefusedRows:
    @pytest.mark.parametrize("reason", BAD)
    def test_are_counted_and_shown(self, tmp_path: Path, reason: str) -> None:
        schema = described(tmp_path, SHOWN + BAD[reason] + "\n", candidate_dense={"price": "price"})
        log = prepare(schema, tmp_path / "log", max_refused=0.5)
        figures = report(log)["refused"]["requests"]
        assert (figures["rows"], figures["refused"]) == (8, 1)
        ((why, found),) = figures["reasons"].items()
        assert why.startswith(reason) and found["rows"] == 1 and len(found["examples"]) == 1
        assert len(log.requests("train")["candidates"]) == 6

    @pytest.mark.parametrize("reason", ["time cannot be read", "line cannot be read"])
    def test_too_many_are_an_error(self, tmp_path: Path, reason: str) -> None:
        schema = described(tmp_path, SHOWN + BAD[reason] + "\n", candidate_dense={"price": "price"})
        schema = replace(schema, events=replace(schema.events, where="page = 'b'"))
        with refused("1 of", "0.01", reason, "max_refused"):
            prepare(schema, tmp_path / "log")

    def test_a_condition_that_is_neither_true_nor_false(self, tmp_path: Path) -> None:
        schema = described(tmp_path, SHOWN + "ann,tea,2024-05-01 10:00:00,a,yes,1\n")
        with refused("events: 1 of", "`where` is neither true nor false"):
            prepare(schema, tmp_path / "log")


class TestSplits:
    def test_by_share_of_the_requests(self, tmp_path: Path) -> None:
        log = prepare(described(tmp_path, splits={"valid": 0.5, "test": 0.9}), tmp_path / "log")
        assert log.splits == ["train", "valid", "test"]
        assert [len(log.requests(split)["user"]) for split in log.splits] == [3, 2, 1]

    @pytest.mark.parametrize(
        ("splits", "words"),
        [({"valid": "2024-06-01"}, ["'valid' has no requests", "2024-05-03"]),
         ({"valid": "2024-05-03", "test": "2024-05-02"}, ["'valid' has no requests", "in order"]),
         ({"valid": "May"}, ["'valid'", "'May'", "not a timestamp"]),
         ({"train": 0.5}, ["'train'", "leave it out"])],
    )  # fmt: skip
    def test_invalid_splits(self, tmp_path: Path, splits: dict, words: list[str]) -> None:
        with refused("splits", *words):
            prepare(described(tmp_path, splits=splits), tmp_path / "log")


class TestReport:
    def test_numbers(self, tmp_path: Path) -> None:
        figures = report(prepare(described(tmp_path), tmp_path / "log"))
        assert (figures["users"], figures["items"], figures["events"]) == (2, 3, 4)
        assert figures["events_per_user"] == {"p50": 2, "p90": 2, "p99": 2, "max": 2}
        assert figures["time_range"] == ["2024-05-01 10:00:00", "2024-05-03 10:00:00"]
        train = figures["requests"]["train"]
        assert train["requests"] == 5 and train["candidates"]["max"] == 2
        assert train["label_rates_of_exposed"] == {"click": 0.5}
        assert train["requests_without_history"] == 3 / 5
        assert train["positives_in_last_second"] == train["positives_seen_before"] == 0

    def test_leaks(self, tmp_path: Path) -> None:
        """Events recorded half a second before their request, and others long before."""
        (tmp_path / "events.csv").write_text(
            "user,item,time\nann,tea,2024-05-01 09:59:59.5\nbob,tea,2024-04-01\nbob,cup,2024-04-01\n"
        )
        schema = described(tmp_path)
        events = replace(schema.events, files=str(tmp_path / "events.csv"), where=None)
        figures = report(prepare(replace(schema, events=events), tmp_path / "log"))["requests"]
        assert figures["train"]["positives_in_last_second"] == pytest.approx(1 / 3)
        assert figures["train"]["positives_seen_before"] == pytest.approx(2 / 3)
        assert figures["test"]["positives_in_last_second"] == 0


def test_it_is_what_from_pandas_writes(tmp_path: Path) -> None:
    """A random log, prepared by ``prepare`` and by pandas."""
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2024-01-01").value // 1000
    rows = pd.DataFrame(
        {
            "user": rng.integers(1, 41, 5000),
            "item": rng.integers(1, 61, 5000),
            "time": start + rng.integers(0, 200, 5000) * 3_600_000_000,
            "label": rng.integers(0, 2, 5000),
        }
    ).drop_duplicates(["user", "time", "item"])
    rows.to_parquet(tmp_path / "rows.parquet")
    given = {"files": str(tmp_path / "rows.parquet"), "unit": "us"}
    given |= {column: column for column in ("user", "item", "time")}
    log = prepare(
        PrepareSchema(
            events=Events(**given), requests=Requests(**given, labels={"label": "label"}), splits={}
        ),
        tmp_path / "log",
        memory="200MB",
    )
    rows["time"] = rows["time"].to_numpy().astype("datetime64[us]")
    ordered = rows.sort_values(["time", "user", "item"]).assign(exposed=True)
    groups = ordered.groupby(["time", "user"], sort=True)
    lists = groups.agg(list).reset_index().rename(columns={"item": "candidates"})
    expected = EventLog.from_pandas(
        tmp_path / "pandas",
        ordered[["user", "time", "item"]],
        LogSchema(item_features={"item": 61}),
        requests={"train": lists},
    )
    assert log.schema == expected.schema
    for columns, same in (
        (log.events, expected.events),
        (log.requests("train"), expected.requests("train")),
    ):
        assert columns.keys() == same.keys()
        for name in columns:
            np.testing.assert_array_equal(columns[name], same[name])


def test_too_little_memory(tmp_path: Path) -> None:
    with refused("memory='1MB' is too little"):
        prepare(described(tmp_path), tmp_path / "log", memory="1MB")


SCHEMA = {
    "events": {"files": "shown.csv", "user": "user", "item": {"column": "item", "hash": 50},
               "time": "time", "where": "clicked = 1"},
    "requests": {"files": ["shown.csv"], "user": "user", "item": "item", "time": "time",
                 "labels": {"click": "clicked"}, "context": {"page": {"column": "page", "hash": 9}}},
    "splits": {"test": "2024-05-03"},
}  # fmt: skip


class TestSchemaFile:
    def write(self, folder: Path, schema) -> Path:
        (folder / "shown.csv").write_text(SHOWN)
        (folder / "schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
        return folder / "schema.json"

    def test_is_read(self, tmp_path: Path) -> None:
        schema = load_schema(self.write(tmp_path, SCHEMA))
        assert schema.requests.context == {"page": Hashed("page", hash=9)}
        log = prepare(schema, tmp_path / "log")
        assert log.schema.item_features == {"item": 50} and log.schema.context_features == {"page": 9}

    @pytest.mark.parametrize(
        ("change", "words"),
        [("{", ["schema.json", "cannot be read as JSON"]),
         ({"event": {}}, ["the schema must be an object with the keys ['events', 'requests', 'sp"]),
         ({"events": {"files": "x"}}, ["events must be", "['files', 'user', 'item']", "'time'"]),
         ({"users": {**SCHEMA["events"]}}, ["users must be", "features"])],
        ids=["no JSON", "key", "missing", "users"],
    )  # fmt: skip
    def test_mistakes_are_named(self, tmp_path: Path, change, words: list[str]) -> None:
        schema = change if isinstance(change, str) else {**SCHEMA, **change}
        with refused(*words):
            load_schema(self.write(tmp_path, schema))


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    schema = described(tmp_path)
    with pytest.raises(FileExistsError):
        prepare(schema, tmp_path)


def test_a_log_in_parts_is_the_log(tmp_path: Path) -> None:
    one = prepare(described(tmp_path), tmp_path / "one")
    log = prepare(described(tmp_path), tmp_path / "parts", parts=3)
    assert len(list((log.path / "events").iterdir())) == 3
    assert not (log.path / "events.parquet").exists()
    assert report(log) == report(one)
    for split in one.splits:
        assert sorted(requests_of(log, split)) == sorted(requests_of(one, split))
    assert sorted(log.events["item"].tolist()) == sorted(one.events["item"].tolist())


def test_parts_have_the_rows_of_one_in_their_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ifa_torchrec.data.prepare.requests.REQUESTS_AT_ONCE", 500)
    rng, day = np.random.default_rng(0), np.datetime64("2024-05-01", "us")

    def rows(number: int) -> pd.DataFrame:
        times = day + rng.integers(0, 10**6, number).astype("timedelta64[s]")
        return pd.DataFrame(
            {"u": rng.integers(0, 300, number), "i": rng.integers(0, 50, number), "t": times}
        )

    rows(200_000).to_parquet(tmp_path / "events.parquet")  # more rows than a DuckDB row group
    rows(2000).assign(c=rng.integers(0, 2, 2000)).to_parquet(tmp_path / "shown.parquet")
    events, shown = (
        {"files": str(tmp_path / f"{name}.parquet"), "user": "u", "item": "i", "time": "t"}
        for name in ("events", "shown")
    )
    requests = Requests(**shown, labels={"click": "c"})
    schema = PrepareSchema(events=Events(**events), requests=requests, splits={"test": 0.7})
    one, log = (prepare(schema, tmp_path / str(n), parts=n).path for n in (1, 5))
    for table in ("events", "requests/train", "requests/test"):
        whole = pd.read_parquet(one / f"{table}.parquet")
        part = part_of(whole["user"].to_numpy(), 5)
        for number in range(5):
            mine = whole[part == number].reset_index(drop=True)
            assert len(mine)
            pd.testing.assert_frame_equal(pd.read_parquet(log / file_of(table, number)), mine)
