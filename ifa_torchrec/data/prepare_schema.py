"""What a log looks like, as it was found: the schema of ``ifa_torchrec.data.prepare``."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import LogError


@dataclass(frozen=True)
class Hashed:
    """A column whose ids are hashed to a fixed number of rows; row 0 of a feature is "unknown".

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Hashed
        >>> Hashed("author_id", hash=100_000).hash
        100000
    """

    column: str
    hash: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Files with the same columns. Wherever a column is asked for, an SQL expression will do as well.

    Args:
        files: path or glob, or several, of Parquet, Feather or CSV; CSV may be compressed by gzip or
            Zstandard. `**` stands for folders of any depth; a folder NAME=VALUE gives no column.
        delimiter, encoding: of CSV, in any of Python's spellings; its columns are all text, so
            `rating::float >= 4`.
        quote: what values of CSV may stand in; "" where quotes are part of the values.
        columns: names of the CSV columns, where the files have no header.
        nulls: values of CSV that stand for none, as "NULL" or "\\N", quoted or not; "" always does.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Table
        >>> Table(files="log-*.csv", delimiter="::").quote
        '"'
    """

    files: str | Sequence[str]
    delimiter: str = ","
    quote: str = '"'
    encoding: str = "utf-8"
    columns: Sequence[str] = ()
    nulls: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Events(Table):
    """Who had to do with which item, and when.

    Args:
        user, item, time: columns.
        unit: "s", "ms" or "us" since 1970; by default times are timestamps, like 2024-05-01 10:00:00.
        where: take only the rows of which this is true.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Events
        >>> Events(files="clicks.csv", user="uid", item="iid", time="ts", unit="s").where is None
        True
    """

    user: str
    item: str | Hashed
    time: str
    unit: str | None = None
    where: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinedLabel(Events):
    """Rows that label a candidate 1: same user and item, at most `within_seconds` after it.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import JoinedLabel
        >>> JoinedLabel(files="buys.csv", user="u", item="i", time="t", within_seconds=600).unit is None
        True
    """

    within_seconds: float


@dataclass(frozen=True, kw_only=True)
class Requests(Events):
    """One row for each candidate.

    A log of what users did, without what they were shown, has candidates with a label of 1 alone. With
    `negatives` others are drawn for them. These candidates are our construction: nobody knows whether
    they were shown. Their labels are 0, and they stand as exposed, since the loss takes the labels of
    the exposed alone. An item is drawn in proportion to its events before the first split, so that
    nothing of what is popular later is known to the training; one without such events is never drawn,
    so an item that is new in the test is always a positive. Draws are the same at every run. One that
    hits an item of the request, or one drawn for it before, is not made up for: LOG/report.json has for
    each split how many were asked for and how many were added; its other figures count them as any
    candidate.

    Args:
        labels: for each task, a column of 0 and 1, or a JoinedLabel.
        exposed: column of who was shown; all, by default. The label of the others may be empty.
        context: id features of the request.
        dense, candidate_dense: numbers of the request, and of the candidate.
        request: column that tells a user's requests apart.
        gap_seconds: rows of one user (and of one `request`, if given) at most so far apart are one
            request. By default rows of one time are, or of one `request` at any time.
        negatives: items to draw for each candidate with a label of 1.

    Raises:
        LogError: `negatives` is no number from 0, or is given beside `candidate_dense`, of which an
            item that is drawn has no value.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Requests
        >>> shown = Requests(files="shown.csv", user="u", item="i", time="t", labels={"click": "c"})
        >>> shown.gap_seconds is None
        True
    """

    labels: Mapping[str, str | JoinedLabel]
    exposed: str | None = None
    context: Mapping[str, str | Hashed] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    candidate_dense: Mapping[str, str] = field(default_factory=dict)
    request: str | None = None
    gap_seconds: float | None = None
    negatives: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.negatives, int) or self.negatives < 0:
            raise LogError(f"requests: negatives must be a whole number from 0, got {self.negatives!r}")
        if self.negatives and self.candidate_dense:
            raise LogError(
                f"requests: an item drawn by negatives={self.negatives} has no value of candidate_dense "
                f"{list(self.candidate_dense)}; leave one of the two out"
            )


@dataclass(frozen=True, kw_only=True)
class Items(Table):
    """What is known of the items; events and candidates of other items are refused.

    Where several rows describe an item, the greatest value of each column is taken.

    Args:
        item: column of the id.
        features: id features.
        name: column of what to call the item; its id, by default.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Items
        >>> Items(files="items.csv", item="id", features={"genre": "split_part(genres, '|', 1)"}).name
    """

    item: str
    features: Mapping[str, str | Hashed] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Users(Table):
    """What is known of the users: context features of each of their requests.

    Args:
        user: column of the id.
        features: id features.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Users
        >>> Users(files="users.csv", user="id", features={"country": "country"}).user
        'id'
    """

    user: str
    features: Mapping[str, str | Hashed]


@dataclass(frozen=True, kw_only=True)
class PrepareSchema:
    """A log, as it was found.

    Args:
        events: the histories.
        requests: what was to be ranked.
        splits: when each split starts, in order: a timestamp, or the share of all requests that come
            before it. What is before the first is "train".
        items, users: what is known of them.

    Example:
        >>> from ifa_torchrec.data.prepare_schema import Events, PrepareSchema, Requests
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={"valid": 0.8, "test": 0.9},
        ...                        requests=Requests(**rows, labels={"click": "clicked"}))
        >>> schema.items is None
        True
    """

    events: Events
    requests: Requests
    splits: Mapping[str, str | float]
    items: Items | None = None
    users: Users | None = None


def load_schema(path: str | Path) -> PrepareSchema:
    """Read a schema from JSON; files are looked for beside it.

    Raises:
        LogError: it is no JSON, a key is unknown or missing; the message has those there are.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare_schema import load_schema
        >>> path = Path(tempfile.mkdtemp()) / "schema.json"
        >>> rows = {"files": "log.csv", "user": "u", "item": "i", "time": "t"}
        >>> schema = {"events": rows, "requests": {**rows, "labels": {"click": "c"}},
        ...           "splits": {"test": "2024-05-01"}}
        >>> _ = path.write_text(json.dumps(schema))
        >>> load_schema(path).events.item
        'i'
    """
    path = Path(path)
    try:
        parts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: not readable as JSON ({error})") from error

    def build(kind: type, section: str, values: Any) -> Any:
        fields = {f.name: f for f in dataclasses.fields(kind)}
        missing = dataclasses.MISSING
        needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
        if not isinstance(values, dict) or not set(needed) <= set(values) <= set(fields):
            raise LogError(
                f"{path}: {section} must be an object with {needed}, and perhaps "
                f"{[n for n in fields if n not in needed]}; got {values!r}"
            )
        values = dict(values)
        if "files" in values:
            files = values["files"]
            patterns = [files] if isinstance(files, str) else files
            if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
                raise LogError(
                    f"{path}: {section}.files must be a path, or a list of paths, got {files!r}"
                )
            # the names of the folders above are no patterns, and neither is that of a file that is there
            beside = [str(path.parent / pattern) for pattern in patterns]
            anywhere = [os.path.join(glob.escape(str(path.parent)), pattern) for pattern in patterns]
            values["files"] = [
                file if os.path.exists(file) else pattern
                for file, pattern in zip(beside, anywhere, strict=True)
            ]
        for key in ("item", "features", "context"):
            values |= {key: hashed(f"{section}.{key}", values[key])} if key in values else {}
        if "labels" in values:
            values["labels"] = {
                task: label if isinstance(label, str) else build(JoinedLabel, f"labels.{task}", label)
                for task, label in values["labels"].items()
            }
        return kind(**values)

    def hashed(section: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "hash" in value:
            return build(Hashed, section, value)
        return {name: hashed(f"{section}.{name}", column) for name, column in value.items()}

    kinds = {"events": Events, "requests": Requests, "items": Items, "users": Users}
    if isinstance(parts, dict):
        parts |= {name: build(kinds[name], name, parts[name]) for name in kinds if name in parts}
    return build(PrepareSchema, "the schema", parts)
