"""The curves of a run, as TensorBoard shows them."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ifa_torchrec.errors import writing


class Curves:
    """What TensorBoard shows of a run; an error names the folder.

    Args:
        folder: where they lie.
        step: the first; what a killed run wrote after its last checkpoint is not shown twice.
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
        """Write the rest."""
        with writing(self.folder):
            self._writer.close()
