"""The same model on two ranks: DistributedModelParallel, fed by TrainPipelineSparseDist.

    torchrun --nproc-per-node 2 examples/plug_into_your_model/sharded.py     # about a minute, 2 cores

Shards the unchanged Ranker of train.py with TorchRec. From ifa_torchrec it uses only the module, a dense
part like any other, of which every rank has a copy; the item table is sharded by rows.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

sys.path.insert(0, str(Path(__file__).parent))
from train import Options, Ranker, Requests, load


@dataclass
class Batch(Pipelineable):
    """A step's inputs, which the pipeline moves to the device."""

    features: KeyedJaggedTensor
    age: Tensor
    liked: Tensor
    label: Tensor

    @classmethod
    def of(cls, requests: Requests) -> Batch:
        """The batch of some requests."""
        return cls(*requests.history(), torch.from_numpy(requests.label.ravel()).float())

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(*(part.to(device, non_blocking=non_blocking) for part in vars(self).values()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Mark its memory as used on that stream."""
        for part in vars(self).values():
            part.record_stream(stream)


class WithLoss(nn.Module):
    """The module that the pipeline calls: takes a batch, returns the loss and the logits."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of the batch, and logits [M]."""
        logits = self.ranker(batch.features, batch.age, batch.liked)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.label), logits.detach()


def shard(model: WithLoss, device: torch.device) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model with its table sharded by rows, and its optimisers."""
    tables = model.ranker.tables
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": 0.03})
    sharders, group = [EmbeddingCollectionSharder()], dist.group.WORLD
    constraints = ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        constraints={table.name: constraints for table in tables.embedding_configs()},
    )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=planner.collective_plan(model, sharders, group),
        sharders=sharders,
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3),
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def batches(requests: Requests, order: np.ndarray) -> Iterator[Batch]:
    """This rank's share of each step's 32 requests; all ranks have the same number of steps."""
    steps = len(order) // 32
    for step in np.array_split(order[: 32 * steps], steps):
        yield Batch.of(requests[step[dist.get_rank() :: dist.get_world_size()]])


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() == 0:  # let TorchRec log which lookups are pipelined
        logging.basicConfig()
        logging.getLogger("torchrec.distributed.train_pipeline.utils").setLevel(logging.INFO)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)  # the same order on all ranks
    training, test, tables, _ = load(options.data)
    training = training[np.arange(len(training))[: options.requests]]
    model, optimizer = shard(WithLoss(Ranker(tables["item"], options.dim, with_history=True)), device)
    for epoch in range(options.epochs):
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
        steps = batches(training, rng.permutation(len(training)))
        while True:
            try:
                pipeline.progress(steps)
            except StopIteration:
                break
        pipeline.detach()  # the model does its lookups itself again
        with torch.no_grad():  # all ranks score all requests, since a lookup needs every rank
            scored = [
                model(Batch.of(test[part]).to(device))[1].cpu()
                for part in np.array_split(np.arange(len(test)), 20)
            ]
        auc = float(binary_auroc(torch.cat(scored), torch.from_numpy(test.label.ravel())))
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks  epoch {epoch + 1}  test AUC {auc:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
