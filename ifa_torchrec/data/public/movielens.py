"""MovieLens (GroupLens) as event logs, from the unpacked archives: ml-100k, ml-1m, ml-20m, 25m and 32m.

MovieLens has ratings but no requests, so we construct them: a request is a page of films, defined as a
user's ratings at most a minute apart. A film is liked with 4 stars or more. The events are all films
that a user rated, with the stars as the event feature `stars`, so that the model can distinguish liked
films from others, and as the number `rating`. A film's features are its year and the list of its genres.
80 % of the requests are for training, 10 % each for validation and test, by time.

So the model ranks films among those that the user chose to rate: it learns what a user likes, not what a
user would watch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import Items, Listed, PrepareSchema
from ifa_torchrec.data.prepare import prepare as write_log
from ifa_torchrec.data.public.common import rated_pages
from ifa_torchrec.data.schema import LogError

_RATINGS = ("userId", "movieId", "rating", "timestamp")
_MOVIES = ("movieId", "title", "genres")
# u.item has a column of 0 or 1 for each genre.
_FLAGS = tuple(f"genre{number}" for number in range(19))
_NAMED_FLAGS = ", ".join(f"CASE WHEN {flag} = '1' THEN '{flag}' END" for flag in _FLAGS)
_LAYOUTS: dict[str, tuple[dict[str, Any], str, dict[str, Any], Listed]] = {
    "u.data": (
        {"delimiter": "\t", "columns": _RATINGS},
        "u.item",
        {
            "delimiter": "|",
            "quote": "",
            "encoding": "latin-1",
            "columns": ("movieId", "title", "released", "video_released", "url", *_FLAGS),
        },
        Listed(f"concat_ws('|', {_NAMED_FLAGS})", delimiter="|"),
    ),
    "ratings.dat": (
        {"delimiter": "::", "columns": _RATINGS},
        "movies.dat",
        {"delimiter": "::", "quote": "", "encoding": "latin-1", "columns": _MOVIES},
        Listed("genres", delimiter="|"),
    ),
    "ratings.csv": ({}, "movies.csv", {}, Listed("genres", delimiter="|")),
}


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    r"""Write the event log of an unpacked MovieLens archive.

    Args:
        folder: contains u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv.
        out: the folder of the log; it must not exist yet.

    Raises:
        LogError: none of these files exists.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.data.public import movielens
        >>> folder = Path(tempfile.mkdtemp())
        >>> movies = ["1::Toy Story (1995)::Animation|Comedy", "2::Jumanji (1995)::Adventure"]
        >>> ratings = [f"1::{film}::{2 + film}::{978300000 + 100 * page + film}"
        ...            for page in range(10) for film in (1, 2)]  # ten pages of two films
        >>> _ = (folder / "movies.dat").write_text("\n".join(movies))
        >>> _ = (folder / "ratings.dat").write_text("\n".join(ratings))
        >>> movielens.prepare(folder, folder / "log").requests("valid")["liked"].tolist()
        [0.0, 1.0]
    """
    return write_log(schema_of(folder), out)


def schema_of(folder: str | Path) -> PrepareSchema:
    """The schema that ``prepare`` uses, to be changed before use.

    Args:
        folder: as for ``prepare``.

    Raises:
        LogError: see ``prepare``.

    Example:
        >>> from ifa_torchrec.data.public import movielens
        >>> movielens.schema_of("ml-25m").events.features  # doctest: +SKIP
        {'stars': 'rating::FLOAT'}
    """
    folder = Path(folder)
    ratings = next((file for file in _LAYOUTS if (folder / file).exists()), None)
    if ratings is None:
        raise LogError(
            f"{folder}: none of {list(_LAYOUTS)} exists; name the folder of the unpacked archive"
        )
    ratings_format, movies, movies_format, genres = _LAYOUTS[ratings]
    rows: dict[str, Any] = {
        **ratings_format,
        "files": str(folder / ratings),
        "user": "userId",
        "item": "movieId",
        "time": "timestamp",
        "unit": "s",
    }
    films = Items(
        files=str(folder / movies),
        item="movieId",
        features={"year": r"nullif(regexp_extract(title, '\((\d{4})\)\s*$', 1), '')"},
        lists={"genres": genres},
        name="title",
        **movies_format,
    )
    stars = {"features": {"stars": "rating::FLOAT"}, "dense": {"rating": "rating::FLOAT"}}
    return rated_pages(rows, "rating::FLOAT >= 4", stars, films)
