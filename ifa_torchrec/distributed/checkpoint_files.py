"""The files of a checkpoint: their names, checksums and format."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifa_torchrec.distributed.errors import CheckpointError, DamagedError

FORMAT = 6
"""Incremented when this package can no longer read older checkpoints, or would build another model for
them: 6 since the model learns how much a history says."""
SMALL_FILES = (".metadata", "progress.json")
"""Files that every rank reads and checks."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first; other folders, such as step-best, are ignored."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{9,}", path.name)]
    return sorted(found, key=step_of)


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed.checkpoint_files import step_of
        >>> step_of(Path("run/checkpoints/step-000000012"))
        12
    """
    return int(path.name.removeprefix("step-"))


def checksum_of(file: Path) -> int:
    """CRC-32 of a file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed.checkpoint_files import checksum_of
        >>> file = Path(tempfile.mkdtemp()) / "empty"
        >>> _ = file.write_text("")
        >>> checksum_of(file)
        0
    """
    result = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            result = zlib.crc32(block, result)
    return result


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file.

    Raises:
        DamagedError: the file is not JSON, or not an object.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed.checkpoint_files import read_object
        >>> file = Path(tempfile.mkdtemp()) / "progress.json"
        >>> _ = file.write_text("[]")
        >>> read_object(file)
        Traceback (most recent call last):
        ifa_torchrec.distributed.errors.DamagedError: progress.json is not a JSON object
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedError(f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file.name} is not a JSON object")
    return content


def verify(path: Path, names: Sequence[str] | None) -> None:
    """Compare a checkpoint's files with their checksums.

    Args:
        path: the checkpoint's folder.
        names: the files to compare; None for all.

    Raises:
        DamagedError: one of them, or checksums.json, is not what was written.
        OSError: one of them cannot be read.
    """
    files = read_object(path / "checksums.json")
    for name in files if names is None else names:
        if checksum_of(path / name) != files.get(name):
            raise DamagedError(f"{name} is not what was written")


def read_progress(path: Path) -> dict[str, Any]:
    """The progress of a checkpoint whose progress.json was verified.

    Raises:
        CheckpointError: the checkpoint has another format, or is a renamed copy.
    """
    progress = read_object(path / "progress.json")
    written = progress.pop("format", None)
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, this version of ifa_torchrec reads {FORMAT}; use the "
            "version that wrote it, or train again in another folder"
        )
    if path.name != (name := step_name(progress["step"])):
        raise CheckpointError(f"{path} is a copy of {name}; give it this name, or move it away")
    return progress
