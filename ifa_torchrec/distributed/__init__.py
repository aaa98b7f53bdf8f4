"""Sharding, optimisers and checkpoints, in one process or many."""

from ifa_torchrec.distributed.errors import CheckpointError, ShardingError
from ifa_torchrec.distributed.plan_picture import draw_plan
from ifa_torchrec.distributed.planning import BatchSize, ShardingConfig
from ifa_torchrec.distributed.rows import zero_rows
from ifa_torchrec.distributed.sharding import OptimizerConfig, init_process_group, shard

__all__ = [
    "BatchSize",
    "CheckpointError",
    "OptimizerConfig",
    "ShardingConfig",
    "ShardingError",
    "draw_plan",
    "init_process_group",
    "shard",
    "zero_rows",
]
