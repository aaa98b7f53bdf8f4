"""The vocabulary: stable rows, ids of one kind, and checked files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from every_field import RICH_SCHEMA, make_rich

from ifa_torchrec.data import EventLog, LogError, LogSchema
from ifa_torchrec.data import vocabulary as vocabulary_module
from ifa_torchrec.data.vocabulary import Ids, Vocabulary, hash_row

SHOP = {"item": ["tea", "cup", "7"], "user": [70, -(2**63), 2**63 - 1]}


def refused(*words: str):
    """Expect a LogError whose message contains all of the words."""
    return pytest.raises(LogError, match="".join(f"(?=.*{re.escape(word)})" for word in words))


class TestRows:
    def test_of_strings(self) -> None:
        items = Vocabulary.of(SHOP)["item"]
        assert (items.kind, items.rows) == ("listed", 4)
        assert items.rows_of(["cup", "new", "tea", "7", "", "Tea"]).tolist() == [2, 0, 1, 3, 0, 0]
        assert items.rows_of([7, np.int64(7)]).tolist() == [0, 0], (
            "a string is found only by that string"
        )
        assert items.at([0, 3, 1]) == [None, "7", "tea"]

    def test_of_integers_and_their_digits(self) -> None:
        users = Vocabulary.of(SHOP)["user"]
        given = [70, "70", "070", " 70", np.int64(70), -(2**63), "9223372036854775807", 2**63, "ann"]
        assert users.rows_of(given).tolist() == [1, 1, 0, 0, 1, 2, 3, 0, 0]
        assert users.at([2, 0]) == [-(2**63), None]
        assert users.rows_of([]).dtype == np.int64

    def test_of_many(self, monkeypatch) -> None:
        """They are converted in several blocks."""
        monkeypatch.setattr(vocabulary_module, "_AT_ONCE", 4)
        for count in (3, 4, 5, 11):
            ids = Vocabulary.of({"item": [f"i{n}" for n in range(count)]})["item"]
            assert ids.rows_of(ids.at(range(1, count + 1))).tolist() == [*range(1, count + 1)]

    def test_of_no_ids(self) -> None:
        assert Vocabulary.of({"item": []})["item"].rows_of(["tea", 3]).tolist() == [0, 0]

    def test_an_id_twice_has_one_row(self) -> None:
        assert Vocabulary.of({"item": ["b", "a", "b"]})["item"].at([1, 2]) == ["b", "a"]

    def test_of_a_hash(self) -> None:
        ids = Ids("hashed", 100)
        rows = ids.rows_of([*range(500), "7"])
        assert rows[7] == rows[-1] == hash_row(7, 100)
        assert rows.min() == 1 and rows.max() == 99 and len(set(rows)) > 90
        assert ids.at([3]) == [None] and ids.extended(["x"]) is ids
        with pytest.raises(ValueError, match="at least 2"):
            hash_row(1, 1)

    def test_of_numbers(self) -> None:
        ids = Ids("numbered", 5)
        assert ids.rows_of([4, "3", 5, -1, 0, "x"]).tolist() == [4, 3, 0, 0, 0, 0]
        assert ids.at([4, 0]) == [4, None]

    @pytest.mark.parametrize(
        "ids",
        [["tea", 7], [7, "tea"], [2**63], [1.5], ["tea", None], [None], ["tea", ""], [True]],
        ids=str,
    )
    def test_ids_of_several_kinds(self, ids: list) -> None:
        with refused("vocabulary", "'item'"):
            Vocabulary.of({"item": ids})

    def test_a_missing_name(self) -> None:
        with refused("'colour'", "'item'", "'user'"):
            Vocabulary.of(SHOP)["colour"]


class TestExtension:
    def test_old_rows_stay(self) -> None:
        old = Vocabulary.of(SHOP)
        new = old.extended({"item": ["jug", "tea", "jug", "pot"], "user": ["70", 5], "shop": ["a"]})
        assert new["item"].at(range(1, 6)) == ["tea", "cup", "7", "jug", "pot"]
        assert new["user"].at(range(1, 5)) == [70, -(2**63), 2**63 - 1, 5]
        assert new["shop"].rows == 2 and new["item"].rows == 6
        assert new.begins_with(old) and not old.begins_with(new)
        assert {n for n, d in old.digests().items() if new.digests()[n] != d} == {"item", "user"}

    def test_by_nothing_new(self) -> None:
        old = Vocabulary.of(SHOP)
        assert old.extended({"item": ["cup"]}).digest == old.digest

    @pytest.mark.parametrize("new", [{"user": ["ann"]}, {"item": [3]}, {"user": [None]}], ids=str)
    def test_by_ids_of_another_kind(self, new: dict) -> None:
        with refused("vocabulary", repr(next(iter(new)))):
            Vocabulary.of(SHOP).extended(new)

    @pytest.mark.parametrize(
        ("first", "second", "begins"),
        [
            ({"item": ["a", "b"]}, {"item": ["b", "a"]}, False),
            ({"item": ["ab", "c"]}, {"item": ["a", "bc"]}, False),
            ({"item": ["1", "2"]}, {"item": [1, 2]}, False),
            ({"item": ["a"]}, {"item": ["a"], "user": [1]}, False),
            ({"item": ["a"], "user": [1]}, {"item": ["a"]}, True),
        ],
        ids=str,
    )
    def test_others_are_distinguished(self, first: dict, second: dict, begins: bool) -> None:
        first, second = Vocabulary.of(first), Vocabulary.of(second)
        assert first.digest != second.digest
        assert first.begins_with(second) == begins

    def test_of_hashes_and_numbers(self) -> None:
        def one(kind, rows: int) -> Vocabulary:
            return Vocabulary({"item": Ids(kind, rows)})

        assert one("numbered", 9).begins_with(one("numbered", 5))
        assert not one("numbered", 5).begins_with(one("numbered", 9))
        assert not one("hashed", 9).begins_with(one("hashed", 5))
        assert one("hashed", 9).begins_with(one("hashed", 9))
        assert not one("hashed", 9).begins_with(one("numbered", 9))


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        vocabulary = Vocabulary.of(SHOP)
        Vocabulary({n: vocabulary[n] for n in SHOP} | {"shop": Ids("hashed", 9)}).save(tmp_path)
        return tmp_path

    def test_round_trip(self, folder: Path) -> None:
        read, wanted = Vocabulary.load(folder), Vocabulary.of(SHOP)
        assert read.digests() == wanted.digests() | {"shop": Ids("hashed", 9).digest}
        assert read["item"].at([1, 2, 3]) == SHOP["item"] and read["shop"].kind == "hashed"
        with pytest.raises(FileExistsError):
            read.save(folder)

    def test_written_by_another_program(self, folder: Path) -> None:
        before = Vocabulary.load(folder).digest
        table = pa.table({"id": pa.array(SHOP["item"], pa.string())})
        pq.write_table(table, folder / "vocabulary/item.parquet", compression="gzip", row_group_size=1)
        assert Vocabulary.load(folder).digest == before

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "vocabulary.json").unlink(),
            lambda folder: (folder / "vocabulary/item.parquet").unlink(),
            lambda folder: (folder / "vocabulary.json").write_text("{"),
            lambda folder: (folder / "vocabulary.json").write_text("[]"),
            lambda folder: (folder / "vocabulary.json").write_text('{"format": "ifa-vocabulary/9"}'),
            lambda folder: (folder / "vocabulary/item.parquet").write_bytes(b"PAR1"),
            lambda folder: pq.write_table(
                pa.table({"id": ["cup", "tea", "7"]}), folder / "vocabulary/item.parquet"
            ),
            lambda folder: pq.write_table(
                pa.table({"name": SHOP["item"]}), folder / "vocabulary/item.parquet"
            ),
        ],
        ids=["gone", "ids gone", "half", "a list", "another format", "ids cut", "other ids", "no ids"],
    )
    def test_damaged(self, folder: Path, damage) -> None:
        damage(folder)
        with refused(str(folder), "vocabulary"):
            Vocabulary.load(folder)

    @pytest.mark.parametrize(
        "change",
        [{"rows": 9}, {"rows": "4"}, {"kind": "guessed"}, {"kind": "hashed", "rows": 1}],
        ids=str,
    )
    def test_another_description(self, folder: Path, change: dict) -> None:
        file = folder / "vocabulary.json"
        saved = json.loads(file.read_text())
        saved["ids"]["item"] |= change
        file.write_text(json.dumps(saved))
        with refused(str(file), "write it again"):
            Vocabulary.load(folder)


class TestOfALog:
    def test_without_one_ids_are_rows(self, tmp_path: Path) -> None:
        rich = make_rich()
        log = rich.write(tmp_path / "log")
        vocabulary = log.vocabulary
        assert {*vocabulary.names} == {*RICH_SCHEMA.tables}
        assert {vocabulary[name].kind for name in vocabulary.names} == {"numbered"}
        assert vocabulary["item"].rows == log.num_items > RICH_SCHEMA.item_features["item"]

    def test_another_vocabulary_is_refused(self, tmp_path: Path) -> None:
        log = make_rich().write(tmp_path / "log")
        before = log.fingerprint()
        for file in ("vocabulary.json", "vocabulary"):
            (log.path / file).rename(tmp_path / file)
        with refused(str(log.path), "no vocabulary"):
            EventLog(log.path).fingerprint()
        Vocabulary.numbered(RICH_SCHEMA, items=41).save(log.path)
        with refused(str(log.path), "not the one", "restore that one"):
            EventLog(log.path).fingerprint()
        assert log.fingerprint() == before

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ({"item": 39}, ["'item'", "39 rows", "40 items"]),
            ({"genre": 7}, ["'genre'", "7 rows", "in the schema has 6", "enlarge"]),
        ],
        ids=str,
    )
    def test_of_another_size(self, tmp_path: Path, rows: dict[str, int], words: list[str]) -> None:
        vocabulary = Vocabulary.numbered(RICH_SCHEMA, 40)
        [(name, number)] = rows.items()
        ids = {n: vocabulary[n] for n in vocabulary.names} | {name: Ids("numbered", number)}
        with refused("vocabulary", *words):
            Vocabulary(ids).check(RICH_SCHEMA, 40)


class TestExternalIds:
    """DataFrames with external ids."""

    SCHEMA = LogSchema(
        item_features={"item": 4, "category": 4},
        item_lists={"genre": 3},
        item_dense=("price",),
        item_vectors={"text": 2},
        event_features={"action": 3},
        context_features={"store": 3},
        context_lists={"interest": 3},
        candidate_features={"place": 3},
    )
    VOCABULARY = Vocabulary.of(
        {
            "user": ["ann", "bob"],
            "item": ["tea", "cup", "jug", "pot"],  # pot is new: the table has four rows
            "category": [700, 800],
            "genre": ["hot", "cold"],
            "action": ["buy", "skip"],
            "store": ["x", "y"],
            "interest": ["hot", "cold"],
        }
    )

    def frames(self) -> dict[str, pd.DataFrame]:
        day = pd.Timestamp(2024, 1, 1)
        return {
            "events": pd.DataFrame(
                {
                    "user": ["bob", "ann", "bob"],
                    "item": ["pot", "tea", "never heard of"],
                    "time": day,
                    "action": ["skip", "buy", None],
                }
            ),
            "items": pd.DataFrame(
                {
                    "item": ["jug", "pot", "tea"],
                    "category": pd.array([800, None, 900], "Int64"),
                    "genre": [["cold"], ["hot", "warm"], []],
                    "price": [5, 6, 7],
                    "text": [[1.0, 2.0]] * 3,
                    "name": ["a jug", "a pot", "tea"],
                }
            ),
            "test": pd.DataFrame(
                {
                    "user": ["ann", "eve"],
                    "time": day + pd.Timedelta(1, unit="D"),
                    "store": ["y", "z"],
                    "interest": [["cold", "warm"], []],
                    "candidates": [["pot", "tea"], ["mug"]],
                    "exposed": [[True, True], [True]],
                    "place": [[2, 1], [0]],  # not in the vocabulary: rows
                    "label": [[1, 0], [0]],
                }
            ),
        }

    def write(self, path: Path, vocabulary: Vocabulary | None = None, **frames) -> EventLog:
        given = self.frames() | frames
        return EventLog.from_pandas(
            path,
            given["events"],
            self.SCHEMA,
            given["items"],
            {"test": given["test"]},
            vocabulary or self.VOCABULARY,
        )

    def test_rows_of_all_ids(self, tmp_path: Path) -> None:
        log = self.write(tmp_path / "log")
        assert log.users.tolist() == [1, 2]
        assert log.events["item"].tolist() == [1, 4, 0] and log.events["action"].tolist() == [1, 2, 0]
        assert log.num_items == 5 and log.item_rows(np.arange(5)).tolist() == [0, 1, 2, 3, 0]
        assert log.items["category"].tolist() == [0, 0, 0, 2, 0]
        assert log.items["genre"].tolist() == [2, 1, 0]
        assert log.items["genre_offsets"].tolist() == [0, 0, 0, 0, 1, 3]
        np.testing.assert_array_equal(log.items["price"], [np.nan, 7, np.nan, 5, 6])
        assert log.items["text"].tolist() == [[0, 0], [1, 2], [0, 0], [1, 2], [1, 2]]
        assert log.item_names() == ["unknown", "tea", "unknown", "a jug", "a pot"]
        test = log.requests("test")
        assert test["user"].tolist() == [1, 0] and test["store"].tolist() == [2, 0]
        assert test["interest"].tolist() == [2, 0] and test["interest_offsets"].tolist() == [0, 2, 2]
        assert test["candidates"].tolist() == [4, 1, 0] and test["place"].tolist() == [2, 1, 0]

    def test_it_is_saved_with_the_log(self, tmp_path: Path) -> None:
        log = EventLog(self.write(tmp_path / "log").path)
        assert log.vocabulary.begins_with(self.VOCABULARY)
        assert log.vocabulary["place"].kind == "numbered"
        longer = self.VOCABULARY.extended({"item": ["mug"]})
        other = self.write(tmp_path / "other", longer)
        assert other.num_items == 6 and other.requests("test")["candidates"].tolist() == [4, 1, 5]
        assert other.vocabulary.begins_with(log.vocabulary)
        assert other.fingerprint() != log.fingerprint()

    def test_items_without_a_description(self, tmp_path: Path) -> None:
        events = self.frames()["events"].drop(columns="action")
        log = EventLog.from_pandas(
            tmp_path / "log", events, LogSchema(item_features={"item": 4}), vocabulary=self.only_items()
        )
        assert log.num_items == 5 and sorted(log.events["item"]) == [0, 1, 4]
        listed = self.only_items()["item"].at(range(1, 5))
        assert log.item_names() == ["item 0", *(f"item {called}" for called in listed)]

    def only_items(self) -> Vocabulary:
        return Vocabulary({name: self.VOCABULARY[name] for name in ("user", "item")})

    @pytest.mark.parametrize(
        ("table", "change", "words"),
        [
            ("events", {"user": ["bob", "eve", "bob"]}, ["events", "row 1", "'user'", "extend"]),
            ("events", {"action": [1.5, 2.0, 2.0]}, ["events", "row 0", "'action'", "1.5", "Int64"]),
            ("items", {"item": ["jug", "mug", "tea"]}, ["items", "row 1", "'item'", "extended"]),
            ("items", {"item": ["jug", "tea", "tea"]}, ["items", "row 2", "'item'", "same item"]),
            ("items", {"genre": ["hot"] * 3}, ["items", "row 0", "'genre'", "expected a list"]),
            (
                "test",
                {"candidates": [["tea"], None]},
                ["requests/test", "row 1", "'candidates'", "list"],
            ),
        ],
        ids=str,
    )
    def test_bad_frames(self, tmp_path: Path, table: str, change: dict, words: list[str]) -> None:
        frame = self.frames()[table].assign(**change)
        with refused(*words):
            self.write(tmp_path / "log", **{table: frame})
        assert list(tmp_path.iterdir()) == []

    def test_names_that_are_not_in_the_schema(self, tmp_path: Path) -> None:
        with refused("vocabulary", "'colour'", "'category'"):
            self.write(tmp_path / "log", self.VOCABULARY.extended({"colour": ["red"]}))
