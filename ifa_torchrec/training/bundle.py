"""A bundle: all that serving needs of a training run, in one folder, without the log.

    BUNDLE/
      bundle.json        format, version of the weights, size and SHA-256 of each file; written last
      config.json        the training's options
      schema.json        the log's schema, and by which figures numbers are standardised
      vocabulary.json, vocabulary/   which external id has which row, but for the users'
      items/COLUMN.npy   what describes the items
      weights.pt         of the whole model, tables and all, in their own types
      dense.pt2          the compiled dense part, where the run has one

No event and no user's id is in it. Arrays and weights are mapped to memory, so that the processes of a
machine share them. To open one runs no code of it: tensors, arrays without objects, and JSON. The
digests tell damage, not malice, and dense.pt2 is code, which ``ifa serve --compiled`` alone runs.
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
_REMEDY = "copy the whole bundle anew, or write another (ifa export --run RUN --bundle DIR)"


class BundleError(UserError, ValueError):
    """A folder is no bundle, or not the one that was written; the message names the file."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds: the model, what its log says of items and ids, and the weights' version."""

    log: LogItems
    dlrm: DLRM_IFA
    version: str


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle, and not a training run.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.bundle import is_bundle
        >>> is_bundle(Path(tempfile.mkdtemp()))
        False
    """
    return (folder / BUNDLE_FILE).exists()


def write_bundle(run: Run, folder: Path, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Write a run's bundle, which appears when it is whole.

    Args:
        run: from ``load_run(..., sharded=False)``.
        folder: which does not exist yet.
        beside: files to copy into it.

    Returns:
        What bundle.json says.

    Raises:
        ExistsError: the folder is there.
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
            said = {"format": FORMAT, "version": run.version, "files": _files(draft)}
            said = {**said, "digest": _digest(said)}
            (draft / BUNDLE_FILE).write_text(json.dumps(said, indent=2))
            draft.rename(folder)
    return said


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
    """Open a bundle, once each of its files is seen to be what was written.

    Raises:
        BundleError: there is none, it is of another format, or a file is missing, damaged or was not in
            it.

    Example: see ``write_bundle``.
    """
    said = _checked(folder)
    header = read_header(folder / _SCHEMA)
    names = [Path(name) for name in said["files"]]
    columns = [name for name in names if name.parent.name == _ITEMS]
    items = {
        # refuses what np.load would unpickle
        name.stem: np.asarray(np.lib.format.open_memmap(folder / name, mode="r"))
        for name in columns
    }
    log = LogItems(str(folder), folder, header.schema, items)
    model = build_model(header.schema, read_options(folder), header.scales)
    weights = torch.load(folder / _WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(weights, assign=True)
    return Bundle(log, model.eval(), said["version"])


def _checked(folder: Path) -> dict[str, Any]:
    """What bundle.json says, where it holds for the folder."""
    file = folder / BUNDLE_FILE
    try:
        said = json.loads(file.read_text())
        if said["format"] != FORMAT:
            raise BundleError(f"{file}: format {said['format']!r}, this version reads {FORMAT!r}")
        if said.pop("digest") != _digest(said):
            raise BundleError(f"{file} is not what was written; {_REMEDY}")
        written, found = said["files"], _names(folder)
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: no bundle here ({BUNDLE_FILE} is missing); {_REMEDY}") from error
    except BundleError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(f"{file}: not readable as a bundle's ({error!r}); {_REMEDY}") from error
    if strange := sorted(found - {*written}):
        raise BundleError(f"{folder / strange[0]} was not in the bundle; {_REMEDY}")
    if missing := sorted({*written} - found):
        raise BundleError(f"{folder / missing[0]} is missing; {_REMEDY}")
    for name, told in written.items():
        if (size := (folder / name).stat().st_size) != told["bytes"]:
            raise BundleError(f"{folder / name} has {size} bytes of {told['bytes']}; {_REMEDY}")
        if sha256_of(folder / name) != told["sha256"]:
            raise BundleError(f"{folder / name} is damaged, its SHA-256 is another; {_REMEDY}")
    return said


def _names(folder: Path) -> set[str]:
    """The files of a bundle, as ``bundle.json`` calls them."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()]
    return {file.as_posix() for file in files} - {BUNDLE_FILE}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(_names(folder))
    }


def _digest(said: Mapping[str, Any]) -> str:
    """Of bundle.json itself."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
