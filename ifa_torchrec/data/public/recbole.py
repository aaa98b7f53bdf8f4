"""Data sets in RecBole's atomic files, as event logs: NAME.inter, NAME.item and NAME.user.

The files are separated by tabs, and a column's header has its type: `user_id:token`, `rating:float`,
`class:token_seq`. An .inter file needs user_id, item_id and timestamp (seconds).

RecBole's data sets have no requests, so the candidates are ours: what a user rated or clicked with no
more than a minute between one and the next. With a column `rating`, those of at least 4 are the
positives and alone are the events; with a column `label`, the ones. Every token of the .item file is an
item feature and every token of the .user file a context feature; a token_seq counts as a whole, one
id a set of tokens. 80 % of the requests are for training, 10 % each for validation and test, by time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare import Items, Users
from ifa_torchrec.data.prepare import prepare as write_log
from ifa_torchrec.data.prepare.files import read_header
from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.public.common import rated_pages
from ifa_torchrec.data.schema import LogError

_TABS: dict[str, Any] = {"delimiter": "\t", "quote": ""}


def prepare(folder: str | Path, out: str | Path) -> EventLog:
    r"""Write the event log of a folder of atomic files.

    Args:
        folder: holds NAME.inter and perhaps NAME.item and NAME.user.
        out: folder of the log; it does not exist yet.

    Raises:
        LogError: there is not one .inter file, or it has no column rating or label.

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
    found = sorted(Path(folder).glob("*.inter"))
    if len(found) != 1:
        raise LogError(f"{folder}: there must be one .inter file, there are {[f.name for f in found]}")
    columns = _columns(found[0])
    if "rating" in columns:
        positive = f'"{columns["rating"]}"::FLOAT >= 4'
    elif "label" in columns:
        positive = f'"{columns["label"]}"::FLOAT = 1'
    else:
        raise LogError(f"{found[0]}: no column rating or label, there are {list(columns)}")
    rows: dict[str, Any] = {
        **_TABS,
        "files": str(found[0]),
        "user": _column(found[0], "user_id"),
        "item": _column(found[0], "item_id"),
        "time": _column(found[0], "timestamp"),
        "unit": "s",
    }
    item_file, user_file = found[0].with_suffix(".item"), found[0].with_suffix(".user")
    items = users = None
    if item_file.exists():
        names = [column for column in _columns(item_file).values() if "title:" in column]
        items = Items(
            files=str(item_file),
            item=_column(item_file, "item_id"),
            features=_tokens(item_file, skip=("item_id:", *names)),
            name=names[0] if names else None,
            **_TABS,
        )
    if user_file.exists():
        users = Users(
            files=str(user_file),
            user=_column(user_file, "user_id"),
            features=_tokens(user_file, skip=("user_id:",)),
            **_TABS,
        )
    return write_log(rated_pages(rows, positive, items, users), out)


def _columns(file: Path) -> dict[str, str]:
    """The columns of a file, without their types, and as they stand in it."""
    header = read_header("atomic files", Table(files=str(file), **_TABS))
    return {column.split(":")[0]: column for column in header}


def _column(file: Path, name: str) -> str:
    columns = _columns(file)
    if name not in columns:
        raise LogError(f"{file}: no column {name}, there are {list(columns)}")
    return columns[name]


def _tokens(file: Path, skip: tuple[str, ...]) -> dict[str, str]:
    return {
        name: column
        for name, column in _columns(file).items()
        if ":token" in column and not column.startswith(skip)
    }
