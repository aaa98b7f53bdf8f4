"""Changes to rows of tables, sharded or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def zero_rows(model: nn.Module, zeroed: Mapping[str, torch.Tensor]) -> None:
    """Set rows of tables to 0, whichever rank has them. Called by all ranks.

    Args:
        model: has embedding (bag) collections, sharded or not.
        zeroed: by table name, [rows] bool; other tables are unchanged.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.distributed import zero_rows
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=2, num_embeddings=3, feature_names=["item"])])
        >>> zero_rows(tables, {"item": torch.tensor([True, False, True])})
        >>> tables.embeddings["item"].weight.ne(0).any(1).tolist()
        [False, True, False]
    """
    for name, value in model.state_dict().items():
        place, _, table = name.removesuffix(".weight").rpartition(".")
        if not place.endswith(("embeddings", "embedding_bags")) or table not in zeroed:
            continue
        rows = zeroed[table]
        for offsets, part in local_parts(value).items():
            first = offsets[0] if offsets else 0
            part[rows[first : first + len(part)].to(part.device)] = 0


@torch.no_grad()
def finite(model: nn.Module) -> bool:
    """Whether all weights on this rank, shards of tables included, are finite.

    Args:
        model: sharded or not.

    Example:
        >>> import torch
        >>> from ifa_torchrec.distributed.rows import finite
        >>> linear = torch.nn.Linear(2, 1)
        >>> before = finite(linear)
        >>> _ = linear.weight.data[0, 1] = float("nan")
        >>> before, finite(linear)
        (True, False)
    """
    parts = [part for value in model.state_dict().values() for part in local_parts(value).values()]
    numbers = [part for part in parts if part.is_floating_point() and part.numel()]
    # the largest magnitude, without a copy of a table
    greatest = [torch.linalg.vector_norm(part, torch.inf).float() for part in numbers]
    return all(math.isfinite(value) for value in torch.stack(greatest).tolist()) if greatest else True


@torch.no_grad()
def rows_as_unknown(model: nn.Module, known: Mapping[str, int]) -> None:
    """Copy row 0, the unknown id, over the rows after the known ones. Called by all ranks.

    Args:
        model: sharded or not.
        known: number of known rows by name of a weight in its ``state_dict``; a rank may leave out
            weights of which it has no part, and other names are ignored.

    Example:
        >>> import torch
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.distributed.rows import rows_as_unknown
        >>> device, table = init_process_group(), torch.nn.Embedding(3, 1)
        >>> _ = table.weight.data.copy_(torch.tensor([[5.0], [6.0], [7.0]]))
        >>> rows_as_unknown(table, {"weight": 2})
        >>> table.weight.flatten().tolist()
        [5.0, 6.0, 5.0]
    """
    # the offsets of a whole tensor, which local_parts leaves out, are 0
    mine = {
        name: [(offsets or (0,) * value.ndim, part) for offsets, part in local_parts(value).items()]
        for name, value in model.state_dict().items()
        if name in known
    }
    first = {
        name: [(columns, part[0].cpu()) for (row, *columns), part in parts if row == 0 and len(part)]
        for name, parts in mine.items()
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, first)
    for name, parts in mine.items():
        rows = [row for of_rank in gathered for row in of_rank.get(name, [])]
        for (start, *columns), part in parts:
            for of_columns, row in rows:
                if of_columns == columns:
                    part[max(known[name] - start, 0) :] = row.to(part)


def local_parts(value: Any) -> dict[tuple[int, ...], Any]:
    """The parts of a state_dict's value on this rank, by their offsets; () for a value that is whole.

    Example:
        >>> import torch
        >>> from ifa_torchrec.distributed.rows import local_parts
        >>> local_parts(torch.ones(2))
        {(): tensor([1., 1.])}
    """
    if isinstance(value, ShardedTensor):
        return {tuple(s.metadata.shard_offsets): s.tensor for s in value.local_shards()}
    return {(): value.to_local() if isinstance(value, DTensor) else value}
