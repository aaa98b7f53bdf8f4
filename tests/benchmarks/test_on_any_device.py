"""The benchmarks for GPUs run on any device, on small cases."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "told"),
    [("attention_gpu", "match {'case': 'log-normal'"), ("dense_step", "| mean pooling |")],
)
def test_smoke(script, told):
    command = [sys.executable, f"benchmarks/{script}.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert told in done.stdout
