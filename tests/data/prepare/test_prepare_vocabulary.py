"""Ids of the training split are numbered first, later ids are new; a vocabulary can be extended."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.data.prepare.ids import hash_in_sql
from ifa_torchrec.data.vocabulary import Vocabulary, hash_row

EVENTS = """user,item,time,action
ann,tea,2024-05-01 08:00:00,buy
ann,cup,2024-05-01 09:00:00,see
bob,pot,2024-05-02 12:00:00,wish
cat,jug,2024-05-04 09:00:00,see
"""
SHOWN = """user,item,time,clicked,page
ann,tea,2024-05-01 10:00:00,1,a
ann,urn,2024-05-01 10:00:00,0,a
bob,tea,2024-05-02 11:00:00,1,b
cat,jug,2024-05-04 10:00:00,1,c
cat,tea,2024-05-04 10:00:00,0,c
bob,can,2024-05-04 11:00:00,0,
"""
ITEMS = """item,kind,tags
tea,drink,hot|green
cup,ware,hot
pot,iron,
urn,ware,big
jug,glass,new|hot
zip,odd,odd
"""


def write(folder: Path, events: str = EVENTS, shown: str = SHOWN, **parts: Any) -> Path:
    """A log with one day of training, up to just before pot's event, and a test two days later."""
    for name, text in {"events": events, "shown": shown, "items": ITEMS}.items():
        (folder / f"{name}.csv").write_text(text)
    rows = {"user": "user", "item": "item", "time": "time"}
    schema = {
        "events": {"files": "events.csv", **rows, "features": {"action": "action"}},
        "requests": {
            "files": "shown.csv", **rows, "labels": {"click": "clicked"}, "context": {"page": "page"},
            "candidate_features": {"place": "page"},
        },
        "items": {
            "files": "items.csv", "item": "item", "features": {"kind": "kind"},
            "lists": {"tags": {"column": "tags", "delimiter": "|"}},
        },
        "splits": {"test": "2024-05-04"},
        **parts,
    }  # fmt: skip
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "schema.json"


def ids(log: EventLog, name: str) -> list[Any]:
    """The listed ids, from row 1 on."""
    listed = Vocabulary.load(log.path)[name].ids
    return [] if listed is None else listed.to_pylist()


def report(log: EventLog) -> dict[str, Any]:
    return json.loads((log.path / "report.json").read_text())


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


class TestNewIds:
    def test_of_items(self, tmp_path: Path) -> None:
        """Pot's event is after the last training request, and zip is only in the catalogue."""
        log = prepare(load_schema(write(tmp_path)), tmp_path / "log")
        assert ids(log, "item") == ["cup", "tea", "urn", "can", "jug", "pot", "zip"]
        assert log.schema.item_features["item"] == 4 and log.num_items == 8
        # they have features, and events and candidates have their numbers
        kinds = Vocabulary.load(log.path)["kind"].at(log.items["kind"])
        assert kinds == [None, "ware", "drink", "ware", None, None, None, None]
        assert log.events["item"].tolist() == [2, 1, 6, 5]
        assert log.requests("test")["candidates"].tolist() == [2, 5, 4]

    def test_of_users_are_numbered(self, tmp_path: Path) -> None:
        log = prepare(load_schema(write(tmp_path)), tmp_path / "log")
        assert ids(log, "user") == ["ann", "bob", "cat"] and log.users.tolist() == [1, 2, 3]

    def test_of_features_are_unknown(self, tmp_path: Path) -> None:
        log = prepare(load_schema(write(tmp_path)), tmp_path / "log")
        assert ids(log, "kind") == ["drink", "ware"] and ids(log, "action") == ["buy", "see"]
        assert ids(log, "tags") == ["big", "green", "hot"] and ids(log, "page") == ["a", "b"]
        assert log.events["action"].tolist() == [1, 2, 0, 2]
        assert log.requests("test")["page"].tolist() == [0, 0]
        items = pd.read_parquet(log.path / "items.parquet")
        assert [list(tags) for tags in items["tags"]] == [
            [], [3], [3, 2], [1], [], [0, 3], [], [0]
        ]  # fmt: skip

    def test_are_in_the_report(self, tmp_path: Path) -> None:
        figures = report(prepare(load_schema(write(tmp_path)), tmp_path / "log"))
        train, test = (figures["requests"][split]["new"] for split in ("train", "test"))
        assert train["items"] == {"candidates": 0, "events": 0}
        assert train["users"] == {"requests": 0, "events": 0}
        assert set(train["values"].values()) == {0}
        # in the test: jug and can of three candidates; the events of pot and jug; cat of cat and bob
        assert test["items"] == {"candidates": pytest.approx(2 / 3), "events": 1}
        assert test["users"] == {"requests": 0.5, "events": 0.5}
        # can is not described; one of drink and glass; one of hot, green, new, hot; wish of wish, see
        assert test["values"] == {
            "kind": 0.5, "tags": 0.25, "action": 0.5, "page": 1, "place": 1,
        }  # fmt: skip
        assert any(
            "66.7% of the candidates are items that are not in the training split" in w
            for w in figures["warnings"]
        )
        assert figures["vocabulary"]["item"] == {"ids": 7, "rows": 4}

    def test_min_count(self, tmp_path: Path) -> None:
        """Training has tea in an event and two candidates, cup in an event, urn in a candidate."""
        log = prepare(load_schema(write(tmp_path, min_count=2)), tmp_path / "log")
        assert ids(log, "item")[0] == "tea" and log.schema.item_features["item"] == 2
        assert ids(log, "kind") == ["drink", "ware"]  # their values are known nevertheless
        with refused("min_count", "0"):
            load_schema(write(tmp_path, min_count=0))


class TestHashes:
    def test_in_sql_are_those_of_python(self) -> None:
        texts = ["", "7", "-3", "tea", "é", "x" * 100, "9223372036854775807"]
        with duckdb.connect() as sql:
            for rows in (2, 3, 1000, 2**60):
                for text in texts:
                    found = sql.execute(f"SELECT {hash_in_sql('?', rows)}", [text]).fetchall()
                    assert found == [(hash_row(text, rows),)] and 0 < found[0][0] < rows

    def test_leave_row_0_to_the_unknown(self, tmp_path: Path) -> None:
        path = write(tmp_path)
        schema = json.loads(path.read_text())
        schema["events"]["item"] = {"column": "item", "hash": 3}
        schema["events"]["features"] = {"action": {"column": "action", "hash": 2}}
        path.write_text(json.dumps(schema))
        log = prepare(load_schema(path), tmp_path / "log")
        assert log.events["item"].tolist() == [hash_row(i, 3) for i in ("tea", "cup", "pot", "jug")]
        assert set(log.events["action"]) == {1}
        assert {*log.requests("train")["candidates"]} <= {1, 2} and log.num_items == 3
        assert Vocabulary.load(log.path)["item"].kind == "hashed"


class TestExtension:
    def test_old_rows_keep_their_numbers(self, tmp_path: Path) -> None:
        """Can, jug and ale are in the second training split; ale and dan are not in the first log."""
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        events = EVENTS + "dan,ale,2024-05-05 08:00:00,sip\n"
        shown = SHOWN + "dan,tea,2024-05-06 10:00:00,1,d\nann,gin,2024-05-07 10:00:00,1,e\n"
        path = write(tmp_path, events, shown, splits={"test": "2024-05-07"})
        log = prepare(load_schema(path), tmp_path / "new", vocabulary=old.path)
        assert ids(log, "item") == [*ids(old, "item"), "ale", "gin"]
        assert log.schema.item_features["item"] == 9  # up to ale, the last one in any training split
        assert ids(log, "user") == ["ann", "bob", "cat", "dan"]
        assert ids(log, "action") == ["buy", "see", "sip", "wish"]
        assert Vocabulary.load(log.path).begins_with(Vocabulary.load(old.path))
        assert log.requests("test")["candidates"].tolist() == [9]

    def test_nothing_new_in_the_training_leaves_the_table(self, tmp_path: Path) -> None:
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        shown = SHOWN + "ann,gin,2024-05-07 10:00:00,1,e\n"
        log = prepare(load_schema(write(tmp_path, shown=shown)), tmp_path / "new", vocabulary=old.path)
        assert log.schema == old.schema and ids(log, "item") == [*ids(old, "item"), "gin"]

    def test_ids_missing_in_the_new_log_stay(self, tmp_path: Path) -> None:
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        lines = SHOWN.replace("urn", "tea")
        log = prepare(load_schema(write(tmp_path, shown=lines)), tmp_path / "new", vocabulary=old.path)
        assert ids(log, "item") == ids(old, "item") and log.schema.item_features["item"] == 4

    def test_of_a_run(self, tmp_path: Path) -> None:
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        run = tmp_path / "run"
        run.mkdir()
        shutil.copytree(old.path / "vocabulary", run / "vocabulary")
        shutil.copy(old.path / "vocabulary.json", run)
        (run / "config.json").write_text(json.dumps({"data": str(old.path)}))
        log = prepare(load_schema(write(tmp_path)), tmp_path / "new", vocabulary=run)
        assert log.schema == old.schema and ids(log, "item") == ids(old, "item")

    def test_of_a_remote_log(self, tmp_path: Path, monkeypatch) -> None:
        """A log, and the log of a run."""
        monkeypatch.setenv("IFA_LOG_CACHE", str(tmp_path / "cache"))
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        run, uri = tmp_path / "run", old.path.as_uri()
        run.mkdir()
        old.vocabulary.save(run)
        (run / "config.json").write_text(json.dumps({"data": uri}))
        for n, place in enumerate((uri, run)):
            log = prepare(load_schema(write(tmp_path)), tmp_path / f"new{n}", vocabulary=place)
            assert log.schema == old.schema and log.vocabulary.digest == old.vocabulary.digest

    def test_what_cannot_be_extended(self, tmp_path: Path) -> None:
        old = prepare(load_schema(write(tmp_path)), tmp_path / "old")
        with refused("ids of 'kind'", "which the schema does not name"):
            parts = {"items": {"files": "items.csv", "item": "item"}}
            prepare(load_schema(write(tmp_path, **parts)), tmp_path / "new", vocabulary=old.path)
        path = write(tmp_path)
        path.write_text(
            path.read_text().replace('"page": "page"', '"page": {"column": "page", "hash": 9}')
        )
        with refused("'page'", "hashed to 9 rows", "listed", "same hash"):
            prepare(load_schema(path), tmp_path / "new", vocabulary=old.path)
        with refused("elsewhere", "schema.json is missing"):
            prepare(load_schema(write(tmp_path)), tmp_path / "new", vocabulary=tmp_path / "elsewhere")

    def test_integers_stay_integers(self, tmp_path: Path) -> None:
        numbers = {"tea": "10", "cup": "9", "urn": "12", "jug": "-4", "can": "13", "pot": "14"}
        events, shown = EVENTS, SHOWN
        for word, digits in numbers.items():
            events, shown = events.replace(word, digits), shown.replace(word, digits)
        path = write(tmp_path, events, shown)
        schema = json.loads(path.read_text())
        del schema["items"]
        path.write_text(json.dumps(schema))
        old = prepare(load_schema(path), tmp_path / "old")
        assert ids(old, "item") == [9, 10, 12, -4, 13, 14]
        (tmp_path / "shown.csv").write_text(shown.replace("13", "x13"))
        with refused("ids of 'item' are integers", "'x13'"):
            prepare(load_schema(path), tmp_path / "new", vocabulary=old.path)


def test_ids_of_any_form_are_found_again(tmp_path: Path) -> None:
    """Ids of any form have the row that the vocabulary records."""
    names = ["007", "7", "-7", "7.0", "é", "a b", "x'y", '"', "NaN", "9" * 25]
    frame = pd.DataFrame({"user": names, "item": names[::-1], "t": pd.Timestamp("2024-05-02"), "c": 1})
    frame.to_parquet(tmp_path / "log.parquet")
    rows = {"files": "log.parquet", "user": "user", "item": "item", "time": "t"}
    schema = {"events": rows, "requests": {**rows, "labels": {"c": "c"}}, "splits": {}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    log = prepare(load_schema(tmp_path / "schema.json"), tmp_path / "log")
    vocabulary = Vocabulary.load(log.path)
    order = np.argsort(vocabulary["user"].rows_of(names))
    assert log.requests("train")["candidates"].tolist() == (
        vocabulary["item"].rows_of(names[::-1])[order].tolist()
    )
    assert sorted(vocabulary["item"].rows_of(names)) == list(range(1, len(names) + 1))
