"""The op: a jagged history into a user state, and candidates against a user state.

Letters, here and everywhere: B requests, M candidates and N events in all of them, D the width of
a token, H dense heads of width d, d_phi features a head, L half-lives of an identity feature.

Four functions, each with the backends "reference" (plain, the truth), "torch" (tiled, with its
own backward), "native" (C++, on CPU), "triton" (on GPUs) and "auto" (the fastest that serves).
``ifa backends`` prints which there are. An exported graph holds the backend's name and chooses anew
where it runs: what "auto" exported beside the C++ kernels runs without them. The environment variable
IFA_KERNELS (plain, avx2, avx512, avx512_bf16 or none) takes another instruction set of theirs than the
processor's fastest, or none of them; it is read when the package is imported.

What all of them take and give, whichever the backend:

- Tensors of one device, in any layout, of float32, bfloat16, float16 or float64, which may be mixed;
  offsets and buckets are integers of any width. Sizes that do not agree are a ValueError that names
  the argument, and so are offsets that do not rise from 0 to the number of rows. ``encode`` and
  ``match`` look at offsets on the CPU alone; on a GPU, where a look would wait for the device, no
  backend does but the reference: they stay within the tensors whatever they are, and of wrong ones
  give something wrong.
- Sums are float32 (float64 where the first argument of ``encode``, ``match``'s history, ``attend``'s
  key_value or ``attend_softmax``'s summaries are), under autocast and any default dtype or device, too.
- Under autocast the tokens, history and candidates, are taken in its dtype; the rest is as given.
- No gradient flows to ages and decay.
- A token that is NaN or infinite spoils the results of its own request (a candidate's: its own row)
  and no other's.
- Several threads may call at once. In a process forked from this one PyTorch is set to one thread:
  OpenMP's others did not survive the fork, and a call that waited for them would hang.
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

# After a fork a parallel region, PyTorch's own ones as well, waits for threads that are no more.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
