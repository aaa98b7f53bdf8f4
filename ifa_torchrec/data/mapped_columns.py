"""The columns of a log's Parquet files as .npy files, which are mapped to memory.

    LOG/.columns/
      events-CONTENT/    of events.parquet as it is now; CONTENT is a digest of it and of the schema
        user.npy ...     its columns
        made.json        what they were made of: the schema, and size, time and SHA-256 of each file
      .draft-*           columns that are being made
      .lock              held by who makes them

They are made when a log is first opened, and anew where the Parquet file is another or they are damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.data.schema import Columns, LogError, LogSchema
from ifa_torchrec.data.writing import new_folder

_DIGEST = 16  # characters of the digest in a folder's name
_LAYOUT = 2  # of the columns: made anew where another version made them

_Seen = list[Any]
"""A file as it was: bytes, time of its last change (ns), SHA-256."""


class MappedColumns:
    """The columns of a log, made where they are not there.

    Args:
        path: the log's folder.
        schema: by which columns are read and checked.
        rows: how many rows each Parquet file must have, by its name without suffix.

    Attributes:
        digests: of the content of each table that was opened.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.data.mapped_columns import MappedColumns
        >>> log = Path(tempfile.mkdtemp())
        >>> pd.DataFrame({"item": [0, 1]}).to_parquet(log / "items.parquet")
        >>> columns = MappedColumns(log, LogSchema(item_features={"item": 2}), {"items": 2})
        >>> columns.open("items", lambda table: {"item": table["item"].to_numpy()})["item"].tolist()
        [0, 1]
    """

    def __init__(self, path: Path, schema: LogSchema, rows: Mapping[str, int]) -> None:
        self.path, self.root, self.rows = path, path / ".columns", rows
        self.digests: dict[str, str] = {}
        self._schema = hashlib.sha256(f"{_LAYOUT} {schema!r}".encode()).hexdigest()[:_DIGEST]
        self._clear_drafts()

    def open(self, name: str, check: Callable[[pa.Table], Columns]) -> Columns:
        """The columns of one Parquet file.

        Args:
            name: of the file, without suffix, in the log's folder.
            check: makes columns of the table, where they are to be made.

        Raises:
            LogError: the file is missing, is not readable or has another number of rows; ``check``
                refuses it; or columns must be made and cannot be written.
        """
        parquet = self.path / f"{name}.parquet"
        if not parquet.exists():
            raise LogError(f"{parquet}: missing; the log is incomplete, write it again")
        columns = self._load(name)
        if columns is not None:
            return columns
        try:
            self.root.mkdir(exist_ok=True)
            with _lock(self.root):
                columns = self._load(name)  # another process may have made them meanwhile
                if columns is None:
                    self._make(name, check)
                    columns = self._load(name)
        except OSError as error:
            raise LogError(
                f"{self.root}: the columns of {parquet} must be made there, which failed ({error}); "
                "make room, open the log once where it can be written, or copy it to such a place"
            ) from error
        if columns is None:
            raise LogError(f"{parquet}: it changed while it was read; open the log again")
        return columns

    def _load(self, name: str) -> Columns | None:
        """The columns that were made of a Parquet file as it is now; None if there are none, or if
        they are not what was made."""
        for folder in self._made(name):
            try:
                made = json.loads((folder / "made.json").read_text())
                if made["schema"] != self._schema:
                    continue
                parquet = _check(self.path / f"{name}.parquet", made["parquet"])
                files = {column: folder / f"{column}.npy" for column in made["columns"]}
                seen = {c: _check(file, made["columns"][c]) for c, file in files.items()}
                columns: Columns = {
                    # refuses what np.load would unpickle
                    c: np.asarray(np.lib.format.open_memmap(file, mode="r"))
                    for c, file in files.items()
                }
            except Exception:  # whatever a damaged folder leads to: the columns are made anew
                continue
            now = {**made, "parquet": parquet, "columns": seen}
            if now != made:  # copied, say: lest all is read again at each opening
                with suppress(OSError):
                    draft = folder / f".made-{secrets.token_hex(6)}"
                    draft.write_text(json.dumps(now))
                    draft.replace(folder / "made.json")
            digests = [(column, sha256) for column, (_, _, sha256) in sorted(seen.items())]
            self.digests[name] = hashlib.sha256(repr(digests).encode()).hexdigest()
            return columns
        return None

    def _make(self, name: str, check: Callable[[pa.Table], Columns]) -> None:
        """Make the columns of a Parquet file, in place of those that were made before."""
        parquet = self.path / f"{name}.parquet"
        source = _see(parquet)
        try:
            table = pq.read_table(parquet, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise LogError(
                f"{parquet}: not readable as Parquet ({error}); write the log again"
            ) from error
        if table.num_rows != self.rows[name]:
            raise LogError(
                f"{parquet}: {table.num_rows} rows, schema.json says {self.rows[name]}; "
                "write the log again"
            )
        columns = check(table)
        draft = new_folder(self.root, ".draft-")
        try:
            for column, values in columns.items():
                np.save(draft / f"{column}.npy", values)
            seen = {column: _see(draft / f"{column}.npy") for column in columns}
            made = {"schema": self._schema, "parquet": source, "columns": seen}
            (draft / "made.json").write_text(json.dumps(made))
            content = hashlib.sha256(f"{self._schema} {source[-1]}".encode()).hexdigest()[:_DIGEST]
            folder = self.root / f"{name}-{content}"
            folder.parent.mkdir(exist_ok=True)
            # Who has opened the old columns keeps them: files that are mapped outlive their names.
            for old in self._made(name):
                shutil.rmtree(old)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _made(self, name: str) -> list[Path]:
        """The folders of columns that were made of a Parquet file, as it is now or was before."""
        return list(self.root.glob(f"{name}-{'?' * _DIGEST}"))

    def _clear_drafts(self) -> None:
        """Delete what killed openings left, unless it is another process at work."""
        if drafts := list(self.root.glob(".draft-*")):
            with suppress(OSError), _lock(self.root, wait=False):
                for draft in drafts:
                    shutil.rmtree(draft, ignore_errors=True)


class _Changed(Exception):
    """A file is not what it was."""


def _see(file: Path) -> _Seen:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def _check(file: Path, before: _Seen) -> _Seen:
    """The file as it is now, where its content is what it was.

    Raises:
        _Changed: it is another; read only where its time is another.
    """
    stat = file.stat()
    if [stat.st_size, stat.st_mtime_ns] == before[:2]:
        return before
    now = _see(file) if stat.st_size == before[0] else None
    if now is None or now[2] != before[2]:
        raise _Changed
    return now


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Generator[None]:
    """Hold the folder's lock, which ends with the process.

    Raises:
        OSError: the folder cannot be written or, without ``wait``, the lock cannot be had.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # a file system without locks: what is made is published by a rename all the same
            if not wait:
                raise
        yield
