"""The columns of a log's Parquet files as memory-mapped .npy files.

    LOG/.columns/
      events-CONTENT/    columns of events.parquet; CONTENT is a digest of the file and the schema
        user.npy ...     one file per column
        made.json        their sources: the schema, and size, time and SHA-256 of each file
      events@0-4-CONTENT/   columns of parts 0 to 3 of a log in parts, which are opened together
      .draft-*           columns that are being written
      .lock              held by the process that writes them

They are written when a log is first opened, and again when the Parquet file has changed or they are
damaged. Those of a table in parts are written one part at a time, so memory is bounded by one part.
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
_LAYOUT = 2  # version of the files; columns with another version are written again

_Seen = list[Any]
"""The state of a file: size in bytes, time of its last change (ns), SHA-256."""


class MappedColumns:
    """The columns of a log, written on first use.

    Args:
        path: the log's folder.
        schema: the schema by which columns are read and checked.
        rows: the number of rows that each table must have, by table name: that of its Parquet file
            without suffix.
        parts: for each table in parts, those to open, consecutive, by their numbers.
        remote: the remote log of which ``path`` is the local copy, if any: a file is copied when its
            columns are written.

    Attributes:
        digests: the digest of each opened table's content.

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
            name: the table.
            check: converts a file's table to columns, when they must be written; it also gets the part's
                number, 0 for a table without parts.
            offsets: the columns of list offsets, each of which begins with 0.

        Raises:
            LogError: a file is missing or not readable, its number of rows or (for a part) its content
                is wrong, or ``check`` refuses it; or the columns cannot be written.
        """
        files = self._files(name)
        for parquet in files:
            if self._remote is None and not parquet.exists():
                raise LogError(f"{parquet}: the file is missing; write the log again")
        parquet = files[0] if len(files) == 1 else files[0].parent
        columns = self._load(name)
        if columns is not None:
            return columns
        try:
            self.root.mkdir(exist_ok=True)
            with _lock(self.root):
                columns = self._load(name)  # another process may have written them meanwhile
                if columns is None:
                    self._make(name, check, offsets)
                    columns = self._load(name)
                    if self._remote is not None:
                        self._remote.keep_within_bound()
        except OSError as error:
            raise LogError(
                f"{self.root}: cannot write the columns of {parquet} there ({error}); free some space, "
                "open the log once with write permission, or copy it to a folder that can be written"
            ) from error
        if columns is None:
            raise LogError(f"{parquet}: the file changed while it was read; open the log again")
        return columns

    def _load(self, name: str) -> Columns | None:
        """The columns written from the Parquet files as they are now; None if there are none or they
        are damaged."""
        for folder in self._made(name):
            try:
                made = json.loads((folder / "made.json").read_text())
                if made["schema"] != self._schema:
                    continue
                if self._remote is None:
                    parquet = _check_all(self._files(name), made["parquet"])
                else:  # copies are of the current files, and those of parts may be deleted by now
                    parquet, self._held[name] = made["parquet"], use(folder)
                files = {column: folder / f"{column}.npy" for column in made["columns"]}
                seen = {c: _check(file, made["columns"][c]) for c, file in files.items()}
                columns: Columns = {
                    # refuses what np.load would unpickle
                    c: np.asarray(np.lib.format.open_memmap(file, mode="r"))
                    for c, file in files.items()
                }
            except Exception:  # any error from a damaged folder: the columns are written again
                continue
            now = {**made, "parquet": parquet, "columns": seen}
            if now != made:  # e.g. copied; so that not everything is read at each opening
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
        """Write the columns of a table, replacing any that were written before."""
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
            # for a table without parts, the size, time and digest of its file
            made = {"schema": self._schema, "parquet": sources, "columns": seen}
            (draft / "made.json").write_text(json.dumps(made))
            key = f"{self._schema} {' '.join(sources[2::3])}"
            content = hashlib.sha256(key.encode()).hexdigest()[:_DIGEST]
            folder = self.root / f"{self._prefix(name)}-{content}"
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
        """Read the columns of one file, and check it against schema.json."""
        part = self.parts[name][number] if name in self.parts else None
        if part is not None and part.sha256 != sha256:
            same = [n for n, other in self.parts[name].items() if other.sha256 == sha256]
            found = f"it is part {same[0]}" if same else "its SHA-256 differs"
            raise LogError(
                f"{parquet}: not the part that the log was written with ({found}); restore that part, "
                "or write the log again"
            )
        try:
            table = pq.read_table(parquet, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise LogError(
                f"{parquet}: not a readable Parquet file ({error}); write the log again"
            ) from error
        rows = self.rows[name] if part is None else part.rows
        if table.num_rows != rows:
            raise LogError(
                f"{parquet}: {table.num_rows} rows, expected {rows} (schema.json); write the log again"
            )
        if part is None:
            return check(table, number)
        try:
            return check(table, number)
        except LogError as error:
            raise LogError(f"{file_of(name, number)}: {error}") from error

    def _here(self, name: str, number: int, parquet: Path) -> AbstractContextManager[object]:
        """Keep a file on this machine while its columns are written."""
        if self._remote is None:
            return nullcontext()
        part = self.parts[name][number] if name in self.parts else None
        return self._remote.file(str(parquet.relative_to(self.path)), part)

    def _files(self, name: str) -> list[Path]:
        """The Parquet files of a table; for a table in parts, those to open."""
        if name in self.parts:
            return [self.path / file_of(name, part) for part in self.parts[name]]
        return [self.path / f"{name}.parquet"]

    def _prefix(self, name: str) -> str:
        """The prefix of the folders with a table's columns."""
        if name not in self.parts:
            return name
        first, *_ = numbers = list(self.parts[name])
        return f"{name}@{first}-{first + len(numbers)}"  # a split's name cannot have an @

    def _made(self, name: str) -> list[Path]:
        """The folders of columns written from the current or an earlier Parquet file."""
        return list(self.root.glob(f"{self._prefix(name)}-{'?' * _DIGEST}"))

    def _clear_drafts(self) -> None:
        """Delete the drafts of killed processes, unless another process is writing."""
        if drafts := list(self.root.glob(".draft-*")):
            with suppress(OSError), _lock(self.root, wait=False):
                for draft in drafts:
                    shutil.rmtree(draft, ignore_errors=True)


class _Joined:
    """Concatenates the columns of parts, writing each part to files as it comes.

    Args:
        folder: where to write the files.
        offsets: the columns of list offsets, which begin with 0 and end with the length of the lists.
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
        """Write a .npy file for each column.

        Returns:
            The names of the columns.
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
    """A file has changed."""


def _see(file: Path) -> _Seen:
    sha256, stat = sha256_of(file), file.stat()
    return [stat.st_size, stat.st_mtime_ns, sha256]


def _check(file: Path, before: _Seen) -> _Seen:
    """The current state of a file whose content has not changed; read only if its time has changed.

    Raises:
        _Changed: the content has changed.
    """
    stat = file.stat()
    if [stat.st_size, stat.st_mtime_ns] == before[:2]:
        return before
    now = _see(file) if stat.st_size == before[0] else None
    if now is None or now[2] != before[2]:
        raise _Changed
    return now


def _check_all(files: Sequence[Path], before: _Seen) -> _Seen:
    """Apply ``_check`` to each file of a table."""
    if len(before) != 3 * len(files):
        raise _Changed
    return [x for n, file in enumerate(files) for x in _check(file, before[3 * n : 3 * n + 3])]


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Generator[None]:
    """Hold the folder's lock; it is released when the process ends.

    Raises:
        OSError: the folder cannot be written or, without ``wait``, the lock is taken.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # a file system without locks: columns are published by a rename in any case
            if not wait:
                raise
        yield
