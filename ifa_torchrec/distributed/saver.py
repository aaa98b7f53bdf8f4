"""Checkpoints that are written while training goes on."""

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
from ifa_torchrec.distributed.checkpoint_writer import Aside, Copies, StagedPlanner


class CheckpointSaver:
    """Writes checkpoints in a thread: training waits while the state is copied, not while it is written.

    One is written at a time: the next waits for it. A checkpoint appears when it is whole, so a run that
    dies meanwhile has the one before. Made, used and closed by all ranks; a context manager, which waits
    for the last checkpoint at its end. It takes memory for a copy of the rank's part of the state.

    Args:
        folder: where checkpoints lie.

    Attributes:
        waited: seconds for which training waited.

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
        # its own: training uses the usual group meanwhile
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._copies = Copies()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[Path] | None = None

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        progress: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Begin to write a checkpoint of what is now; see ``checkpoint.save``.

        Raises:
            WriteError: that before could not be written.
        """
        self.wait()
        start = time.perf_counter()
        state = checkpoint.state_of(model, optimizer)
        self._copies.take(state)
        aside = Aside(self._group, StagedPlanner(self._copies))
        self._pending = self._thread.submit(checkpoint.write, self.folder, state, progress, best, aside)
        self.waited += time.perf_counter() - start

    def wait(self) -> None:
        """Until the last checkpoint is there.

        Raises:
            WriteError: it could not be written; the checkpoints before are as they were.
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
            with suppress(*([BaseException] if error else [])):  # the first error is what went wrong
                self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)
