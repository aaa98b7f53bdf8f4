"""A schema from its JSON file."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from pathlib import Path
from typing import Any

from ifa_torchrec.data.prepare.schema import (
    Events,
    Hashed,
    Items,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
)
from ifa_torchrec.data.schema import LogError

_SECTIONS = {"events": Events, "requests": Requests, "items": Items, "users": Users}


def load_schema(path: str | Path) -> PrepareSchema:
    """Read a schema from JSON; files are looked for beside it.

    Raises:
        LogError: it is no JSON, a key is unknown, missing or given twice, or a value is wrong (see
            PrepareSchema); the message has the keys there are.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare import load_schema
        >>> path = Path(tempfile.mkdtemp()) / "schema.json"
        >>> rows = {"files": "log.csv", "user": "u", "item": "i", "time": "t"}
        >>> schema = {"events": rows, "requests": {**rows, "labels": {"click": "c"}},
        ...           "splits": {"test": "2024-05-01"}}
        >>> _ = path.write_text(json.dumps(schema))
        >>> load_schema(path).events.item
        'i'
    """
    path = Path(path)
    parts = _read(path)
    if isinstance(parts, dict):
        parts |= {
            name: _build(path, kind, name, parts[name])
            for name, kind in _SECTIONS.items()
            if name in parts
        }
    return _build(path, PrepareSchema, "the schema", parts)


def _read(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of JSON, of which Python would take the last of the same keys."""
        values = dict(pairs)
        if len(values) < len(pairs):
            raise LogError(f"{path}: a key is given twice, among {[key for key, _ in pairs]}")
        return values

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once)
    except LogError:
        raise
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: not readable as JSON ({error})") from error


def _build(path: Path, kind: type, section: str, values: Any) -> Any:
    """A dataclass of an object of JSON, which must have its fields."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    if not isinstance(values, dict) or not set(needed) <= set(values) <= set(fields):
        raise LogError(
            f"{path}: {section} must be an object with {needed}, and perhaps "
            f"{[n for n in fields if n not in needed]}; got {values!r}"
        )
    values = dict(values)
    if "files" in values:
        values["files"] = _beside(path, section, values["files"])
    if "item" in values:
        values["item"] = _hashed(path, f"{section}.item", values["item"])
    for key in {"features", "context"} & {key for key in values if isinstance(values[key], dict)}:
        values[key] = {
            name: _hashed(path, f"{section}.{key}.{name}", column)
            for name, column in values[key].items()
        }
    if isinstance(values.get("labels"), dict):
        values["labels"] = {
            task: label if isinstance(label, str) else _build(path, JoinedLabel, f"labels.{task}", label)
            for task, label in values["labels"].items()
        }
    try:
        return kind(**values)
    except LogError as error:
        raise LogError(f"{path}: {error}") from error


def _hashed(path: Path, section: str, value: Any) -> Any:
    return _build(path, Hashed, section, value) if isinstance(value, dict) else value


def _beside(path: Path, section: str, files: Any) -> list[str]:
    """Paths and patterns of files, from the folder of the schema."""
    patterns = [files] if isinstance(files, str) else files
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise LogError(f"{path}: {section}.files must be a path, or a list of paths, got {files!r}")
    # the names of the folders above are no patterns, and neither is that of a file that is there
    there = [str(path.parent / pattern) for pattern in patterns]
    anywhere = [os.path.join(glob.escape(str(path.parent)), pattern) for pattern in patterns]
    return [
        file if os.path.exists(file) else pattern for file, pattern in zip(there, anywhere, strict=True)
    ]
