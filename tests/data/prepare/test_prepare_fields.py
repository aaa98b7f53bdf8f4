"""Every field of the log's schema, from files: lists, numbers, vectors, weights, regressions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.data.vocabulary import Vocabulary

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

ROWS = {"user": "u", "item": "i", "time": "t"}
TABLES: dict[str, dict[str, list[Any]]] = {
    "events": {
        "u": ["ann", "ann", "bob"], "i": ["tea", "cup", "tea"], "t": [1, 2, 3],
        "action": ["buy", "see", "see"], "device": [7, None, 8], "dwell": [2.5, None, 30.0],
        "weight": [1.0, 0.5, 0.0],
    },
    "shown": {
        "u": ["ann", "ann", "bob"], "i": ["tea", "pot", "cup"], "t": [10, 10, 20],
        "click": [1, 0, 1], "watch": [12.0, 0.0, 3.5], "hour": [0.5, 0.5, None],
        "interests": [["hot", "new"], ["hot", "new"], []], "place": ["top", "low", None],
        "bid": [1.5, None, 2.0],
    },
    "items": {
        "i": ["tea", "cup", "pot"], "genres": ["a| b|", None, "b"], "colours": [[1, 2], [2], []],
        "price": [3.0, None, 12.5], "text": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "row": [2, 0, 1],
    },
    "users": {"u": ["ann", "bob"], "towns": ["Ulm;Bonn", "Bonn"], "age": [30.0, None]},
}  # fmt: skip


def write(
    folder: Path,
    change: Callable[[dict[str, dict[str, list[Any]]]], None] | None = None,
    **parts: Any,
) -> Path:
    """Four Parquet tables with every kind of field, and their schema."""
    tables = json.loads(json.dumps(TABLES))
    if change:
        change(tables)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    np.save(folder / "pictures.npy", np.arange(9, dtype=np.float16).reshape(3, 3))
    rows = {**ROWS, "unit": "s"}
    year = f"{365 * 24 * 3600 * 40} + t"  # 2009, since times in 1970 are refused as mistakes
    rows["time"] = year
    schema = {
        "events": {
            "files": "events.parquet", **rows, "features": {"action": "action", "device": "device"},
            "dense": {"dwell": "dwell"}, "weight": "weight",
        },
        "requests": {
            "files": "shown.parquet", **rows,
            "labels": {"click": "click", "watch": {"regression": "watch"}},
            "dense": {"hour": "hour"}, "context_lists": {"interest": "interests"},
            "candidate_features": {"place": {"column": "place", "hash": 5}},
            "candidate_dense": {"bid": "bid"},
        },
        "items": {
            "files": "items.parquet", "item": "i",
            "lists": {"genre": {"column": "genres", "delimiter": "|"},
                      "colour": {"column": "colours", "hash": 9}},
            "dense": {"price": "price"},
            "vectors": {"text": "text", "picture": {"npy": "pictures.npy", "row": "row"}},
        },
        "users": {
            "files": "users.parquet", "user": "u", "dense": {"age": "age"},
            "lists": {"town": {"column": "towns", "delimiter": ";"}},
        },
        "log_scaled": ["price", "watch", "dwell"],
        "splits": {},
    }  # fmt: skip
    for name, part in parts.items():
        schema[name] = {**schema[name], **part} if isinstance(part, dict) else part
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / "schema.json"


def lists(columns: dict[str, np.ndarray], name: str) -> list[list[int]]:
    """A list column, row by row."""
    ends = columns[f"{name}_offsets"]
    return [part.tolist() for part in np.split(columns[name], ends[1:-1])]


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def report(log: EventLog) -> dict[str, Any]:
    return json.loads((log.path / "report.json").read_text())


def test_all_fields_of_a_log(tmp_path: Path) -> None:
    log = prepare(load_schema(write(tmp_path)), tmp_path / "log")
    schema, ids = log.schema, Vocabulary.load(log.path)
    assert schema.item_lists == {"genre": 3, "colour": 9} and schema.item_dense == ("price",)
    assert schema.item_vectors == {"text": 2, "picture": 3}
    assert schema.event_features == {"action": 3, "device": 3} and schema.event_dense == ("dwell",)
    assert schema.event_weight == "weight" and schema.log_scaled == ("price", "watch", "dwell")
    assert schema.context_lists == {"interest": 3, "town": 3}
    assert schema.dense_features == ("hour", "age") and schema.candidate_dense == ("bid",)
    assert schema.candidate_features == {"place": 5}
    assert schema.tasks == {"click": "binary", "watch": "regression"}

    # items are unknown, cup, pot, tea
    assert [ids["genre"].at(row) for row in lists(log.items, "genre")] == [[], [], ["b"], ["a", "b"]]
    colours = ids["colour"].rows_of([1, 2]).tolist()
    assert lists(log.items, "colour") == [[], [colours[1]], [], colours]
    np.testing.assert_array_equal(log.items["price"], np.float32([np.nan, np.nan, 12.5, 3]))
    assert log.items["text"].tolist() == [[0, 0], [3, 4], [5, 6], [1, 2]]
    assert log.items["picture"].tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [6, 7, 8]]

    assert ids["action"].at(log.events["action"]) == ["buy", "see", "see"]
    assert ids["device"].at(log.events["device"]) == [7, None, 8]
    np.testing.assert_array_equal(log.events["dwell"], np.float32([2.5, np.nan, 30]))
    assert log.events["weight"].tolist() == [1, 0.5, 0]

    train = log.requests("train")  # ann's pot and tea, bob's cup
    assert train["click"].tolist() == [0, 1, 1] and train["watch"].tolist() == [0, 12, 3.5]
    np.testing.assert_array_equal(train["hour"], np.float32([0.5, np.nan]))
    np.testing.assert_array_equal(train["age"], np.float32([30, np.nan]))
    np.testing.assert_array_equal(train["bid"], np.float32([np.nan, 1.5, 2]))
    assert [ids["interest"].at(row) for row in lists(train, "interest")] == [["hot", "new"], []]
    assert [ids["town"].at(row) for row in lists(train, "town")] == [["Ulm", "Bonn"], ["Bonn"]]
    assert train["place"].tolist() == [*ids["place"].rows_of(["low", "top"]), 0]


def test_names_of_items_may_be_any(tmp_path: Path) -> None:
    """Such names are also columns of intermediate files."""

    def named(tables: dict[str, dict[str, list[Any]]]) -> None:
        tables["items"] |= {"kind": ["drink", "ware", "ware"], "n": [1, 2, 2]}

    for first, second in (("id", "code"), ("code", "id")):
        folder = tmp_path / first
        folder.mkdir()
        items = {"features": {first: "kind", "n": "n"}, "dense": {second: "price"}}
        described = write(folder, named, items=items, log_scaled=[])
        log = prepare(load_schema(described), folder / "log")
        ids = Vocabulary.load(log.path)
        # items are unknown, cup, pot, tea
        assert ids[first].at(log.items[first])[1:] == ["ware", "ware", "drink"]
        np.testing.assert_array_equal(log.items[second], np.float32([np.nan, np.nan, 12.5, 3]))


@pytest.mark.parametrize("kind", ["feather", "csv"])
def test_of_other_files(tmp_path: Path, kind: str) -> None:
    """Lists as texts in CSV; fixed-size lists in Feather."""
    wanted = prepare(load_schema(write(tmp_path)), tmp_path / "wanted")
    path = write(tmp_path)
    for name, columns in TABLES.items():
        table = pa.table(columns)
        if kind == "feather":
            if name == "items":
                fixed = table["text"].cast(pa.list_(pa.float32(), 2))
                table = table.set_column(table.column_names.index("text"), "text", fixed)
            pyarrow.feather.write_feather(table, str(tmp_path / f"{name}.feather"))
        else:
            pd.DataFrame(columns).to_csv(tmp_path / f"{name}.csv", index=False)
    path.write_text(path.read_text().replace(".parquet", f".{kind}"))
    if kind == "csv":
        text = path.read_text().replace('"action": "action", "device": "device"', '"action": "action", '
                                        '"device": "device::FLOAT::INT"')  # fmt: skip
        path.write_text(text.replace("+ t", "+ t::INT"))
    log = prepare(load_schema(path), tmp_path / "log")
    assert log.schema == wanted.schema
    for columns, same in (
        (log.events, wanted.events),
        (log.items, wanted.items),
        (log.requests("train"), wanted.requests("train")),
    ):
        for name in columns:
            np.testing.assert_array_equal(columns[name], same[name], err_msg=name)


class TestVectors:
    def test_in_the_order_of_the_items(self, tmp_path: Path) -> None:
        path = write(tmp_path, items={"vectors": {"picture": {"npy": "pictures.npy"}}})
        log = prepare(load_schema(path), tmp_path / "log")
        assert log.items["picture"].tolist() == [[0, 0, 0], [3, 4, 5], [6, 7, 8], [0, 1, 2]]

    def test_an_item_without_one_has_zeros(self, tmp_path: Path) -> None:
        def change(tables: dict) -> None:
            tables["items"]["text"][1] = tables["items"]["row"][1] = None

        log = prepare(load_schema(write(tmp_path, change)), tmp_path / "log")
        assert log.items["text"].tolist()[1] == [0, 0] and log.items["picture"].tolist()[1] == [0] * 3

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (None, ["gone.npy", "cannot be read"]),
            (np.zeros((4, 3)), ["gone.npy has 4 rows", "items' table has 3", "`row`"]),
            (np.zeros(3), ["gone.npy", "(3,)", "floats [rows, width]"]),
            (np.zeros((3, 3), np.int64), ["int64", "expected floats"]),
            (np.array([[0, 0], [0, np.inf], [0, 0]]), ["row 1, column 1 is inf"]),
            (np.array([[0, 0], [0, 0], [1e300, 0]]), ["row 2, column 0 is 1e+300"]),
            (np.array([[None, {}]] * 3), ["cannot be read"]),
        ],
        ids=["missing", "rows", "shape", "integers", "inf", "beyond", "pickle"],
    )
    def test_of_a_bad_npy(self, tmp_path: Path, array: np.ndarray | None, words: list[str]) -> None:
        if array is not None:
            np.save(tmp_path / "gone.npy", array)
        path = write(tmp_path, items={"vectors": {"picture": {"npy": "gone.npy"}}})
        with refused("items.vectors.picture", *words):
            prepare(load_schema(path), tmp_path / "log")


def _set(table: str, column: str, row: int, value: Any) -> Callable[[dict], None]:
    def change(tables: dict) -> None:
        tables[table][column][row] = value

    return change


BAD = {
    "text is a vector whose length is not 2, that of most items": _set(
        "items", "text", 1, [1.0, 2.0, 3.0]
    ),
    "text has a missing, NaN or infinite number": _set("items", "text", 1, [1.0, float("inf")]),
    "picture is not a row of its .npy file, which has 3": _set("items", "row", 1, 3),
    "price is negative, but in log_scaled": _set("items", "price", 1, -1.0),
    "price is not a finite number": _set("items", "price", 1, float("nan")),
    "dwell is not a finite number": _set("events", "dwell", 1, 1e300),
    "weight is not a finite number of at least 0": _set("events", "weight", 1, -1.0),
    "label watch is not a number": _set("shown", "watch", 2, None),
    "bid is not a finite number": _set("shown", "bid", 2, float("-inf")),
    "interest has an empty id": _set("shown", "interests", 2, ["hot", None]),
    "colour has an empty id": _set("items", "colours", 1, [None]),
}


class TestBadInput:
    @pytest.mark.parametrize("why", BAD)
    def test_is_named(self, tmp_path: Path, why: str) -> None:
        """The error names file, row and value; the row is counted if some may be refused."""
        schema = load_schema(write(tmp_path, BAD[why]))
        vector = why.startswith(("text is", "picture"))
        with refused("1 of 3", why, "cup", "max_refused", *([] if vector else [".parquet", "'_row'"])):
            prepare(schema, tmp_path / "log")
        log = prepare(schema, tmp_path / "allowed", max_refused=0.4)
        (figures,) = (t for t in report(log)["refused"].values() if t["refused"])
        assert (figures["rows"], figures["refused"]) == (3, 1) and next(
            iter(figures["reasons"])
        ).startswith(why)

    def test_a_text_that_is_not_a_list(self, tmp_path: Path) -> None:
        path = write(tmp_path, items={"lists": {"genre": "genres"}})
        with refused("genre is not a list", "`delimiter`"):
            prepare(load_schema(path), tmp_path / "log")

    @pytest.mark.parametrize("kind", ["parquet", "feather"])
    def test_a_column_with_another_type_in_the_second_file(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path)
        path.write_text(path.read_text().replace("events.parquet", f"events-*.{kind}"))
        for number, i in enumerate([["tea", "cup", "tea"], [1, 2, 3]]):
            table, file = (
                pa.table({**TABLES["events"], "i": i}),
                str(tmp_path / f"events-{number}.{kind}"),
            )
            pq.write_table(table, file) if kind == "parquet" else pyarrow.feather.write_feather(
                table, file
            )
        with refused("events: the column 'i' is int64", f"events-1.{kind}", "string in", "use one type"):
            prepare(load_schema(path), tmp_path / "log")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"items": {"lists": {"genre": {"column": "g", "delimiter": ""}}}}, ["delimiter is empty"]),
            ({"items": {"lists": {"genre": {"column": "genres", "hash": 1}}}}, ["'genres'", "hash"]),
            ({"items": {"lists": {"genre": {"colum": "genres"}}}}, ["items.lists.genre", "'column'"]),
            ({"items": {"vectors": {"text": {"file": "x.npy"}}}}, ["items.vectors.text", "'npy'"]),
            ({"items": {"dense": {"price": 5}}}, ["items.dense.price", "a string"]),
            ({"events": {"weight": ""}}, ["events.weight is empty"]),
            ({"events": {"dense": {"weight": "dwell"}}}, ["'weight'", "twice"]),
            ({"events": {"features": {"price": "action"}}}, ["'price'", "twice"]),
            ({"events": {"time": None}}, ["events.time is missing", "`each`"]),
            ({"requests": {"time": None}}, ["requests.time is missing"]),
            ({"requests": {"labels": {"watch": {"regress": "watch"}}}},
             ["requests.labels.watch", "['regression']", "['column']", "'within_seconds'"]),
            ({"requests": {"negatives": 2, "candidate_dense": {}, "candidate_features": {}}},
             ["regression", "['watch']"]),
            ({"requests": {"negatives": 2, "labels": {"click": "click"}, "candidate_dense": {}}},
             ["candidate_features", "['place']"]),
            ({"log_scaled": ["prices"]}, ["log_scaled", "'prices'"]),
            ({"splits": {"test": {"users": 0.1}}}, ["splits.test", "splits are only by time"]),
        ],
        ids=str,
    )  # fmt: skip
    def test_of_the_schema(self, tmp_path: Path, change: dict, words: list[str]) -> None:
        path = write(tmp_path)
        schema = json.loads(path.read_text())
        for name, part in change.items():
            schema[name] = {**schema[name], **part} if isinstance(part, dict) else part
        path.write_text(json.dumps(schema))
        with refused(*words):
            prepare(load_schema(path), tmp_path / "log")
