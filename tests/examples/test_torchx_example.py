"""examples/torchx: the unchanged script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(out: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["examples/torchx/launch.sh", str(out)],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_run_on_two_ranks_and_what_a_cluster_would_get(tmp_path: Path) -> None:
    out = tmp_path / "torchx"
    done = launch(out)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = json.loads((out / "run" / "metrics-test.json").read_text())
    assert 0.7 < metrics["gauc"] < 0.8
    assert f'"gauc": {metrics["gauc"]}' in done.stdout + done.stderr
    for scheduler, words in {
        "slurm": ("#SBATCH", "--nnodes 2", "--nproc_per_node 4"),
        "kubernetes": ("batch.volcano.sh", "CLAIM", "--nnodes 2"),
    }.items():
        request = (out / f"{scheduler}.txt").read_text()
        assert all(word in request for word in words)
    again = launch(out)
    assert again.returncode == 1 and "is there already; name another folder" in again.stderr
