"""The files of a section of a schema: which there are, and what they are.

What a file is, Parquet, Feather or CSV, compressed or not, is told from its first bytes. DuckDB reads
Parquet and Feather; of CSV it gets the rows that ``csv_rows`` reads.
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
    r"""The columns of a section's files, as they stand there.

    Args:
        section: what to call the table in errors.
        table: files, and how they are written.

    Raises:
        LogError: there are no such files, they cannot be read, or differ in their columns.

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
    r"""The files of a section, where each is read by itself.

    Args:
        section: what to call the table in errors.
        table: files, and how they are written.
        numbered: whether rows are to be counted.
        sql: a connection.

    Returns:
        For each path, how many rows stand in the files before; 0 unless they are counted.

    Raises:
        LogError: see ``read_header``; or types differ, so that values would be other ones in files that
            are read together; or rows of several files of CSV are to be counted.

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
                    f"{section}: the column {name!r} is {kind} in {file}, and {first[name]} in "
                    f"{files.files[0]}; on Spark each file is read by itself, so write it alike in all"
                )
    if numbered and files.kind == "csv" and len(before) > 1:
        raise LogError(
            f"{section}: `each` numbers the rows of its files, which on Spark are read side by side; "
            "write them as Parquet, as one file, or take the engine duckdb"
        )
    return before


def _parquet(files: Sequence[str]) -> str:
    """Files of Parquet, to select from.

    By default the folders' names would replace columns, and the first file's types would round those of
    the others.
    """
    # DuckDB would take a name such as log[1].parquet for a pattern
    listed = ", ".join(literal(glob.escape(file)) for file in files)
    return f"read_parquet([{listed}], hive_partitioning=false, union_by_name=true)"


class Source:
    r"""What DuckDB selects a section's rows from.

    Args:
        section: what to call the table in errors.
        table: files, and how they are written.
        connection: where the files are to be read.

    Attributes:
        relation: to select from, once.
        columns: for each name that stands once in the header, the column of the relation.
        places: columns of the relation, beside those of the file, that say where a row stands, and what
            to call them; of Parquet alone.
        refused: why lines of CSV were refused, with their number (`rows`) and `examples`; complete when
            all rows have been read.

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
        {'line cannot be read: 3 columns wanted, 1 found': {'rows': 1, 'examples': ['log.csv: bob']}}
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
        """Raises what went wrong in a file as it was, where DuckDB would wrap it."""
        try:
            yield
        except Exception:
            if self._rows and self._rows.failure:
                raise self._rows.failure from None
            raise


def _unique(names: Sequence[str]) -> list[str]:
    """Names that DuckDB can tell apart, which does so without regard to case.

    A name that stands there several times is numbered each time, so that none is taken for another.
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
                    f"{section}: {file} is {self._kind(file)}, {self.files[0]} is {self.kind}; name "
                    "files of one kind"
                )
        self._check_options()
        self.names = list(table.columns) or self._columns(self.files[0])
        for file in [] if table.columns else self.files[1:]:
            names = self._columns(file)
            # in CSV a column is known by its place
            same = names == self.names if self.kind == "csv" else sorted(names) == sorted(self.names)
            if not same:
                raise LogError(
                    f"{section}: {file} starts with {','.join(names)!r}, {self.files[0]} with "
                    f"{','.join(self.names)!r}; name files of the same columns, or name the `columns` "
                    "if there is no header"
                )
        if self.kind != "csv":
            self._check_types()

    def _find(self) -> list[str]:
        patterns = [self.table.files] if isinstance(self.table.files, str) else self.table.files
        found: dict[str, str] = {}
        for pattern in patterns:
            # a file may have a name that would be a pattern
            files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if "**" in pattern:
                files = [file for file in files if not os.path.isdir(file)]
            if not files:
                raise LogError(f"{self.section}: no file is called {pattern}")
            for file in files:
                if os.path.isdir(file):
                    raise LogError(f"{self.section}: {file} is a folder; name its files, as {file}/*")
                found.setdefault(os.path.realpath(file), file)  # one that two patterns name is read once
        if not found:
            raise LogError(f"{self.section}: `files` names none")
        return list(found.values())

    def _kind(self, file: str) -> str:
        with naming_errors(self.section, file), open(file, "rb") as stream:
            start = stream.read(6)
        kind = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "csv")
        named = _NAMES.get(Path(file).suffix.lower(), kind)
        if named != kind and kind == "csv":
            raise LogError(f"{self.section}: {file} is called {named} and is none, or not a whole one")
        return kind

    def _check_options(self) -> None:
        """Raises LogError where an option of the section cannot be."""
        section, file, table = self.section, self.files[0], self.table
        for option in ("columns", "nulls"):
            given = getattr(table, option)
            if isinstance(given, str) or not all(isinstance(value, str) for value in given):
                raise LogError(f"{section}: {option} must be a list of texts, got {given!r}")
            if given and self.kind != "csv":
                raise LogError(
                    f"{section}: {file} is {self.kind}, and `{option}` is of CSV; leave it out"
                )
        quote, delimiter = table.quote, table.delimiter
        if not isinstance(quote, str) or len(quote) > 1 or not quote.isascii() or quote in set("\r\n"):
            raise LogError(
                f'{section}: quote must be one ASCII character, or "" for none, got {quote!r}'
            )
        if not isinstance(delimiter, str) or not delimiter or set(delimiter) & {"\r", "\n", quote}:
            raise LogError(
                f"{section}: delimiter must be a text without quotes and line ends, got {delimiter!r}"
            )
        try:  # None would be this machine's own
            io.TextIOWrapper(io.BytesIO(), encoding=table.encoding or "")
        except (LookupError, TypeError) as error:
            raise LogError(
                f"{section}: {file} cannot be read: encoding {table.encoding!r} is none of text that "
                "Python knows, such as utf-8, cp1252 or gbk"
            ) from error

    def _check_types(self) -> None:
        """Raises LogError where a column is, say, text in one file and a number in another."""
        first: dict[str, tuple[str, str, pa.DataType]] = {}
        for file in self.files:
            for column in self._schema(file):
                kind = _kind_of(column.type)
                if kind is None:
                    continue
                known, where, was = first.setdefault(column.name, (kind, file, column.type))
                if known != kind:
                    raise LogError(
                        f"{self.section}: the column {column.name!r} is {column.type} in {file}, and "
                        f"{was} in {where}; write it alike in all files, or cast it there"
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
        """A dataset of all files; its types hold the values of each of them."""
        with naming_errors(self.section, self.files[0]):
            schemas = [self._schema(file) for file in self.files]
            types = pa.unify_schemas(schemas, promote_options="permissive")
            return ds.dataset(self.files, schema=types, format="feather")


def _feather_schema(file: str) -> pa.Schema:
    with pa.memory_map(file) as stream:
        return pa.ipc.open_file(stream).schema


def _kind_of(kind: pa.DataType) -> str | None:
    """What a type holds, whatever its width; None of a column of nulls, which is of any."""
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
