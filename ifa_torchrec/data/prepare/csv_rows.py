"""Rows of CSV, all counted: decoded by Python and parsed by Arrow, a block of lines at a time.

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
"""Bytes that are read at a time."""
HEADER = 1 << 16
"""Bytes within which the header ends."""
LONGEST_VALUE = 1 << 20
"""Bytes of a quoted value of several lines."""
LONGEST_LINE = 1 << 26
"""Bytes of a line."""

_EXAMPLES = 3  # of the lines that are refused for one reason
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


@contextmanager
def naming_errors(section: str, file: str) -> Generator[None]:
    """Names the section and the file in what the file's reading raises.

    Raises:
        LogError: in place of an error of the system, of decoding, or of Arrow.

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
    r"""CSV files of a section as blocks of lines, whatever their encoding and line ends.

    Args:
        section: what to call the table in errors.
        table: how the files are written.

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
        """What separates values within a block: one character of one byte."""
        return self.table.delimiter if len(self.table.delimiter.encode()) == 1 else _DELIMITER

    def blocks(self, file: str, size: int) -> Iterator[tuple[bytes, bool]]:
        """Whole lines of a file in UTF-8, ending with LF, and whether they are the last."""
        decoder = codecs.getincrementaldecoder(self.table.encoding)("ifa_torchrec.unreadable")
        rest, first = b"", True
        old: bool | None = None  # whether lines end with CR; None until one has ended
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
                        f"{self.section}: {file} has a line of more than {LONGEST_LINE >> 20} MB; "
                        "is it CSV?"
                    )
                block = block.replace(b"\r\n", b"\n").replace(b"\r", _CR.encode())
                if self.delimiter != self.table.delimiter:
                    block = block.replace(self.table.delimiter.encode(), _DELIMITER.encode())
                if block or not raw:
                    yield block, not raw
                if not raw:
                    return

    def names(self, file: str) -> list[str]:
        """The names in a file's header."""
        block, _ = next(self.blocks(file, HEADER))
        return self.header(file, block)[0]

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
                f"{self.section}: {file} starts with {self.excerpt(taken)!r}, which is not "
                f"{self.table.encoding}; say which `encoding` it has"
            )
        inner = [name.split("\n") for name in names]
        if any(line.count(self.delimiter) == len(names) - 1 for name in inner for line in name[1:]):
            raise LogError(
                f"{self.section}: {file} has a header with a quote that opens in its first line and "
                f"does not close there: {self.excerpt(taken)!r}"
            )
        return [self.restored(name) for name in names], len(taken)

    def restored(self, text: str) -> str:
        return text.replace(_CR, "\r").replace(_DELIMITER, self.table.delimiter)

    def excerpt(self, line: bytes) -> str:
        return self.restored(line.decode("utf-8", "replace")).rstrip("\n")[:200]


class CsvRows:
    r"""The rows of CSV files as a stream of Arrow, with what was refused of them.

    Args:
        text: how to read them.
        files: their paths.
        columns: what to call their columns.

    Attributes:
        refused: why lines were refused, with their number (`rows`) and `examples`.
        failure: what went wrong in a file, if something did.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.csv_rows import CsvRows, CsvText
        >>> from ifa_torchrec.data.prepare.schema import Table
        >>> file = str(Path(tempfile.mkdtemp()) / "log.csv")
        >>> _ = Path(file).write_text("user,item\nann,tea\nbob\n")
        >>> rows = CsvRows(CsvText("events", Table(files=file)), [file], ["user", "item"])
        >>> rows.reader().read_all().to_pylist(), [why for why in rows.refused]
        ([{'user': 'ann', 'item': 'tea'}], ['line cannot be read: 2 columns wanted, 1 found'])
    """

    def __init__(self, text: CsvText, files: Sequence[str], columns: Sequence[str]) -> None:
        self.text, self.files, self.columns = text, files, list(columns)
        self.refused: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None
        delimiter, quote = text.delimiter, text.table.quote
        self.delimiter, self.quote = delimiter.encode(), quote.encode()
        # if it does not come out as a row of its own, the block before it ends within quotes
        self.sentinel = self.quote * 2 + self.delimiter * (len(columns) - 1) + b"\n"
        self.convert = pyarrow.csv.ConvertOptions(
            check_utf8=False,  # it comes from Python's encoder
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=["", *text.table.nulls],
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
        """Leave an empty line, which is no row, where a line cannot be decoded."""
        lines = block.splitlines(keepends=True)
        for number, text in enumerate(lines):
            if _UNREADABLE in text:
                encoding = self.text.table.encoding
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
            # as long as a value may be, wherever its row began; and a row no longer than a line
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
        reason = self.refused.setdefault(why, {"rows": 0, "examples": []})
        reason["rows"] += rows
        if len(reason["examples"]) < _EXAMPLES:
            reason["examples"].append(f"{Path(file).name}: {place}{self.text.excerpt(text)}")


def _opened(file: str) -> IO[bytes]:
    with open(file, "rb") as stream:
        start = stream.read(4)
    kind = next((kind for magic, kind in _COMPRESSION.items() if start.startswith(magic)), None)
    return pa.input_stream(file, compression=kind, buffer_size=BLOCK)
