"""``torchx run`` on this machine: a training that loses a rank, its evaluation, a job that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed.checkpoint import checkpoints

pytestmark = pytest.mark.slow

SMALL = ["--ifa.embedding-dim", "8", "--ifa.num-heads", "2", "--no-validate"]
EPOCHS, STEPS_AN_EPOCH = 20, 6
TIMEOUT = 240


@dataclass
class Job:
    """A finished job."""

    exit_code: int
    log: str
    attempts: int
    printed: str
    """Rank 0's output in the last attempt."""


@contextmanager
def torchx_run(folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """Start a job in a folder; it is stopped at the end of the block."""
    folder.mkdir(exist_ok=True)
    programs = Path(sys.executable).parent  # torchrun must be found by name
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [programs / "torchx", "run", "-s", "local_cwd", "-cfg", "log_dir=logs", *arguments],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def wait(process: subprocess.Popen, folder: Path) -> Job:
    exit_code = process.wait(TIMEOUT)
    ranks = sorted(folder.glob("logs/torchx/*/torchelastic/*/*/attempt_*/0/stdout.log"))
    return Job(exit_code, (folder / "log").read_text(), len(ranks), ranks[-1].read_text())


def kill_rank_1(run: Path) -> None:
    """Kill a rank of the training that writes to a folder, as soon as it has a checkpoint."""
    deadline = time.monotonic() + TIMEOUT
    while not checkpoints(run / "checkpoints"):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        if os.fsencode(run) in command_line and b"LOCAL_RANK=1" in environment:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("no rank 1")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("torchx") / "my run"


@pytest.fixture(scope="module")
def trained(log: EventLog, run: Path) -> Job:
    """A training on two ranks, one of which is killed midway."""
    folder = run.parent / "train"
    options = ["--data", str(log.path), "--out", str(run), "--max_requests", "4", "--max_restarts", "1"]
    script_options = [*SMALL, "--epochs", str(EPOCHS)]
    with torchx_run(folder, "ifa.train.ddp", *options, "--", *script_options) as process:
        kill_rank_1(run)
        return wait(process, folder)


def test_training_goes_on_after_a_rank_was_killed(trained, run):
    assert trained.exit_code == 0, trained.log
    assert trained.attempts == 2
    assert f"{run}/checkpoints: resuming from step" in trained.log
    assert json.loads(trained.printed)["steps"] == EPOCHS * STEPS_AN_EPOCH
    assert checkpoints(run / "checkpoints")[-1].name.endswith(str(EPOCHS * STEPS_AN_EPOCH))


def test_a_trained_run_is_evaluated_by_two_ranks(trained, run):
    folder = run.parent / "evaluate"
    with torchx_run(folder, "ifa.evaluate.ddp", "--run", str(run), "--", "--by", "store") as process:
        job = wait(process, folder)
    assert job.exit_code == 0, job.log
    printed = json.loads(job.printed)
    assert printed["gauc"] > 0.5
    assert printed == json.loads((run / "metrics-test.json").read_text())


def test_a_failed_job_fails_torchx_and_the_log_says_why(tmp_path):
    start = time.monotonic()
    options = ["--data", "no such log", "--out", "run", "-j", "1x1"]
    with torchx_run(tmp_path, "ifa.train.ddp", *options) as process:
        job = wait(process, tmp_path)
    assert job.exit_code == 1
    assert "error: no such log: no such event log" in job.log
    assert "Job finished: FAILED" in job.log
    assert job.attempts == 1
    assert time.monotonic() - start < 300
