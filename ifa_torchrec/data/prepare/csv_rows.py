"""Read the rows of CSV files, decoded by Python and parsed by Arrow one block of lines at a time.

No row is lost silently; every row is read or counted as refused:

- A line whose number of columns differs from the header's is refused.
- A line with bytes that are not valid in its encoding is refused.
- Lines end with LF or CRLF, in any mixture, or all with CR. Otherwise a CR within a line is part of it.
- A quoted value may contain line ends. But a quote that opens a value and closes it lines later may be
  stray; then the value has swallowed rows. It is taken as a value if it closes properly and most of its
  lines do not have the columns of a row. Otherwise all its lines are refused, each counted as a row,
  since it is not known which of them are rows. A quote that never closes costs only its own line.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ifa_torchrec.data.prepare.schema import Table
from ifa_torchrec.data.schema import LogError

BLOCK = 1 << 22
"""The number of bytes read at a time."""
HEADER = 1 << 16
"""The maximum size of the header in bytes."""
LONGEST_VALUE = 1 << 20
"""The maximum size in bytes of a quoted value with several lines."""
LONGEST_LINE = 1 << 26
"""The maximum size of a line in bytes."""

_EXAMPLES = 3  # examples of refused lines per reason
_COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

# Placeholders within a block for what the parser must not see; none can come from the file.
_UNREADABLE = b"\xfe"
_CR = "\ufdd1"
_DELIMITER = "\x1f"

_STRAY_QUOTE = (
    "a stray quote: it opens a value that never closes, closes within a text, or spans lines that look "
    'like rows; if quotes are part of the values, set "quote": ""'
)


def _mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be decoded by a surrogate, and what cannot be encoded by _UNREADABLE."""
    if isinstance(error, UnicodeDecodeError):
        return "\udcff", error.end
    assert isinstance(error, UnicodeEncodeError)
    return _UNREADABLE, error.end


codecs.register_error("ifa_torchrec.unreadable", _mark)


@contextmanager
def naming_errors(section: str, file: str) -> Generator[None]:
    """Add the section and the file to errors of reading.

    Raises:
        LogError: instead of an OSError, a UnicodeError or an error of Arrow.

    Example:
        >>> from ifa_torchrec.data.prepare.csv_rows import naming_errors
        >>> with naming_errors("events", "log.csv"):
        ...     raise OSError("disk full")
        Traceback (most recent call last):
        ifa_torchrec.data.schema.LogError: events: log.csv cannot be read (disk full)
    """
    try:
        yield
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise LogError(f"{section}: {file} cannot be read ({error})") from error


class CsvText:
    r"""CSV files of a section as blocks of lines, with any encoding and line ends.

    Args:
        section: the name of the table in errors.
        table: the format of the files.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.csv_rows import CsvText
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = file.write_bytes(b"user,item\r\nann,tea\r\n")
        >>> list(CsvText("events", Table(files=str(file))).blocks(str(file), 100))
        [(b'user,item\nann,tea\n', False), (b'', True)]
    """

    def __init__(self, section: str, table: Table) -> None:
        self.section, self.table = section, table

    @property
    def delimiter(self) -> str:
        """The delimiter within a block: a single one-byte character."""
        return self.table.delimiter if len(self.table.delimiter.encode()) == 1 else _DELIMITER

    def blocks(self, file: str, size: int) -> Iterator[tuple[bytes, bool]]:
        """Blocks of complete lines of a file, in UTF-8 and ending with LF, and whether each is the
        last."""
        decoder = codecs.getincrementaldecoder(self.table.encoding)("ifa_torchrec.unreadable")
        rest, first = b"", True
        old: bool | None = None  # whether lines end with CR; None until a line has ended
        with naming_errors(self.section, file), _opened(file) as stream:
            while True:
                raw = stream.read(size)
                text = decoder.decode(raw, not raw)
                if first:
                    text, first = text.removeprefix("\ufeff"), False
                text = text.replace(_CR, "\udcff")
                if self.delimiter != self.table.delimiter:
                    text = text.replace(_DELIMITER, "\udcff")
                block = rest + text.encode("utf-8", "ifa_torchrec.unreadable")
                start = block[:HEADER]
                if old is None and (b"\n" in start or b"\r" in start[:-1] or not raw):
                    old = b"\n" not in start
                if old:
                    block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                end = block.rfind(b"\n") + 1
                if not raw and end < len(block):
                    block = block.removesuffix(b"\r") + b"\n"
                    end = len(block)
                block, rest = block[:end], block[end:]
                if len(rest) > LONGEST_LINE:
                    raise LogError(
                        f"{self.section}: {file} has a line of more than {LONGEST_LINE >> 20} MB; check "
                        "that it is a CSV file"
                    )
                block = block.replace(b"\r\n", b"\n").replace(b"\r", _CR.encode())
                if self.delimiter != self.table.delimiter:
                    block = block.replace(self.table.delimiter.encode(), _DELIMITER.encode())
                if block or not raw:
                    yield block, not raw
                if not raw:
                    return

    def names(self, file: str) -> list[str]:
        """The column names in a file's header."""
        block, _ = next(self.blocks(file, HEADER))
        return self.header(file, block)[0]

    def header(self, file: str, block: bytes) -> tuple[list[str], int]:
        """The column names in a file's header, and the number of bytes that it takes of the block."""
        lines = block.splitlines(keepends=True)
        # strict: a stray quote must not make rows part of a name
        options: dict[str, Any] = {"delimiter": self.delimiter, "strict": True}
        options |= {"quotechar": self.table.quote} if self.table.quote else {"quoting": csv.QUOTE_NONE}
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), **options)
        try:
            names = next((row for row in rows if row), [])
        except csv.Error as error:
            raise LogError(f"{self.section}: the header of {file} is not valid CSV ({error})") from error
        taken = b"".join(lines[: rows.line_num])
        if not names:
            raise LogError(f"{self.section}: {file} is empty; it needs a header, or set `columns`")
        if _UNREADABLE in taken:
            raise LogError(
                f"{self.section}: {file} starts with {self.excerpt(taken)!r}, which is not "
                f"{self.table.encoding}; set its `encoding`"
            )
        inner = [name.split("\n") for name in names]
        if any(line.count(self.delimiter) == len(names) - 1 for name in inner for line in name[1:]):
            raise LogError(
                f"{self.section}: the header of {file} has a quote that opens in its first line but "
                f"does not close there: {self.excerpt(taken)!r}; close it, or set `quote`"
            )
        return [self.restored(name) for name in names], len(taken)

    def restored(self, text: str) -> str:
        return text.replace(_CR, "\r").replace(_DELIMITER, self.table.delimiter)

    def excerpt(self, line: bytes) -> str:
        return self.restored(line.decode("utf-8", "replace")).rstrip("\n")[:200]


class CsvRows:
    r"""The rows of CSV files as an Arrow stream, and the refused lines.

    Args:
        text: how to read the files.
        files: the paths of the files.
        columns: the names of the columns.

    Attributes:
        refused: for each reason for which lines were refused, their number (`rows`) and `examples`.
        failure: the error raised by a file, if any.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.csv_rows import CsvRows, CsvText
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = str(Path(tempfile.mkdtemp()) / "log.csv")
        >>> _ = Path(file).write_text("user,item\nann,tea\nbob\n")
        >>> rows = CsvRows(CsvText("events", Table(files=file)), [file], ["user", "item"])
        >>> rows.reader().read_all().to_pylist(), [why for why in rows.refused]
        ([{'user': 'ann', 'item': 'tea'}], ['line cannot be read: expected 2 columns, got 1'])
    """

    def __init__(self, text: CsvText, files: Sequence[str], columns: Sequence[str]) -> None:
        self.text, self.files, self.columns = text, files, list(columns)
        self.refused: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None
        delimiter, quote = text.delimiter, text.table.quote
        self.delimiter, self.quote = delimiter.encode(), quote.encode()
        # if it is not parsed as a row of its own, the block before it ends within quotes
        self.sentinel = self.quote * 2 + self.delimiter * (len(columns) - 1) + b"\n"
        self.convert = pyarrow.csv.ConvertOptions(
            check_utf8=False,  # encoded by Python
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=["", *text.table.nulls],
        )

    @cached_property
    def quoted(self) -> re.Pattern[bytes]:
        """Matches a quoted value, to its closing quote or to the end."""
        # the quote comes first and then a look-behind, since searching for a literal is fastest
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
            for file in self.files:
                rest, line = b"", 1
                for number, (block, last) in enumerate(self.text.blocks(file, BLOCK)):
                    if number == 0 and not self.text.table.columns:
                        end = self.text.header(file, block)[1]
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
        """Parse a block whose first line has the number ``line``.

        Returns:
            The rows, and the rest of the block that must wait for the next one.
        """
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
            # the most rows that it may contain: a line may also have ended with a CR
            rows = 1 + row.text.rstrip("\n").count("\n") + row.text.count(_CR)
            why = f"expected {row.expected_columns} columns, got {row.actual_columns}"
            self.refuse(f"line cannot be read: {why}", rows, file, row.text.encode())
        restored = {_CR: "\r"} if _CR.encode() in block else {}
        if quotes and self.text.delimiter != self.text.table.delimiter:
            restored[_DELIMITER] = self.text.table.delimiter
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
                delimiter=self.text.delimiter,
                quote_char=self.text.table.quote or False,
                newlines_in_values=True,
                invalid_row_handler=skip,
            ),
            self.convert,
        )
        return table, bad

    def without_unreadable(self, file: str, block: bytes) -> bytes:
        """Refuse the lines that cannot be decoded; leave empty lines, which are not rows, instead."""
        lines = block.splitlines(keepends=True)
        for number, text in enumerate(lines):
            if _UNREADABLE in text:
                encoding = self.text.table.encoding
                why = f"line cannot be read: it is not {encoding}; set `encoding`"
                self.refuse(why, 1, file, text)
                lines[number] = b"\n"
        return b"".join(lines)

    def without_stray_quotes(
        self, file: str, block: bytes, line: int, last: bool
    ) -> tuple[bytes, bytes]:
        """Refuse the lines that a stray quote has swallowed; the end of the block may have to wait."""
        good: list[bytes] = []
        position = kept = 0  # up to where the block has been examined, and kept or refused
        row = value_end = 0  # the start of the last row of several lines, and the end of its value
        while match := self.quoted.search(block, position):
            if block.find(b"\n", *match.span()) < 0:
                position = match.end()
                continue
            start = block.rfind(b"\n", 0, match.start()) + 1
            if start < value_end:  # the row began lines before
                start = row
            # limits: the length of a value, wherever its row began, and of a line for the whole row
            may_close = (
                len(block) - match.start() <= LONGEST_VALUE and len(block) - start <= LONGEST_LINE
            )
            if not match[1] and not last and may_close:
                return b"".join([*good, block[kept:start]]), block[start:]
            closes = block[match.end() : match.end() + 1] in (self.delimiter, b"\n")
            if not match[1] or match.end() - match.start() > LONGEST_VALUE:
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
        # A text in the first column ends in a line with all delimiters of its row. That line is a row of
        # its own only if the first line has all delimiters as well.
        if (
            self.closed.sub(b"", before).count(self.delimiter) + first.count(self.delimiter)
            == delimiters
        ):
            ends = tail.count(self.delimiter) + self.closed.sub(b"", behind).count(self.delimiter)
            rows.append(ends == delimiters)
        return bool(rows) and 2 * sum(rows) >= len(rows)

    def refuse(self, why: str, rows: int, file: str, text: bytes, place: str = "") -> None:
        reason = self.refused.setdefault(why, {"rows": 0, "examples": []})
        reason["rows"] += rows
        if len(reason["examples"]) < _EXAMPLES:
            reason["examples"].append(f"{Path(file).name}: {place}{self.text.excerpt(text)}")


def _opened(file: str) -> IO[bytes]:
    with open(file, "rb") as stream:
        start = stream.read(4)
    kind = next((kind for magic, kind in _COMPRESSION.items() if start.startswith(magic)), None)
    return pa.input_stream(file, compression=kind, buffer_size=BLOCK)
