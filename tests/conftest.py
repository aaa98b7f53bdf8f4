"""Puts this folder on sys.path, so that every test file can import helpers; the toy log."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# The tests' tensors are tiny: more threads only wait for each other, long when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy():
    """The toy's DataFrames; a test that spoils them makes its own."""
    from toy import make_toy

    return make_toy()


@pytest.fixture(scope="module")
def log(toy, tmp_path_factory):
    """The toy as an opened EventLog."""
    return toy.write(tmp_path_factory.mktemp("toy") / "log")
