"""Data sets in RecBole's atomic files as event logs: NAME.inter, NAME.item and NAME.user.

The files are tab-separated, and the header of a column has its type: `user_id:token`, `rating:float`,
`class:token_seq`, `text:float_seq`. An .inter file needs user_id, item_id and timestamp (seconds).

RecBole's data sets have no requests, so we construct them: what a user rated or clicked, at most a
minute apart. With a column `rating`, ratings of at least 4 are positives; with a column `label`, ones.
Events are all rows, and whether a row is a positive is the event feature `action`. 80 % of the requests
are for training, 10 % each for validation and test, by time.

The type of a column decides its use. Columns that the log cannot represent are left out with a warning:

| | token | token_seq | float | float_seq |
|---|---|---|---|---|
| .inter | event feature | left out | number of an event | left out |
| .item | item feature | list of an item | number of an item | vector of an item |
| .user | context feature | context list | number of a request | left out |

A column `..._title` or `title` of the .item file has the display names of the items.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import Items, Listed, PrepareSchema, Users
from ifa_torchrec.data.prepare import prepare as write_log
from ifa_torchrec.data.prepare.files import read_header
from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.public.common import rated_pages
from ifa_torchrec.data.schema import LogError

_TABS: dict[str, Any] = {"delimiter": "\t", "quote": ""}
_TYPES = ("token", "token_seq", "float", "float_seq")


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    r"""Write the event log of a folder of atomic files.

    Args:
        folder: contains NAME.inter and optionally NAME.item and NAME.user.
        out: the folder of the log; it must not exist yet.

    Raises:
        LogError: there is not exactly one .inter file, it has no column rating or label, or a header has
            no known type.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.data.public import recbole
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        >>> rows += [f"1\t{242 + n % 2}\t{3 + n % 2}\t{881250000 + 100 * n}" for n in range(10)]
        >>> _ = (folder / "tiny.inter").write_text("\n".join(rows))
        >>> recbole.prepare(folder, folder / "log").requests("train")["liked"].tolist()
        [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """
    return write_log(schema_of(folder), out)


def schema_of(folder: str | Path) -> PrepareSchema:
    """The schema that ``prepare`` uses, to be changed before use.

    Args:
        folder: as for ``prepare``.

    Raises:
        LogError: see ``prepare``.

    Example:
        >>> from ifa_torchrec.data.public import recbole
        >>> recbole.schema_of("ml-100k").items.lists  # doctest: +SKIP
        {'class': Listed(column='class:token_seq', delimiter=' ', hash=None)}
    """
    found = sorted(Path(folder).glob("*.inter"))
    if len(found) != 1:
        raise LogError(f"{folder}: expected exactly one .inter file, got {[f.name for f in found]}")
    inter = _Atomic(found[0])
    if "rating" in inter.columns:
        positive = f'"{inter.columns["rating"]}"::FLOAT >= 4'
    elif "label" in inter.columns:
        positive = f'"{inter.columns["label"]}"::FLOAT = 1'
    else:
        raise LogError(f"{found[0]}: no column rating or label; it has {list(inter.columns)}")
    rows: dict[str, Any] = {
        **_TABS,
        "files": str(found[0]),
        "user": inter.taken("user_id"),
        "item": inter.taken("item_id"),
        "time": inter.taken("timestamp"),
        "unit": "s",
    }
    tokens = inter.of("token")
    if "action" in tokens:
        raise LogError(
            f"{found[0]}: the column {tokens['action']!r} must be renamed in the header: the name "
            "`action` is reserved for whether the item was liked"
        )
    of_events = {
        "features": {**tokens, "action": f"CASE WHEN {positive} THEN 'liked' ELSE 'not' END"},
        "dense": inter.of("float"),
    }
    inter.warn_of_others("events")
    items = users = None
    if (file := found[0].with_suffix(".item")).exists():
        of_items = _Atomic(file)
        item = of_items.taken("item_id")
        titles = [name for name in of_items.columns if name == "title" or name.endswith("_title")]
        items = Items(
            files=str(file),
            item=item,
            name=of_items.taken(titles[0]) if titles else None,
            features=of_items.of("token"),
            lists={n: Listed(c, delimiter=" ") for n, c in of_items.of("token_seq").items()},
            dense=of_items.of("float"),
            vectors={n: f"string_split(\"{c}\", ' ')" for n, c in of_items.of("float_seq").items()},
            **_TABS,
        )
    if (file := found[0].with_suffix(".user")).exists():
        of_users = _Atomic(file)
        users = Users(
            files=str(file),
            user=of_users.taken("user_id"),
            features=of_users.of("token"),
            lists={n: Listed(c, delimiter=" ") for n, c in of_users.of("token_seq").items()},
            dense=of_users.of("float"),
            **_TABS,
        )
        of_users.warn_of_others("users")
    return rated_pages(rows, positive, of_events, items, users)


class _Atomic:
    """The columns of a file by their names without type; each can be taken once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        header = read_header("atomic files", Table(files=str(file), **_TABS))
        self.columns: dict[str, str] = {}
        self.left: dict[str, str] = {}
        for column in header:
            name, _, kind = column.partition(":")
            if kind not in _TYPES:
                raise LogError(
                    f"{file}: the column {column!r} must end with a type, one of {list(_TYPES)}"
                )
            self.columns[name], self.left[name] = column, kind

    def taken(self, name: str) -> str:
        """Take a column; returns its name in the file."""
        if name not in self.columns:
            raise LogError(f"{self.file}: no column {name}; it has {list(self.columns)}")
        del self.left[name]
        return self.columns[name]

    def of(self, kind: str) -> dict[str, str]:
        """Take all remaining columns of a type."""
        names = [name for name, its in self.left.items() if its == kind]
        return {name: self.taken(name) for name in names}

    def warn_of_others(self, of: str) -> None:
        if self.left:
            others = [self.columns[name] for name in self.left]
            warnings.warn(
                f"{self.file}: the columns {others} are left out: {of} cannot have their types",
                stacklevel=3,
            )
