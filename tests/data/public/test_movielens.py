"""MovieLens in each of its published layouts gives the same log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifa_torchrec.data import EventLog, LogError
from ifa_torchrec.data.public import movielens

pytest.importorskip("duckdb", reason="the extra `data` is not installed")

FILMS = [(1, "Toy Story (1995)", "Animation|Comedy"), (2, "Café (1996)", "Drama"), (9, "unknown", "")]
# 20 pages of one user: two films rated within a minute, with an hour between pages
RATINGS = [
    (user, film, 1 + (film + page) % 5, 881250949 + 3600 * page + film)
    for user in (7, 10)
    for page in range(20)
    for film in (1, 9)
]


def lines(delimiter: str, fraction: str = "") -> str:
    return "".join(
        delimiter.join([str(user), str(film), f"{stars}{fraction}", str(time)]) + "\n"
        for user, film, stars, time in RATINGS
    )


def write(folder: Path, layout: str) -> Path:
    folder.mkdir()
    if layout == "ml-100k":
        flags = {"Animation|Comedy": {3, 5}, "Drama": {8}, "": {0}}
        films = [
            f"{film}|{title}|01-Jan-1995||http://us.imdb.com/M/?{film}|"
            + "|".join(str(int(number in flags[genres])) for number in range(19))
            for film, title, genres in FILMS
        ]
        (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
        (folder / "u.data").write_text(lines("\t"))
    elif layout == "ml-1m":
        films = ["::".join(map(str, film)) for film in FILMS]
        (folder / "movies.dat").write_text("\n".join(films) + "\n", encoding="latin-1")
        (folder / "ratings.dat").write_text(lines("::"))
    else:
        films = [f'{film},"{title}",{genres}' for film, title, genres in FILMS]
        (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *films]) + "\n")
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines(",", ".0"))
    return folder


@pytest.mark.parametrize("layout", ["ml-100k", "ml-1m", "ml-25m"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    log: EventLog = movielens.prepare(write(tmp_path / layout, layout), tmp_path / "log")
    # nobody rated the second film, so it is a new item, and its year and genre are unknown
    assert log.item_names() == ["unknown", "Toy Story (1995)", "unknown", "Café (1996)"]
    assert log.schema.item_features == {"item": 3, "year": 2} and log.items["year"].tolist() == [
        0,
        1,
        0,
        0,
    ]
    lengths = np.diff(log.items["genres_offsets"])
    assert lengths.tolist() == [0, 2, int(layout == "ml-100k"), 1]  # ml-100k has a genre "unknown"
    assert log.items["genres"][-1] == 0 and log.users.tolist() == [1, 2]
    rated = sorted((user, time, stars) for user, _, stars, time in RATINGS)
    assert log.events["time"].tolist() == [time * 1_000_000 for _, time, _ in rated]
    given = log.vocabulary["stars"].at(log.events["stars"])
    assert [float(stars) for stars in given] == [stars for *_, stars in rated]
    assert [len(log.requests(split)["user"]) for split in log.splits] == [32, 4, 4]
    train = log.requests("train")
    assert train["candidates"].tolist() == [1, 2] * 32
    assert (np.diff(train["candidate_offsets"]) == 2).all()
    stars = [(1 + (film + page) % 5) for page in range(16) for _ in range(2) for film in (1, 9)]
    assert train["liked"].tolist() == [float(s >= 4) for s in stars]


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"none of .*u\.data.*unpacked archive"):
        movielens.prepare(tmp_path, tmp_path / "log")
