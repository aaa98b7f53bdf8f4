"""Checkpoints that are written while training continues."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from typing_extensions import Self

from ifa_torchrec.distributed import checkpoint
from ifa_torchrec.distributed.checkpoint_writer import BackgroundWrite, StagedPlanner, StateCopies


class CheckpointSaver:
    """Writes checkpoints in a thread: training waits while the state is copied, not while it is written.

    One checkpoint is written at a time; the next waits for it. It appears only when it is complete, so a
    run that dies during the write still has the previous one. Created, used and closed by all ranks. It
    is a context manager, which waits for the last checkpoint on exit. It needs memory for a copy of the
    rank's part of the state.

    Args:
        folder: the folder of the checkpoints.

    Attributes:
        waited: seconds that training has waited.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec.distributed import OptimizerConfig, checkpoint, init_process_group, shard
        >>> from ifa_torchrec.distributed.saver import CheckpointSaver
        >>> device = init_process_group()
        >>> tables = EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100, feature_names=["item"])])
        >>> model = torch.nn.ModuleDict({"tables": tables, "over": torch.nn.Linear(8, 1)})
        >>> sharded, optimizer = shard(model, device, OptimizerConfig())
        >>> folder = Path(tempfile.mkdtemp())
        >>> with CheckpointSaver(folder) as saver:
        ...     saver.save(sharded, optimizer, {"step": 5})
        >>> checkpoint.load(folder, sharded, optimizer)
        {'step': 5}
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.waited = folder, 0.0
        # a group of its own, since training uses the default group at the same time
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._copies = StateCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[Path] | None = None

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        progress: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Start writing a checkpoint of the current state; see ``checkpoint.save``.

        Raises:
            WriteError: the previous checkpoint could not be written.
        """
        self.wait()
        start = time.perf_counter()
        state = checkpoint.state_of(model, optimizer)
        self._copies.take(state)
        background = BackgroundWrite(self._group, StagedPlanner(self._copies))
        self._pending = self._thread.submit(
            checkpoint.write, self.folder, state, progress, best, background
        )
        self.waited += time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            WriteError: it could not be written; the earlier checkpoints are unchanged.
        """
        start = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self.waited += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(*([BaseException] if error else [])):  # keep the first error, the cause
                self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)
