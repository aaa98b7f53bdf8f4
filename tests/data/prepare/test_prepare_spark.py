"""On Spark ``prepare`` writes the same log as on one machine: rows, report and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_prepare
import test_prepare_fields
import test_prepare_impressions

from ifa_torchrec.data import LogError
from ifa_torchrec.data.prepare import (
    Events,
    Hashed,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
    load_schema,
    prepare,
)

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

PARTS = 3


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def written_in_two(folder: Path, text: str) -> str:
    """Write CSV lines to two files; returns the pattern for both."""
    header, *lines = text.splitlines(keepends=True)
    (folder / "half-1.csv").write_text("".join([header, *lines[:4]]))
    (folder / "half-2.csv").write_text("".join([header, *lines[4:]]))
    return str(folder / "half-*.csv")


def shown(folder: Path) -> PrepareSchema:
    """Two CSV files with refused rows, requests by gap, users and a joined label."""
    text = test_prepare.SHOWN + "ann,tea,yesterday,c,0,1\nbob\nbob,,2024-05-02 10:00:00,c,0,1\n"
    (folder / "users.csv").write_text("id,town\nann,Ulm\nzoe,Bonn\n")
    (folder / "buys.csv").write_text("u,i,t\nann,tea,1714557660\nzoe,cup,1714558000\n")
    buys = JoinedLabel(
        files=str(folder / "buys.csv"), user="u", item="i", time="t", unit="s", within_seconds=60
    )
    schema = test_prepare.described(
        folder,
        gap_seconds=30,
        labels={"click": "clicked", "buy": buys},
        context={"page": Hashed("page", hash=8)},
        candidate_features={"page_of_candidate": "page"},
        dense={"hour": "hour(time::TIMESTAMP) / 24"},
        candidate_dense={"price": "price"},
        users=Users(files=str(folder / "users.csv"), user="id", features={"town": "town"}),
        splits={"test": 0.8},
        min_count=2,
    )
    both = written_in_two(folder, text)
    return replace(
        schema, events=replace(schema.events, files=both), requests=replace(schema.requests, files=both)
    )


def every_field(folder: Path) -> PrepareSchema:
    """Parquet with lists, numbers, vectors, weights, a regression."""
    return load_schema(test_prepare_fields.write(folder))


def mind(folder: Path) -> PrepareSchema:
    """Impressions as lists in a row, and histories given as lists without times."""
    (folder / "behaviors.tsv").write_text(test_prepare_impressions.BEHAVIORS)
    return load_schema(test_prepare_impressions.written(folder, test_prepare_impressions.MIND_SCHEMA))


def lists(folder: Path) -> PrepareSchema:
    """One row per request in two Parquet files, lists of equal length, requests without users."""
    rng = np.random.default_rng(0)
    users = [*[None, "ann", "bob", "cat"] * 8]
    rows = pa.table(
        {
            "u": users,
            "t": [f"2024-05-{1 + n // 2:02} 10:00:00" for n in range(len(users))],
            "items": [rng.integers(0, 9, 3).tolist() for _ in users],
            "clicks": [[int(click)] for click in rng.integers(0, 9, len(users))],
            "history": [rng.integers(0, 9, 2).tolist() for _ in users],
        }
    )
    pq.write_table(rows.slice(0, 13), folder / "rows-1.parquet")
    pq.write_table(rows.slice(13), folder / "rows-2.parquet")
    given = {"files": "rows-*.parquet", "user": "u"}
    schema = {
        "events": {**given, "where": "u IS NOT NULL", "each": {"read": "history"}, "item": "read"},
        "requests": {
            **given, "time": "t", "each": {"shown": "items"}, "item": "shown",
            "labels": {"click": {"column": "clicks"}},
        },
        "splits": {"test": 0.7},
    }  # fmt: skip
    (folder / "schema.json").write_text(json.dumps(schema))
    return load_schema(folder / "schema.json")


def random(folder: Path) -> PrepareSchema:
    """A few thousand rows of 40 users, with a regression and missing numbers."""
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2024-01-01").value // 1000
    rows = pd.DataFrame(
        {
            "user": rng.integers(1, 41, 5000),
            "item": rng.geometric(0.05, 5000),
            "time": start + rng.integers(0, 200, 5000) * 3_600_000_000,
            "label": rng.integers(0, 2, 5000),
            "watch": np.where(rng.random(5000) < 0.1, np.nan, rng.random(5000)),
        }
    )
    for n in range(3):
        rows[n::3].to_parquet(folder / f"rows-{n}.parquet")
    given = {"files": str(folder / "rows-*.parquet"), "unit": "us"}
    given |= {column: column for column in ("user", "item", "time")}
    return PrepareSchema(
        events=Events(
            **given, where="item % 3 = 0", dense={"watch": "watch"}, features={"kind": "label"}
        ),
        requests=Requests(**given, labels={"label": "label"}, candidate_dense={"seen": "watch"}),
        splits={"valid": "2024-01-05", "test": 0.9},
        log_scaled=["watch"],
    )


CASES = [shown, every_field, mind, lists, random]


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """A Spark session on this machine."""
    if shutil.which("java") is None:
        pytest.skip("java is not installed, and Spark runs on it")
    sql = pytest.importorskip("pyspark.sql", reason="the extra `spark` is not installed")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    options = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2"}
    options |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    session = sql.SparkSession.builder.master("local[2]").config(map=options).getOrCreate()
    yield session
    session.stop()


def tables(log: Path) -> dict[str, pa.Table]:
    """All tables of a log, by path."""
    files = [file for file in sorted(log.rglob("*.parquet")) if ".columns" not in file.parts]
    return {str(file.relative_to(log)): pq.read_table(file) for file in files}


def assert_alike(one: Any, other: Any, where: str = "report") -> None:
    """Compare two reports; sums of floats may be in another order."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            assert_alike(one[name], other[name], f"{where}.{name}")
    else:
        assert other == (pytest.approx(one, rel=1e-9) if isinstance(one, float) else one), where


def assert_same(one: Path, other: Path) -> None:
    """Files, rows and their order, ids and the report are the same."""
    mine, theirs = tables(one), tables(other)
    assert list(mine) == list(theirs)
    for name in mine:
        types = [
            dict(zip(t.column_names, t.schema.types, strict=True)) for t in (mine[name], theirs[name])
        ]
        assert list(types[0].items()) == list(types[1].items()), name
        pd.testing.assert_frame_equal(mine[name].to_pandas(), theirs[name].to_pandas(), obj=name)
    for file in (one / "vocabulary").iterdir():
        assert file.read_bytes() == (other / "vocabulary" / file.name).read_bytes()
    assert_alike(*(json.loads((log / "report.json").read_text()) for log in (one, other)))
    headers = [json.loads((log / "schema.json").read_text()) for log in (one, other)]
    for header in headers:
        header.pop("parts")  # checksums of files; their rows are compared above
    assert headers[0] == headers[1]


@pytest.mark.slow
class TestOnSpark:
    @pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
    def test_it_is_the_log_of_one_machine(
        self, spark: Any, tmp_path: Path, case: Callable[[Path], PrepareSchema]
    ) -> None:
        schema = case(tmp_path)
        options = {"parts": PARTS, "max_refused": 0.5}
        one = prepare(schema, tmp_path / "one", **options)
        other = prepare(schema, tmp_path / "other", engine="spark", **options)
        assert other.parts == PARTS
        assert_same(one.path, other.path)
        assert sorted(file.name for file in other.path.iterdir()) == sorted(
            file.name for file in one.path.iterdir()
        )

    def test_refused_rows_are_reported_as_on_one_machine(self, spark: Any, tmp_path: Path) -> None:
        schema = shown(tmp_path)
        figures = []
        for engine in ("duckdb", "spark"):
            with refused("rows are refused", "line cannot be read", "bob") as error:
                prepare(schema, tmp_path / engine, parts=PARTS, engine=engine, max_refused=0.1)
            figures.append(str(error.value))
            assert not (tmp_path / engine).exists()
        assert figures[0] == figures[1]


class TestIsRefused:
    """Before anything is read, and without PySpark."""

    def test_negatives(self, tmp_path: Path) -> None:
        schema = test_prepare.described(tmp_path, negatives=2)
        with refused("negatives=2", "engine duckdb"):
            prepare(schema, tmp_path / "log", parts=4, engine="spark")

    def test_one_part(self, tmp_path: Path) -> None:
        with refused("parts=1", "two or more"):
            prepare(test_prepare.described(tmp_path), tmp_path / "log", engine="spark")

    def test_a_folder_that_is_a_pattern(self, tmp_path: Path) -> None:
        with refused("[1]", "pattern"):
            prepare(test_prepare.described(tmp_path), tmp_path / "log[1]", parts=4, engine="spark")

    def test_an_unknown_engine(self, tmp_path: Path) -> None:
        with refused("engine", "'duckdb', 'spark'", "'flink'"):
            prepare(test_prepare.described(tmp_path), tmp_path / "log", engine="flink")


class TestEachFile:
    def test_types_are_those_of_the_first(self, tmp_path: Path) -> None:
        import duckdb

        from ifa_torchrec.data.prepare.files import each_file
        from ifa_torchrec.data.prepare.schema import Table

        pd.DataFrame({"u": [1], "i": [1]}).to_parquet(tmp_path / "a.parquet")
        pd.DataFrame({"u": [1.0], "i": [1]}).to_parquet(tmp_path / "b.parquet")
        table = Table(files=str(tmp_path / "*.parquet"))
        with refused("'u' is DOUBLE", "b.parquet", "BIGINT", "a.parquet"):
            each_file("events", table, False, duckdb.connect())

    def test_rows_before(self, tmp_path: Path) -> None:
        import duckdb

        from ifa_torchrec.data.prepare.files import each_file
        from ifa_torchrec.data.prepare.schema import Table

        for name, rows in (("a", 3), ("b", 2), ("c", 1)):
            pd.DataFrame({"u": range(rows)}).to_parquet(tmp_path / f"{name}.parquet")
            (tmp_path / f"{name}.csv").write_text("u\n1\n")
        files = each_file("events", Table(files=str(tmp_path / "*.parquet")), True, duckdb.connect())
        assert list(files.values()) == [0, 3, 5]
        with refused("`each`", "one file"):
            each_file("events", Table(files=str(tmp_path / "*.csv")), True, duckdb.connect())
