"""Write a log to a draft folder next to its path, and rename it when it is complete."""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.data.cache import Held, drop
from ifa_torchrec.data.columns import Column
from ifa_torchrec.data.parts import file_of, part_of
from ifa_torchrec.data.remote import is_uri
from ifa_torchrec.data.schema import USER, LogError
from ifa_torchrec.errors import ConfigError, ExistsError

_RANDOM_BYTES = 6


@contextmanager
def drafting(path: str | Path) -> Generator[Path]:
    """A folder next to ``path`` to write a log in; deleted unless ``EventLog.publish`` renamed it.

    Raises:
        FileExistsError: ``path`` exists.
        LogError: there is no space or no permission to write there, or it is a URI.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import drafting
        >>> with drafting(Path(tempfile.mkdtemp()) / "log") as draft:
        ...     (draft / "requests").is_dir()
        True
        >>> draft.exists()
        False
    """
    if is_uri(path):
        raise LogError(
            f"{path}: a log can only be written to a local folder; write it there, then copy it, "
            "schema.json last"
        )
    path = Path(path)
    if path.exists():
        raise ExistsError(f"{path} exists; delete it or choose another folder")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = stack.enter_context(draft_beside(path))
        except OSError as error:
            raise LogError(
                f"{path}: cannot write a log there ({error}); choose another folder"
            ) from error
        try:
            (draft / "requests").mkdir()
            yield draft
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LogError(
                f"{path}: no space to write the log ({error}); free some, or choose another folder"
            ) from error


@contextmanager
def draft_beside(path: Path) -> Generator[Path]:
    """A new folder next to ``path``, deleted at the end unless it was renamed. Drafts of ``path`` left
    by killed processes are deleted.

    Raises:
        OSError: the folder cannot be created.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import draft_beside
        >>> path = Path(tempfile.mkdtemp()) / "log"
        >>> (path.parent / ".log-0123456789ab").mkdir()  # left by a killed process
        >>> with draft_beside(path) as draft:
        ...     list(path.parent.iterdir()) == [draft]
        True
    """
    of_path = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{{2 * _RANDOM_BYTES}}}")
    for left in list(path.parent.iterdir()):
        if of_path.fullmatch(left.name):
            drop(left)
    draft, held = new_folder(path.parent, f".{path.name}-"), None
    with suppress(OSError):  # without locks nothing is deleted either
        held = Held(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if held is not None:
            held.close()


def new_folder(parent: Path, prefix: str) -> Path:
    """Create a folder in ``parent``; its permissions follow the umask, unlike those of tempfile.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import new_folder
        >>> new_folder(Path(tempfile.mkdtemp()), ".draft-").name[:7]
        '.draft-'
    """
    folder = parent / f"{prefix}{secrets.token_hex(_RANDOM_BYTES)}"
    folder.mkdir()
    return folder


def publish_folder(draft: Path, path: str | Path) -> None:
    """Rename a draft to its final path.

    Raises:
        FileExistsError: the path was created meanwhile.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import new_folder, publish_folder
        >>> parent = Path(tempfile.mkdtemp())
        >>> publish_folder(new_folder(parent, ".log-"), parent / "log")
        >>> [folder.name for folder in parent.iterdir()]
        ['log']
    """
    try:
        draft.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ExistsError(
            f"{path} was created meanwhile, by another process; delete it or choose another folder"
        ) from error


@contextmanager
def recording(path: Path, file: str, options: Mapping[str, Any]) -> Generator[Path]:
    """A folder to write a log in; it appears as ``path``, with a file that records ``options``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import recording
        >>> path = Path(tempfile.mkdtemp()) / "log"
        >>> with recording(path, "options.json", {"seed": 1}) as draft:
        ...     draft.mkdir()
        >>> (path / "options.json").read_text()
        '{"seed": 1}'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(path) as draft:
        yield draft / path.name
        (draft / path.name / file).write_text(json.dumps(options))
        publish_folder(draft / path.name, path)


def check_recorded(path: Path, file: str, options: Mapping[str, Any]) -> None:
    """Raise if a log was written with other options; a log without a record is accepted.

    Raises:
        ConfigError: an option differs; the message names it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.writing import check_recorded
        >>> check_recorded(Path(tempfile.mkdtemp()), "options.json", {"seed": 1})
    """
    if not (path / file).exists():
        return
    there = json.loads((path / file).read_text())
    other = [
        f"{name} {there[name]!r}, not {value!r}"
        for name, value in json.loads(json.dumps(options)).items()
        if name in there and there[name] != value
    ]
    if other:
        raise ConfigError(
            f"{path} was written with {', '.join(other)}; delete it, choose another folder, or use its "
            "options"
        )


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame], parts: int = 1) -> None:
    """Write each DataFrame to FOLDER/NAME.parquet or, with parts and except the items, to
    NAME/part-*.parquet.

    Args:
        folder: the folder to write in.
        tables: the DataFrames by name.
        parts: the number of parts.

    Raises:
        LogError: a column has several types, or a number beyond an int64.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> from ifa_torchrec.data.writing import write_tables
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_tables(folder, {"items": pd.DataFrame({"item": [0, 1]})})
        >>> [file.name for file in folder.iterdir()]
        ['items.parquet']
    """
    for name, frame in tables.items():
        try:
            table = pa.Table.from_pandas(frame, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise LogError(f"{name}: a column has values of several types: {error}") from error
        except OverflowError as error:
            raise LogError(
                f"{name}: a column has a number that does not fit an int64: {error}"
            ) from error
        for file, rows in _cut(name, table, parts):
            (folder / file).parent.mkdir(exist_ok=True)
            pq.write_table(rows, folder / file, write_page_checksum=True)


def _cut(name: str, table: pa.Table, parts: int) -> Iterator[tuple[str, pa.Table]]:
    """The files of a table, and the rows to write to each."""
    if parts == 1 or name == "items":
        yield f"{name}.parquet", table
        return
    part = part_of(Column.of(table, USER, name).ids(), parts)
    for number in range(parts):
        yield file_of(name, number), table.filter(pa.array(part == number))
