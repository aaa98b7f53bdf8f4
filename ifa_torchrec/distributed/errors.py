"""Errors of sharding and of checkpoints."""

from __future__ import annotations

from ifa_torchrec.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """There is no usable checkpoint, or it has another configuration."""


class DamagedError(Exception):
    """A checkpoint is not what was written; raised on all ranks."""


class ShardingError(UserError, ValueError):
    """There is no sharding plan, the ranks disagree on it, or they cannot do what the options ask."""
