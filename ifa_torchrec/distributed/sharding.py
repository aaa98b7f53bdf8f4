"""From a plain model to a sharded one, on one process or many."""

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
"""Learning rate of all but the tables, unless the options say more."""


@dataclass(frozen=True)
class OptimizerConfig:
    """A fused optimiser for the tables, AdamW for the rest.

    Args:
        table_optimizer: "rowwise_adagrad" has one state a row, so rows are not split among ranks;
            "adagrad" has one a number; "sgd" none.
        table_lr: learning rate of the tables.
        dense_lr: learning rate of everything else; None for 3e-3, though ``ifa train`` then takes less
            where its steps have few requests.
        weight_decay: of the dense matrices; biases and norms have none.
        table_weight_decay: of the rows of tables that a step touches, by table_lr table_weight_decay of
            what they are; of "rowwise_adagrad" alone, the only optimiser for which fbgemm has it.
        clip_norm: most that the norm of the gradient of the dense part, over all its parameters, may be:
            a longer one is scaled down to it. Tables are updated as the backward reaches them, before
            any norm is known, and are not clipped. None for any.

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
                f"OptimizerConfig: table_optimizer {self.table_optimizer!r} is none of "
                f"{list(_TABLE_OPTIMIZERS)}"
            )
        if self.table_weight_decay and self.table_optimizer != "rowwise_adagrad":
            raise ConfigError(
                f"OptimizerConfig: table_weight_decay {self.table_weight_decay:g}: "
                f"{self.table_optimizer!r} has none; take 'rowwise_adagrad'"
            )
        for name in ("table_lr", "dense_lr", "weight_decay", "table_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"OptimizerConfig: {name} must be a number of at least 0, got {value}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"OptimizerConfig: clip_norm must be above 0, got {self.clip_norm}")

    @property
    def dense_rate(self) -> float:
        """``dense_lr``, or what stands for None."""
        return DENSE_LR if self.dense_lr is None else self.dense_lr


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
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if "RANK" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        elif restarts != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store still holds the addresses of the ranks that died (pytorch issue
            # 135712); on several nodes the count is not the same on each
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart-{restarts}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        else:
            dist.init_process_group(backend)
    return device


@torch.enable_grad()  # the fused optimisers hang on the tables' autograd, also for a model to score
def shard(
    model: nn.Module,
    device: torch.device,
    optimizers: OptimizerConfig,
    sharding: ShardingConfig | None = None,
    batch: BatchSize | None = None,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the model's embedding collections by the planner's plan and give it its optimisers.

    The model's tables may be on the meta device: they are made, and initialised by their
    configs' ``init_fn``, where the plan puts them. Table weights set before are lost. Called by
    all ranks; the dense part starts as it is on rank 0.

    Args:
        model: a model of embedding (bag) collections and dense parts.
        device: this rank's device.
        optimizers: OptimizerConfig.
        sharding: ShardingConfig; None leaves all to the planner.
        batch: BatchSize that the planner reckons with; None for its defaults.

    Returns:
        The sharded model, and one optimiser over both kinds of parameters. The tables are
        updated during backward; its ``step`` updates the rest.

    Raises:
        ShardingError: the tables do not fit the ranks' memory, or the device or the optimiser
            cannot do what ``sharding`` asks for. All ranks raise it.

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
            "managed collisions: where a row gets another id, fbgemm can clear its state of row-wise "
            "Adagrad on GPUs alone; on a CPU use table optimizer 'adagrad' or 'sgd'"
        )
    if decay := optimizers.table_weight_decay:
        # not as a part of the gradient, which Adagrad would scale to the same step whatever its size
        options = {**options, "weight_decay": decay, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    for module in model.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            apply_optimizer_in_backward(
                fused,
                module.parameters(),
                # a dict of its own each time: it is mutated
                {"lr": optimizers.table_lr, **options},
            )
    with warnings.catch_warnings():
        # torchrec warns of its own calls to deprecated arguments
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
    # Without state the dense optimiser's part of a checkpoint would be skipped in silence.
    # torchrec makes it by a step with zero gradients, which must not count nor decay a weight.
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


_TABLE_OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (Adagrad, {"eps": 1e-8}),
    "sgd": (SGD, {}),
}
