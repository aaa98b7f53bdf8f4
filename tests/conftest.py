"""Puts this folder on sys.path, so that every test file can import helpers."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# The tests' tensors are tiny: more threads only wait for each other, long when the machine is busy.
torch.set_num_threads(1)
