"""The event log: round trips, and errors that name every bad input and its fix."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from toy import BUSY_USER, NEW_USER, NUM_EVENTS, NUM_ITEMS, SCHEMA, SPLITS, Toy, make_toy

from ifa_torchrec.data import EventLog, LogError, LogSchema, RankingDataset, mapped_columns
from ifa_torchrec.data.writing import drafting, publish_folder
from ifa_torchrec.errors import ExistsError


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "log").path


def microseconds(times: pd.Series) -> np.ndarray:
    return times.to_numpy().astype("datetime64[us]").astype(np.int64)


def rewrite(parquet: Path, change) -> None:
    """Change a Parquet file of a log, as another program might."""
    frame = change(pd.read_parquet(parquet))
    # not within the tick of the file system's clock in which the log was written
    time.sleep(0.01)
    frame.to_parquet(parquet, index=False)


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="".join(f"(?=.*{re.escape(word)})" for word in words))


class TestRoundTrip:
    def test_events_are_sorted_by_user_then_time(self, toy: Toy, folder: Path) -> None:
        log = EventLog(folder)
        wanted = toy.events.sort_values(["user", "time"], kind="stable")
        assert not wanted.index.is_monotonic_increasing, "the toy's events must come unsorted"
        np.testing.assert_array_equal(log.events["time"], microseconds(wanted["time"]))
        np.testing.assert_array_equal(log.events["item"], wanted["item"])

    def test_events_at_the_same_time_keep_their_order(self, tmp_path: Path) -> None:
        same = pd.Timestamp(2024, 1, 1)
        events = pd.DataFrame({"user": [1] * 30, "time": [same] * 30, "item": np.arange(30)[::-1]})
        log = EventLog.from_pandas(tmp_path / "log", events, LogSchema(item_features={"item": 30}))
        assert log.events["item"].tolist() == list(range(30))[::-1]

    def test_user_offsets_bound_each_users_events(self, folder: Path) -> None:
        log = EventLog(folder)
        assert log.users.tolist() == sorted(NUM_EVENTS)
        assert np.diff(log.user_offsets).tolist() == [NUM_EVENTS[u] for u in sorted(NUM_EVENTS)]
        assert log.user_offsets[0] == 0

    def test_items_and_their_names(self, toy: Toy, folder: Path) -> None:
        log = EventLog(folder)
        np.testing.assert_array_equal(log.items["category"], toy.items["category"])
        assert log.item_names() == toy.items["name"].tolist()

    def test_items_without_names_are_numbered(self, toy: Toy, tmp_path: Path) -> None:
        toy.items = toy.items.drop(columns="name")
        names = toy.write(tmp_path / "log").item_names()
        assert len(set(names)) == NUM_ITEMS and "7" in names[7]

    def test_requests(self, toy: Toy, folder: Path) -> None:
        log = EventLog(folder)
        assert log.splits == list(SPLITS)
        for split, frame in toy.requests.items():
            columns = log.requests(split)
            np.testing.assert_array_equal(columns["time"], microseconds(frame["time"]))
            for name in ("user", "store", "weekday"):
                np.testing.assert_array_equal(columns[name], frame[name])
            for name in ("hour", "season"):
                np.testing.assert_array_equal(columns[name], frame[name].to_numpy(np.float32))
            lengths = frame["candidates"].map(len).to_numpy()
            np.testing.assert_array_equal(np.diff(columns["candidate_offsets"]), lengths)
            for name in ("candidates", "exposed", "label", "source"):
                np.testing.assert_array_equal(columns[name], np.concatenate(list(frame[name])))
            price = np.concatenate(list(frame["price"])).astype(np.float32)
            np.testing.assert_array_equal(columns["price"], price)

    def test_schema(self, folder: Path) -> None:
        assert EventLog(folder).schema == SCHEMA

    def test_columns_are_memory_mapped(self, folder: Path) -> None:
        log = EventLog(folder)
        columns = {**log.events, **log.items, **log.requests("train")}
        assert [name for name, c in columns.items() if not isinstance(c.base, np.memmap)] == []

    def test_time_in_utc_and_time_without_a_zone_are_the_same(self, toy: Toy, tmp_path: Path) -> None:
        plain = toy.write(tmp_path / "plain").events["time"]
        toy.events["time"] = toy.events["time"].dt.tz_localize("UTC")
        np.testing.assert_array_equal(toy.write(tmp_path / "utc").events["time"], plain)


class TestHistoryRange:
    def test_unknown_user_has_an_empty_history(self, folder: Path) -> None:
        start, end = EventLog(folder).history_range(
            np.array([NEW_USER, 0, 10**9]), np.full(3, 2**62, dtype=np.int64)
        )
        assert (start == end).all()

    def test_only_events_strictly_before(self, folder: Path) -> None:
        log = EventLog(folder)
        first = log.user_offsets[log.users.tolist().index(BUSY_USER)]
        times = log.events["time"][first:]
        at = np.array([times[0], times[0] + 1, times[20], times[-1], times[-1] + 1])
        start, end = log.history_range(np.full(5, BUSY_USER), at)
        assert (start == first).all()
        assert (end - start).tolist() == [(times < t).sum() for t in at]


# the change to the input, and the words that the message must contain: where, and what to do
def _drop(table: str, column: str):
    def damage(toy: Toy) -> None:
        if table == "requests":
            toy.requests["valid"] = toy.requests["valid"].drop(columns=column)
        else:
            setattr(toy, table, getattr(toy, table).drop(columns=column))

    return damage


def _set(table: str, column: str, value):
    """Set a column of a table to a value, or to a function of the column."""

    def damage(toy: Toy) -> None:
        frame = toy.requests["valid"] if table == "requests" else getattr(toy, table)
        frame[column] = value(frame[column]) if callable(value) else value

    return damage


def _at(row: int, value):
    """A column with one row set to a value, or to a function of it."""

    def change(column: pd.Series) -> list:
        values = column.tolist()
        values[row] = value(values[row]) if callable(value) else value
        return values

    return change


def _first(value):
    return lambda values: [value, *values[1:]]


VALID = "requests/valid"
BAD = {
    "events without user": (_drop("events", "user"), ("events", "'user'", "missing")),
    "events without time": (_drop("events", "time"), ("events", "'time'", "missing")),
    "events without item": (_drop("events", "item"), ("events", "'item'", "missing")),
    "items without category": (_drop("items", "category"), ("items", "'category'", "missing")),
    **{
        f"requests without {column}": (_drop("requests", column), (VALID, f"'{column}'", "missing"))
        for column in (
            "user",
            "time",
            "store",
            "hour",
            "candidates",
            "exposed",
            "label",
            "price",
            "source",
        )
    },
    "item a float": (
        _set("events", "item", lambda c: c.astype(float)),
        ("events", "'item'", "double", "integer"),
    ),
    "user a string": (
        _set("events", "user", lambda c: c.astype(str)),
        ("events", "'user'", "string", "integer"),
    ),
    "time an int": (
        _set("events", "time", lambda c: c.astype("int64")),
        ("events", "'time'", "int64", "timestamp"),
    ),
    "request time an int": (_set("requests", "time", 5), (VALID, "'time'", "int64", "timestamp")),
    "context a float": (_set("requests", "store", 1.0), (VALID, "'store'", "double", "integer")),
    "dense a string": (_set("requests", "hour", "noon"), (VALID, "'hour'", "string", "number")),
    "labels strings": (
        _set("requests", "label", lambda c: c.map(lambda v: ["yes"] * len(v))),
        (VALID, "'label'", "string", "number"),
    ),
    "exposed ints": (
        _set("requests", "exposed", lambda c: c.map(lambda v: [1] * len(v))),
        (VALID, "'exposed'", "bool"),
    ),
    "candidates floats": (
        _set("requests", "candidates", lambda c: c.map(lambda v: v.astype(float))),
        (VALID, "'candidates'", "double", "integer"),
    ),
    "candidates not lists": (
        _set("requests", "candidates", 3),
        (VALID, "'candidates'", "int64", "list"),
    ),
    "labels not lists": (_set("requests", "label", 1.0), (VALID, "'label'", "double", "list")),
    "time null": (_set("events", "time", _at(4, pd.NaT)), ("events", "'time'", "null", "drop")),
    "request time null": (
        _set("requests", "time", _at(4, pd.NaT)),
        (VALID, "'time'", "null", "row 4", "drop"),
    ),
    "item null": (_set("events", "item", _at(4, None)), ("events", "'item'", "null", "row", "drop")),
    "context null": (
        _set("requests", "store", lambda c: c.astype("Int64").where(c.index != 2)),
        (VALID, "'store'", "null", "row 2", "drop"),
    ),
    "candidate null": (
        _set("requests", "candidates", _at(2, lambda v: [None, *v[1:].tolist()])),
        (VALID, "'candidates'", "null"),
    ),
    "candidates null": (
        _set("requests", "candidates", _at(2, None)),
        (VALID, "'candidates'", "null", "row 2", "list"),
    ),
    "event of an item that is not there": (
        _set("events", "item", _at(0, NUM_ITEMS)),
        ("events", "'item'", f"id {NUM_ITEMS}", f"{NUM_ITEMS} rows", f"0..{NUM_ITEMS - 1}"),
    ),
    "event before that of another user": (
        lambda toy: [
            _set("events", "user", lambda c: c[::-1])(toy),
            _set("events", "item", _at(0, -1))(toy),
        ],
        ("events", "'item'", "id -1", "rows as sorted by user and time"),
    ),
    "event of item -1": (_set("events", "item", _at(0, -1)), ("events", "'item'", "id -1", "map ids")),
    "category outside its table": (
        _set("items", "category", _at(6, 5)),
        ("items", "'category'", "row 6", "id 5", "5 rows", "enlarge"),
    ),
    "candidate that is not there": (
        _set("requests", "candidates", _at(0, _first(NUM_ITEMS))),
        (VALID, "'candidates'", "value 0", f"id {NUM_ITEMS}", "map ids"),
    ),
    "store outside its table": (
        _set("requests", "store", _at(3, 3)),
        (VALID, "'store'", "row 3", "id 3", "3 rows", "enlarge"),
    ),
    "source without a name": (
        _set("requests", "source", _at(0, _first(2))),
        (VALID, "'source'", "id 2", "2 rows"),
    ),
    "empty candidate set": (
        lambda toy: [
            _set("requests", column, _at(5, lambda v: v[:0]))(toy)
            for column in ("candidates", "exposed", "label", "price", "source")
        ],
        (VALID, "row 5", "empty", "drop"),
    ),
    "one label too few": (
        _set("requests", "label", _at(3, lambda v: v[1:])),
        (VALID, "row 3", "'label'", "equal length"),
    ),
    "one price too many in the last row": (
        _set("requests", "price", _at(11, lambda v: [*v, 0.0])),
        (VALID, "row 11", "'price'", "equal length"),
    ),
    "dense infinite": (_set("requests", "season", _at(7, np.inf)), (VALID, "'season'", "7", "finite")),
    "price infinite": (
        _set("requests", "price", _at(2, _first(np.inf))),
        (VALID, "'price'", "row 2", "value 0", "finite", "null"),
    ),
    "label NaN": (
        _set("requests", "label", _at(2, _first(float("nan")))),
        (VALID, "'label'", "row 2", "value 0", "null", "may not be null"),
    ),
    "label 2": (
        _set("requests", "label", _at(6, _first(2.0))),
        (VALID, "row 6", "'label'", "2.0", "0 or 1"),
    ),
    "label -1": (_set("requests", "label", _at(6, _first(-1.0))), (VALID, "row 6", "'label'", "-1.0")),
    "items from 1 on": (
        lambda toy: setattr(toy, "items", toy.items.iloc[1:]),
        ("items", "'item'", "0, 1, 2", "row i"),
    ),
    "items out of order": (
        lambda toy: setattr(toy, "items", toy.items.iloc[::-1]),
        ("items", "'item'", "0, 1, 2", "row i"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing_behind(case: str, toy: Toy, tmp_path: Path) -> None:
    damage, words = BAD[case]
    damage(toy)
    with refused(*words):
        toy.write(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_leaves_nothing_behind(toy: Toy, tmp_path: Path, monkeypatch) -> None:
    written = []

    def fails_at_the_third(table, where, **kwargs):
        written.append(where)
        if len(written) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        toy.write(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_left_alone(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match=r"log.*delete it or choose another"):
        toy.write(tmp_path / "log")
    assert (tmp_path / "log" / "precious").read_text() == "mine"


def test_a_schema_needs_an_item_feature() -> None:
    with refused("item_features", "empty"):
        LogSchema(item_features={})


class TestDamagedFolder:
    def test_no_folder(self, tmp_path: Path) -> None:
        with refused(str(tmp_path / "nowhere"), "no such event log", "from_pandas"):
            EventLog(tmp_path / "nowhere")

    def test_incomplete(self, folder: Path) -> None:
        (folder / "schema.json").unlink()
        with refused(str(folder), "schema.json", "write the log again"):
            EventLog(folder)

    def test_schema_cut_short(self, folder: Path) -> None:
        text = (folder / "schema.json").read_text()
        (folder / "schema.json").write_text(text[: len(text) // 2])
        with refused("schema.json"):
            EventLog(folder)

    def test_another_format(self, folder: Path) -> None:
        header = json.loads((folder / "schema.json").read_text())
        (folder / "schema.json").write_text(json.dumps({**header, "format": "ifa-event-log/99"}))
        with refused("schema.json", "ifa-event-log/99", "ifa-event-log/2"):
            EventLog(folder)

    @pytest.mark.parametrize("name", ["events", "items", "requests/valid"])
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / f"{name}.parquet").unlink()
        with refused(f"{name}.parquet", "missing", "write the log again"):
            EventLog(folder).requests("valid")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: data[:4] + b"\xff" * (len(data) - 8) + data[-4:],  # garbage in the footer
            lambda data: data[:4] + b"\xff" * 64 + data[68:],  # garbage in a page
        ],
        ids=["empty", "cut short", "footer", "page"],
    )
    def test_corrupt_file(self, folder: Path, damage) -> None:
        events = folder / "events.parquet"
        events.write_bytes(damage(events.read_bytes()))
        with refused("events.parquet", "readable"):
            EventLog(folder)

    def test_fewer_rows_than_were_written(self, folder: Path) -> None:
        rewrite(folder / "events.parquet", lambda frame: frame[:-3])
        with refused("events.parquet", "192 rows", "195", "write the log again"):
            EventLog(folder)

    @pytest.mark.parametrize("by", ["time", "user"])
    def test_events_out_of_order(self, folder: Path, by: str) -> None:
        def swap(frame: pd.DataFrame) -> pd.DataFrame:
            same_user = frame["user"].diff() == 0
            later = frame["time"].diff() > pd.Timedelta(0)
            # swap rows `row - 1` and `row`: of one user, or at the border of two users
            row = np.flatnonzero(same_user & later if by == "time" else ~same_user)[3]
            order = np.arange(len(frame))
            order[[row - 1, row]] = order[[row, row - 1]]
            swap.row = row
            return frame.iloc[order]

        rewrite(folder / "events.parquet", swap)
        with refused("events", "'time'", "out of order", "sort by user, then time") as error:
            EventLog(folder)
        row = int(re.search(r"at row (\d+)", str(error.value)).group(1))
        assert abs(row - swap.row) <= 1

    def test_unknown_split(self, folder: Path) -> None:
        with refused(str(folder), "'tomorrow'", "train", "valid", "test"):
            EventLog(folder).requests("tomorrow")


def test_columns_are_written_again_when_the_parquet_file_changed(folder: Path) -> None:
    before = np.array(EventLog(folder).events["item"])
    rewrite(folder / "events.parquet", lambda f: f.assign(item=(f["item"] + 1) % NUM_ITEMS))
    np.testing.assert_array_equal(EventLog(folder).events["item"], (before + 1) % NUM_ITEMS)


def test_damage_is_not_hidden_by_old_columns(folder: Path) -> None:
    EventLog(folder)
    rewrite(folder / "events.parquet", lambda f: f.assign(item=NUM_ITEMS))
    for _ in range(2):
        with refused("events", "'item'"):
            EventLog(folder)


def test_columns_are_not_written_again_at_each_opening(folder: Path, monkeypatch) -> None:
    EventLog(folder).requests("train")
    monkeypatch.setattr(pq, "read_table", lambda *a, **k: pytest.fail("Parquet was read again"))
    EventLog(folder).requests("train")


def columns_of(folder: Path, table: str) -> Path:
    """The only folder of a table's columns."""
    (found,) = (folder / ".columns").glob(f"{table}-*")
    return found


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 0xFF
    before = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk does


def of_another_log(columns: Path) -> None:
    other = make_toy(seed=1).write(columns.parents[1].with_name("other")).path
    shutil.rmtree(columns)
    shutil.copytree(columns_of(other, "events"), columns)


class TestColumns:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda columns: cut(columns / "time.npy", 500),
            lambda columns: cut(columns / "time.npy", 0),
            lambda columns: (columns / "time.npy").unlink(),
            lambda columns: np.save(columns / "item.npy", np.zeros(195, np.int32)),
            lambda columns: np.save(columns / "item.npy", np.zeros(195, np.int64)),
            lambda columns: np.save(columns / "item.npy", np.array([{}] * 195)),
            lambda columns: flip(columns / "time.npy"),
            of_another_log,
            lambda columns: cut(columns / "made.json", 100),
            lambda columns: (columns / "made.json").unlink(),
            lambda columns: (columns / "made.json").write_text("[1]"),
            lambda columns: [file.unlink() for file in columns.iterdir()],
        ],
        ids=[
            "cut short", "empty", "missing", "dtype", "values", "pickle", "header", "of another log",
            "half a manifest", "no manifest", "another manifest", "empty folder",
        ],
    )  # fmt: skip
    def test_damaged_columns_are_written_again(self, folder: Path, damage) -> None:
        before = {name: np.array(values) for name, values in EventLog(folder).events.items()}
        damage(columns_of(folder, "events"))
        for _ in range(2):
            after = EventLog(folder).events
            assert all(np.array_equal(after[name], values) for name, values in before.items())
        assert len(list((folder / ".columns").glob("events*"))) == 1

    def test_a_copy_keeps_its_columns(self, folder: Path, tmp_path: Path, monkeypatch) -> None:
        """The times of a copy differ, its content does not: it is read once, and not again."""
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, copy_function=shutil.copyfile)
        for file in copy.rglob("*.*"):
            os.utime(file, (1, 1))
        monkeypatch.setattr(pq, "read_table", lambda *a, **k: pytest.fail("Parquet was read again"))
        EventLog(copy)
        monkeypatch.setattr(mapped_columns, "_see", lambda file: pytest.fail("read again"))
        EventLog(copy)

    def test_earlier_columns_are_deleted(self, folder: Path) -> None:
        (folder / ".columns" / "events-0123456789abcdef").mkdir()  # from another version of the package
        other = columns_of(folder, "requests/train")
        rewrite(folder / "events.parquet", lambda f: f.assign(item=(f["item"] + 1) % NUM_ITEMS))
        EventLog(folder)
        assert len(list((folder / ".columns").glob("events-*"))) == 1
        assert other.exists()

    def test_drafts_of_killed_openings_are_deleted(self, folder: Path) -> None:
        draft = folder / ".columns" / ".draft-1"
        draft.mkdir()
        with (folder / ".columns" / ".lock").open("a") as lock:  # another process is writing
            fcntl.flock(lock, fcntl.LOCK_EX)
            EventLog(folder)
            assert draft.exists()
        EventLog(folder)
        assert not draft.exists()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_where_they_cannot_be_written(self, folder: Path, monkeypatch, number: int) -> None:
        shutil.rmtree(columns_of(folder, "events"))

        def fail(*args) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(np, "save", fail)
        with refused(str(folder / ".columns"), "events.parquet", os.strerror(number), "copy it"):
            EventLog(folder)
        assert list((folder / ".columns").glob(".draft-*")) == []
        monkeypatch.undo()
        EventLog(folder)

    def test_others_may_read_what_the_umask_lets_them(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            path = make_toy().write(tmp_path / "log").path
        finally:
            os.umask(before)
        modes = {file: file.stat().st_mode & 0o777 for file in (path, *path.rglob("*"))}
        wrong = {f: oct(m) for f, m in modes.items() if m != (0o755 if f.is_dir() else 0o644)}
        assert wrong == {}


class TestWriting:
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with refused(str(tmp_path / "file" / "log"), "cannot write a log there", "another folder"):
            make_toy().write(tmp_path / "file" / "log")

    def test_a_full_disk(self, tmp_path: Path) -> None:
        with refused(str(tmp_path / "log"), "No space left", "free some"), drafting(tmp_path / "log"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("split", ["../x", "a/b", "/x", "", ".", "..", ".x", "a\0", 3, "x" * 300])
    def test_splits_that_would_leave_the_folder(self, toy: Toy, tmp_path: Path, split) -> None:
        toy.requests = {split: toy.requests["test"]}
        with refused("split", repr(split), "letters"):
            toy.write(tmp_path / "log")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_split(self, toy: Toy, tmp_path: Path) -> None:
        toy.requests["valid"] = toy.requests["valid"][:0]
        with refused("requests/valid", "no requests", "leave out the split"):
            toy.write(tmp_path / "log")


class TestHeader:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"schema": {"item_features": {"item": 40}, "colour": 1}}, ["colour", "item_features"]),
            ({"schema": {"tasks": ["label"]}}, ["item_features is empty"]),
            ({"schema": {"item_features": {"item": "40"}}}, ["'item'", "'40'", "integer"]),
            ({"schema": None}, ["the schema"]),
            ({"rows": {"items": 40}}, ["row counts of events"]),
            ({"rows": {"events": "195", "items": 40}}, ["events", "'195'"]),
            ({"rows": {"events": 195, "items": 40, "requests/../x": 1}}, ["split '../x'"]),
        ],
        ids=str,
    )
    def test_invalid_headers_are_refused(self, folder: Path, changes: dict, words: list[str]) -> None:
        header = json.loads((folder / "schema.json").read_text())
        (folder / "schema.json").write_text(json.dumps({**header, **changes}))
        with refused(str(folder / "schema.json"), *words):
            EventLog(folder)


class TestFingerprint:
    def test_the_same_content_written_again(self, toy: Toy, folder: Path, tmp_path: Path) -> None:
        toy.events = toy.events.sample(frac=1, random_state=5)
        again = toy.write(tmp_path / "again")
        assert again.fingerprint() == EventLog(folder).fingerprint()

    @pytest.mark.parametrize("table", ["events", "items", "train", "test"])
    def test_one_other_value(self, toy: Toy, folder: Path, tmp_path: Path, table: str) -> None:
        if table == "events":
            row = toy.events.index[100]
            toy.events.loc[row, "item"] = (toy.events.loc[row, "item"] + 1) % NUM_ITEMS
        elif table == "items":
            toy.items.loc[5, "category"] = 0
        else:
            toy.requests[table].loc[3, "store"] = (toy.requests[table].loc[3, "store"] + 1) % 3
        other = toy.write(tmp_path / "other")
        assert other.fingerprint() != EventLog(folder).fingerprint()


def test_a_log_without_events_and_requests_without_users(toy: Toy, tmp_path: Path) -> None:
    toy.events = toy.events[:0]
    log = toy.write(tmp_path / "log")
    assert RankingDataset(log, "train").history_lengths.tolist() == [0] * SPLITS["train"]
    assert len(RankingDataset.of_users(log, log.users, log.users)) == 0


class TestTimeZones:
    def test_another_zone_is_refused(self, tmp_path: Path) -> None:
        """A request at local noon would see events of another zone's evening."""
        toy = make_toy()
        toy.events["time"] = toy.events["time"].dt.tz_localize("Asia/Tokyo")
        with refused("events", "'time'", "Asia/Tokyo", "tz_convert"):
            toy.write(tmp_path / "log")

    def test_no_zone_means_utc(self, tmp_path: Path) -> None:
        plain, utc = make_toy(), make_toy()
        utc.events["time"] = utc.events["time"].dt.tz_localize("UTC")
        logs = [plain.write(tmp_path / "plain"), utc.write(tmp_path / "utc")]
        np.testing.assert_array_equal(logs[0].events["time"], logs[1].events["time"])


def _open_often(path: Path) -> None:
    for _ in range(5):
        EventLog(path).requests("train")


@pytest.mark.slow
def test_many_processes_may_open_a_copied_log_at_once(tmp_path: Path) -> None:
    """Each process finds the columns stale and writes them again."""
    make_toy().write(tmp_path / "log")
    shutil.copytree(tmp_path / "log", tmp_path / "copy", copy_function=shutil.copy)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(_open_often, [tmp_path / "copy"] * 4))


def test_a_changed_schema_is_checked_again(tmp_path: Path) -> None:
    make_toy().write(tmp_path / "log")
    file = tmp_path / "log" / "schema.json"
    file.write_text(
        file.read_text().replace(f'"category": {SCHEMA.item_features["category"]}', '"category": 2')
    )
    with refused("items", "'category'", "outside its table of 2 rows"):
        EventLog(tmp_path / "log")


@pytest.mark.parametrize(
    "changes",
    [
        {"context_features": {"item": 3}},
        {"dense_features": ("time",)},
        {"tasks": "label"},
        {"tasks": ()},
        {"tasks": ("a/b",)},
        {"tasks": ("like", "shares")},
        {"item_features": "item"},
        {"item_features": {"item": "3"}},
        {"item_features": {"item": 0}},
        {"item_features": {"../item": 3}},
        {"context_features": None},
        {"context_features": {"x" * 300: 3}},
        {"dense_features": None},
        {"dense_features": (3,)},
        {"candidate_tags": {"source": "ab"}},
        {"candidate_tags": {"source": ("a", "b"), "place": ("b", "c")}},
        {"candidate_tags": {"source": ("popular", "exposed")}},
    ],
    ids=str,
)
def test_invalid_names_are_refused(changes: dict) -> None:
    with pytest.raises(LogError, match="schema: "):
        LogSchema(**({"item_features": {"item": 3}} | changes))


def test_the_second_of_two_preparations_of_one_folder(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "schema.json").write_text("{}")
    (tmp_path / "draft").mkdir()
    with pytest.raises(ExistsError, match=r"log was created meanwhile.*choose another folder"):
        publish_folder(tmp_path / "draft", tmp_path / "log")
