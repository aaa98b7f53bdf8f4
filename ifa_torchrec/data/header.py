"""Read and write a log's schema.json: Header."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ifa_torchrec.batch import Scale
from ifa_torchrec.data.parts import Part, read_parts
from ifa_torchrec.data.schema import LogError, LogSchema, check_splits
from ifa_torchrec.errors import ConfigError

FORMAT, IN_PARTS = "ifa-event-log/2", "ifa-event-log/3"
"""Formats of a log without parts, and of a log in parts. Versions that cannot read parts refuse the
latter by its name."""


@dataclass(frozen=True)
class Header:
    """The content of schema.json.

    Args:
        schema: the log's schema.
        rows: the number of rows of each table.
        scales: the scale of each of ``schema.scaled``.
        vocabulary: the digest of the log's vocabulary.
        parts: the parts of each table that is in parts.

    Example:
        >>> from ifa_torchrec.data.header import Header
        >>> from ifa_torchrec.data.schema import LogSchema
        >>> Header(LogSchema(item_features={"item": 3}), {"events": 0, "items": 3}, {}, "").rows
        {'events': 0, 'items': 3}
    """

    schema: LogSchema
    rows: dict[str, int]
    scales: dict[str, Scale]
    vocabulary: str
    parts: dict[str, list[Part]] = field(default_factory=dict[str, list[Part]])


def write_header(file: Path, header: Header) -> None:
    """Write schema.json.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.header import Header, read_header, write_header
        >>> from ifa_torchrec.data.schema import LogSchema
        >>> file = Path(tempfile.mkdtemp()) / "schema.json"
        >>> header = Header(LogSchema(item_features={"item": 3}), {"events": 0, "items": 3}, {}, "")
        >>> write_header(file, header)
        >>> read_header(file) == header
        True
    """
    content = dataclasses.asdict(header)
    if not header.parts:
        del content["parts"]
    content = {"format": IN_PARTS if header.parts else FORMAT, **content}
    file.write_text(json.dumps(content, indent=2))


def read_header(file: Path) -> Header:
    """Read schema.json; see ``write_header``.

    Raises:
        LogError: the file is missing, has another format, or is not what ``write_header`` writes.
    """
    try:
        header = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise LogError(
            f"{file.parent}: schema.json is missing, so the log is incomplete; delete the folder and "
            "write the log again"
        ) from error
    except OSError as error:
        raise LogError(f"{file}: cannot be read ({error}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise LogError(f"{file}: not valid JSON ({error}); write the log again") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found not in (FORMAT, IN_PARTS):
        raise LogError(
            f"{file}: format {found!r}, expected {FORMAT!r} or {IN_PARTS!r}; write the log again with "
            "this version"
        )
    schema, rows = header.get("schema"), header.get("rows")
    if not isinstance(schema, dict) or not isinstance(rows, dict) or not {"events", "items"} <= {*rows}:
        raise LogError(
            f"{file}: the schema or the row counts of events and items are missing; write the log again"
        )
    for table, number in rows.items():
        if not isinstance(number, int):
            raise LogError(
                f"{file}: rows of {table}: got {number!r}, expected an integer; write the log again"
            )
    names = {field.name for field in dataclasses.fields(LogSchema)}
    if unknown := {*schema} - names:
        raise LogError(
            f"{file}: the schema has the unknown fields {sorted(unknown)}; this version knows "
            f"{sorted(names)}"
        )
    try:
        check_splits(name.removeprefix("requests/") for name in rows if name not in ("events", "items"))
        schema.setdefault("item_features", {})
        read = LogSchema(**schema)
    except LogError as error:
        raise LogError(f"{file}: {error}") from error
    scales, vocabulary = _scales(header.get("scales"), read, file), str(header.get("vocabulary"))
    parts = read_parts(header.get("parts"), rows, file) if found == IN_PARTS else {}
    return Header(read, rows, scales, vocabulary, parts)


def _scales(given: Any, schema: LogSchema, file: Path) -> dict[str, Scale]:
    """Read the scales of schema.json."""
    if not isinstance(given, dict) or {*given} != {*schema.scaled}:
        raise LogError(
            f"{file}: scales must have exactly the names {list(schema.scaled)}; write the log again"
        )
    try:
        return {name: Scale(**given[name]) for name in schema.scaled}
    except (TypeError, ConfigError) as error:
        raise LogError(f"{file}: a scale is not valid ({error}); write the log again") from error
