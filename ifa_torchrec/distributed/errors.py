"""What checkpoints raise."""

from __future__ import annotations

from ifa_torchrec.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """There is no usable checkpoint, or it is of another configuration."""


class DamagedError(Exception):
    """A checkpoint is not what was written; raised on all ranks."""
