"""The `triton` backend: one pass over the rows on a GPU.

No call looks at a value: the number of programs comes of sizes alone, and each finds its request by
bisection. So nothing waits for the device, and a CUDA graph can hold every kernel. Sums of chunks of
rows are added up in a fixed order, without atomics: results are the same to the bit at every run.

Products of bfloat16 tokens are of bfloat16, those of float16 of TF32, which holds them and does not
overflow, those of float32 of TF32 where torch allows it for its own and else of three products of TF32,
which are off by 1e-6; sums are float32. So of bfloat16 tokens phi, the weights of projections and
gradients are rounded where they are multiplied: states are off by up to 1 %, as the native backend's.
Heads wider than 64 have kernels of their own in encode and attend, which go through a head's features
in tiles. attend_softmax's heads above 256 are the `torch` backend's, as are all on GPUs before compute
capability 8.0.

Without a GPU the kernels run on CPU tensors in Triton's interpreter, slowly, where the environment
variable TRITON_INTERPRET is 1 before the first import of them.
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
