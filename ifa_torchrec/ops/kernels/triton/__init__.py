"""The `triton` backend: one pass over the rows on a GPU.

The host never reads a value: the number of programs depends only on sizes, and each program finds its
request by bisection. So nothing waits for the device, and every kernel can be captured in a CUDA graph.
Sums of chunks of rows are added up in a fixed order, without atomics: results are bitwise reproducible.

bfloat16 tokens are multiplied in bfloat16. float16 tokens are multiplied in TF32, which represents them
exactly and does not overflow. float32 tokens are multiplied in TF32 if torch allows it for its own
products, else by three TF32 products, which are off by 1e-6. Sums are float32. For bfloat16 tokens, phi,
the weights of projections and gradients are therefore rounded where they are multiplied: states are off
by up to 1 %, as with the native backend's avx512_bf16.
In encode and attend, heads wider than 64 have their own kernels, which process a head's features in
tiles. The `torch` backend handles attend_softmax's heads wider than 256, and all GPUs before compute
capability 8.0.

Without a GPU the kernels run slowly on CPU tensors in Triton's interpreter if the environment variable
TRITON_INTERPRET is 1 before they are first imported.
"""

from ifa_torchrec.ops.kernels.triton.attend import attend, attend_backward
from ifa_torchrec.ops.kernels.triton.attend_softmax import attend_softmax, attend_softmax_backward
from ifa_torchrec.ops.kernels.triton.encode import encode, encode_backward
from ifa_torchrec.ops.kernels.triton.match import match, match_backward

__all__ = [
    "attend",
    "attend_backward",
    "attend_softmax",
    "attend_softmax_backward",
    "encode",
    "encode_backward",
    "match",
    "match_backward",
]
