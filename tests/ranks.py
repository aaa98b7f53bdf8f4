"""Runs a function on several ranks, each a process of its own, as torchrun would, and brings back
what they return or raise; or runs a script under torchrun itself."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchrec.test_utils import get_free_port

import ifa_torchrec
from ifa_torchrec.distributed import init_process_group

SMALL = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""What a rank is started with: it shares this machine's cores, and needs no GPU."""
GRACE = 10
"""Seconds that ranks have to end after another raised, for which they may wait in vain."""


class RankFailure(AssertionError):
    """Some ranks raised; holds their tracebacks."""


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120, check: bool = True
) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world`` ranks, in their order.

    Inside ``function`` the process group (gloo) is there, and ``pytest.raises`` works. The first
    call of a session takes some seconds; others fork the process that imported torch for it.

    Args:
        function: of a module; what it returns is pickled (tensors by value).
        world: ranks.
        args: pickled as well.
        timeout: seconds after which all ranks are killed.
        check: False puts an exception that a rank raised in the place of its result.

    Raises:
        RankFailure: a rank raised and ``check``, or another rank has not ended GRACE after that.
        TimeoutError: a rank did not end in time, or was killed.
    """
    environment = rendezvous(world)  # whatever the process that is forked was started with
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ifa_torchrec.training.trainer"])
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: list[str] = []
    # a Pool that is left kills its processes
    with (
        mock.patch.dict(os.environ, SMALL),
        context.Pool(world) as pool,
    ):
        jobs = [(rank, environment, deadline, function, args) for rank in range(world)]
        ended = pool.imap_unordered(_on_rank, jobs)
        while len(results) < world:
            try:
                rank, pickled = ended.next(max(deadline - time.monotonic(), 0))
            except multiprocessing.TimeoutError:
                break
            results[rank], failure = pickle.loads(pickled)
            if failure:
                failures.append(f"rank {rank} of {world}: {failure}")
                deadline = min(deadline, time.monotonic() + GRACE)
    missing = sorted(set(range(world)) - set(results))
    if failures and (check or missing):
        raise RankFailure("\n".join(failures + [f"rank {rank} was still running" for rank in missing]))
    if missing:
        raise TimeoutError(f"ranks {missing} of {world} did not end in {timeout} s")
    return [results[rank] for rank in range(world)]


def rendezvous(world: int) -> dict[str, str]:
    """The environment in which ranks of this machine find each other; each adds its own number."""
    return {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(get_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def torchrun(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script under torchrun, on two ranks, ended.

    Args:
        arguments: the script and its own.
        environment: beside that of this process.
    """
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*run, *map(str, arguments)],
        env={
            **{name: value for name, value in os.environ.items() if name not in own},
            "PYTHONPATH": str(Path(ifa_torchrec.__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            **SMALL,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


def _on_rank(job: tuple) -> tuple[int, bytes]:
    """The rank, and pickled: its result or exception, and an exception's traceback."""
    rank, environment, deadline, function, args = job
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # shows where a rank hangs
    faulthandler.dump_traceback_later(max(0.9 * (deadline - time.monotonic()), 0.1))
    try:
        init_process_group()  # waits for all ranks, so that each is a process of its own
        return rank, pickle.dumps((function(*args), None))
    except BaseException as error:  # pytest.fail's is no Exception, and would end the process
        text = traceback.format_exc()
        try:
            pickled = pickle.dumps((error, text))
            pickle.loads(pickled)
        except Exception:  # it cannot leave its process
            pickled = pickle.dumps((RuntimeError(repr(error)), text))
        return rank, pickled
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()  # most ranks that wait for this one hear of its end
