"""What sharding and checkpoints raise."""

from __future__ import annotations

from ifa_torchrec.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """There is no usable checkpoint, or it is of another configuration."""


class DamagedError(Exception):
    """A checkpoint is not what was written; raised on all ranks."""


class ShardingError(UserError, ValueError):
    """There is no sharding plan, the ranks do not agree on one, or cannot do what is asked of them."""
