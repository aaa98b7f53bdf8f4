"""Load a schema from its JSON file."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.schema import LogError


def load_schema(path: str | Path) -> PrepareSchema:
    """Read a schema from JSON; paths of files are relative to its folder.

    Raises:
        LogError: it is not JSON, a key is unknown, missing or duplicate, or a value is wrong (see
            PrepareSchema); the message lists the allowed keys.

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
    return _Loading(path).build([PrepareSchema], "the schema", _read(path))


def _read(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Make a dict of a JSON object; by default Python would silently keep the last of duplicate
        keys."""
        values = dict(pairs)
        if len(values) < len(pairs):
            raise LogError(f"{path}: duplicate key among {[key for key, _ in pairs]}; remove one")
        return values

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once)
    except LogError:
        raise
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: cannot be read as JSON ({error})") from error


class _Loading:
    """Converts JSON objects to dataclasses by the annotations."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def build(self, kinds: list[Any], section: str, values: Any) -> Any:
        """Build the first of ``kinds`` whose fields match the object."""
        expected: list[str] = []
        for kind in kinds:
            fields = {f.name: f for f in dataclasses.fields(kind)}
            missing = dataclasses.MISSING
            needed = [
                n for n, f in fields.items() if f.default is missing and f.default_factory is missing
            ]
            if isinstance(values, dict) and set(needed) <= set(values) <= set(fields):
                return self._dataclass(kind, section, values)
            optional = [n for n in fields if n not in needed]
            expected.append(f"the keys {needed}, and optionally {optional}")
        raise LogError(
            f"{self.path}: {section} must be an object with {'; or with '.join(expected)}; got "
            f"{values!r}"
        )

    def _dataclass(self, kind: Any, section: str, values: dict[str, Any]) -> Any:
        inside = "" if section == "the schema" else f"{section}."
        hints = typing.get_type_hints(kind)
        values = {name: self._value(hints[name], inside + name, v) for name, v in values.items()}
        if "files" in values:
            values["files"] = self._beside(f"{section}.files", values["files"])
        if isinstance(values.get("npy"), str):
            values["npy"] = str(self.path.parent / values["npy"])
        try:
            return kind(**values)
        except LogError as error:
            raise LogError(f"{self.path}: {error}") from error

    def _value(self, hint: Any, where: str, value: Any) -> Any:
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        objects = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if objects and (isinstance(value, dict) or len(kinds) == 1):
            return self.build(objects, where, value)
        origin: Any = typing.get_origin(hint)
        if origin is Mapping and isinstance(value, dict):
            of_values = typing.get_args(hint)[1]
            return {name: self._value(of_values, f"{where}.{name}", v) for name, v in value.items()}
        return value

    def _beside(self, where: str, files: Any) -> list[str]:
        """Make paths and patterns of files relative to the schema's folder."""
        patterns = [files] if isinstance(files, str) else files
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise LogError(f"{self.path}: {where} must be a path, or a list of paths, got {files!r}")
        # the names of parent folders, and of existing files, are not patterns
        folder = self.path.parent
        there = [str(folder / pattern) for pattern in patterns]
        anywhere = [os.path.join(glob.escape(str(folder)), pattern) for pattern in patterns]
        return [
            file if os.path.exists(file) else pattern
            for file, pattern in zip(there, anywhere, strict=True)
        ]
