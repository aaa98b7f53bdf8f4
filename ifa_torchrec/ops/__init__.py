"""The operators: encode a jagged history into a user state, and attend from candidates to the state.

Letters used throughout: B requests, with M candidates and N events in total; D, the width of a token;
H dense heads of width d with d_phi features each; L half-lives per identity feature.

There are four functions, each with the backends "reference" (plain, defines the correct result),
"torch" (tiled, with its own backward), "native" (C++, CPU), "triton" (GPU) and "auto" (the fastest
available). ``ifa backends`` prints which are available. An exported graph stores the backend's name and
resolves it where it runs: a graph exported with "auto" on a machine with the C++ kernels also runs
without them. The environment variable IFA_KERNELS (plain, avx2, avx512, avx512_bf16 or none) selects
the instruction set of the C++ kernels instead of the processor's fastest, or turns them off; it is read
when the package is imported.

For all functions and backends:

- Tensors must be on one device, in any layout, and float32, bfloat16, float16 or float64, which may be
  mixed; offsets and buckets are integers of any width. Sizes that do not agree raise a ValueError that
  names the argument, and so do offsets that do not rise from 0 to the number of rows. Offsets are only
  checked on the CPU. On a GPU, where reading them would wait for the device, no backend but the
  reference does: wrong offsets give wrong results, but never access memory outside the tensors.
- Sums are float32 (float64 if the first argument of ``encode``, ``match``'s history, ``attend``'s
  key_value or ``attend_softmax``'s summaries is), also under autocast and any default dtype or device.
- Under autocast the tokens (history and candidates) are cast to its dtype; the rest is used as given.
- No gradient flows to ages and decay.
- A token that is NaN or infinite spoils only the results of its own request (a candidate: its own row).
- Several threads may call at once. In a process forked from this one PyTorch is set to one thread:
  OpenMP's other threads do not survive the fork, and a call that waits for them would hang.
"""

from __future__ import annotations

import os
from functools import partial

import torch

from ifa_torchrec.ops.attend import attend
from ifa_torchrec.ops.attend_softmax import attend_softmax
from ifa_torchrec.ops.backends import BACKENDS, Backend
from ifa_torchrec.ops.encode import encode
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.kernels import native, reference
from ifa_torchrec.ops.match import match

__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "Backend",
    "attend",
    "attend_softmax",
    "encode",
    "match",
    "native",
    "reference",
]

# After a fork, a parallel region (also PyTorch's own) waits for threads that no longer exist.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
