"""Print which backends of the operators there are here, and why not where there are not.

ifa backends
"""

import torch

from ifa_torchrec.ops import BACKENDS
from ifa_torchrec.ops.kernels import native


def main() -> None:
    """The command; its help is the top of this file."""
    if native.LIBRARY:
        auto = f"native for float32 and bfloat16 on CPU ({native.STATUS}); torch for the rest"
    else:
        auto = "torch"
    about = {
        "auto": auto,
        "native": f"{'available' if native.LIBRARY else 'not available'}: {native.STATUS}",
        "reference": "available: the plain truth, slow",
        "torch": f"available: torch {torch.__version__}, any device and dtype",
    }
    for name in BACKENDS:
        print(f"{name:10}{about[name]}")


main.__doc__ = __doc__
