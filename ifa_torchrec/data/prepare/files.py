"""The files of a section of a schema: which there are, what they are, and the rows of CSV, all counted.

What a file is, Parquet, Feather or CSV, compressed or not, is told from its first bytes. DuckDB reads
Parquet and Feather. CSV is decoded by Python and parsed by Arrow, a block of lines at a time, and every
line is accounted for:

- A line without the header's number of columns is refused.
- A line with bytes that its encoding does not know is refused.
- Lines end with LF or CRLF, in any mixture, or all with CR. A CR amid a line belongs to the line.
- A quoted value may hold line ends. A quote that opens a value and closes it lines later may also be
  stray, and then the value has swallowed rows. Where the value closes as a value does, and most of its
  lines do not have the columns of a row, it is taken for one; otherwise all its lines are refused, each
  as a row: nobody can tell which of them are. A quote that closes nowhere costs its own line.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.schema import LogError

if TYPE_CHECKING:
    import duckdb

_BLOCK = 1 << 22  # bytes read at a time
_HEADER = 1 << 16  # within which the header ends
_LONGEST_VALUE = 1 << 20  # bytes of a quoted value of several lines
_LONGEST_LINE = 1 << 26
_EXAMPLES = 3

_KINDS = {b"PAR1": "parquet", b"ARROW1": "feather"}
_NAMES = {".parquet": "parquet", ".pq": "parquet", ".feather": "feather", ".arrow": "feather"}
_COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

# Within a block these stand for what the parser must not see; none can come from the file.
_UNREADABLE = b"\xfe"
_CR = "\ufdd1"
_DELIMITER = "\x1f"

_STRAY_QUOTE = (
    "a stray quote: it opens a value that does not close, or only amid a text, or over lines that look "
    'like rows; if quotes are part of the values, say "quote": ""'
)


def _mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Let what cannot be decoded pass as a surrogate, and what cannot be encoded as _UNREADABLE."""
    if isinstance(error, UnicodeDecodeError):
        return "\udcff", error.end
    assert isinstance(error, UnicodeEncodeError)
    return _UNREADABLE, error.end


codecs.register_error("ifa_torchrec.unreadable", _mark)


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


class Source:
    r"""What DuckDB selects a section's rows from.

    Args:
        section: what to call the table in errors.
        table: files, and how they are written.
        connection: where the files are to be read.

    Attributes:
        relation: to select from, once.
        columns: for each name that stands once in the header, the column of the relation.
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
        self._rows: _CsvRows | None = None
        read = _name(f"_{section}")
        if files.kind == "parquet":
            listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files.files)
            # By default the folders' names would replace columns, and the first file's types would
            # round those of the others.
            read = f"read_parquet([{listed}], hive_partitioning=false, union_by_name=true)"
        elif files.kind == "feather":
            connection.register(f"_{section}", files.feather())
        else:
            self._rows = _CsvRows(files, columns, self.refused)
            connection.register(f"_{section}", self._rows.reader())
        self.relation = f"{read} AS _file({', '.join(map(_name, columns))})"

    @contextmanager
    def reading(self) -> Generator[None]:
        """Raises what went wrong in a file as it was, where DuckDB would wrap it."""
        try:
            yield
        except Exception:
            if self._rows and self._rows.failure:
                raise self._rows.failure from None
            raise


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


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
        self.section, self.table = section, table
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
        with self.errors(file), open(file, "rb") as stream:
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

    def _columns(self, file: str) -> list[str]:
        with self.errors(file):
            if self.kind == "parquet":
                return pq.read_schema(file).names
            if self.kind == "feather":
                return _feather_schema(file).names
            block, _ = next(self.blocks(file, _HEADER))
            return self.header(file, block)[0]

    def feather(self) -> ds.Dataset:
        """A dataset of all files; its types hold the values of each of them."""
        with self.errors(self.files[0]):
            schemas = [_feather_schema(file) for file in self.files]
            types = pa.unify_schemas(schemas, promote_options="permissive")
            return ds.dataset(self.files, schema=types, format="feather")

    @contextmanager
    def errors(self, file: str) -> Generator[None]:
        """Names the file in what its reading raises."""
        try:
            yield
        except (OSError, UnicodeError, pa.ArrowException) as error:
            raise LogError(f"{self.section}: {file} cannot be read ({error})") from error

    # ---------------------------------------------------------------- CSV

    @property
    def delimiter(self) -> str:
        """What separates values within a block: one character of one byte."""
        return self.table.delimiter if len(self.table.delimiter.encode()) == 1 else _DELIMITER

    def blocks(self, file: str, size: int) -> Iterator[tuple[bytes, bool]]:
        """Whole lines of a file in UTF-8, ending with LF, and whether they are the last."""
        decoder = codecs.getincrementaldecoder(self.table.encoding)("ifa_torchrec.unreadable")
        rest, first = b"", True
        old: bool | None = None  # whether lines end with CR; None until one has ended
        with self.errors(file), _opened(file) as stream:
            while True:
                raw = stream.read(size)
                text = decoder.decode(raw, not raw)
                if first:
                    text, first = text.removeprefix("\ufeff"), False
                text = text.replace(_CR, "\udcff")
                if self.delimiter != self.table.delimiter:
                    text = text.replace(_DELIMITER, "\udcff")
                block = rest + text.encode("utf-8", "ifa_torchrec.unreadable")
                start = block[:_HEADER]
                if old is None and (b"\n" in start or b"\r" in start[:-1] or not raw):
                    old = b"\n" not in start
                if old:
                    block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                end = block.rfind(b"\n") + 1
                if not raw and end < len(block):
                    block = block.removesuffix(b"\r") + b"\n"
                    end = len(block)
                block, rest = block[:end], block[end:]
                if len(rest) > _LONGEST_LINE:
                    raise LogError(
                        f"{self.section}: {file} has a line of more than {_LONGEST_LINE >> 20} MB; "
                        "is it CSV?"
                    )
                block = block.replace(b"\r\n", b"\n").replace(b"\r", _CR.encode())
                if self.delimiter != self.table.delimiter:
                    block = block.replace(self.table.delimiter.encode(), _DELIMITER.encode())
                if block or not raw:
                    yield block, not raw
                if not raw:
                    return

    def header(self, file: str, block: bytes) -> tuple[list[str], int]:
        """The names in a file's first line, and how many bytes of the block they take."""
        lines = block.splitlines(keepends=True)
        # it is strict: a quote that is amiss is not to make rows a part of a name
        options: dict[str, Any] = {"delimiter": self.delimiter, "strict": True}
        options |= {"quotechar": self.table.quote} if self.table.quote else {"quoting": csv.QUOTE_NONE}
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), **options)
        try:
            names = next((row for row in rows if row), [])
        except csv.Error as error:
            raise LogError(
                f"{self.section}: {file} has a header that is no line of CSV ({error})"
            ) from error
        taken = b"".join(lines[: rows.line_num])
        if not names:
            raise LogError(
                f"{self.section}: {file} is empty; it must have a header, unless `columns` are named"
            )
        if _UNREADABLE in taken:
            raise LogError(
                f"{self.section}: {file} starts with {self.shown(taken)!r}, which is not "
                f"{self.table.encoding}; say which `encoding` it has"
            )
        inner = [name.split("\n") for name in names]
        if any(line.count(self.delimiter) == len(names) - 1 for name in inner for line in name[1:]):
            raise LogError(
                f"{self.section}: {file} has a header with a quote that opens in its first line and "
                f"does not close there: {self.shown(taken)!r}"
            )
        return [self.restored(name) for name in names], len(taken)

    def restored(self, text: str) -> str:
        return text.replace(_CR, "\r").replace(_DELIMITER, self.table.delimiter)

    def shown(self, line: bytes) -> str:
        return self.restored(line.decode("utf-8", "replace")).rstrip("\n")[:200]


class _CsvRows:
    """The rows of CSV files as a stream of Arrow, with what was refused of them."""

    def __init__(self, files: _Files, columns: list[str], refused: dict[str, dict[str, Any]]) -> None:
        self.files, self.columns, self.refused = files, columns, refused
        self.failure: Exception | None = None
        delimiter, quote = files.delimiter, files.table.quote
        self.delimiter, self.quote = delimiter.encode(), quote.encode()
        # if it does not come out as a row of its own, the block before it ends within quotes
        self.sentinel = self.quote * 2 + self.delimiter * (len(columns) - 1) + b"\n"
        self.convert = pyarrow.csv.ConvertOptions(
            check_utf8=False,  # it comes from Python's encoder
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=["", *files.table.nulls],
        )

    @cached_property
    def quoted(self) -> re.Pattern[bytes]:
        """A value that a quote opens, to the quote that closes it, or to the end."""
        # the quote comes first, and then what may stand before it, since a letter is found fastest
        d, q = re.escape(self.delimiter), re.escape(self.quote)
        return re.compile(b"%b(?<![^%b\n]%b)[^%b]*(?:%b%b[^%b]*)*(%b|\\Z)" % (q, d, q, q, q, q, q, q))

    @cached_property
    def closed(self) -> re.Pattern[bytes]:
        q = re.escape(self.quote)
        return re.compile(b"%b[^%b]*%b" % (q, q, q))

    def reader(self) -> pa.RecordBatchReader:
        schema = pa.schema([(column, pa.string()) for column in self.columns])
        return pa.RecordBatchReader.from_batches(schema, self.batches())

    def batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for file in self.files.files:
                rest, line = b"", 1
                for number, (block, last) in enumerate(self.files.blocks(file, _BLOCK)):
                    if number == 0 and not self.files.table.columns:
                        end = self.files.header(file, block)[1]
                        line += block.count(b"\n", 0, end)
                        block = block[end:]
                    block = rest + block
                    table, rest = self.parse(file, block, line, last)
                    line += block.count(b"\n") - rest.count(b"\n")
                    yield from table.to_batches()
        except Exception as error:
            self.failure = error
            raise

    def parse(self, file: str, block: bytes, line: int, last: bool) -> tuple[pa.Table, bytes]:
        """The rows of a block, and what of it must wait for the next; its first line has that number."""
        rest = b""
        if _UNREADABLE in block:
            block = self.without_unreadable(file, block)
        quotes = bool(self.quote) and self.quote in block
        if quotes:
            table, bad = self.arrow(block + self.sentinel)
            if table.num_rows + len(bad) == block.count(b"\n") + 1:  # every line is a row, or refused
                table = table.slice(0, table.num_rows - 1)
            else:
                block, rest = self.without_stray_quotes(file, block, line, last)
                table, bad = self.arrow(block)
        else:
            table, bad = self.arrow(block)
        for row in bad:
            # as many as there may be in it: a line may also have ended with its CR
            rows = 1 + row.text.rstrip("\n").count("\n") + row.text.count(_CR)
            why = f"{row.expected_columns} columns wanted, {row.actual_columns} found"
            self.refuse(f"line cannot be read: {why}", rows, file, row.text.encode())
        restored = {_CR: "\r"} if _CR.encode() in block else {}
        if quotes and self.files.delimiter != self.files.table.delimiter:
            restored[_DELIMITER] = self.files.table.delimiter
        for mark, text in restored.items():
            options = pc.ReplaceSubstringOptions(mark, text)
            columns = [pc.call_function("replace_substring", [c], options) for c in table.columns]
            table = pa.table(columns, names=self.columns)
        return table, rest

    def arrow(self, block: bytes) -> tuple[pa.Table, list[pyarrow.csv.InvalidRow]]:
        bad: list[pyarrow.csv.InvalidRow] = []

        def skip(row: pyarrow.csv.InvalidRow) -> str:
            bad.append(row)
            return "skip"

        if not block.strip(b"\n"):
            return pa.table([pa.array([], pa.string())] * len(self.columns), names=self.columns), bad
        table = pyarrow.csv.read_csv(
            io.BytesIO(block),
            pyarrow.csv.ReadOptions(column_names=self.columns, block_size=len(block) + 1),
            pyarrow.csv.ParseOptions(
                delimiter=self.files.delimiter,
                quote_char=self.files.table.quote or False,
                newlines_in_values=True,
                invalid_row_handler=skip,
            ),
            self.convert,
        )
        return table, bad

    def without_unreadable(self, file: str, block: bytes) -> bytes:
        """Leave an empty line, which is no row, where a line cannot be decoded."""
        lines = block.splitlines(keepends=True)
        for number, text in enumerate(lines):
            if _UNREADABLE in text:
                encoding = self.files.table.encoding
                self.refuse(f"line cannot be read: is it {encoding}? Name the `encoding`", 1, file, text)
                lines[number] = b"\n"
        return b"".join(lines)

    def without_stray_quotes(
        self, file: str, block: bytes, line: int, last: bool
    ) -> tuple[bytes, bytes]:
        """Take out the lines of a block for which a stray quote stands; the end may have to wait."""
        good: list[bytes] = []
        position = kept = 0  # up to where the block has been looked at, and taken over or refused
        row = value_end = 0  # the start of the last row of several lines, and the end of its value
        while match := self.quoted.search(block, position):
            if block.find(b"\n", *match.span()) < 0:
                position = match.end()
                continue
            start = block.rfind(b"\n", 0, match.start()) + 1
            if start < value_end:  # the row began lines before
                start = row
            if not match[1] and not last and len(block) - start <= _LONGEST_VALUE:
                return b"".join([*good, block[kept:start]]), block[start:]
            closes = block[match.end() : match.end() + 1] in (self.delimiter, b"\n")
            if not match[1] or match.end() - match.start() > _LONGEST_VALUE:
                end = block.find(b"\n", match.start()) + 1
            elif not closes:
                end = block.rfind(b"\n", 0, match.end()) + 1
            elif self.looks_like_rows(block, match):
                end = block.find(b"\n", match.end()) + 1
            else:
                row, value_end = start, match.end()
                position = match.end()
                continue
            text = block[start : block.find(b"\n", match.start())]
            line += block.count(b"\n", kept, start)
            lines = block.count(b"\n", start, end)
            self.refuse(_STRAY_QUOTE, lines, file, text, f"line {line}: ")
            line += lines
            good.append(block[kept:start])
            kept = position = end
        return b"".join([*good, block[kept:]]), b""

    def looks_like_rows(self, block: bytes, match: re.Match[bytes]) -> bool:
        """Whether most lines of a quoted value, after its first, have as many columns as a row."""
        first, *inner, tail = match[0].split(b"\n")
        before = block[block.rfind(b"\n", 0, match.start()) + 1 : match.start()]
        behind = block[match.end() : block.find(b"\n", match.end())]
        delimiters = len(self.columns) - 1
        rows = [text.count(self.delimiter) == delimiters for text in inner]
        # A text in the first column ends in a line with all the delimiters of its row. That line is one
        # of its own only if the first has them all as well.
        if (
            self.closed.sub(b"", before).count(self.delimiter) + first.count(self.delimiter)
            == delimiters
        ):
            ends = tail.count(self.delimiter) + self.closed.sub(b"", behind).count(self.delimiter)
            rows.append(ends == delimiters)
        return bool(rows) and 2 * sum(rows) >= len(rows)

    def refuse(self, why: str, rows: int, file: str, text: bytes, place: str = "") -> None:
        told = self.refused.setdefault(why, {"rows": 0, "examples": []})
        told["rows"] += rows
        if len(told["examples"]) < _EXAMPLES:
            told["examples"].append(f"{Path(file).name}: {place}{self.files.shown(text)}")


def _opened(file: str) -> IO[bytes]:
    with open(file, "rb") as stream:
        start = stream.read(4)
    kind = next((kind for magic, kind in _COMPRESSION.items() if start.startswith(magic)), None)
    return pa.input_stream(file, compression=kind, buffer_size=_BLOCK)


def _feather_schema(file: str) -> pa.Schema:
    with pa.memory_map(file) as stream:
        return pa.ipc.open_file(stream).schema
