"""Train a DLRM_IFA on an event log.

    ifa train --data LOG --out runs/mine
    torchrun --nproc-per-node 2 -m ifa_torchrec train --data LOG --out runs/mine

Writes OUT/config.json, OUT/checkpoints/, OUT/tensorboard/ and, where the log has a split `valid`,
OUT/validations.json, by which the best checkpoint is kept and used (--keep-best). With --resume it goes
on from the last checkpoint, if there is one, at the request where that was written; so the same line
starts a run and restarts it. The number of ranks, the batches' size and the sharding may then be
others. While it runs, no other training can write to OUT.
"""

from __future__ import annotations

from typing import Annotated

import torch.distributed as dist
import tyro

from ifa_torchrec.commands.command_line import result_as_json
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train


def main(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    result = train(config)
    if dist.get_rank() == 0:
        print(result_as_json(result))
    dist.destroy_process_group()


main.__doc__ = __doc__
