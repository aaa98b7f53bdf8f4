"""A bundle: everything that serving needs from a training run, in one folder, without the log.

    BUNDLE/
      bundle.json        format, version of the weights, size and SHA-256 of each file; written last
      config.json        the training's options
      schema.json        the log's schema, and the means and deviations that standardise numbers
      vocabulary.json, vocabulary/   the row of each external id, users' ids excluded
      items/COLUMN.npy   the items' features
      weights.pt         all weights of the model, tables included, in their own dtypes
      dense.pt2          the compiled dense part, if the run has one

It contains no events and no users' ids. Arrays and weights are memory-mapped, so the processes of a
machine share them. Opening a bundle runs no code from it: it is tensors, arrays without objects, and
JSON. The digests detect damage, not tampering. dense.pt2 is code, which only ``ifa serve --compiled``
runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifa_torchrec.data.header import Header, read_header, write_header
from ifa_torchrec.data.log_items import LogItems
from ifa_torchrec.data.parts import sha256_of
from ifa_torchrec.data.schema import USER
from ifa_torchrec.data.writing import draft_beside
from ifa_torchrec.errors import ExistsError, UserError, writing
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import OPTIONS, options_text, read_options
from ifa_torchrec.training.run import Run

FORMAT = "ifa-bundle/3"
BUNDLE_FILE = "bundle.json"
_SCHEMA, _WEIGHTS, _ITEMS = "schema.json", "weights.pt", "items"
_REMEDY = "copy the whole bundle again, or write a new one (ifa export --run RUN --bundle DIR)"


class BundleError(UserError, ValueError):
    """A folder is not a bundle, or has changed since it was written; the message names the file."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the items and ids of its log, the model, and the weights' version."""

    log: LogItems
    dlrm: DLRM_IFA
    version: str


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle rather than a training run.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.bundle import is_bundle
        >>> is_bundle(Path(tempfile.mkdtemp()))
        False
    """
    return (folder / BUNDLE_FILE).exists()


def write_bundle(run: Run, folder: Path, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Write a run's bundle, which appears only when it is complete.

    Args:
        run: from ``load_run(..., sharded=False)``.
        folder: the bundle's folder, which must not exist yet.
        beside: files to copy into it.

    Returns:
        The content of bundle.json.

    Raises:
        ExistsError: the folder exists.
        WriteError: it cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.bundle import read_bundle, write_bundle
        >>> from ifa_torchrec.training.run import load_run
        >>> def version_of_bundle(trained):  # a training's --out
        ...     write_bundle(load_run(trained, sharded=False), Path("bundle"))
        ...     return read_bundle(Path("bundle")).version
    """
    if folder.exists():
        raise ExistsError(f"{folder} exists; delete it or choose another folder")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with draft_beside(folder) as draft:
            _write_parts(run, draft)
            for file in beside:
                shutil.copyfile(file, draft / file.name)
            content = {"format": FORMAT, "version": run.version, "files": _files(draft)}
            content = {**content, "digest": _digest(content)}
            (draft / BUNDLE_FILE).write_text(json.dumps(content, indent=2))
            draft.rename(folder)
    return content


def _write_parts(run: Run, folder: Path) -> None:
    log, vocabulary = run.log, run.log.vocabulary.withholding(USER)
    (folder / OPTIONS).write_text(options_text(run.config))
    rows = {"events": 0, "items": log.num_items}
    header = Header(log.schema, rows, dict(run.scales), vocabulary.digest)
    write_header(folder / _SCHEMA, header)
    vocabulary.save(folder)
    (folder / _ITEMS).mkdir()
    for name, column in log.items.items():
        np.save(folder / _ITEMS / f"{name}.npy", column)
    torch.save(run.dlrm.state_dict(), folder / _WEIGHTS)


def read_bundle(folder: Path) -> Bundle:
    """Verify a bundle's files and open it.

    Raises:
        BundleError: there is none, it has another format, or a file is missing, damaged or was added.

    Example: see ``write_bundle``.
    """
    content = _checked(folder)
    header = read_header(folder / _SCHEMA)
    names = [Path(name) for name in content["files"]]
    columns = [name for name in names if name.parent.name == _ITEMS]
    items = {
        # open_memmap refuses object arrays, which np.load might unpickle
        name.stem: np.asarray(np.lib.format.open_memmap(folder / name, mode="r"))
        for name in columns
    }
    log = LogItems(str(folder), folder, header.schema, items)
    model = build_model(header.schema, read_options(folder), header.scales)
    weights = torch.load(folder / _WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(weights, assign=True)
    return Bundle(log, model.eval(), content["version"])


def _checked(folder: Path) -> dict[str, Any]:
    """The content of bundle.json, once the folder's files were verified against it."""
    file = folder / BUNDLE_FILE
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise BundleError(f"{file}: format {content['format']!r}, this version reads {FORMAT!r}")
        if content.pop("digest") != _digest(content):
            raise BundleError(f"{file} is not what was written; {_REMEDY}")
        written, found = content["files"], _names(folder)
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: no bundle here ({BUNDLE_FILE} is missing); {_REMEDY}") from error
    except BundleError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(f"{file}: not a bundle's file ({error!r}); {_REMEDY}") from error
    if strange := sorted(found - {*written}):
        raise BundleError(f"{folder / strange[0]} was not in the bundle; {_REMEDY}")
    if missing := sorted({*written} - found):
        raise BundleError(f"{folder / missing[0]} is missing; {_REMEDY}")
    for name, expected in written.items():
        if (size := (folder / name).stat().st_size) != expected["bytes"]:
            raise BundleError(
                f"{folder / name} has {size} bytes, expected {expected['bytes']}; {_REMEDY}"
            )
        if sha256_of(folder / name) != expected["sha256"]:
            raise BundleError(f"{folder / name} is damaged: its SHA-256 differs; {_REMEDY}")
    return content


def _names(folder: Path) -> set[str]:
    """The files of a bundle, by their names in ``bundle.json``."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()]
    return {file.as_posix() for file in files} - {BUNDLE_FILE}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(_names(folder))
    }


def _digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of bundle.json's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
