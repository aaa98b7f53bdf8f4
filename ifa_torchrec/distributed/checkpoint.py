"""Checkpoints that are whole or not there, by torch.distributed.checkpoint.

FOLDER/step-000400/   DCP's shards: model, tables, both optimisers; and progress.json
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

KEEP = 2
"""Checkpoints kept; older ones are deleted once a newer one is whole."""


class CheckpointError(RuntimeError):
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
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # of a save that was killed
            shutil.rmtree(left)
    dist.barrier()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with _quiet():
        dcp.save(state, checkpoint_id=draft)
    if dist.get_rank() == 0:
        (draft / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    return sorted(file.parent for file in folder.glob("step-*/progress.json"))


def load(
    folder: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the latest checkpoint into the model and, to go on training, the optimiser.

    Args:
        folder: where checkpoints lie.
        model, optimizer: from ``shard``.
        config: what the caller is configured as, in JSON's types; must equal the "config" that
            was saved.

    Returns:
        The progress that was saved.

    Raises:
        CheckpointError: there is none, or it is of another configuration; the message names
            what differs.
    """
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint here; train first, or leave out --resume")
    try:
        progress = json.loads((found[-1] / "progress.json").read_text())
    except ValueError as error:
        raise _damaged(found, error) from error
    if config is not None:
        saved = progress.get("config")
        if saved != config:
            differing = sorted(_differences(saved or {}, config))
            raise CheckpointError(
                f"{found[-1]} is of another configuration: {'; '.join(differing)}; "
                "use the same options, or another folder"
            )
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=found[-1])
    # of many kinds, by what is damaged; DCP's own is no Exception
    except (Exception, CheckpointException) as error:
        raise _damaged(found, error) from error
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return progress


def _damaged(found: list[Path], error: BaseException) -> CheckpointError:
    reason = (str(error).strip() or repr(error)).splitlines()[-1]
    back = f"go on from {found[-2]}" if len(found) > 1 else "start anew"
    return CheckpointError(
        f"{found[-1]} cannot be loaded: it is damaged or of another model ({reason}); "
        f"delete that folder to {back}"
    )


def _differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    result = []
    for key in saved.keys() | now.keys():
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return result


@contextmanager
def _quiet() -> Iterator[None]:
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
