"""A log in parts equals the log: the same histories and batches; a foreign part is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy import SPLITS, USERS, make_toy

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.data.parts import part_in_sql, part_of

PARTS = 3


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return make_toy().write(tmp_path_factory.mktemp("one") / "log")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy, path = make_toy(), tmp_path_factory.mktemp("parts") / "log"
    EventLog.from_pandas(path, toy.events, toy.schema, toy.items, toy.requests, parts=PARTS)
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy without columns, to be damaged."""
    return shutil.copytree(written, tmp_path / "log", ignore=shutil.ignore_patterns(".columns"))


def refused(*words: str):
    return pytest.raises(LogError, match="".join(f"(?=.*{re.escape(word)})" for word in words))


def by_user(log: EventLog) -> dict[int, list]:
    """The events of each user, with all columns."""
    bounds = zip(log.users.tolist(), log.user_offsets, log.user_offsets[1:], strict=False)
    return {u: [log.events[c][a:b].tolist() for c in sorted(log.events)] for u, a, b in bounds}


def same_batch(one: RankingBatch, two: RankingBatch) -> None:
    mine, other = one.__dict__, two.__dict__
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)
        elif value is not None:
            assert value.keys() == other[name].keys()
            assert torch.equal(value.values(), other[name].values())
            assert torch.equal(value.lengths(), other[name].lengths())


class TestTheSameLog:
    def test_events_and_histories(self, one: EventLog, written: Path) -> None:
        log = EventLog(written)
        assert log.parts == PARTS
        assert by_user(log) == by_user(one)
        users = np.repeat([*USERS, -3, 10**12], 50)
        times = np.random.default_rng(0).choice(one.events["time"], len(users))
        found = [of.history_range(users, times) for of in (one, log)]
        lists = [
            [of.events["item"][a:b].tolist() for a, b in zip(*ends, strict=True)]
            for of, ends in zip((one, log), found, strict=True)
        ]
        assert lists[0] == lists[1]

    @pytest.mark.parametrize("split", SPLITS)
    def test_batches_are_equal(self, one: EventLog, written: Path, split: str) -> None:
        log = EventLog(written)
        # its requests are those of part 0 in order, then those of part 1, and so on
        order = np.argsort(part_of(one.requests(split)["user"], PARTS), kind="stable")
        whole, parts = RankingDataset(one, split), RankingDataset(log, split)
        np.testing.assert_array_equal(whole.history_lengths[order], parts.history_lengths)
        for rows in np.array_split(np.random.default_rng(1).permutation(len(order)), 5):
            same_batch(parts[rows], whole[order[rows]])

    def test_figures_of_the_log(self, one: EventLog, written: Path) -> None:
        log = EventLog(written)
        assert log.new_items("test") == one.new_items("test")
        for name, scale in one.scales.items():
            assert (log.scales[name].mean, log.scales[name].deviation) == pytest.approx(
                (scale.mean, scale.deviation)
            )

    def test_a_part_may_be_empty(self, one: EventLog, tmp_path: Path) -> None:
        toy = make_toy()
        log = EventLog.from_pandas(
            tmp_path / "log", toy.events, toy.schema, toy.items, toy.requests, parts=40
        )
        assert by_user(log) == by_user(one)
        assert len(log.requests("test")["user"]) == SPLITS["test"]

    def test_columns_are_not_written_again(self, written: Path, monkeypatch) -> None:
        fingerprint = EventLog(written).fingerprint()
        monkeypatch.setattr("pyarrow.parquet.read_table", None)
        assert EventLog(written).fingerprint() == fingerprint


class TestShards:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_together_they_are_the_log(self, written: Path, world: int) -> None:
        whole, shards = EventLog(written), [EventLog(written, (r, world)) for r in range(world)]
        assert [part for log in shards for part in log.own] == list(range(PARTS))
        assert [user for log in shards for user in by_user(log).items()] == list(by_user(whole).items())
        for split in SPLITS:
            of_all, first = RankingDataset(whole, split, unknown_items=0.5), 0
            for log in shards:
                dataset = RankingDataset(log, split, unknown_items=0.5)
                assert dataset.of_parts == of_all.of_parts
                rows = np.random.default_rng(1).permutation(len(dataset))
                same_batch(dataset[rows], of_all[rows + first])
                first += len(dataset)
            assert first == SPLITS[split] == sum(of_all.of_parts)
        assert {log.fingerprint() for log in shards} == {whole.fingerprint()}

    def test_a_rank_opens_only_its_own_files(self, folder: Path) -> None:
        log = EventLog(folder)
        for file in folder.rglob("part-00000.parquet"):
            file.unlink()
        shutil.rmtree(folder / ".columns")
        own = EventLog(folder, (1, 2))
        assert own.own == range(1, 3) and not own.whole
        assert by_user(own).items() <= by_user(log).items()
        assert [len(own.requests(split)["user"]) for split in SPLITS]
        again = pickle.loads(pickle.dumps(own))  # as sent to a worker
        assert again.own == own.own and by_user(again) == by_user(own)
        for closed in ((0, 1), (0, 2)):
            with refused("part-00000.parquet", "missing"):
                EventLog(folder, closed)

    def test_users_of_parts_that_are_not_open(self, written: Path) -> None:
        log = EventLog(written, (0, PARTS))
        other = int(EventLog(written, (1, PARTS)).users[0])
        with refused(f"user {other} is in part 1", "only parts 0 to 0"):
            log.history_range(np.array([log.users[0], other]), np.zeros(2, np.int64))

    def test_fewer_parts_than_ranks(self, one: EventLog, written: Path) -> None:
        assert EventLog(written, (3, 4)).whole
        assert EventLog(one.path, (1, 2)).whole


def _swap(folder: Path) -> None:
    first, second = (folder / f"events/part-0000{n}.parquet" for n in (0, 1))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def _change_a_value(folder: Path) -> None:
    file = folder / "requests/train/part-00001.parquet"
    frame = pd.read_parquet(file)
    frame.loc[0, "store"] += 1
    frame.to_parquet(file, index=False)


def _manifest(change):
    def edit(folder: Path) -> None:
        header = json.loads((folder / "schema.json").read_text())
        change(header)
        (folder / "schema.json").write_text(json.dumps(header))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "events/part-00002.parquet").unlink(), ["events/part-00002", "missing"]),
        (_swap, ["events/part-00000.parquet", "it is part 1", "restore that part"]),
        (_change_a_value, ["requests/train/part-00001", "SHA-256"]),
        (_manifest(lambda h: h["parts"].pop("requests/valid")), ["schema.json", "requests/valid"]),
        (_manifest(lambda h: h["parts"]["events"].pop()), ["schema.json", "rows"]),
        (_manifest(lambda h: h["parts"]["requests/test"][0].update(rows=99)), ["requests/test", "rows"]),
        (_manifest(lambda h: h["parts"]["events"][0].pop("sha256")), ["schema.json", "sha256"]),
        (_manifest(lambda h: h.pop("parts")), ["schema.json", "parts"]),
        (_manifest(lambda h: h.update(format="ifa-event-log/9")), ["ifa-event-log/9", "this version"]),
    ],
)
def test_damaged_logs_are_refused(folder: Path, damage, words: list[str]) -> None:
    damage(folder)
    with refused(*words):
        log = EventLog(folder)
        for split in log.splits:
            log.requests(split)


def test_a_user_in_another_part_is_refused(folder: Path, tmp_path: Path) -> None:
    log = EventLog(folder)
    draft = tmp_path / "draft"
    shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(".columns", "schema.json"))
    _swap(draft)
    with refused("events/part-00000.parquet", "belongs in part", "not in part 0"):
        EventLog.publish(draft, tmp_path / "new", log.schema, log.splits)


def test_a_folder_with_too_few_parts_is_not_published(folder: Path, tmp_path: Path) -> None:
    schema = EventLog(folder).schema
    (folder / "requests/valid/part-00002.parquet").unlink()
    with refused("requests/valid", "part-00000", "part-00002", "as many parts as events"):
        EventLog.publish(folder, tmp_path / "new", schema, list(SPLITS))


@pytest.mark.parametrize("parts", [0, -1, 2.0, True, 1 << 17])
def test_an_invalid_number_of_parts(tmp_path: Path, parts) -> None:
    toy = make_toy()
    with refused("parts must be an integer", repr(parts)):
        EventLog.from_pandas(tmp_path / "log", toy.events, toy.schema, toy.items, parts=parts)


def test_duckdb_cuts_users_as_numpy_does() -> None:
    duckdb = pytest.importorskip("duckdb", reason="the extra `data` is not installed")
    users = np.append(np.random.default_rng(0).integers(0, 2**63 - 1, 5000), [0, 1, 2**63 - 1])
    frame = pd.DataFrame({"u": users})
    sql = duckdb.connect()
    sql.register("frame", frame)
    found = sql.execute(f"SELECT {part_in_sql('u', 7)} FROM frame").fetchnumpy()
    assert next(iter(found.values())).tolist() == part_of(users, 7).tolist()


def test_consecutive_users_are_spread_evenly() -> None:
    counts = np.bincount(part_of(np.arange(1, 100_001), 64))
    assert counts.max() / counts.mean() < 1.02
