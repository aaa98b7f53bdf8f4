"""A run's curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ifa_torchrec.errors import writing


class Curves:
    """Writes a run's curves for TensorBoard; errors name the folder.

    Args:
        folder: the folder of the event files.
        step: the first step; points that a killed run wrote from this step on are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step)

    def show(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        with writing(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the remaining points."""
        with writing(self.folder):
            self._writer.close()
