"""Sharding plans by TorchRec's planner, which is given the sizes of histories and dense parts."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ifa_torchrec.distributed.errors import ShardingError
from ifa_torchrec.distributed.sharders import Exchange, sharders
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.sparse import tables_of

Collection = EmbeddingBagCollection | EmbeddingCollection | ManagedCollisionEmbeddingCollection

SHARDING_TYPES = {
    "cpu": ("table_wise", "row_wise", "column_wise"),
    "cuda": (
        "table_wise",
        "row_wise",
        "column_wise",
        "table_row_wise",
        "table_column_wise",
        "grid_shard",
    ),
}
"""Sharding types that a table may have, by device type. data_parallel is left out: its copies are
outside TorchRec's fused optimiser, and on a CPU they pool sequences."""

DENSE_COPIES = 5
"""Copies per dense parameter: its weight, gradient, AdamW's two moments and DDP's bucket."""

EVENT_COPIES, CANDIDATE_COPIES = 11, 32
"""float32 vectors of width D per event and per candidate that a training step holds at its peak,
measured on models of the default configuration (tests/distributed/test_planning.py). The [events,
candidates] matrices of a softmax come on top if the sets are large."""


@dataclass(frozen=True)
class ShardingConfig:
    """Constraints on the planner.

    Args:
        tables: sharding type by table name; the planner chooses for other tables.
        memory_gb: memory per rank, in 2^30 bytes; None for the available memory (the GPU's, or the
            machine's divided by its ranks).
        exchange: dtype in which ranks exchange embeddings and their gradients, by TorchRec's codecs:
            "fp32"; or half the bytes: "fp16", with gradients scaled by 4,096 for the transfer, or
            "bf16", only on GPUs. Tables and computations keep their dtypes.

    Example:
        >>> from ifa_torchrec.distributed import ShardingConfig
        >>> ShardingConfig(tables={"item_table": "row_wise"}).memory_gb is None
        True
    """

    tables: dict[str, str] = field(default_factory=dict)
    memory_gb: float | None = None
    exchange: Exchange = "fp32"

    def __post_init__(self) -> None:
        if self.exchange not in get_args(Exchange):
            raise ConfigError(
                f"ShardingConfig: exchange must be one of {list(get_args(Exchange))}, "
                f"got {self.exchange!r}"
            )
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ConfigError(f"ShardingConfig: memory_gb must be positive, got {self.memory_gb}")


@dataclass(frozen=True)
class BatchSize:
    """A rank's largest batch, from which the planner estimates time and memory.

    Args:
        requests: B, number of requests.
        events: N, history events of all requests.
        candidates: M, candidates of all requests.

    Example:
        >>> from ifa_torchrec.distributed import BatchSize
        >>> BatchSize(requests=32).events
        32768
    """

    requests: int = 32
    events: int = 32768
    candidates: int = 2560


class DenseAndTokenReservation(FixedPercentageStorageReservation):
    """Reserves memory on each rank for the dense part and for the tokens of a batch.

    It reserves DENSE_COPIES times the parameters outside the embedding collections, and 4 * D bytes for
    each of EVENT_COPIES * N + CANDIDATE_COPIES * M vectors. The planner itself accounts for the memory
    of the lookups.

    Args:
        batch: BatchSize.

    Example:
        >>> import torch
        >>> from torchrec.distributed.planner import Topology
        >>> from ifa_torchrec.distributed.planning import BatchSize, DenseAndTokenReservation
        >>> topology = Topology(world_size=1, compute_device="cpu", ddr_cap=1000)
        >>> left = DenseAndTokenReservation(BatchSize()).reserve(
        ...     topology, 32, torch.nn.Linear(4, 2, bias=False), [], None)
        >>> left.devices[0].storage.ddr  # 1000 - 5 * 8 * 4
        840
    """

    def __init__(self, batch: BatchSize) -> None:
        super().__init__(percentage=0.0)
        self.batch = batch

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """TorchRec's interface: the topology minus the reserved memory.

        Raises:
            PlannerError: a rank has less memory than is to be reserved.
        """
        tables = {id(p) for m in _collections(module) for p in m.parameters()}
        dense = sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in tables)
        dims = [c.embedding_dim for m in _collections(module) for c in _configs(m)]
        dims += [m.config.ifa.embedding_dim for m in module.modules() if isinstance(m, DLRM_IFA)]
        vectors = EVENT_COPIES * self.batch.events + CANDIDATE_COPIES * self.batch.candidates
        dense, tokens = DENSE_COPIES * dense, vectors * 4 * max(dims, default=0)
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        memory = "ddr" if topology.compute_device == "cpu" else "hbm"
        for device in reserved.devices:
            there = getattr(device.storage, memory)
            if there < dense + tokens:
                raise PlannerError(
                    error_type=PlannerErrorType.INSUFFICIENT_STORAGE,
                    message=f"a rank has {there / 2**30:.3f} GB of memory; the dense part needs "
                    f"{dense / 2**30:.3f} and a batch's tokens {tokens / 2**30:.3f}: use smaller "
                    "batches (max_events), or more memory (memory_gb)",
                )
            setattr(device.storage, memory, there - dense - tokens)
        return reserved


def topology(device: torch.device, sharding: ShardingConfig) -> Topology:
    """The ranks of the process group and their memory.

    Example:
        >>> import torch
        >>> from ifa_torchrec.distributed import ShardingConfig, init_process_group
        >>> from ifa_torchrec.distributed.planning import topology
        >>> found = topology(init_process_group(), ShardingConfig(memory_gb=2))
        >>> found.world_size
        1
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if sharding.memory_gb is not None:
        memory = int(sharding.memory_gb * 2**30)
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = _memory_of_machine() // local
    # TorchRec recommends a factory that its own examples do not use
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    return Topology(
        world_size=world,
        local_world_size=local,
        compute_device=device.type,
        hbm_cap=memory,
        ddr_cap=memory if device.type == "cpu" else None,
    )


def make_planner(
    model: nn.Module,
    topology: Topology,
    sharding: ShardingConfig,
    batch: BatchSize,
    whole_rows: bool = True,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for this model. It needs no process group, so it can plan for any cluster.

    For a DLRM_IFA the planner assumes N/B values per request for history features, M/B for candidate
    features, (N + M)/B for item lists, and one for the others. For another model it goes by the names
    ``history_*`` and ``candidate_*``.

    Args:
        model: has embedding (bag) collections, on any device.
        topology: from ``topology``, or that of any cluster.
        sharding: ShardingConfig.
        batch: BatchSize.
        whole_rows: whether rows must stay whole, as an optimiser with one state per row (row-wise
            Adagrad) needs: columns are then not sharded.

    Raises:
        ShardingError: ``sharding`` names an unknown table, or a sharding type that the device or the
            optimiser does not support.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from torchrec.distributed.planner import Topology
        >>> from ifa_torchrec.distributed.planning import (
        ...     BatchSize, ShardingConfig, make_planner)
        >>> from ifa_torchrec.distributed.sharders import sharders
        >>> tables = EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=64, num_embeddings=10**9, feature_names=["history_item"])])
        >>> cluster = Topology(world_size=64, local_world_size=8, compute_device="cuda")
        >>> planner = make_planner(tables, cluster, ShardingConfig(), BatchSize())
        >>> planner.plan(tables, sharders()).plan[""]["item"].sharding_type
        'row_wise'
    """
    device, ranks = topology.compute_device, topology.world_size
    known = [table.name for module in _collections(model) for table in _configs(module)]
    for name in sharding.tables:
        if name not in known:
            raise ShardingError(f"sharding: there is no table {name!r}; the tables are {known}")
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if device == "cuda":
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
    constraints, values, items = {}, _values_a_request(model, batch), _item_collections(model)
    for module in _collections(model):
        # on a CPU fbgemm fails on a rank that has no row of any of the tables of one width
        filled = {
            table.embedding_dim
            for table in _configs(module)
            if sharding.tables.get(table.name) == "row_wise" and _fills(table.num_embeddings, ranks)
        }
        for table in _configs(module):
            possible = _possible(module, device)
            if device == "cpu" and id(module) in items:
                # its collectives need the same number of rows on each rank, and the items differ
                possible = [kind for kind in possible if kind != "row_wise"]
            if device == "cpu" and not _fills(table.num_embeddings, ranks):
                possible = [k for k in possible if k != "row_wise" or table.embedding_dim in filled]
            asked = sharding.tables.get(table.name)
            if asked is not None:
                _check_asked(asked, table.name, possible, whole_rows, f"{ranks} {device} ranks")
            constraints[table.name] = ParameterConstraints(
                sharding_types=[asked] if asked else _default(module, possible, whole_rows, device),
                compute_kernels=kernels,
                min_partition=_narrowest(table.embedding_dim, ranks),
                pooling_factors=[values(name) for name in table.feature_names],
            )
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch.requests,
        storage_reservation=DenseAndTokenReservation(batch),
        constraints=constraints,
    )


def plan_on_all_ranks(make_plan: Callable[[], ShardingPlan]) -> ShardingPlan:
    """Let each rank plan by itself; then all continue, or all raise. Called by all ranks.

    If only one rank planned and failed, the others would wait for it until a timeout.

    Args:
        make_plan: makes the same plan on every rank.

    Returns:
        The plan.

    Raises:
        ShardingError: on every rank, if one has no plan or its plan differs from rank 0's.
        RuntimeError: on every rank, if ``make_plan`` failed on one with an error that is not the user's.

    Example:
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.distributed.planning import plan_on_all_ranks
        >>> from torchrec.distributed.types import ShardingPlan
        >>> device = init_process_group()
        >>> plan_on_all_ranks(lambda: ShardingPlan(plan={})).plan
        {}
    """
    plan, error, bug = None, None, None
    try:
        plan = make_plan()
    except (ShardingError, PlannerError) as raised:
        error = str(raised).strip() or repr(raised)
    except Exception as raised:  # the other ranks wait for this one's outcome
        bug = raised
    digest = hashlib.sha256(str(plan).encode()).hexdigest()
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, digest, repr(bug) if bug else None))
    for rank, (_, _, failure) in enumerate(outcomes):
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed during planning: {failure}") from bug
    if error is not None and all(failure == error for failure, _, _ in outcomes):
        raise ShardingError(error)
    for rank, (failure, digest, _) in enumerate(outcomes):
        if failure is not None:
            raise ShardingError(f"rank {rank} finds no sharding plan: {failure}")
        if digest != outcomes[0][1]:
            raise ShardingError(
                f"rank {rank} has another sharding plan than rank 0; give all ranks the same "
                "options and memory (memory_gb)"
            )
    assert plan is not None
    return plan


_SPLIT_ROWS = ("column_wise", "table_column_wise", "grid_shard")


def _memory_of_machine() -> int:
    """Bytes of the machine's memory, or of the container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        path = Path("/sys/fs/cgroup") / file
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)


def _collections(model: nn.Module) -> list[Collection]:
    """The outermost collections: a managed-collision collection instead of the one inside it."""
    inner = {
        id(child)
        for module in model.modules()
        if isinstance(module, ManagedCollisionEmbeddingCollection)
        for child in module.children()
    }
    return [m for m in model.modules() if isinstance(m, Collection) and id(m) not in inner]


def _configs(module: Collection) -> Sequence[BaseEmbeddingConfig]:
    if isinstance(module, EmbeddingBagCollection):
        return module.embedding_bag_configs()
    return tables_of(module)


def _check_asked(asked: str, name: str, possible: list[str], whole_rows: bool, where: str) -> None:
    """Refuse a sharding type that a table cannot have."""
    if asked not in possible:
        raise ShardingError(f"sharding: {name} cannot be {asked!r} on {where}; use one of {possible}")
    if whole_rows and asked in _SPLIT_ROWS:
        raise ShardingError(
            f"sharding: {name} cannot be {asked!r} with row-wise Adagrad, which keeps one state per "
            "whole row; use table optimizer 'adagrad' or 'sgd'"
        )


def _default(module: Collection, possible: list[str], whole_rows: bool, device: str) -> list[str]:
    """The sharding types among which the planner chooses for a table."""
    allowed = [kind for kind in possible if not (whole_rows and kind in _SPLIT_ROWS)]
    if device == "cpu" and isinstance(module, EmbeddingBagCollection):
        # its collectives need equal batch sizes, which loaders other than ours may not have
        allowed = [kind for kind in allowed if kind != "row_wise"]
    return allowed


def _possible(module: Collection, device: str) -> list[str]:
    """Sharding types that a collection's tables can have."""
    sharder = next(s for s in sharders() if isinstance(module, s.module_type))
    return [kind for kind in SHARDING_TYPES[device] if kind in sharder.sharding_types(device)]


def _fills(rows: int, ranks: int) -> bool:
    """Whether each rank gets a row: row_wise gives each ceil(rows / ranks) until none are left."""
    return -(-rows // ranks) * (ranks - 1) < rows


def _item_collections(model: nn.Module) -> set[int]:
    """Ids of the collections that pool items' lists: one row per item, not per request."""
    archs = [m.item_sparse_arch for m in model.modules() if isinstance(m, DLRM_IFA)]
    return {id(arch.embedding_bag_collection) for arch in archs if arch is not None}


def _values_a_request(model: nn.Module, batch: BatchSize) -> Callable[[str], float]:
    """The number of values per request, as a function of the feature's name."""
    events, candidates = batch.events / batch.requests, batch.candidates / batch.requests
    known: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, DLRM_IFA):
            known |= dict.fromkeys(module.config.history_keys.values(), events)
            known |= dict.fromkeys(module.config.candidate_keys.values(), candidates)
            if module.item_sparse_arch is not None:
                names = module.item_sparse_arch.sparse_feature_names
                known |= dict.fromkeys(names, events + candidates)

    def values(feature: str) -> float:
        if feature in known:
            return known[feature]
        if feature.startswith("history_"):
            return events
        return candidates if feature.startswith("candidate_") else 1.0

    return values


def _narrowest(dim: int, world: int) -> int:
    """Fewest columns of a shard, to use as many ranks as possible: a divisor of ``dim`` and, for fbgemm,
    a multiple of 4."""
    return min((c for c in range(4, dim + 1, 4) if dim % c == 0 and c * world >= dim), default=dim)
