"""Real-world files: each row is read, or refused and counted; errors name what cannot be read."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.prepare import csv_rows, load_schema, prepare
from ifa_torchrec.data.prepare.files import Source, read_header
from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.public import kuairand, movielens, recbole, recflow

duckdb = pytest.importorskip("duckdb", reason="the extra `data` is not installed")
SQL = duckdb.connect()


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def write(folder: Path, content: str | bytes, name: str = "log.csv") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(*files: Path | str, **options: Any) -> tuple[list[tuple], Source]:
    """All rows of the files."""
    source = Source("events", Table(files=[str(file) for file in files], **options), SQL)
    with source.reading():
        return SQL.execute(f"FROM {source.relation}").fetchall(), source


def refused_rows(source: Source) -> int:
    return sum(reason["rows"] for reason in source.refused.values())


def numbered(rows: int, titles: dict[int, str]) -> str:
    """A file with this many rows, some with given titles."""
    lines = [f"u{n},i{n},{titles.get(n, 'name')}" for n in range(rows)]
    return "\n".join(["user,item,title", *lines])


class TestHeader:
    @pytest.mark.parametrize(
        ("header", "row", "columns"),
        [(",u,i", "0,a,b", ["column0", "u", "i"]),
         ("u,i,", "a,b,", ["u", "i", "column2"]),
         ('u,"price, EUR",i', "a,2,b", ["u", "price, EUR", "i"]),
         ('u,"say ""x""",i', "a,2,b", ["u", 'say "x"', "i"]),
         ('u,"price\n(EUR)",i', "a,2,b", ["u", "price\n(EUR)", "i"]),
         ("\ufeffu,i", "a,b", ["u", "i"]),
         ("\n\nu,i", "a,b", ["u", "i"]),
         ("column1,,i", "a,2,b", ["column1", "column1_", "i"])],
    )  # fmt: skip
    def test_is_a_line_of_csv(self, tmp_path: Path, header: str, row: str, columns: list[str]) -> None:
        rows, source = read(write(tmp_path, f"{header}\n{row}\n"))
        assert rows == [tuple(value or None for value in row.split(","))] and not source.refused
        assert list(source.columns.values()) == columns

    def test_a_repeated_name_is_neither_column(self, tmp_path: Path) -> None:
        rows, source = read(write(tmp_path, "u,note,Id,note,ID\na,1,2,3,4\n"))
        assert rows == [("a", "1", "2", "3", "4")]
        # names that differ in case are different columns
        assert source.columns == {"u": "u", "Id": "Id_1", "ID": "ID_2"}

    def test_a_name_in_another_case_is_another_column(self, tmp_path: Path) -> None:
        frame = pd.DataFrame({"Id": [1], "ID": [2]})
        frame.to_parquet(tmp_path / "log.parquet")
        pyarrow.feather.write_feather(frame, str(tmp_path / "log.feather"))
        for kind in ("parquet", "feather"):
            source = Source("events", Table(files=str(tmp_path / f"log.{kind}")), SQL)
            found = SQL.execute(f"SELECT {source.columns['ID']} FROM {source.relation}").fetchall()
            assert found == [(2,)]

    @pytest.mark.parametrize(
        ("content", "words"),
        [("", ["is empty", "columns"]),
         ('u,"i\na,b\n', ["is not valid CSV"]),
         ('u,"i\na,b\na,b"\n', ["quote", "does not close there"]),
         ("u,\u4e2d\na,b\n".encode("gbk"), ["not utf-8", "encoding"])],
        ids=["empty", "open", "rows in a name", "gbk"],
    )  # fmt: skip
    def test_invalid_headers(self, tmp_path: Path, content: str | bytes, words: list[str]) -> None:
        with refused("events: ", "log.csv", *words):
            read(write(tmp_path, content))


class TestLines:
    @pytest.mark.parametrize(
        "content",
        ["u,i\na,1\r\nb,2\nc,3\n", "u,i\r\na,1\r\nb,2\nc,3", "u,i\ra,1\rb,2\rc,3\r",
         "u,i\r\na,1\r\nb,2\r\nc,3\r",
         "u,i\n\na,1\n\n\nb,2\nc,3\n\n\n"],
        ids=["a CRLF", "an LF", "CR", "CR at the end", "empty lines"],
    )  # fmt: skip
    @pytest.mark.parametrize("block", [3, 1 << 22])
    def test_end_in_any_way(self, tmp_path: Path, monkeypatch, content: str, block: int) -> None:
        monkeypatch.setattr(csv_rows, "BLOCK", block)
        rows, source = read(write(tmp_path, content))
        assert rows == [("a", "1"), ("b", "2"), ("c", "3")] and not source.refused

    def test_a_carriage_return_within_a_value_is_part_of_it(self, tmp_path: Path) -> None:
        rows, source = read(write(tmp_path, 'u,i\nna\rme,1\n"x\ry",2\n'))
        assert rows == [("na\rme", "1"), ("x\ry", "2")] and not source.refused

    def test_lines_that_ended_with_it_are_counted(self, tmp_path: Path) -> None:
        rows, source = read(write(tmp_path, "u,i\na,1\n" + "b,2\r" * 40 + "\nc,3\n"))
        assert rows == [("a", "1"), ("c", "3")] and refused_rows(source) == 40

    def test_of_other_columns_are_refused(self, tmp_path: Path) -> None:
        rows, source = read(write(tmp_path, "u,i\na,1\nb\nc,3,4\nd,4\n"))
        assert rows == [("a", "1"), ("d", "4")]
        reason = "line cannot be read: expected 2 columns, "
        assert source.refused == {
            f"{reason}got 1": {"rows": 1, "examples": ["log.csv: b"]},
            f"{reason}got 3": {"rows": 1, "examples": ["log.csv: c,3,4"]},
        }

    def test_none_is_longer_than_memory(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(csv_rows, "LONGEST_LINE", 1000)
        with refused("log.csv", "a line of more than"):
            read(write(tmp_path, "u,i\n" + "a" * 70_000))


class TestQuotes:
    @pytest.mark.parametrize("block", [100, 1 << 22])
    def test_a_value_may_have_several_lines(self, tmp_path: Path, monkeypatch, block: int) -> None:
        monkeypatch.setattr(csv_rows, "BLOCK", block)
        texts = ["One,\ntwo, three\nfour", "\n\nspaced\n", 'he said\n""no""\n', "x\ny"]
        texts = [texts[n % 4] for n in range(100)]
        for column in range(3):  # the column of the text
            rows = [[f"u{n}", f"i{n}"] for n in range(100)]
            for row, text in zip(rows, texts, strict=True):
                row.insert(column, f'"{text}"')
            content = "a,b,c\n" + "\n".join(map(",".join, rows))
            found, source = read(write(tmp_path, content))
            assert [row[column] for row in found] == [text.replace('""', '"') for text in texts]
            assert not source.refused

    @pytest.mark.parametrize("block", [100, 1 << 22])
    @pytest.mark.parametrize(
        ("titles", "lost"),
        [({100: '"Alien', 500: '"Aliens'}, [*range(100, 501)]),  # the second never closes
         ({100: '"Alien', 500: 'Aliens"'}, [*range(100, 501)]),
         ({100: '"Alien', 101: 'Aliens"'}, [100, 101]),
         ({100: '"Alien', 500: '5" disk'}, [*range(100, 500)]),
         ({100: '"Alien'}, [100]),
         ({999: '"Alien'}, [999]),
         ({100: '5" disk', 200: 'a "film"', 300: '"Weird Al" Yankovic'}, [])],
        ids=["opens twice", "closes", "closes in the next", "closes amid", "alone", "last", "harmless"],
    )  # fmt: skip
    def test_what_a_stray_one_swallows_is_refused(
        self, tmp_path: Path, monkeypatch, titles: dict[int, str], lost: list[int], block: int
    ) -> None:
        monkeypatch.setattr(csv_rows, "BLOCK", block)
        rows, source = read(write(tmp_path, numbered(1000, titles)))
        assert [row[0] for row in rows] == [f"u{n}" for n in range(1000) if n not in lost]
        assert refused_rows(source) == len(lost)
        for reason, figures in source.refused.items():
            assert "a stray quote" in reason and '"quote": ""' in reason
            assert figures["examples"][0] == f'log.csv: line {2 + lost[0]}: u{lost[0]},i{lost[0]},"Alien'

    def test_one_that_opens_far_from_the_next_costs_its_line(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(csv_rows, "LONGEST_VALUE", 1000)
        rows, source = read(write(tmp_path, numbered(1000, {100: '"Alien', 500: 'Aliens"'})))
        assert len(rows) == 999 and refused_rows(source) == 1

    def test_two_values_of_several_lines_are_one_row(self, tmp_path: Path) -> None:
        rows, source = read(write(tmp_path, 'a,b\n"x\ny","p\nq"\n1,2\n"x\ny","stray\n3,4\n5,6\n'))
        assert rows == [("x\ny", "p\nq"), ("1", "2"), ("3", "4"), ("5", "6")]
        assert refused_rows(source) == 2  # the lines of the row with the stray quote

    def test_too_many_fail_the_command(self, tmp_path: Path) -> None:
        titles = {10: '"Alien', 100: 'Aliens"'}
        lines = numbered(200, titles).replace(",i", ",2024-05-01 10:00:00,i").splitlines()
        write(tmp_path, "\n".join(["user,time,item,title", *lines[1:]]))
        with refused("events: 91 of 200 rows", "a stray quote", "line 12", "u10,"):
            prepared(tmp_path, "log.csv")
        log = prepared(tmp_path, "log.csv", quote="")
        assert len(log.events["item"]) == 200

    @pytest.mark.parametrize("longest", [20, 1 << 20])
    @settings(max_examples=50, deadline=None)
    @given(
        lines=st.lists(st.text('ab,,""', min_size=1, max_size=8), max_size=20),
        block=st.integers(1, 40),
    )
    def test_every_line_is_accounted_for(
        self, tmp_path_factory, longest: int, lines: list[str], block: int
    ) -> None:
        """For any quotes, and any end of a block."""
        file = write(tmp_path_factory.mktemp("lines"), "\n".join(["u,i", *lines]))
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(csv_rows, "LONGEST_VALUE", longest)
            for size in (block, 1 << 22):
                patch.setattr(csv_rows, "BLOCK", size)
                rows, source = read(file)
                ends = sum(value.count("\n") for row in rows for value in row if value)
                assert len(rows) + ends + refused_rows(source) == len(lines)
                found.append((rows, source.refused))
        assert found[0] == found[1]


class TestDelimiters:
    def test_of_several_characters_within_quotes_are_text(self, tmp_path: Path) -> None:
        content = 'u::i\n"a::b"::1\nc:d::2\n\x1f::3\n'
        rows, source = read(write(tmp_path, content), delimiter="::")
        assert rows == [("a::b", "1"), ("c:d", "2")] and refused_rows(source) == 1

    @pytest.mark.parametrize("delimiter", ["\t", "|", ";", "\x01", "\x1f", "\u00a6", "||"])
    def test_of_any_kind(self, tmp_path: Path, delimiter: str) -> None:
        content = delimiter.join("ui") + "\n" + delimiter.join("ab") + "\n"
        assert read(write(tmp_path, content), delimiter=delimiter)[0] == [("a", "b")]

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"delimiter": ""}, ["delimiter", "''"]), ({"delimiter": '"'}, ["delimiter"]),
         ({"quote": "''"}, ["quote", "one ASCII character", '"" for none']),
         ({"quote": None}, ["quote"]),
         ({"columns": "u,i"}, ["columns must be a list", "'u,i'"]),
         ({"nulls": "NULL"}, ["nulls must be a list", "'NULL'"])],
    )  # fmt: skip
    def test_invalid_options(self, tmp_path: Path, options: dict, words: list[str]) -> None:
        with refused("events: ", *words):
            read(write(tmp_path, "u,i\na,b\n"), **options)


class TestEncodings:
    @pytest.mark.parametrize(
        "encoding",
        ["utf-8", "UTF8", "utf-8-sig", "UTF_8_SIG", "utf-16", "UTF-16LE", "gbk", "GB2312", "gb18030",
         "cp936", "shift_jis", "Shift-JIS", "sjis", "cp932", "euc_jp", "big5"],
    )  # fmt: skip
    @pytest.mark.parametrize("block", [3, 1 << 22])
    def test_of_python(self, tmp_path: Path, monkeypatch, encoding: str, block: int) -> None:
        monkeypatch.setattr(csv_rows, "BLOCK", block)
        content = 'u,\u4e2d\n\u65e5|,"\u672c,\n\u65e5"\n\u4e2d,b\n'
        rows, source = read(write(tmp_path, content.encode(encoding)), encoding=encoding)
        assert rows == [("\u65e5|", "\u672c,\n\u65e5"), ("\u4e2d", "b")] and not source.refused
        assert "\u4e2d" in source.columns

    @pytest.mark.parametrize(
        "encoding", ["cp1252", "windows-1252", "latin1", "ISO-8859-1", "iso8859_15"]
    )
    def test_of_one_byte(self, tmp_path: Path, encoding: str) -> None:
        content = "u,i\nandr\u00e9,1\n".encode(encoding)
        assert read(write(tmp_path, content), encoding=encoding)[0] == [("andr\u00e9", "1")]

    @pytest.mark.parametrize("encoding", ["klingon", "rot13", "hex", "idna", "", 5, None])
    def test_unknown(self, tmp_path: Path, encoding: Any) -> None:
        with refused("events: ", "log.csv cannot be read"):
            read(write(tmp_path, "u,i\na,b\n"), encoding=encoding)

    @pytest.mark.parametrize("before", [0, 3, 200_000])
    def test_bytes_of_another_encoding_cost_their_row(self, tmp_path: Path, before: int) -> None:
        lines = ["u,i", *["a,b"] * before, "andr\u00e9,b", "c,d"]
        rows, source = read(write(tmp_path, "\n".join(lines).encode("latin-1")))
        assert len(rows) == before + 1 and rows[-1] == ("c", "d")
        (reason,) = source.refused
        assert "it is not utf-8" in reason and refused_rows(source) == 1
        assert source.refused[reason]["examples"] == ["log.csv: andr\ufffd,b"]


class TestNulls:
    def test_are_named(self, tmp_path: Path) -> None:
        content = 'u,i\na,\\N\nb,"NULL"\nc,nan\nd,None\ne,\nf,""\ng,none\n'
        file = write(tmp_path, content)
        nulls = ["\\N", "NULL", "nan", "None"]
        assert [i for _, i in read(file, nulls=nulls)[0]] == [None] * 6 + ["none"]
        assert [i for _, i in read(file)[0]] == ["\\N", "NULL", "nan", "None", None, None, "none"]

    def test_are_only_for_csv(self, tmp_path: Path) -> None:
        pd.DataFrame({"u": ["None"]}).to_parquet(tmp_path / "log.parquet")
        with refused("log.parquet is parquet", "`nulls` is only for CSV"):
            read(tmp_path / "log.parquet", nulls=["None"])


class TestKinds:
    @pytest.mark.parametrize("name", ["log.PARQUET", "log.pq", "log", "log.csv"])
    def test_parquet_of_any_name(self, tmp_path: Path, name: str) -> None:
        pd.DataFrame({"u": [1]}).to_parquet(tmp_path / name)
        assert read(tmp_path / name)[0] == [(1,)]

    @pytest.mark.parametrize("name", ["log.Feather", "log.arrow", "log.csv"])
    def test_feather_of_any_name(self, tmp_path: Path, name: str) -> None:
        pyarrow.feather.write_feather(pd.DataFrame({"u": [1]}), str(tmp_path / name))
        assert read(tmp_path / name)[0] == [(1,)]

    @pytest.mark.parametrize("name", ["log.csv.GZ", "log.csv", "log.tsv.gzip"])
    def test_gzip_of_any_name(self, tmp_path: Path, name: str) -> None:
        # with two members, as made by `cat a.gz b.gz`
        content = gzip.compress(b"u,i\na,b\n") + gzip.compress(b"c,d\n")
        assert read(write(tmp_path, content, name))[0] == [("a", "b"), ("c", "d")]

    def test_zstandard(self, tmp_path: Path) -> None:
        content = pa.compress(b"u,i\na,b\n", codec="zstd", asbytes=True)
        assert read(write(tmp_path, content, "log.csv.zst"))[0] == [("a", "b")]

    def test_text_named_gz(self, tmp_path: Path) -> None:
        assert read(write(tmp_path, "u,i\na,b\n", "log.csv.gz"))[0] == [("a", "b")]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [("log.parquet", b"u,i\na,b\n", ["is named like a parquet file"]),
         ("log.feather", b"", ["is named like a feather file"]),
         ("log.parquet", b"PAR1 and no more", ["cannot be read"]),
         ("log.feather", b"ARROW1 and no more", ["cannot be read"]),
         ("log.csv.gz", gzip.compress(b"u,i\n" + bytes(range(256)) * 99)[:-9], ["cannot be read"]),
         ("log.xlsx", b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xee\x9d\n", ["not utf-8"])],
    )  # fmt: skip
    def test_files_of_another_format_are_named(
        self, tmp_path: Path, name: str, content: bytes, words: list[str]
    ) -> None:
        with refused("events: ", name, *words):
            read(write(tmp_path, content, name))

    def test_damage_late_in_a_file_is_named(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(csv_rows, "BLOCK", 1 << 14)
        monkeypatch.setattr(csv_rows, "HEADER", 1 << 10)
        whole = gzip.compress("".join(["u,i\n", *(f"{n},{n * n}\n" for n in range(20_000))]).encode())
        with refused("events: ", "log.csv.gz cannot be read"):
            read(write(tmp_path, whole[:-1000], "log.csv.gz"))

    def test_are_not_mixed(self, tmp_path: Path) -> None:
        pd.DataFrame({"u": [1]}).to_parquet(tmp_path / "a.parquet")
        with refused("b.csv is csv", "a.parquet is parquet"):
            read(tmp_path / "a.parquet", write(tmp_path, "u\n1\n", "b.csv"))

    @pytest.mark.parametrize("kind", ["parquet", "feather"])
    def test_types_of_all_files_count(self, tmp_path: Path, kind: str) -> None:
        """The first file has integers, which must not round the second file's numbers."""
        for name, frame in {"a": {"p": [1], "q": [0]}, "b": {"q": [2], "p": [1.5]}}.items():
            file = str(tmp_path / f"{name}.{kind}")
            table = pa.table(frame)
            pyarrow.parquet.write_table(table, file) if kind == "parquet" else (
                pyarrow.feather.write_feather(table, file)
            )
        assert read(tmp_path / f"*.{kind}")[0] == [(1.0, 0), (1.5, 2)]

    @pytest.mark.parametrize("kind", ["parquet", "feather"])
    def test_files_have_the_same_columns(self, tmp_path: Path, kind: str) -> None:
        for name, frame in {"a": {"p": [1]}, "b": {"q": [2], "p": [1]}}.items():
            file = str(tmp_path / f"{name}.{kind}")
            table = pa.table(frame)
            pyarrow.parquet.write_table(table, file) if kind == "parquet" else (
                pyarrow.feather.write_feather(table, file)
            )
        with refused(f"b.{kind}", "'q,p'", "'p'", "same columns"):
            read(tmp_path / f"*.{kind}")


LINES = [
    f"u{user},i{item},2024-05-{day:02d} 10:00:00,{int(item == day % 3)}"
    for day in range(1, 9)
    for user in range(3)
    for item in range(3)
]


def prepared(folder: Path, files: Any, **options: Any) -> EventLog:
    """A log from files next to their schema."""
    rows = {"files": files, "user": "user", "item": "item", "time": "time", **options}
    schema = {"events": rows, "requests": {**rows, "labels": {"seen": "1"}}, "splits": {}}
    (folder / "schema.json").write_text(json.dumps(schema))
    return prepare(load_schema(folder / "schema.json"), folder / "log")


class TestPlaces:
    def logs(self, folder: Path) -> None:
        header = "user,item,time,c"
        for name, part in {"a": LINES[:30], "2024/b": LINES[30:50], "2024/05/c": LINES[50:]}.items():
            write(folder, "\n".join([header, *part]), f"logs/{name}.csv")

    def test_two_stars_are_folders_of_any_depth(self, tmp_path: Path) -> None:
        self.logs(tmp_path)
        for pattern in ("logs/**/*.csv", "logs/**"):
            assert len(read(f"{tmp_path}/{pattern}")[0]) == len(LINES)

    def test_a_file_is_read_once(self, tmp_path: Path) -> None:
        self.logs(tmp_path)
        (tmp_path / "logs/z.csv").symlink_to(tmp_path / "logs/a.csv")
        assert len(read(f"{tmp_path}/logs/*.csv", f"{tmp_path}/logs/a.csv")[0]) == 30

    def test_every_pattern_finds_something(self, tmp_path: Path) -> None:
        self.logs(tmp_path)
        with refused("events: no file matches", "logs/b*.csv"):
            read(f"{tmp_path}/logs/a.csv", f"{tmp_path}/logs/b*.csv")
        with refused("events: `files` is empty"):
            read()

    def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        self.logs(tmp_path)
        with refused("2024 is a folder", "name its files"):
            read(f"{tmp_path}/logs/*")

    @pytest.mark.parametrize("files", ["log.csv", "log*.csv", "log[1].csv", ["log[1].csv"]])
    def test_a_folders_own_name_is_not_a_pattern(self, tmp_path: Path, files: Any) -> None:
        folder = tmp_path / "run [v2]*"
        name = "log[1].csv" if "[" in str(files) else "log.csv"
        write(folder, "\n".join(["user,item,time,c", *LINES]), name)
        assert len(prepared(folder, files).events["item"]) == len(LINES)

    @pytest.mark.parametrize("kind", ["csv", "parquet", "feather"])
    def test_a_folder_name_is_not_a_column(self, tmp_path: Path, kind: str) -> None:
        frame = pd.DataFrame({"uid": [1, 2, 3], "dt": ["x", "y", "z"]})
        folder = tmp_path / "dt=2024-05-01" / "uid=7"
        folder.mkdir(parents=True)
        {
            "csv": lambda file: frame.to_csv(file, index=False),
            "parquet": frame.to_parquet,
            "feather": lambda file: pyarrow.feather.write_feather(frame, str(file)),
        }[kind](folder / f"log.{kind}")
        rows = read(f"{tmp_path}/**/log.{kind}")[0]
        assert [(str(uid), dt) for uid, dt in rows] == [("1", "x"), ("2", "y"), ("3", "z")]

    @pytest.mark.parametrize("files", [5, None, [5], {"a": "b"}])
    def test_files_are_paths(self, tmp_path: Path, files: Any) -> None:
        with refused("schema.json", "events.files must be a path", repr(files)):
            prepared(tmp_path, files)


@pytest.mark.parametrize(
    ("one", "zero"), [("True", "False"), ("true", "false"), ("1", "0"), ("1.0", "0.0"), ("t", "f")]
)
def test_labels_may_be_true_and_false(tmp_path: Path, one: str, zero: str) -> None:
    values = {"1": one, "0": zero}
    lines = [f"{line[:-1]}{values[line[-1]]}" for line in LINES]
    write(tmp_path, "\n".join(["user,item,time,c", *lines]))
    rows = {"files": "log.csv", "user": "user", "item": "item", "time": "time"}
    requests = {**rows, "labels": {"seen": "c"}}
    (tmp_path / "schema.json").write_text(
        json.dumps({"events": rows, "requests": requests, "splits": {}})
    )
    log = prepare(load_schema(tmp_path / "schema.json"), tmp_path / "log").requests("train")
    expected = [int(line[-1]) for line in LINES]
    assert log["seen"].tolist() == expected


class TestReaders:
    def test_movielens(self, tmp_path: Path) -> None:
        folder = tmp_path / "ml [small]"
        write(folder, "1::Toy::Comedy\n2::Jumanji::Adventure\n", "movies.dat")
        ratings = [f"1::{film}::{3 + film}::{978300000 + 100 * n}" for n in range(10) for film in (1, 2)]
        write(folder, "\n".join(ratings), "ratings.dat")
        assert len(movielens.prepare(folder, tmp_path / "log").events["item"]) == 20

    def test_recbole(self, tmp_path: Path) -> None:
        folder = tmp_path / "atomic [1]"
        rows = ["\ufeffuser_id:token\titem_id:token\trating:float\ttimestamp:float"]
        rows += [f"1\t{242 + n % 2}\t{3 + n % 2}\t{881250000 + 100 * n}" for n in range(10)]
        write(folder, "\n".join(rows), "tiny[1].inter")
        assert len(recbole.prepare(folder, tmp_path / "log").events["item"]) == 10

    @pytest.mark.parametrize("reader", [kuairand, recflow])
    def test_of_patterns(self, tmp_path: Path, reader: Any) -> None:
        """In a folder with brackets an unescaped pattern would find the first, wrong file."""
        folder = tmp_path / "archive [1]"
        for name in ("video_features_basic_1k.csv", "all_stage/1.feather"):
            write(folder, "not,theirs\n", name)
        with refused("archive [1]" if reader is recflow else "does not match", "not"):
            reader.prepare(folder, tmp_path / "log")


def test_read_header_names_its_section(tmp_path: Path) -> None:
    with refused("items: no file matches"):
        read_header("items", Table(files=str(tmp_path / "none.csv")))
