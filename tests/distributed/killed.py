"""``ifa train``, in which one rank kills itself once.

    KILL="PLACE RANK STEP" python killed.py OPTIONS

PLACE is ``training``: before that step; ``writing``: when the rank has written its part of that step's
checkpoint; or ``renaming``: when the whole checkpoint is written but not renamed yet. After a restart by
torchrun, no rank is killed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

from ifa_torchrec.__main__ import main
from ifa_torchrec.training import trainer as train


def arm(place: str, rank: int, step: int) -> None:
    """Set the trap on the rank that is to be killed."""
    if int(os.environ["RANK"]) != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    set_learning_rate, write_data, rename = (
        train.set_learning_rate,
        FileSystemWriter.write_data,
        Path.rename,
    )

    def stepping(optimizer, config, now, progress):
        if now == step:
            die()
        set_learning_rate(optimizer, config, now, progress)

    def writing(self, *args):
        written = write_data(self, *args)
        if f"step-{step:09d}" in str(self.path):
            written.wait()
            die()
        return written

    def renaming(self, target):
        if target.name == f"step-{step:09d}":
            die()
        return rename(self, target)

    if place == "training":
        train.set_learning_rate = stepping
    elif place == "writing":
        FileSystemWriter.write_data = writing
    else:
        Path.rename = renaming


if __name__ == "__main__":
    place, rank, step = os.environ["KILL"].split()
    arm(place, int(rank), int(step))
    main()
