"""Checks of lists, vectors, numbers and event features: errors name the problem and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from every_field import KNOWN_ITEMS, RICH_SCHEMA, make_rich
from toy import NUM_ITEMS, Toy, make_toy

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import EventLog, LogError, LogSchema
from ifa_torchrec.data.columns import Column
from ifa_torchrec.data.header import read_header
from ifa_torchrec.data.schema import LIST_OFFSETS
from ifa_torchrec.data.writing import drafting

VALID = "requests/valid"


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="".join(f"(?=.*{re.escape(word)})" for word in words))


@pytest.fixture(scope="module")
def rich() -> Toy:
    return make_rich()


@pytest.fixture(scope="module")
def log(rich: Toy, tmp_path_factory) -> EventLog:
    return rich.write(tmp_path_factory.mktemp("rich") / "log")


class TestRoundTrip:
    def test_lists(self, rich: Toy, log: EventLog) -> None:
        columns = log.items | log.requests("train")
        for frame, names in (
            (rich.items, RICH_SCHEMA.item_lists),
            (rich.requests["train"], RICH_SCHEMA.context_lists),
        ):
            for name in names:
                assert np.diff(columns[name + LIST_OFFSETS]).tolist() == frame[name].map(len).tolist()
                assert columns[name].tolist() == [i for ids in frame[name] for i in ids]

    def test_vectors(self, rich: Toy, log: EventLog) -> None:
        for name, width in RICH_SCHEMA.item_vectors.items():
            assert log.items[name].shape == (NUM_ITEMS, width) and log.items[name].dtype == np.float32
            np.testing.assert_array_equal(log.items[name], np.stack(rich.items[name]).astype(np.float32))

    def test_all_is_memory_mapped(self, log: EventLog) -> None:
        columns = log.events | log.items | log.requests("train")
        assert len(columns) > 30
        assert [name for name, c in columns.items() if not isinstance(c.base, np.memmap)] == []

    def test_schema_and_header(self, log: EventLog) -> None:
        assert EventLog(log.path).schema == RICH_SCHEMA
        assert EventLog(log.path).scales == log.scales

    def test_one_other_number_makes_another_log(self, log: EventLog, tmp_path: Path) -> None:
        other = make_rich()
        other.events.loc[3, "dwell"] = 1e6
        assert other.write(tmp_path / "log").fingerprint() != log.fingerprint()


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (pa.array([1.5, None, 2.0]), [1.5, None, 2.0]),
        (pa.array([1, None, 2], pa.int8()), [1.0, None, 2.0]),
        (pa.array([1, 2, 3], pa.uint64()), [1.0, 2.0, 3.0]),
        (pa.array([True, None, False]), [1.0, None, 0.0]),
        (pa.array([1.5, None], pa.float32()), [1.5, None]),
        (pa.array([0.5, None], pa.float16()), [0.5, None]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([], pa.float64()), []),
        (pa.array([3.4e38]), [3.4e38]),
    ],
    ids=str,
)
def test_numbers_of_every_type(column: pa.Array, numbers: list) -> None:
    got = Column(pa.chunked_array([column]), "price", "items").numbers(missing=True)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(numbers, np.float32))


@pytest.mark.parametrize(
    "lists",
    [
        pa.array([[1], [], [2, 3]]),
        pa.array([[1], [], [2, 3]], pa.large_list(pa.int32())),
        pa.array([[], [], []]),
        pa.array([[1, 2], [3, 4], [5, 1]], pa.list_(pa.int64(), 2)),
        pa.chunked_array([[[1]], [[], [2]]]),
        pa.array([[9], [1], [], [2]])[1:],
    ],
    ids=str,
)
def test_lists_of_every_type(lists: pa.Array) -> None:
    column = Column.of(pa.table({"genre": lists}), "genre", "items").flat()
    wanted = lists.to_pylist()
    assert column.ids(6).tolist() == [i for ids in wanted for i in ids]
    assert np.diff(column.offsets).tolist() == [len(ids) for ids in wanted]


def change(table: str, column: str, row: int, value) -> Callable[[Toy], None]:
    """Set a row to a value, or to a function of its present value."""

    def damage(toy: Toy) -> None:
        frame = toy.requests["valid"] if table == VALID else getattr(toy, table)
        values = frame[column].astype(object).tolist()
        values[row] = value(values[row]) if callable(value) else value
        frame[column] = pd.Series(values, frame.index).infer_objects()

    return damage


def make(table: str, column: str, value: Callable) -> Callable[[Toy], None]:
    """Replace a column by a function of it; None drops it."""

    def damage(toy: Toy) -> None:
        frame = toy.requests["valid"] if table == VALID else getattr(toy, table)
        frame[column] = value(frame[column])

    return damage


def without(table: str, column: str) -> Callable[[Toy], None]:
    def damage(toy: Toy) -> None:
        frame = toy.requests["valid"] if table == VALID else getattr(toy, table)
        del frame[column]

    return damage


def at(row: int, table: str, column: str) -> tuple[str, ...]:
    return (table, f"row {row}", f"'{column}'")


BAD = {
    **{
        f"{table} without {column}": (without(table, column), (table, f"'{column}'", "missing"))
        for table, columns in {
            "items": ("genre", "weight", "text"),
            "events": ("action", "dwell", "importance"),
            VALID: ("interest", "place", "watch"),
        }.items()
        for column in columns
    },
    "a genre outside its table": (
        change("items", "genre", 5, [1, 6]),
        (*at(5, "items", "genre"), "value 1 of the list", "id 6", "6 rows", "enlarge"),
    ),
    "a negative genre": (change("items", "genre", 5, [-1]), (*at(5, "items", "genre"), "id -1")),
    "genres null": (
        change("items", "genre", 5, None),
        (*at(5, "items", "genre"), "null", "put a list"),
    ),
    "a genre null": (
        change("items", "genre", 5, [1, None]),
        (*at(5, "items", "genre"), "value 1 of the list", "null", "put 0"),
    ),
    "genres of strings": (
        make("items", "genre", lambda c: c.map(lambda ids: ["a"] * len(ids))),
        ("items", "'genre'", "lists of", "string", "lists of an integer"),
    ),
    "genres no lists": (
        make("items", "genre", lambda c: c.map(len)),
        ("items", "'genre'", "int64", "one list per row"),
    ),
    "genres of lists": (
        make("items", "genre", lambda c: c.map(lambda ids: [ids])),
        ("items", "'genre'", "list<", "an integer"),
    ),
    "a vector too short": (
        change("items", "text", 7, [1.0, 2.0]),
        (*at(7, "items", "text"), "2 numbers", "3", "that length"),
    ),
    "a vector too long": (
        change("items", "image", 7, [1.0, 2.0, 3.0]),
        (*at(7, "items", "image"), "3 numbers", "2"),
    ),
    "vectors null": (change("items", "text", 7, None), (*at(7, "items", "text"), "null")),
    "a vector with a NaN": (
        change("items", "text", 7, [1.0, float("nan"), 2.0]),
        (*at(7, "items", "text"), "value 1 of the list", "null", "may not be null"),
    ),
    "a vector with an infinity": (
        change("items", "text", 7, [1.0, 2.0, np.inf]),
        (*at(7, "items", "text"), "value 2 of the list", "finite"),
    ),
    "an infinite price": (
        change("items", "weight", 4, -np.inf),
        (*at(4, "items", "weight"), "-inf", "finite", "use null for a missing value"),
    ),
    "a number beyond a float32": (
        change("items", "weight", 4, 1e39),
        (*at(4, "items", "weight"), "1e+39", "is not a finite float32"),
    ),
    "an unknown action": (
        change("events", "action", 9, 4),
        (*at(1, "events", "action")[::2], "id 4", "4 rows", "0..3", "enlarge"),
    ),
    "actions as text": (
        make("events", "action", lambda c: "buy"),
        ("events", "'action'", "string", "integer"),
    ),
    "an action null": (
        make("events", "action", lambda c: c.astype("Int64").where(c.index != 9)),
        ("events", "'action'", "null", "put 0"),
    ),
    "negative where its logarithm is taken": (
        change("events", "dwell", 9, -0.5),
        ("events", "'dwell'", "-0.5", "negative", "log_scaled"),
    ),
    "a negative label where its logarithm is taken": (
        change(VALID, "watch", 2, lambda v: [-1.0, *v[1:]]),
        (*at(2, VALID, "watch"), "value 0 of the list", "-1.0", "negative"),
    ),
    "a regression label missing": (
        change(VALID, "watch", 2, lambda v: [np.nan, *v[1:]]),
        (*at(2, VALID, "watch"), "value 0 of the list", "null", "may not be null"),
    ),
    "a regression label infinite": (
        change(VALID, "watch", 2, lambda v: [np.inf, *v[1:]]),
        (*at(2, VALID, "watch"), "finite"),
    ),
    "a negative weight": (
        change("events", "importance", 9, -1.0),
        ("events", "'importance'", "-1.0", "negative"),
    ),
    "a weight missing": (
        change("events", "importance", 9, np.nan),
        ("events", "'importance'", "null", "may not be null"),
    ),
    "an infinite weight": (change("events", "importance", 9, np.inf), ("events", "'importance'")),
    "an interest outside its table": (
        change(VALID, "interest", 3, [8]),
        (*at(3, VALID, "interest"), "id 8", "8 rows"),
    ),
    "a place outside its table": (
        change(VALID, "place", 3, lambda v: [5, *v[1:]]),
        (*at(3, VALID, "place"), "value 0", "id 5"),
    ),
    "one place too few": (
        change(VALID, "place", 3, lambda v: v[1:]),
        (*at(3, VALID, "place"), "equal length"),
    ),
    "an item that is not described": (
        change("events", "item", 3, NUM_ITEMS),
        ("events", "'item'", f"id {NUM_ITEMS}", f"{NUM_ITEMS} rows"),
    ),
    **{
        f"the unknown item has a {column}": (
            change("items", column, 0, value),
            ("items", "row 0", f"'{column}'", must, "unknown", "number the items from 1"),
        )
        for column, value, must in (
            ("category", 2, "must be 0"),
            ("genre", [1], "must be an empty list"),
            ("weight", 0.0, "must be null"),
            ("text", [0.0, 0.1, 0.0], "must be all 0"),
        )
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    damage, words = BAD[case]
    rich = make_rich()
    damage(rich)
    with refused(*words):
        rich.write(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", ["events", "items", VALID])
def test_columns_that_the_schema_does_not_name(table: str, tmp_path: Path) -> None:
    rich = make_rich()
    frame = rich.requests["valid"] if table == VALID else getattr(rich, table)
    frame["colour"] = 1
    with refused(table, "'colour'", "does not name", "drop", "'item'" if table != VALID else "'place'"):
        rich.write(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def published(rich: Toy, path: Path, tables: dict[str, pa.Table]) -> EventLog:
    """A log whose tables are written as another program might."""
    frames = {"events": rich.events.sort_values(["user", "time"], kind="stable"), "items": rich.items}
    with drafting(path) as draft:
        for name, frame in frames.items():
            table = tables.get(name, pa.Table.from_pandas(frame, preserve_index=False))
            pq.write_table(table, draft / f"{name}.parquet")
        return EventLog.publish(draft, path, rich.schema, [])


def test_vectors_of_a_fixed_size(rich: Toy, log: EventLog, tmp_path: Path) -> None:
    table = pa.Table.from_pandas(rich.items, preserve_index=False)
    text = pa.FixedSizeListArray.from_arrays(
        pa.array(np.concatenate(list(rich.items["text"])), pa.float32()), 3
    )
    table = table.set_column(table.column_names.index("text"), "text", text)
    other = published(rich, tmp_path / "log", {"items": table})
    np.testing.assert_array_equal(other.items["text"], log.items["text"])


def test_a_nan_of_a_file_is_not_a_missing_number(rich: Toy, tmp_path: Path) -> None:
    table = pa.Table.from_pandas(rich.items, preserve_index=False)
    weight = table["weight"].to_pylist()
    weight[8] = float("nan")
    table = table.set_column(table.column_names.index("weight"), "weight", pa.array(weight))
    with refused("items", "row 8", "'weight'", "nan", "use null for a missing value"):
        published(rich, tmp_path / "log", {"items": table})


class TestScales:
    def test_of_the_training_split(self, rich: Toy, log: EventLog) -> None:
        train = rich.requests["train"]

        def flat(name: str) -> np.ndarray:
            return np.concatenate(list(train[name]))

        seen = rich.events["time"] < train["time"].max()
        exposed = flat("exposed").astype(bool)
        wanted = {
            "hour": train["hour"],
            "price": flat("price"),
            "year": rich.items["year"][:KNOWN_ITEMS],
            "rating": rich.events["rating"][seen],
            "dwell": np.log1p(rich.events["dwell"][seen]),
            "watch": np.log1p(flat("watch")[exposed]),
        }
        assert {*log.scales} == {*RICH_SCHEMA.scaled} > {*wanted}
        for name, numbers in wanted.items():
            scale = log.scales[name]
            assert scale.mean == pytest.approx(np.nanmean(numbers), rel=1e-5), name
            assert scale.deviation == pytest.approx(np.nanstd(numbers), rel=1e-5), name
            assert scale.log == (name in RICH_SCHEMA.log_scaled)

    def test_of_all_splits_without_a_training_split(self, tmp_path: Path) -> None:
        toy = make_toy()
        del toy.requests["train"]
        hours = pd.concat([frame["hour"] for frame in toy.requests.values()])
        scale = toy.write(tmp_path / "log").scales["hour"]
        assert scale.mean == pytest.approx(hours.mean()) and not scale.log
        toy.requests = {}
        assert toy.write(tmp_path / "other").scales["hour"] == Scale()

    @pytest.mark.parametrize(
        ("numbers", "mean"), [([0.1] * 1000, 0.1), ([np.nan] * 3, 0.0), ([1.7e9] * 7, 1.7e9)], ids=str
    )
    def test_numbers_that_are_all_equal(self, tmp_path: Path, numbers: list, mean: float) -> None:
        events = pd.DataFrame({"user": 1, "item": 1, "time": pd.Timestamp(2024, 1, 1), "dwell": numbers})
        schema = LogSchema(item_features={"item": 2}, event_dense=("dwell",))
        scale = EventLog.from_pandas(tmp_path / "log", events, schema).scales["dwell"]
        assert scale.mean == pytest.approx(mean, rel=1e-6) and scale.deviation == 1.0

    @pytest.mark.parametrize(
        "scales",
        [
            None,
            {},
            {"hour": {}},
            {"hour": {"mean": 0, "deviation": 0, "log": False}, "season": {}, "price": {}},
            {"hour": {"median": 0}, "season": {}, "price": {}},
            {"hour": 3, "season": {}, "price": {}},
        ],
        ids=str,
    )
    def test_damaged(self, tmp_path: Path, scales) -> None:
        file = make_toy().write(tmp_path / "log").path / "schema.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "scales": scales}))
        with refused(str(file), "scale", "write the log again"):
            read_header(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"item_lists": {"item": 3}},
        {"item_lists": {"genre": 3}, "dense_features": ("genre_offsets",)},
        {"context_lists": {"candidate": 3}},
        {"item_vectors": {"text": 0}},
        {"event_features": {"time": 3}},
        {"event_weight": "user"},
        {"item_dense": ("name",)},
        {"log_scaled": ("label",)},
        {"tasks": {"label": "ranking"}},
    ],
    ids=str,
)
def test_invalid_names_are_refused(changes: dict) -> None:
    with pytest.raises(LogError, match="schema: "):
        LogSchema(**({"item_features": {"item": 3}} | changes))
