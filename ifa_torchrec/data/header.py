"""What stands in a log's schema.json: Header."""

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
"""Of a log without parts, and of one in parts, which versions before them refuse by its name."""


@dataclass(frozen=True)
class Header:
    """What schema.json says.

    Args:
        schema: of the log.
        rows: number of rows of each table.
        scales: of each of ``schema.scaled``.
        vocabulary: digest of the log's vocabulary.
        parts: of each table that is in parts.

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
    """What schema.json says; see ``write_header``.

    Raises:
        LogError: the file is missing, of another format, or not what ``write_header`` writes.
    """
    try:
        header = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise LogError(
            f"{file.parent}: no schema.json, so the folder was not written to the end; "
            "delete it and write it again"
        ) from error
    except OSError as error:
        raise LogError(f"{file}: not readable ({error}); make it so, or copy the log") from error
    except (ValueError, RecursionError) as error:
        raise LogError(f"{file}: not readable as JSON ({error}); write the log again") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found not in (FORMAT, IN_PARTS):
        raise LogError(
            f"{file}: format {found!r}, this version reads {FORMAT!r} and {IN_PARTS!r}; write "
            "the log again"
        )
    schema, rows = header.get("schema"), header.get("rows")
    if not isinstance(schema, dict) or not isinstance(rows, dict) or not {"events", "items"} <= {*rows}:
        raise LogError(f"{file}: no schema, or no rows of events and items; write the log again")
    for table, number in rows.items():
        if not isinstance(number, int):
            raise LogError(f"{file}: {table} has {number!r} rows, which is no number; write it again")
    names = {field.name for field in dataclasses.fields(LogSchema)}
    if unknown := {*schema} - names:
        raise LogError(
            f"{file}: the schema has {sorted(unknown)}, which this version does not know; there are "
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
    """The scales of schema.json."""
    if not isinstance(given, dict) or {*given} != {*schema.scaled}:
        raise LogError(f"{file}: scales must be those of {list(schema.scaled)}; write the log again")
    try:
        return {name: Scale(**given[name]) for name in schema.scaled}
    except (TypeError, ConfigError) as error:
        raise LogError(f"{file}: a scale is none ({error}); write the log again") from error
