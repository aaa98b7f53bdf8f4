"""Train a DLRM_IFA on an event log.

    ifa train --data LOG --out runs/mine
    torchrun --nproc-per-node 2 -m ifa_torchrec train --data LOG --out runs/mine
    ifa train --data LOGS --out runs/mine --follow

Writes OUT/config.json, OUT/checkpoints/, OUT/tensorboard/ and, where the log has a split `valid`,
OUT/validations.json, by which the best checkpoint is kept and used (--keep-best). With --resume it goes
on from the last checkpoint, if there is one, at the request where that was written; so the same command
starts a run and restarts it. The number of ranks, the batches' size and the sharding may then be
others. While it runs, no other training can write to OUT.

With --follow DATA is a folder of logs, one a day, say, in the order of their names. The first is trained
as above; each later one is measured by the run before it, then trained once, in order of time. Each has
its run in OUT/NAME, and its row in OUT/parts.csv. The same command takes up the logs that came since.
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
    """Options of ``ifa train``: those of a training, and whether it is one without end."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Of a training."""
    follow: bool = False
    """DATA is a folder of logs, a day each, say: train on those that are left, each measured before it
    is trained, and trained once; OUT gets a run for each."""


def main(command: Annotated[TrainCommand, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    result = follow(command.config) if command.follow else train(command.config)
    if dist.get_rank() == 0:
        print(result_as_json(result))
    dist.destroy_process_group()


main.__doc__ = __doc__
