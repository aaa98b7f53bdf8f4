"""A remote log equals the log: it is read through checked copies within a size limit."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from toy import make_toy

from ifa_torchrec.data import EventLog, LogError, remote
from ifa_torchrec.data.parts import own_parts
from ifa_torchrec.data.remote import RemoteLog, is_uri
from ifa_torchrec.data.writing import drafting

PARTS = 3


@pytest.fixture(scope="module", params=[1, PARTS])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    toy, path = make_toy(), tmp_path_factory.mktemp("written") / "log"
    return EventLog.from_pandas(
        path, toy.events, toy.schema, toy.items, toy.requests, parts=request.param
    )


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy, path = make_toy(), tmp_path_factory.mktemp("parts") / "log"
    EventLog.from_pandas(path, toy.events, toy.schema, toy.items, toy.requests, parts=PARTS)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IFA_LOG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(in_parts: Path, tmp_path: Path) -> Path:
    """A copy without columns, to be damaged."""
    return shutil.copytree(in_parts, tmp_path / "log", ignore=shutil.ignore_patterns(".columns"))


def refused(*words: str):
    return pytest.raises(LogError, match="".join(f"(?=.*{re.escape(word)})" for word in words))


def opened(folder: Path) -> EventLog:
    """Open a log by its URI, with all tables."""
    log = EventLog(folder.as_uri())
    for split in log.splits:
        log.requests(split)
    return log


def parquet_in(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.rglob("part-*.parquet"))


def test_the_same_log(written: EventLog, cache: Path) -> None:
    log = opened(written.path)
    assert log.fingerprint() == written.fingerprint()
    assert (log.parts, log.item_names()) == (written.parts, written.item_names())
    assert log.path.is_relative_to(cache) and log.path.name == "log"


def test_nothing_is_copied_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = opened(folder).fingerprint()
    shutil.rmtree(folder / "events")  # only the listing is read
    monkeypatch.setattr("pyarrow.parquet.read_table", None)
    assert opened(folder).fingerprint() == fingerprint


def test_a_log_written_again_is_copied_again(folder: Path) -> None:
    before = opened(folder)
    toy = make_toy()
    toy.events["item"] = (toy.events["item"] + 1) % len(toy.items)
    shutil.rmtree(folder)
    EventLog.from_pandas(folder, toy.events, toy.schema, toy.items, toy.requests, parts=PARTS)
    after = opened(folder)
    assert after.path != before.path
    assert not np.array_equal(after.events["item"], before.events["item"])


def test_parts_are_deleted_when_space_is_needed_and_columns_in_use_stay(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(folder)
    assert len(parquet_in(cache)) == 4 * PARTS
    of_parts = sum(file.stat().st_size for file in cache.rglob("part-*.parquet"))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    monkeypatch.setenv("IFA_LOG_CACHE_GB", str((size - of_parts) / 1e9))
    again = opened(folder)  # unused copies are deleted to stay within the limit
    again._columns._remote.keep_within_bound()
    assert not parquet_in(cache)
    assert again.fingerprint() == log.fingerprint()
    monkeypatch.setenv("IFA_LOG_CACHE_GB", str((size - of_parts - 1) / 1e9))
    with refused("bytes are in use", "raise IFA_LOG_CACHE_GB"):
        opened(folder)
    del log, again
    monkeypatch.setenv("IFA_LOG_CACHE_GB", "1e-6")
    with refused("bytes are in use"):
        opened(folder)
    assert not list(cache.rglob("*.npy"))


def test_a_rank_copies_only_its_own_parts(folder: Path, cache: Path) -> None:
    own = own_parts(PARTS, (1, 2))
    for file in folder.rglob("part-*.parquet"):
        if int(file.stem.removeprefix("part-")) not in own:
            file.unlink()
    log = EventLog(folder.as_uri(), (1, 2))
    rows = [len(log.requests(split)["user"]) for split in log.splits]
    assert rows == [sum(log.requests_of_parts(split)[n] for n in own) for split in log.splits]
    assert len(parquet_in(cache)) == len(own) * (1 + len(log.splits))
    assert EventLog(folder.as_uri(), (1, 2)).fingerprint() == log.fingerprint()
    with refused("part-00000.parquet", "missing"):
        EventLog(folder.as_uri(), (0, 2))


def test_a_damaged_copy_is_copied_again(folder: Path, cache: Path) -> None:
    log = opened(folder)
    fingerprint = log.fingerprint()
    shutil.rmtree(log.path / ".columns")
    part = log.path / "events/part-00001.parquet"
    part.write_bytes(bytes(part.stat().st_size))
    assert opened(folder).fingerprint() == fingerprint


def _change_a_value(folder: Path) -> None:
    file = folder / "requests/train/part-00001.parquet"
    frame = pd.read_parquet(file)
    frame.loc[0, "store"] += 1
    frame.to_parquet(file, index=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "events/part-00002.parquet").unlink(), ["events/part-00002", "missing"]),
        (_change_a_value, ["requests/train/part-00001.parquet", "SHA-256", "restore that part"]),
        (lambda f: (f / "schema.json").unlink(), ["schema.json is missing", "schema.json last"]),
        (lambda f: (f / "items.parquet").unlink(), ["items.parquet", "missing"]),
        (shutil.rmtree, ["no such log, folder or file"]),
    ],
)
def test_damaged_logs_are_refused(folder: Path, cache: Path, damage, words: list[str]) -> None:
    damage(folder)
    with refused(*words):
        opened(folder)
    assert not list(cache.rglob(".draft-*"))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://host/log", ["ftp://host/log", "s3://BUCKET/LOG"]),
        ("s3://key:secret@bucket/log", ["must not contain a key or password", "environment"]),
    ],
)
def test_uris_that_cannot_be_read(uri: str, words: list[str]) -> None:
    with refused(*words) as error:
        EventLog(uri)
    assert "secret" not in str(error.value)


def test_a_log_is_not_written_to_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a Path, as made by the command line, has one slash less
    for place in ("s3://bucket/log", Path("s3://bucket/log")):
        with refused("a log can only be written to a local folder"), drafting(place):
            pass
    assert os.listdir(tmp_path) == []


def test_is_uri() -> None:
    assert is_uri("hdfs://host:8020/log") and is_uri("abfss://box@account/log")
    assert not any(map(is_uri, ("log", "/log", "./s3:/log", Path("runs/data"))))


@pytest.mark.parametrize("place", ["abfss://box@account.dfs.core.windows.net", "gs://anonymous@bucket"])
def test_text_before_an_at_need_not_be_a_key(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SimpleNamespace(from_uri=lambda uri: (uri, "log/"))
    monkeypatch.setattr(remote, "pafs", SimpleNamespace(FileSystem=files))
    assert remote._opened(f"{place}/log") == (f"{place}/log", "log")
    for secret in ("s3://key@bucket/log", "hdfs://user:secret@host/log"):
        with refused("must not contain a key or password"):
            remote._opened(secret)


def test_the_header_is_the_one_that_was_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, copy = (folder / "schema.json").read_bytes(), RemoteLog._copy

    def meanwhile(self: RemoteLog, *args, **options):
        (folder / "schema.json").write_bytes(b"{}")
        return copy(self, *args, **options)

    monkeypatch.setattr(RemoteLog, "_copy", meanwhile)
    log = RemoteLog(folder.as_uri())
    assert (log.folder / "schema.json").read_bytes() == header
