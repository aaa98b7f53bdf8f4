"""Print which backends of the operators are available here, and why others are not.

ifa backends
"""

import torch

from ifa_torchrec.ops import BACKENDS
from ifa_torchrec.ops.backends import TRITON_IS_INSTALLED
from ifa_torchrec.ops.kernels import native


def main() -> None:
    """The command; its help is the top of this file."""
    if native.LIBRARY:
        auto = f"native for float32 and bfloat16 on CPU ({native.STATUS}); torch for the rest"
    else:
        auto = "torch"
    if TRITON_IS_INSTALLED and torch.cuda.is_available():
        auto += "; triton for float32, bfloat16 and float16 on GPUs"
    installed = "installed" if TRITON_IS_INSTALLED else "not installed"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = TRITON_IS_INSTALLED and gpus
    about = {
        "auto": auto,
        "native": f"{'available' if native.LIBRARY else 'not available'}: {native.STATUS}",
        "reference": "available: slow, the definition that the others are tested against",
        "torch": f"available: torch {torch.__version__}, any device and dtype",
        "triton": f"{'available' if here else 'not available'}: Triton is {installed}, {gpus} GPUs",
    }
    for name in BACKENDS:
        print(f"{name:10}{about[name]}")


main.__doc__ = __doc__
