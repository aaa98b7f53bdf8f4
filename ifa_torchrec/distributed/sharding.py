"""From a plain model to a sharded one, in one process or many."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.optim import SGD, Adagrad, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ifa_torchrec.distributed.errors import ShardingError
from ifa_torchrec.distributed.planning import (
    BatchSize,
    ShardingConfig,
    make_planner,
    plan_on_all_ranks,
    topology,
)
from ifa_torchrec.distributed.sharders import sharders
from ifa_torchrec.errors import ConfigError

DENSE_LR = 3e-3
"""Default learning rate of everything but the tables."""


@dataclass(frozen=True)
class OptimizerConfig:
    """A fused optimiser for the tables, AdamW for the rest.

    Args:
        table_optimizer: "rowwise_adagrad" keeps one state per row, so rows are not split among ranks;
            "adagrad" keeps one per weight; "sgd" keeps none.
        table_lr: learning rate of the tables.
        dense_lr: learning rate of everything else; None for 3e-3, which ``ifa train`` lowers if its
            steps have few requests.
        weight_decay: weight decay of the dense matrices; biases and norms have none.
        table_weight_decay: decoupled weight decay of the table rows that a step touches: each shrinks
            by the fraction table_lr * table_weight_decay. Only with "rowwise_adagrad", the only
            optimiser for which fbgemm has it.
        clip_norm: maximum norm of the gradient over all dense parameters; a longer gradient is scaled
            down to it. Tables are updated during the backward pass, before the norm is known, and are
            not clipped. None for no limit.

    Example:
        >>> from ifa_torchrec.distributed import OptimizerConfig
        >>> OptimizerConfig(dense_lr=0.001).table_lr
        0.03
    """

    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    table_lr: float = 0.03
    dense_lr: float | None = None
    weight_decay: float = 0.0
    table_weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.table_optimizer not in _TABLE_OPTIMIZERS:
            raise ConfigError(
                f"OptimizerConfig: table_optimizer must be one of {list(_TABLE_OPTIMIZERS)}, "
                f"got {self.table_optimizer!r}"
            )
        if self.table_weight_decay and self.table_optimizer != "rowwise_adagrad":
            raise ConfigError(
                f"OptimizerConfig: table_weight_decay {self.table_weight_decay:g}: "
                f"{self.table_optimizer!r} does not support it; use 'rowwise_adagrad'"
            )
        for name in ("table_lr", "dense_lr", "weight_decay", "table_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"OptimizerConfig: {name} must be a number of at least 0, got {value}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"OptimizerConfig: clip_norm must be above 0, got {self.clip_norm}")

    @property
    def dense_rate(self) -> float:
        """``dense_lr``, or its default."""
        return DENSE_LR if self.dense_lr is None else self.dense_lr


def init_process_group() -> torch.device:
    """Join the process group that torchrun describes, or create one with only this process.

    Returns:
        The device of this rank: a GPU with NCCL, otherwise the CPU with gloo.

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
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if "RANK" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        elif restarts != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store still has the addresses of the ranks that died (pytorch issue 135712);
            # on several nodes the restart count differs between nodes
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart-{restarts}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        else:
            dist.init_process_group(backend)
    return device


@torch.enable_grad()  # the fused optimisers attach to the tables' autograd graph, even for scoring only
def shard(
    model: nn.Module,
    device: torch.device,
    optimizers: OptimizerConfig,
    sharding: ShardingConfig | None = None,
    batch: BatchSize | None = None,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the model's embedding collections by the planner's plan and create its optimisers.

    The model's tables may be on the meta device: they are allocated where the plan puts them and
    initialised by their configs' ``init_fn``. Table weights set before are lost. Called by all ranks;
    all dense parts start with rank 0's weights.

    Args:
        model: a model with embedding (bag) collections and dense parts.
        device: this rank's device.
        optimizers: OptimizerConfig.
        sharding: ShardingConfig; None leaves everything to the planner.
        batch: BatchSize for the planner's estimates; None for its defaults.

    Returns:
        The sharded model, and one optimiser for tables and dense parameters. The tables are updated
        during the backward pass; ``step`` updates the rest.

    Raises:
        ShardingError: the tables do not fit into the ranks' memory, or the device or the optimiser
            does not support what ``sharding`` asks for. All ranks raise it.

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
    sharding, batch = sharding or ShardingConfig(), batch or BatchSize()
    fused, options = _TABLE_OPTIMIZERS[optimizers.table_optimizer]
    managed = any(isinstance(m, ManagedCollisionEmbeddingCollection) for m in model.modules())
    if managed and fused is RowWiseAdagrad and device.type == "cpu":
        raise ShardingError(
            "managed collisions: fbgemm can reset a reassigned row's row-wise Adagrad state on GPUs "
            "only; on a CPU use table optimizer 'adagrad' or 'sgd'"
        )
    if decay := optimizers.table_weight_decay:
        # decoupled: as part of the gradient, Adagrad would normalise its size away
        options = {**options, "weight_decay": decay, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    for module in model.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            apply_optimizer_in_backward(
                fused,
                module.parameters(),
                # a new dict each time, since it is mutated
                {"lr": optimizers.table_lr, **options},
            )
    buffers = _dense_buffers(model)
    with warnings.catch_warnings():
        # TorchRec warns about its own use of deprecated arguments
        warnings.simplefilter("ignore", FutureWarning)
        plan = plan_on_all_ranks(
            lambda: make_planner(
                model, topology(device, sharding), sharding, batch, whole_rows=fused is RowWiseAdagrad
            ).plan(model, sharders(sharding.exchange, device.type))
        )
        sharded = DistributedModelParallel(
            model,
            device=device,
            plan=plan,
            sharders=sharders(sharding.exchange, device.type),
        )
    _broadcast_buffers(sharded, buffers)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    matrices = [p for p in dense.values() if p.dim() > 1]
    vectors = [p for p in dense.values() if p.dim() <= 1]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizers.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.0,
    )
    dense_optimizer = KeyedOptimizerWrapper(dense, lambda _: adamw)
    # Without state, the dense optimiser would silently be left out of checkpoints. TorchRec creates the
    # state by a step with zero gradients, which must neither count nor decay a weight.
    dense_optimizer.init_state()
    for group in adamw.param_groups:
        group["lr"] = optimizers.dense_rate
    for state in adamw.state.values():
        state["step"].zero_()
    if optimizers.clip_norm is not None:
        dense_optimizer = GradientClippingOptimizer(
            dense_optimizer, GradientClipping.NORM, optimizers.clip_norm
        )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, ("dense", dense_optimizer)])


def _broadcast_buffers(sharded: nn.Module, names: set[str]) -> None:
    """Give all ranks rank 0's buffers, e.g. a random hash; TorchRec does this only for parameters."""
    for name, buffer in sharded.named_buffers():
        if name in names:
            dist.broadcast(buffer, src=0)


def _dense_buffers(model: nn.Module) -> set[str]:
    """The names of all buffers outside the tables."""
    kinds = (EmbeddingBagCollection, EmbeddingCollection, ManagedCollisionEmbeddingCollection)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    return {name for name, _ in model.named_buffers() if not name.startswith(inside)}


_TABLE_OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (Adagrad, {"eps": 1e-8}),
    "sgd": (SGD, {}),
}
