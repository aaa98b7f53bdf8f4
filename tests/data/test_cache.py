"""The cache deletes the least recently used copies, and never one that is in use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ifa_torchrec.data import LogError
from ifa_torchrec.data.cache import Cache, Held, use

KB = 1000


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    """Files of one kilobyte, from the least to the most recently used."""
    names = [
        "a/log/events/part-00000.parquet",
        "b/log/requests/train/part-00001.parquet",
        "a/log/.columns/events-0123456789abcdef/user.npy",
        "b/log/.columns/requests/train-0123456789abcdef/user.npy",
        "a/log/items.parquet",
        "b/log/schema.json",
    ]
    for time, name in enumerate(names):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(KB))
        os.utime(file, (time, time))
        if ".columns" in name:
            os.utime(file.parent, (time, time))
    return {name: tmp_path / name for name in names}


def left_by(cache: Cache, wanted: int, copies: dict[str, Path]) -> list[int]:
    with cache.room_for(wanted):
        return [number for number, file in enumerate(copies.values()) if file.exists()]


def test_nothing_is_deleted_within_the_limit(tmp_path: Path, copies: dict[str, Path]) -> None:
    assert left_by(Cache(tmp_path, 7 * KB), KB, copies) == [0, 1, 2, 3, 4, 5]


def test_the_least_recently_used_are_deleted(tmp_path: Path, copies: dict[str, Path]) -> None:
    use(copies["a/log/events/part-00000.parquet"]).close()
    assert left_by(Cache(tmp_path, 6 * KB), 2 * KB, copies) == [0, 3, 4, 5]


def test_small_files_are_deleted_last_and_with_their_whole_log(
    tmp_path: Path, copies: dict[str, Path]
) -> None:
    held = use(tmp_path / "b/log")
    assert left_by(Cache(tmp_path, 2 * KB), KB, copies) == [5]
    held.close()
    assert not (tmp_path / "a/log").exists()


def test_what_is_in_use_stays(tmp_path: Path, copies: dict[str, Path]) -> None:
    columns = copies["a/log/.columns/events-0123456789abcdef/user.npy"].parent
    held = [Held(path) for path in (copies["a/log/events/part-00000.parquet"], columns)]
    cache = Cache(tmp_path, 4 * KB)
    assert left_by(cache, 0, copies) == [0, 2, 4, 5]
    with pytest.raises(LogError, match=re.escape("3,000 bytes are in use and 3,000 more are needed")):
        left_by(cache, 3 * KB, copies)
    assert [file.exists() for file in copies.values()] == [True, False, True, False, True, False]
    for each in held:
        each.close()


@pytest.mark.parametrize("given", ["0", "-1", "many", "inf", "nan"])
def test_an_invalid_limit(given: str) -> None:
    with pytest.raises(LogError, match=f"IFA_LOG_CACHE_GB.*{given}"):
        Cache.of({"IFA_LOG_CACHE_GB": given})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache.of({"IFA_LOG_CACHE": str(tmp_path / "file")})
    with pytest.raises(LogError, match="set IFA_LOG_CACHE to a folder"), cache.room_for(1):
        pass
