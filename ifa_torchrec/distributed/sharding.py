"""From a plain model to a sharded one, on one process or many."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter


@dataclass(frozen=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for the tables, AdamW for the rest.

    Args:
        table_lr: learning rate of the tables.
        dense_lr: learning rate of everything else.
        weight_decay: of the dense matrices; biases and norms have none.

    Example:
        >>> from ifa_torchrec.distributed import OptimizerConfig
        >>> OptimizerConfig(table_lr=0.01).dense_lr
        0.003
    """

    table_lr: float = 0.03
    dense_lr: float = 3e-3
    weight_decay: float = 0.0


def init_process_group() -> torch.device:
    """Join the process group that torchrun describes, or make one of this process alone.

    Returns:
        The device of this rank: a GPU under NCCL, else the CPU under gloo.

    Example:
        >>> from ifa_torchrec.distributed import init_process_group
        >>> device = init_process_group()
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


@torch.enable_grad()  # the fused optimisers hang on the tables' autograd, also for a model to score
def shard(
    model: nn.Module, device: torch.device, optimizers: OptimizerConfig
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the model's embedding collections by the planner's plan and give it its optimisers.

    The model's tables may be on the meta device: they are made, and initialised by their
    configs' ``init_fn``, where the plan puts them. Table weights set before are lost.

    Args:
        model: a model of embedding (bag) collections and dense parts.
        device: this rank's device.
        optimizers: OptimizerConfig.

    Returns:
        The sharded model, and one optimiser over both kinds of parameters. The tables are
        updated during backward; its ``step`` updates the rest.

    Raises:
        torchrec.distributed.planner.types.PlannerError: the tables do not fit the devices.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
        >>> device = init_process_group()
        >>> tables = EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100, feature_names=["item"])])
        >>> model = torch.nn.ModuleDict({"tables": tables, "over": torch.nn.Linear(8, 1)})
        >>> sharded, optimizer = shard(model, device, OptimizerConfig())
        >>> [name for name, _ in optimizer.optimizers]
        ['', 'dense']
    """
    tables: list[str] = []
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            tables += [table.name for table in module.embedding_bag_configs()]
        if isinstance(module, EmbeddingCollection):
            tables += [table.name for table in module.embedding_configs()]
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            apply_optimizer_in_backward(
                RowWiseAdagrad,
                module.parameters(),
                # a dict of its own each time: it is mutated
                {"lr": optimizers.table_lr, "eps": 1e-8},
            )
    world = dist.get_world_size()
    with warnings.catch_warnings():
        # torchrec warns of its own calls to deprecated arguments
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=world,
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
                compute_device=device.type,
            ),
            storage_reservation=FixedPercentageStorageReservation(0.15),
            # Left to itself the planner copies small tables to every rank, outside the fused
            # optimiser.
            constraints={
                name: ParameterConstraints(
                    sharding_types=[t.value for t in ShardingType if t != ShardingType.DATA_PARALLEL],
                    compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                )
                for name in tables
            },
        )
        sharders = get_default_sharders()
        # The collective plan asks rank 0; were it to fail there, the other ranks would wait. Every
        # rank comes to the same plan by itself.
        plan = planner.plan(model, sharders)
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=plan,
            sharders=sharders,
        )
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))

    def adamw(parameters: list[torch.Tensor]) -> torch.optim.AdamW:
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": optimizers.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=optimizers.dense_lr,
        )

    dense_optimizer = KeyedOptimizerWrapper(dense, adamw)
    # Without state the dense optimiser's part of a checkpoint would be skipped in silence.
    dense_optimizer.init_state()
    return sharded, CombinedOptimizer([sharded.fused_optimizer, ("dense", dense_optimizer)])
