"""Find the files of a section of a schema, and detect their format.

The format (Parquet, Feather or CSV, compressed or not) is detected from the first bytes. DuckDB reads
Parquet and Feather itself; CSV rows come from ``csv_rows``.
"""

from __future__ import annotations

import glob
import io
import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ifa_torchrec.data.prepare.csv_rows import CsvRows, CsvText, naming_errors
from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.prepare.sql import literal, quoted
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    import duckdb

_KINDS = {b"PAR1": "parquet", b"ARROW1": "feather"}
_NAMES = {".parquet": "parquet", ".pq": "parquet", ".feather": "feather", ".arrow": "feather"}


def read_header(section: str, table: Table) -> list[str]:
    r"""The column names of a section's files, unchanged.

    Args:
        section: the name of the table in errors.
        table: the files and their format.

    Raises:
        LogError: there are no such files, they cannot be read, or their columns differ.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.files import read_header
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = Path(tempfile.mkdtemp()) / "prices.csv"
        >>> _ = file.write_text(',item,"price, EUR"\n0,tea,2.5\n')
        >>> read_header("items", Table(files=str(file)))
        ['', 'item', 'price, EUR']
    """
    return _Files(section, table).names


def each_file(
    section: str, table: Table, numbered: bool, sql: duckdb.DuckDBPyConnection
) -> dict[str, int]:
    r"""The files of a section, when each is read separately.

    Args:
        section: the name of the table in errors.
        table: the files and their format.
        numbered: whether to count rows.
        sql: a connection.

    Returns:
        For each path, the number of rows in the files before it; 0 unless ``numbered``.

    Raises:
        LogError: see ``read_header``; or types differ between files, so that reading them separately
            would change values; or ``numbered`` with several CSV files.

    Example:
        >>> import duckdb, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.files import each_file
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = file.write_text("user,item\nann,tea\n")
        >>> list(each_file("events", Table(files=str(file)), True, duckdb.connect()).values())
        [0]
    """
    files = _Files(section, table)
    before: dict[str, int] = {}
    rows, first = 0, dict[str, str]()
    for file in files.files:
        before[os.path.abspath(file)] = rows if numbered else 0
        if files.kind == "parquet":
            found = sql.execute(f"DESCRIBE SELECT * FROM {_parquet([file])}").fetchall()
            types = {name: kind for name, kind, *_ in found}
            rows += pq.read_metadata(file).num_rows
        elif files.kind == "feather":
            types = {column.name: str(column.type) for column in _feather_schema(file)}
            rows += ds.dataset(file, format="feather").count_rows() if numbered else 0
        else:
            types = {}
        first = first or types
        for name, kind in types.items():
            if kind != first.get(name, kind):
                raise LogError(
                    f"{section}: the column {name!r} is {kind} in {file}, but {first[name]} in "
                    f"{files.files[0]}; on Spark each file is read separately, so use one type in all"
                )
    if numbered and files.kind == "csv" and len(before) > 1:
        raise LogError(
            f"{section}: `each` numbers the rows over several CSV files, which Spark reads in parallel; "
            "write them as Parquet, as one file, or use the engine duckdb"
        )
    return before


def _parquet(files: Sequence[str]) -> str:
    """Parquet files, as an SQL relation.

    By DuckDB's defaults folder names would replace columns, and values would be rounded to the types of
    the first file.
    """
    # DuckDB would treat a name such as log[1].parquet as a pattern
    listed = ", ".join(literal(glob.escape(file)) for file in files)
    return f"read_parquet([{listed}], hive_partitioning=false, union_by_name=true)"


class Source:
    r"""The relation from which DuckDB selects a section's rows.

    Args:
        section: the name of the table in errors.
        table: the files and their format.
        connection: the connection that reads the files.

    Attributes:
        relation: the SQL relation; it can be read once.
        columns: for each name that occurs once in the header, the column of the relation.
        places: for Parquet, our names of further columns of the relation, which locate a row, and these
            columns; else empty.
        refused: for each reason for which lines of CSV were refused, their number (`rows`) and
            `examples`; complete after all rows have been read.

    Raises:
        LogError: see ``read_header``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import duckdb
        >>> from ifa_torchrec.data.prepare.files import Source
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = file.write_text("user,note,note\nann,a,b\nbob\n")
        >>> sql = duckdb.connect()
        >>> source = Source("events", Table(files=str(file)), sql)
        >>> sql.execute(f"FROM {source.relation}").fetchall(), source.columns
        ([('ann', 'a', 'b')], {'user': 'user'})
        >>> source.refused
        {'line cannot be read: expected 3 columns, got 1': {'rows': 1, 'examples': ['log.csv: bob']}}
    """

    def __init__(self, section: str, table: Table, connection: duckdb.DuckDBPyConnection) -> None:
        files = _Files(section, table)
        columns = _unique(files.names)
        count = Counter(files.names)
        self.columns = {
            name: column for name, column in zip(files.names, columns, strict=True) if count[name] == 1
        }
        self.refused: dict[str, dict[str, Any]] = {}
        self.places: dict[str, str] = {}
        self._rows: CsvRows | None = None
        read = quoted(f"_{section}")
        if files.kind == "parquet":
            read = _parquet(files.files)
            self.places = {"_file": "filename", "_row": "file_row_number"}
        elif files.kind == "feather":
            connection.register(f"_{section}", files.feather())
        else:
            self._rows = CsvRows(files.csv, files.files, columns)
            self.refused = self._rows.refused
            connection.register(f"_{section}", self._rows.reader())
        self.relation = f"{read} AS _file({', '.join(map(quoted, columns))})"

    @contextmanager
    def reading(self) -> Generator[None]:
        """Raise an error of reading a file unchanged, which DuckDB would wrap."""
        try:
            yield
        except Exception:
            if self._rows and self._rows.failure:
                raise self._rows.failure from None
            raise


def _unique(names: Sequence[str]) -> list[str]:
    """Make names unique for DuckDB, which ignores case.

    Every occurrence of a repeated name gets a number, so that none is mistaken for another.
    """
    count = Counter(name.lower() for name in names)
    seen: Counter[str] = Counter()
    taken = {name for name, times in count.items() if times == 1}
    unique: list[str] = []
    for position, name in enumerate(names):
        key = name.lower()
        seen[key] += 1
        if not name:
            name = f"column{position}"
        elif count[key] > 1:
            name = f"{name}_{seen[key]}"
        if not names[position] or count[key] > 1:
            while name.lower() in taken:
                name += "_"
            taken.add(name.lower())
        unique.append(name)
    return unique


class _Files:
    """The files of a section, all of one kind and with the same columns."""

    def __init__(self, section: str, table: Table) -> None:
        self.section, self.table, self.csv = section, table, CsvText(section, table)
        self.files = self._find()
        self.kind = self._kind(self.files[0])
        for file in self.files[1:]:
            if self._kind(file) != self.kind:
                raise LogError(
                    f"{section}: {file} is {self._kind(file)}, but {self.files[0]} is {self.kind}; use "
                    "files of one format"
                )
        self._check_options()
        self.names = list(table.columns) or self._columns(self.files[0])
        for file in [] if table.columns else self.files[1:]:
            names = self._columns(file)
            # in CSV columns are identified by their position
            same = names == self.names if self.kind == "csv" else sorted(names) == sorted(self.names)
            if not same:
                raise LogError(
                    f"{section}: {file} starts with {','.join(names)!r}, but {self.files[0]} with "
                    f"{','.join(self.names)!r}; use files with the same columns, or set `columns` if "
                    "they have no header"
                )
        if self.kind != "csv":
            self._check_types()

    def _find(self) -> list[str]:
        patterns = [self.table.files] if isinstance(self.table.files, str) else self.table.files
        found: dict[str, str] = {}
        for pattern in patterns:
            # the name of an existing file may look like a pattern
            files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if "**" in pattern:
                files = [file for file in files if not os.path.isdir(file)]
            if not files:
                raise LogError(f"{self.section}: no file matches {pattern}; check `files`")
            for file in files:
                if os.path.isdir(file):
                    raise LogError(
                        f"{self.section}: {file} is a folder; name its files, such as {file}/*"
                    )
                # a file that matches two patterns is read once
                found.setdefault(os.path.realpath(file), file)
        if not found:
            raise LogError(f"{self.section}: `files` is empty; name at least one file")
        return list(found.values())

    def _kind(self, file: str) -> str:
        with naming_errors(self.section, file), open(file, "rb") as stream:
            start = stream.read(6)
        kind = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "csv")
        named = _NAMES.get(Path(file).suffix.lower(), kind)
        if named != kind and kind == "csv":
            raise LogError(
                f"{self.section}: {file} is named like a {named} file, but is not one or is incomplete"
            )
        return kind

    def _check_options(self) -> None:
        """Raise a LogError if an option of the section is not valid."""
        section, file, table = self.section, self.files[0], self.table
        for option in ("columns", "nulls"):
            given = getattr(table, option)
            if isinstance(given, str) or not all(isinstance(value, str) for value in given):
                raise LogError(f"{section}: {option} must be a list of strings, got {given!r}")
            if given and self.kind != "csv":
                raise LogError(
                    f"{section}: {file} is {self.kind}, but `{option}` is only for CSV; leave it out"
                )
        quote, delimiter = table.quote, table.delimiter
        if not isinstance(quote, str) or len(quote) > 1 or not quote.isascii() or quote in set("\r\n"):
            raise LogError(
                f'{section}: quote must be one ASCII character, or "" for none, got {quote!r}'
            )
        if not isinstance(delimiter, str) or not delimiter or set(delimiter) & {"\r", "\n", quote}:
            raise LogError(
                f"{section}: delimiter must be a non-empty string without quotes and line ends, got "
                f"{delimiter!r}"
            )
        try:  # None would mean the locale's encoding
            io.TextIOWrapper(io.BytesIO(), encoding=table.encoding or "")
        except (LookupError, TypeError) as error:
            raise LogError(
                f"{section}: {file} cannot be read: encoding {table.encoding!r} is not a text encoding "
                "of Python, such as utf-8, cp1252 or gbk"
            ) from error

    def _check_types(self) -> None:
        """Raise a LogError if a column has different kinds in two files, such as text and numbers."""
        first: dict[str, tuple[str, str, pa.DataType]] = {}
        for file in self.files:
            for column in self._schema(file):
                kind = _kind_of(column.type)
                if kind is None:
                    continue
                known, where, was = first.setdefault(column.name, (kind, file, column.type))
                if known != kind:
                    raise LogError(
                        f"{self.section}: the column {column.name!r} is {column.type} in {file}, but "
                        f"{was} in {where}; use one type in all files"
                    )

    def _schema(self, file: str) -> pa.Schema:
        with naming_errors(self.section, file):
            return pq.read_schema(file) if self.kind == "parquet" else _feather_schema(file)

    def _columns(self, file: str) -> list[str]:
        if self.kind != "csv":
            return self._schema(file).names
        with naming_errors(self.section, file):
            return self.csv.names(file)

    def feather(self) -> ds.Dataset:
        """A dataset of all files, with types wide enough for the values of each."""
        with naming_errors(self.section, self.files[0]):
            schemas = [self._schema(file) for file in self.files]
            types = pa.unify_schemas(schemas, promote_options="permissive")
            return ds.dataset(self.files, schema=types, format="feather")


def _feather_schema(file: str) -> pa.Schema:
    with pa.memory_map(file) as stream:
        return pa.ipc.open_file(stream).schema


def _kind_of(kind: pa.DataType) -> str | None:
    """The kind of a type, regardless of its width; None for a column of nulls, which fits any kind."""
    if pa.types.is_null(kind):
        return None
    if pa.types.is_dictionary(kind):
        return _kind_of(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _kind_of(kind.value_type)
        return None if inner is None else f"lists of {inner}"
    kinds = {
        "numbers": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
        "texts": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "times": (pa.types.is_timestamp, pa.types.is_date),
    }
    return next((name for name, those in kinds.items() if any(is_(kind) for is_ in those)), str(kind))
