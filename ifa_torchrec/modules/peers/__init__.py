"""The interactions that IFA is compared with, with the same call and configuration.

Each implements the dense heads of a published system. Identity heads and masses come from the base
class and are the same for all.
"""

from ifa_torchrec.modules.peers.din import DINAttention
from ifa_torchrec.modules.peers.hstu import HSTUAttention
from ifa_torchrec.modules.peers.low_rank import LowRankAttention
from ifa_torchrec.modules.peers.mean_pooling import MeanPooling
from ifa_torchrec.modules.peers.sdim import SDIMAttention
from ifa_torchrec.modules.peers.search import ETAAttention, SIMAttention, TWINAttention
from ifa_torchrec.modules.peers.solar import SOLARAttention

__all__ = [
    "DINAttention",
    "ETAAttention",
    "HSTUAttention",
    "LowRankAttention",
    "MeanPooling",
    "SDIMAttention",
    "SIMAttention",
    "SOLARAttention",
    "TWINAttention",
]
