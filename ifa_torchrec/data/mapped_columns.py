"""The columns of a log's Parquet files as .npy files, which are mapped to memory.

    LOG/.columns/
      events-CONTENT/    of events.parquet as it is now; CONTENT is a digest of it and of the schema
        user.npy ...     its columns
        made.json        what they were made of: the schema, and size, time and SHA-256 of each file
      events@0-4-CONTENT/   of parts 0 to 3, which are opened together, of a log in parts
      .draft-*           columns that are being made
      .lock              held by who makes them

They are made when a log is first opened, and anew where the Parquet file is another or they are damaged.
Those of a table in parts are made a part at a time, so that memory is a part's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.data.cache import Held, use
from ifa_torchrec.data.parts import Part, file_of, sha256_of
from ifa_torchrec.data.remote import RemoteLog
from ifa_torchrec.data.schema import Columns, LogError, LogSchema
from ifa_torchrec.data.writing import new_folder

_DIGEST = 16  # characters of the digest in a folder's name
_COPIED = 1 << 24  # bytes at a time
_LAYOUT = 2  # of the columns: made anew where another version made them

_Seen = list[Any]
"""A file as it was: bytes, time of its last change (ns), SHA-256."""


class MappedColumns:
    """The columns of a log, made where they are not there.

    Args:
        path: the log's folder.
        schema: by which columns are read and checked.
        rows: how many rows each table must have, by its name: its Parquet file's without suffix.
        parts: of each table that is in parts those that are opened, in a row, by their numbers.
        remote: the log elsewhere that ``path`` is the copy of, if it is one: files are copied when
            columns are made of them.

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
        >>> columns.open("items", lambda table, _: {"item": table["item"].to_numpy()})["item"].tolist()
        [0, 1]
    """

    def __init__(
        self,
        path: Path,
        schema: LogSchema,
        rows: Mapping[str, int],
        parts: Mapping[str, Mapping[int, Part]] | None = None,
        remote: RemoteLog | None = None,
    ) -> None:
        self.path, self.root, self.rows, self.parts = path, path / ".columns", rows, parts or {}
        self._remote, self._held = remote, dict[str, Held]()
        self.digests: dict[str, str] = {}
        self._schema = hashlib.sha256(f"{_LAYOUT} {schema!r}".encode()).hexdigest()[:_DIGEST]
        self._clear_drafts()

    def open(
        self, name: str, check: Callable[[pa.Table, int], Columns], offsets: Collection[str] = ()
    ) -> Columns:
        """The columns of one table.

        Args:
            name: of the table.
            check: makes columns of a file's table, where they are to be made; given the part's number,
                0 of a table without parts.
            offsets: those columns that say where lists begin, each of which begins with 0.

        Raises:
            LogError: a file is missing, is not readable, has another number of rows or, of a part,
                another content; ``check`` refuses it; or columns must be made and cannot be written.
        """
        files = self._files(name)
        for parquet in files:
            if self._remote is None and not parquet.exists():
                raise LogError(f"{parquet}: missing; the log is incomplete, write it again")
        parquet = files[0] if len(files) == 1 else files[0].parent
        columns = self._load(name)
        if columns is not None:
            return columns
        try:
            self.root.mkdir(exist_ok=True)
            with _lock(self.root):
                columns = self._load(name)  # another process may have made them meanwhile
                if columns is None:
                    self._make(name, check, offsets)
                    columns = self._load(name)
                    if self._remote is not None:
                        self._remote.keep_within_bound()
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
                if self._remote is None:
                    parquet = _check_all(self._files(name), made["parquet"])
                else:  # the copy is of files as they are now, and parts need not be there any more
                    parquet, self._held[name] = made["parquet"], use(folder)
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

    def _make(
        self, name: str, check: Callable[[pa.Table, int], Columns], offsets: Collection[str]
    ) -> None:
        """Make the columns of a table, in place of those that were made before."""
        draft, sources = new_folder(self.root, ".draft-"), list[Any]()
        try:
            held = None if self._remote is None else use(draft)
            joined = _Joined(draft, offsets)
            numbers = self.parts.get(name, [0])
            for number, parquet in zip(numbers, self._files(name), strict=True):
                with self._here(name, number, parquet):
                    source = _see(parquet)
                    joined.add(self._read(name, number, parquet, source[-1], check))
                sources += source
            columns = joined.finish()
            seen = {column: _see(draft / f"{column}.npy") for column in columns}
            # of a table without parts, the one file's size, time and digest
            made = {"schema": self._schema, "parquet": sources, "columns": seen}
            (draft / "made.json").write_text(json.dumps(made))
            key = f"{self._schema} {' '.join(sources[2::3])}"
            content = hashlib.sha256(key.encode()).hexdigest()[:_DIGEST]
            folder = self.root / f"{self._called(name)}-{content}"
            folder.parent.mkdir(exist_ok=True)
            # Who has opened the old columns keeps them: files that are mapped outlive their names.
            for old in self._made(name):
                shutil.rmtree(old)
            draft.rename(folder)
            if held is not None:
                self._held[name] = held
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _read(
        self,
        name: str,
        number: int,
        parquet: Path,
        sha256: str,
        check: Callable[[pa.Table, int], Columns],
    ) -> Columns:
        """The columns of one file, which is as schema.json says."""
        part = self.parts[name][number] if name in self.parts else None
        if part is not None and part.sha256 != sha256:
            same = [n for n, other in self.parts[name].items() if other.sha256 == sha256]
            told = f"it is part {same[0]}" if same else "its SHA-256 is another"
            raise LogError(
                f"{parquet}: not the part that the log was written with, {told}; copy that back, or "
                "write the log again"
            )
        try:
            table = pq.read_table(parquet, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise LogError(
                f"{parquet}: not readable as Parquet ({error}); write the log again"
            ) from error
        rows = self.rows[name] if part is None else part.rows
        if table.num_rows != rows:
            raise LogError(
                f"{parquet}: {table.num_rows} rows, schema.json says {rows}; write the log again"
            )
        if part is None:
            return check(table, number)
        try:
            return check(table, number)
        except LogError as error:
            raise LogError(f"{file_of(name, number)}: {error}") from error

    def _here(self, name: str, number: int, parquet: Path) -> AbstractContextManager[object]:
        """Have a file on this machine, while columns are made of it."""
        if self._remote is None:
            return nullcontext()
        part = self.parts[name][number] if name in self.parts else None
        return self._remote.file(str(parquet.relative_to(self.path)), part)

    def _files(self, name: str) -> list[Path]:
        """The Parquet files of a table, of its parts those that are opened."""
        if name in self.parts:
            return [self.path / file_of(name, part) for part in self.parts[name]]
        return [self.path / f"{name}.parquet"]

    def _called(self, name: str) -> str:
        """What the folders of a table's columns begin with."""
        if name not in self.parts:
            return name
        first, *_ = numbers = list(self.parts[name])
        return f"{name}@{first}-{first + len(numbers)}"  # no split has an @ in its name

    def _made(self, name: str) -> list[Path]:
        """The folders of columns that were made of a Parquet file, as it is now or was before."""
        return list(self.root.glob(f"{self._called(name)}-{'?' * _DIGEST}"))

    def _clear_drafts(self) -> None:
        """Delete what killed openings left, unless it is another process at work."""
        if drafts := list(self.root.glob(".draft-*")):
            with suppress(OSError), _lock(self.root, wait=False):
                for draft in drafts:
                    shutil.rmtree(draft, ignore_errors=True)


class _Joined:
    """Columns of one part after the other, written to files as they come.

    Args:
        folder: of the files.
        offsets: the columns that begin with 0 and end with the length of others.
    """

    def __init__(self, folder: Path, offsets: Collection[str]) -> None:
        self._folder, self._offsets = folder, offsets
        self._first: Columns | None = None
        self._rows: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._types: dict[str, Any] = {}

    def add(self, columns: Columns) -> None:
        """Write the columns of the next part."""
        if self._first is None:
            self._first = columns
            self._ends = {name: int(columns[name][-1]) for name in self._offsets}
            return
        self._append(self._first)
        self._first = {}
        for name in self._offsets:
            shifted = columns[name][1:] + self._ends[name]
            self._ends[name] += int(columns[name][-1])
            columns = {**columns, name: shifted}
        self._append(columns)

    def finish(self) -> list[str]:
        """Make a .npy file of each column.

        Returns:
            The columns' names.
        """
        if not self._rows:
            for name, values in (self._first or {}).items():
                np.save(self._folder / f"{name}.npy", values)
            return list(self._first or {})
        for name, rows in self._rows.items():
            raw = self._folder / f"{name}.raw"
            with (self._folder / f"{name}.npy").open("wb") as file, raw.open("rb") as body:
                header = {"descr": self._types[name], "fortran_order": False, "shape": (rows,)}
                np.lib.format.write_array_header_1_0(file, header)
                shutil.copyfileobj(body, file, _COPIED)
            raw.unlink()
        return list(self._rows)

    def _append(self, columns: Columns) -> None:
        for name, values in columns.items():
            with (self._folder / f"{name}.raw").open("ab") as file:
                np.ascontiguousarray(values).tofile(file)
            self._rows[name] = self._rows.get(name, 0) + len(values)
            self._types[name] = np.lib.format.dtype_to_descr(values.dtype)


class _Changed(Exception):
    """A file is not what it was."""


def _see(file: Path) -> _Seen:
    sha256, stat = sha256_of(file), file.stat()
    return [stat.st_size, stat.st_mtime_ns, sha256]


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


def _check_all(files: Sequence[Path], before: _Seen) -> _Seen:
    """``_check`` of the files of a table, one after the other."""
    if len(before) != 3 * len(files):
        raise _Changed
    return [x for n, file in enumerate(files) for x in _check(file, before[3 * n : 3 * n + 3])]


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
