"""Atomic checkpoints, written with torch.distributed.checkpoint (DCP).

FOLDER/step-000400/   DCP's shards: model, tables, both optimisers, each rank's random number
                      generators; progress.json, with the format number; and checksums.json, with
                      the checksums of all these files

Loading a checkpoint runs no code from it: DCP's metadata, a pickle, may name only the types that DCP
writes, and everything else is tensors and JSON. The checksums detect damage, not tampering.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from ifa_torchrec.distributed.checkpoint_files import (
    FORMAT,
    SMALL_FILES,
    checkpoints,
    checksum_of,
    read_object,
    read_progress,
    step_name,
    step_of,
    verify,
)
from ifa_torchrec.distributed.checkpoint_reader import CheckpointPlanner, CheckpointReader
from ifa_torchrec.distributed.checkpoint_writer import (
    BackgroundWrite,
    CheckpointWriter,
    sync,
    write_synced,
)
from ifa_torchrec.distributed.errors import CheckpointError, DamagedError
from ifa_torchrec.distributed.rows import rows_as_unknown
from ifa_torchrec.errors import WriteError, writing

Result = TypeVar("Result")
KEEP = 2
"""Number of checkpoints kept; older ones are deleted once a newer one is complete."""


def save(
    folder: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    progress: dict[str, Any],
    best: int | None = None,
) -> Path:
    """Write a checkpoint next to the others and publish it by a rename. Called by all ranks.

    Args:
        folder: the folder of the checkpoints.
        model, optimizer: from ``shard``.
        progress: JSON; contains "step" and everything that resuming needs.
        best: the step of a checkpoint that is kept besides the latest ones, however old it is.

    Returns:
        The checkpoint's folder.

    Raises:
        WriteError: it cannot be written; the earlier checkpoints are unchanged.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.distributed import OptimizerConfig, checkpoint, init_process_group, shard
        >>> device = init_process_group()
        >>> tables = EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100, feature_names=["item"])])
        >>> model = torch.nn.ModuleDict({"tables": tables, "over": torch.nn.Linear(8, 1)})
        >>> sharded, optimizer = shard(model, device, OptimizerConfig())
        >>> folder = Path(tempfile.mkdtemp())
        >>> checkpoint.save(folder, sharded, optimizer, {"step": 5}).name
        'step-000000005'
        >>> checkpoint.load(folder, sharded, optimizer)
        {'step': 5}
    """
    return write(folder, state_of(model, optimizer), progress, best)


def state_of(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """Everything in a checkpoint except the progress, as DCP takes it.

    Args:
        model, optimizer: from ``shard``.
    """
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **_rng_states()}


def write(
    folder: Path,
    state: dict[str, Any],
    progress: dict[str, Any],
    best: int | None = None,
    background: BackgroundWrite | None = None,
) -> Path:
    """``save`` for a state from ``state_of``.

    Args:
        folder, progress, best: as for ``save``.
        state: from ``state_of``.
        background: given if training continues during the write.
    """
    group, planner = (background.group, background.planner) if background else (None, None)
    final = folder / step_name(progress["step"])
    draft = folder / f".{final.name}"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # left by a save that was killed
            shutil.rmtree(left)

    def publish() -> None:
        write_synced(draft / "progress.json", json.dumps({"format": FORMAT, **progress}))
        files = {name: value for of_rank in sums for name, value in of_rank.items()}
        files |= {name: checksum_of(draft / name) for name in SMALL_FILES}
        write_synced(draft / "checksums.json", json.dumps(files))
        sync(draft)
        if final.exists():
            _delete(final)
        draft.rename(final)
        sync(folder)  # before an older one is deleted
        for old in checkpoints(folder)[:-KEEP]:
            if step_of(old) != best:
                _delete(old)

    sums: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    try:
        with writing(draft):
            on_rank_0(prepare, group)
            writer = CheckpointWriter(draft)
            with _dcp():
                dcp.save(state, storage_writer=writer, planner=planner, process_group=group)
            dist.all_gather_object(sums, writer.checksums, group=group)
            on_rank_0(publish, group)
    except WriteError:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)  # it may have filled the disk
        raise
    return final


def on_rank_0(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call ``work`` on rank 0 while the other ranks wait. All ranks return its result or raise its
    error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def checkpoints_of_rank_0(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` as rank 0 sees them: on a shared file system ranks may briefly see
    different contents. Called by all ranks."""
    return on_rank_0(lambda: checkpoints(folder))


def latest_progress(folder: Path, whole: bool = False) -> dict[str, Any] | None:
    """The progress of the latest checkpoint whose progress.json is undamaged; None if there is none.
    Called by all ranks.

    Args:
        folder: the folder of the checkpoints.
        whole: all its files must be undamaged, so that ``load`` would take it; otherwise no weights are
            read.

    Raises:
        CheckpointError: that checkpoint has another format, or is a renamed copy.
    """

    def find() -> dict[str, Any] | None:
        for path in reversed(checkpoints(folder)):
            with suppress(DamagedError, OSError):
                verify(path, None if whole else ["progress.json"])
                return read_progress(path)
        return None

    return on_rank_0(find)


def version(folder: Path, progress: dict[str, Any]) -> str:
    """A unique name for a checkpoint's weights.

    Args:
        folder: the folder of the checkpoints.
        progress: what ``load`` returned.

    Raises:
        CheckpointError: the checkpoint is not there any more.
    """
    name = step_name(progress["step"])
    try:
        sums = (folder / name / "checksums.json").read_bytes()
    except FileNotFoundError as error:
        raise _deleted(folder / name) from error
    return f"{name}-{hashlib.sha256(sums).hexdigest()[:12]}"


def load(
    folder: Path,
    model: nn.Module,
    optimizer: CombinedOptimizer | None = None,
    config: dict[str, Any] | None = None,
    step: int | None = None,
    grow: bool = False,
) -> dict[str, Any]:
    """Load the latest complete checkpoint, or that of a given step, into the model and, to resume
    training, into the optimiser and the random number generators. Called by all ranks. The number of
    ranks and the sharding plan may differ from when it was saved.

    A damaged checkpoint (a file is missing or changed) is skipped, with a warning, and the one before it
    is loaded; if training resumes, it is also renamed to damaged-STEP. All other errors are raised and
    change nothing.

    Args:
        folder: the folder of the checkpoints.
        model, optimizer: from ``shard``; or a model that is not sharded.
        config: the caller's configuration, in JSON's types; each entry must equal that of the saved
            "config".
        step: the checkpoint to load; the latest if that one is damaged or missing.
        grow: let the model have more rows than were saved. They start as row 0, the unknown id, and
            without optimiser state.

    Returns:
        The progress that was saved.

    Raises:
        CheckpointError: there is no checkpoint, none is complete, it cannot be read now, or its format,
            configuration or model differs; the message names what differs. Or its metadata names types
            that DCP does not write. Or it has managed collisions, and there are too many ranks.
    """
    found = sorted(checkpoints_of_rank_0(folder), key=lambda path: step_of(path) == step)
    if found and step not in (None, step_of(found[-1])) and dist.get_rank() == 0:
        warnings.warn(f"{folder} has no {step_name(step)}; loading {found[-1].name}", stacklevel=2)
    damaged: list[Path] = []
    for path in reversed(found):
        try:
            progress = _check(path)
        except DamagedError as error:
            damaged.append(path)
            damage = f"{path} is damaged ({error})"
            if path == found[0]:
                raise CheckpointError(
                    f"{damage}, and there is no earlier checkpoint; start again in another folder"
                ) from error
            if dist.get_rank() == 0:
                warnings.warn(f"{damage}; trying another", stacklevel=2)
        else:
            try:
                _load(path, progress, model, optimizer, config, grow)
            except Exception as error:
                if path.exists():
                    raise
                raise _deleted(path) from error
            if optimizer is not None:  # otherwise training would write steps below the damaged ones
                on_rank_0(lambda: _rename_damaged(damaged))
            return progress
    raise CheckpointError(f"{folder}: no checkpoint here; train first")


def _deleted(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was deleted by a training while it was read; try again")


def _rename_damaged(damaged: Sequence[Path]) -> None:
    """Rename checkpoints to damaged-STEP, or damaged-STEP-2 and so on if that name is taken."""
    for path in damaged:
        number, renamed = 1, path.with_name(f"damaged-{path.name}")
        while renamed.exists():
            number += 1
            renamed = path.with_name(f"damaged-{path.name}-{number}")
        with writing(path):
            path.rename(renamed)


def _check(path: Path) -> dict[str, Any]:
    """Verify a checkpoint's files and return its progress. An error on one rank is raised on all."""
    progress, error = {}, None
    try:
        progress = _check_files(path)
    except Exception as raised:  # any error: the other ranks wait for this one's outcome
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    # if one rank cannot read the folder, a file that another finds damaged may be intact
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, DamagedError)):
        raise error
    return progress


def _load(
    path: Path,
    progress: dict[str, Any],
    model: nn.Module,
    optimizer: CombinedOptimizer | None,
    config: dict[str, Any] | None,
    grow: bool,
) -> None:
    saved = progress.get("config") or {}
    if differing := sorted(_differences({k: saved.get(k) for k in config or {}}, config or {})):
        raise CheckpointError(
            f"{path} has another configuration: {'; '.join(differing)}; "
            "use the same options, or another folder"
        )
    state: dict[str, Any] = {"model": model.state_dict()}
    rng, reader, planner = {}, CheckpointReader(path), CheckpointPlanner(path, grow)
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
        # a rank that did not exist when it was saved keeps its own generators
        names = reader.read_metadata().state_dict_metadata
        rng = {name: value for name, value in _rng_states().items() if name in names}
    with _dcp():
        dcp.load({**state, **rng}, storage_reader=reader, planner=planner)
    try:
        model.load_state_dict(state["model"])
    except AssertionError as error:  # an id's hash decides which rank has its row
        raise CheckpointError(
            f"{path}: its managed-collision tables were trained on a different number of ranks "
            f"({error}); load with that number, or with one"
        ) from error
    rows_as_unknown(model, {name.removeprefix("model."): n for name, n in planner.grown.items()})
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    for name, value in rng.items():
        (torch.cuda if name.startswith("cuda") else torch).set_rng_state(value)


def _check_files(path: Path) -> dict[str, Any]:
    """Verify this rank's share of the files and return the progress."""
    try:
        shards = sorted(read_object(path / "checksums.json").keys() - {*SMALL_FILES})
        verify(path, [*shards[dist.get_rank() :: dist.get_world_size()], *SMALL_FILES])
        progress = read_progress(path)
        CheckpointReader(path).read_metadata()
    except FileNotFoundError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read now, and was left as it is: {error}") from error
    return progress


def _delete(path: Path) -> None:
    """Delete a checkpoint; if killed midway, the next save deletes the rest."""
    doomed = path.with_name(f".{path.name}-old")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _rng_states() -> dict[str, torch.Tensor]:
    states = {f"cpu_rng_{dist.get_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda_rng_{dist.get_rank()}"] = torch.cuda.get_rng_state()
    return states


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    result = []
    for key in saved.keys() | now.keys():
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return result


@contextmanager
def _dcp() -> Generator[None]:
    """Raise what a rank raised instead of DCP's CheckpointException, which is not an Exception; and hide
    torch's deprecation warnings about ShardedTensor, which TorchRec's tables use."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock a run's folder so that no other training writes to it. Called by all ranks.

    The operating system releases the lock when the process of rank 0 ends, however it ends.

    Raises:
        CheckpointError: another training holds the lock.
        WriteError: the folder cannot be created or written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed import checkpoint, init_process_group
        >>> device, folder = init_process_group(), Path(tempfile.mkdtemp())
        >>> with checkpoint.locked(folder), checkpoint.locked(folder):  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        ifa_torchrec.distributed.errors.CheckpointError: ...: another training writes here; ...
    """
    lock: int | None = None

    def acquire() -> None:
        nonlocal lock
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another training writes here; wait for it to end, or give another --out"
            ) from None
        except OSError as error:
            message = f"{folder} cannot be locked ({error}); do not start a second training here"
            warnings.warn(message, stacklevel=5)

    try:
        on_rank_0(acquire)
        yield
    finally:
        if lock is not None:
            os.close(lock)
