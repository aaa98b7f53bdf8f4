"""Ids and other values of typed columns: which are the same id, missing or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.data.vocabulary import hash_row

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

T = 1_714_557_600  # the first of May 2024
ROWS = {"user": "u", "item": "i", "time": "t", "unit": "s"}


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def prepared(folder: Path, columns: dict[str, Any], **changes: Any) -> EventLog:
    """A log from one Parquet file with three rows, which are both its events and its requests."""
    table = {"u": [1, 1, 2], "i": [5, 6, 5], "t": [T, T + 9, T + 20], "click": [1, 0, 1], **columns}
    pq.write_table(pa.table(table), folder / "log.parquet")
    schema: dict[str, Any] = {
        "events": {"files": "log.parquet", **ROWS},
        "requests": {"files": "log.parquet", **ROWS, "labels": {"click": "click"}},
        "splits": {},
    }
    for name, part in changes.items():
        schema[name] = {**schema[name], **part} if name in schema else part
    (folder / "schema.json").write_text(json.dumps(schema))
    return prepare(load_schema(folder / "schema.json"), folder / "log")


class TestWholeFloats:
    """Integers with nulls are floats in many Parquet files."""

    def test_are_integers(self, tmp_path: Path) -> None:
        columns = {
            "u": [10.0, 10.0, 12.0],
            "i": pa.array([7.0, 8.0, 7.0], pa.float32()),
            "page": [10.0, None, 1.5],
        }
        log = prepared(tmp_path, columns, requests={"context": {"page": "page"}})
        assert log.vocabulary["user"].at([1, 2]) == [10, 12]
        assert log.vocabulary["item"].at([1, 2]) == [7, 8]
        assert log.vocabulary["page"].at([1, 2]) == ["1.5", "10"]

    def test_are_hashed_as_integers(self, tmp_path: Path) -> None:
        columns = {
            "i": [10.0, 11.0, 10.0],
            "page": [10.0, None, 12.0],
            "tags": [[10.0], [], [11.0, 12.5]],
        }
        item = {"item": {"column": "i", "hash": 99}}
        context = {"context": {"page": {"column": "page", "hash": 99}}}
        context["context_lists"] = {"tag": {"column": "tags", "hash": 99}}
        log = prepared(tmp_path, columns, events=item, requests={**item, **context})
        assert log.events["item"].tolist() == [hash_row(i, 99) for i in (10, 11, 10)]
        train = log.requests("train")
        assert train["page"].tolist() == [hash_row(10, 99), 0, hash_row(12, 99)]
        assert train["tag"].tolist() == [hash_row(tag, 99) for tag in (10, 11, "12.5")]

    def test_of_items_and_users(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table({"i": [5.0, 6.0], "kind": [3.0, None], "tags": [[1.0, 2.0], []]}),
            tmp_path / "items.parquet",
        )
        pq.write_table(pa.table({"u": [1.0, 2.0], "age": [30.0, None]}), tmp_path / "users.parquet")
        items = {"files": "items.parquet", "item": "i", "features": {"kind": "kind"}}
        users = {"files": "users.parquet", "user": "u", "features": {"age": "age"}}
        log = prepared(tmp_path, {}, items={**items, "lists": {"tag": "tags"}}, users=users)
        assert log.items["kind"].tolist() == [0, 1, 0]
        assert log.vocabulary["tag"].at([1, 2]) == [1, 2] and log.vocabulary["age"].at([1]) == [30]
        assert log.requests("train")["age"].tolist() == [1, 1, 0]


class TestEmptyTexts:
    """They are null in CSV, and so they are in other formats."""

    @pytest.mark.parametrize("column", ["u", "i"])
    def test_an_event_needs_its_ids(self, tmp_path: Path, column: str) -> None:
        with refused("events: 1 of 3", f"{'user' if column == 'u' else 'item'} is empty"):
            prepared(tmp_path, {column: ["a", "", "b"]})

    def test_of_an_expression(self, tmp_path: Path) -> None:
        with refused("events: 3 of 3", "user is empty"):
            prepared(tmp_path, {}, events={"user": "''"})

    def test_of_a_request(self, tmp_path: Path) -> None:
        with refused("requests: 1 of 3", "request is empty"):
            prepared(tmp_path, {"r": ["a", "", "b"]}, requests={"request": "r"})

    def test_of_lists(self, tmp_path: Path) -> None:
        tags = [["a"], ["", "b"], []]
        with refused("requests: 1 of 3", "tag has an empty id"):
            prepared(tmp_path, {"tags": tags}, requests={"context_lists": {"tag": "tags"}})

    def test_a_feature_is_unknown(self, tmp_path: Path) -> None:
        log = prepared(tmp_path, {"page": ["a", "", "b"]}, requests={"context": {"page": "page"}})
        assert log.requests("train")["page"].tolist() == [1, 0, 2]


class TestMissingColumns:
    @pytest.mark.parametrize(
        ("change", "column"),
        [
            ({"labels": {"click": "click", "seen": "exposed"}}, "exposed"),
            ({"dense": {"hour": "hour(time)"}}, "time"),
            ({"candidate_features": {"same": "item"}}, "item"),
        ],
    )
    def test_are_not_resolved_to_output_columns(
        self, tmp_path: Path, change: dict[str, Any], column: str
    ) -> None:
        with refused("requests: the schema does not match", "log.parquet", f'"{column}" not found'):
            prepared(tmp_path, {}, requests=change)


class TestExposed:
    @pytest.mark.parametrize("wrong", [-1, 2, 0.3])
    def test_is_0_or_1(self, tmp_path: Path, wrong: float) -> None:
        with refused("requests: 1 of 3", "exposed is not 0 or 1"):
            prepared(tmp_path, {"seen": [1, wrong, 0]}, requests={"exposed": "seen"})

    @pytest.mark.parametrize("seen", [[1, 0, 1], [1.0, 0.0, 1.0], [True, False, True], ["t", "f", "1"]])
    def test_of_any_type(self, tmp_path: Path, seen: list[Any]) -> None:
        log = prepared(tmp_path, {"seen": seen}, requests={"exposed": "seen"})
        assert log.requests("train")["exposed"].tolist() == [True, False, True]


def test_a_file_whose_name_is_a_pattern_is_read_as_itself(tmp_path: Path) -> None:
    other = {"u": [3], "i": [9], "t": [T + 30], "click": [1]}
    pq.write_table(pa.table(other), tmp_path / "log[1].parquet")
    pq.write_table(pa.table({**other, "i": [8]}), tmp_path / "log1.parquet")
    files = {"files": "log*.parquet"}
    log = prepared(tmp_path, {}, events=files, requests=files)
    assert len(log.events["item"]) == 5
    assert sorted(log.vocabulary["item"].at(log.events["item"])) == [5, 5, 6, 8, 9]


def test_a_32_bit_float_is_not_a_time(tmp_path: Path) -> None:
    with refused("events: 3 of 3", "time cannot be read as a number in s (a 32-bit float is"):
        prepared(tmp_path, {"t": pa.array([float(T)] * 3, pa.float32())})
    log = prepared(tmp_path, {"t": [T + 0.5, T + 1.0, T + 2.0]})
    assert log.events["time"].tolist()[0] == (10**6 * T + 500_000)


def test_a_row_of_an_npy_is_an_integer(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 2), np.float32))
    for rows in ([1.0, 1.6], ["1", "1.6"]):
        pq.write_table(pa.table({"i": [5, 6], "row": rows}), tmp_path / "items.parquet")
        items = {"files": "items.parquet", "item": "i", "vectors": {"v": {"npy": "v.npy", "row": "row"}}}
        with refused("items: 1 of 2", "v is not a row number", "1.6"):
            prepared(tmp_path, {}, items=items)


def test_min_count_is_not_for_hashed_items(tmp_path: Path) -> None:
    item = {"item": {"column": "i", "hash": 99}}
    with refused("min_count is 2", "events.item has a hash"):
        prepared(tmp_path, {}, events=item, requests=item, min_count=2)
