"""Checkpoints that are whole or not there, by torch.distributed.checkpoint.

FOLDER/step-000400/   DCP's shards: model, tables, both optimisers, each rank's random number
                      generators; progress.json, with the format's number; and checksums.json, of
                      all these files
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from ifa_torchrec.errors import UserError

FORMAT = 1
"""Rises when this package could no longer read what it wrote before."""
KEEP = 2
"""Checkpoints kept; older ones are deleted once a newer one is whole."""


class CheckpointError(UserError, RuntimeError):
    """There is no usable checkpoint, or it is of another configuration."""


def save(
    folder: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    progress: dict[str, Any],
) -> Path:
    """Write a checkpoint beside the others and publish it by a rename. Called by all ranks.

    Args:
        folder: where checkpoints lie.
        model, optimizer: from ``shard``.
        progress: JSON; holds "step", and whatever resuming needs.

    Returns:
        The checkpoint's folder.

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
    final = folder / f"step-{progress['step']:09d}"
    draft = folder / f".{final.name}"
    rank = dist.get_rank()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # of a save that was killed
            shutil.rmtree(left)
    dist.barrier()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **_rng_states()}
    with _quiet():
        dcp.save(state, checkpoint_id=draft)
    sums: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(sums, {f.name: _checksum(f) for f in draft.glob(f"__{rank}_*")})
    if rank == 0:
        (draft / "progress.json").write_text(json.dumps({"format": FORMAT, **progress}))
        files = {name: value for of_rank in sums for name, value in of_rank.items()}
        files |= {name: _checksum(draft / name) for name in (".metadata", "progress.json")}
        (draft / "checksums.json").write_text(json.dumps(files))
        if final.exists():
            _delete(final)
        draft.rename(final)
        for old in checkpoints(folder)[:-KEEP]:
            _delete(old)
    dist.barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*"))


def checkpoints_of_rank_0(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` as rank 0 sees them: a shared file system need not show all
    ranks the same at the same time. Called by all ranks."""
    found = [checkpoints(folder)]
    dist.broadcast_object_list(found)
    return found[0]


def version(folder: Path, progress: dict[str, Any]) -> str:
    """A name of a checkpoint's weights, which no other checkpoint has.

    Args:
        folder: where checkpoints lie.
        progress: what ``load`` returned.
    """
    name = f"step-{progress['step']:09d}"
    sums = (folder / name / "checksums.json").read_bytes()
    return f"{name}-{hashlib.sha256(sums).hexdigest()[:12]}"


def load(
    folder: Path,
    model: nn.Module,
    optimizer: CombinedOptimizer | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the latest whole checkpoint into the model and, to go on training, the optimiser and
    the random number generators. Called by all ranks; there may be more or fewer of them than
    saved it, and the sharding plan may be another.

    A damaged checkpoint is passed over for the one before, with a warning; to go on training, it
    is renamed as well, to damaged-STEP.

    Args:
        folder: where checkpoints lie.
        model, optimizer: from ``shard``; or a model that is not sharded.
        config: what the caller is configured as, in JSON's types; must equal the "config" that
            was saved.

    Returns:
        The progress that was saved.

    Raises:
        CheckpointError: there is none, none is whole, or it is of another format or configuration;
            the message names what differs. Or it has managed collisions, and the ranks are too many.
    """
    found = checkpoints_of_rank_0(folder)
    damaged: list[Path] = []
    for path in reversed(found):
        try:
            progress = _load(path, model, optimizer, config)
        except _Damaged as error:
            damaged.append(path)
            damage = f"{path} is damaged or of another model ({error})"
            if path == found[0]:
                raise CheckpointError(
                    f"{damage}, and there is none before it; start anew in another folder"
                ) from error
            if dist.get_rank() == 0:
                warnings.warn(f"{damage}; trying the one before", stacklevel=2)
        else:
            if optimizer is not None and dist.get_rank() == 0:
                for path in damaged:  # else they would be the latest again once training passes them
                    path.rename(path.with_name(f"damaged-{path.name}"))
            return progress
    raise CheckpointError(f"{folder}: no checkpoint here; train first")


class _Damaged(Exception):
    """A checkpoint cannot be read; raised on all ranks."""


def _load(
    path: Path,
    model: nn.Module,
    optimizer: CombinedOptimizer | None,
    config: dict[str, Any] | None,
) -> dict[str, Any]:
    progress, error = _check_files(path)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise _Damaged(error)
    written = progress.pop("format", None)
    if written != FORMAT:
        raise CheckpointError(
            f"{path} is of format {written}, this version of ifa_torchrec reads {FORMAT}; use the "
            "version that wrote it, or train anew in another folder"
        )
    if config is not None:
        saved = progress.get("config")
        if saved != config:
            differing = sorted(_differences(saved or {}, config))
            raise CheckpointError(
                f"{path} is of another configuration: {'; '.join(differing)}; "
                "use the same options, or another folder"
            )
    state: dict[str, Any] = {"model": model.state_dict()}
    rng = {}
    try:
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
            # a rank that was not there when it was saved keeps its own
            saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            rng = {name: value for name, value in _rng_states().items() if name in saved}
        with _quiet():
            dcp.load({**state, **rng}, checkpoint_id=path)
    # of many kinds, by what is wrong; DCP's own is no Exception
    except (Exception, CheckpointException) as error:
        raise _Damaged((str(error).strip() or repr(error)).splitlines()[-1]) from error
    try:
        model.load_state_dict(state["model"])
    except AssertionError as error:  # an id's row lies on the rank that its hash belongs to
        raise CheckpointError(
            f"{path}: managed collisions of another number of ranks ({error}); use as many ranks as "
            "trained it, or one"
        ) from error
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    for name, value in rng.items():
        (torch.cuda if name.startswith("cuda") else torch).set_rng_state(value)
    return progress


def _check_files(path: Path) -> tuple[dict[str, Any], str | None]:
    """The progress, and what is wrong with this rank's part of the checkpoint's files."""
    try:
        files = json.loads((path / "checksums.json").read_text())
        for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
            if _checksum(path / name) != files[name]:
                return {}, f"{name} is not what was written"
        return json.loads((path / "progress.json").read_text()), None
    except (OSError, ValueError, TypeError) as error:
        return {}, f"{type(error).__name__}: {error}"


def _checksum(file: Path) -> int:
    result = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            result = zlib.crc32(block, result)
    return result


def _delete(path: Path) -> None:
    """Delete a checkpoint; killed amid it, leave what the next save clears away."""
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
def _quiet() -> Generator[None]:
    """Without torch's warnings of its own use of ShardedTensor, which torchrec's tables are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def seed_everything(seed: int) -> None:
    """Seed torch on this rank; different ranks draw different table shards.

    Example:
        >>> import torch
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.distributed.checkpoint import seed_everything
        >>> _ = init_process_group()
        >>> seed_everything(3)
        >>> torch.initial_seed()
        3
    """
    torch.manual_seed(seed + dist.get_rank())
