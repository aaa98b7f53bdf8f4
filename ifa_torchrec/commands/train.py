"""Train a DLRM_IFA on an event log.

    ifa train --data LOG --out runs/mine
    torchrun --nproc-per-node 2 -m ifa_torchrec train --data LOG --out runs/mine
    ifa train --data LOGS --out runs/mine --follow

Writes OUT/config.json, OUT/checkpoints/, OUT/tensorboard/ and, if the log has a split `valid`,
OUT/validations.json, by which the best checkpoint is kept and used (--keep-best). With --resume it
continues from the last checkpoint, if there is one, at the exact request; so the same command starts and
restarts a run. The number of ranks, the batch size and the sharding may differ. While it runs, no other
training can write to OUT.

With --follow, DATA is a folder of logs, for example one per day, taken in the order of their names. The
first is trained as above; each later one is measured with the run before it, then trained once, in order
of time. Each has its own run in OUT/NAME, and a row in OUT/parts.csv. Run the same command again to
train on new logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.distributed as dist
import tyro

from ifa_torchrec.commands.command_line import result_as_json
from ifa_torchrec.training.follow import follow
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train


@dataclass(frozen=True)
class TrainCommand:
    """Options of ``ifa train``: those of a training, and --follow."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Options of the training."""
    follow: bool = False
    """DATA is a folder of logs, for example one per day: train on the remaining ones, each measured
    first and trained once; OUT gets one run per log."""


def main(command: Annotated[TrainCommand, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    result = follow(command.config) if command.follow else train(command.config)
    if dist.get_rank() == 0:
        print(result_as_json(result))
    dist.destroy_process_group()


main.__doc__ = __doc__
