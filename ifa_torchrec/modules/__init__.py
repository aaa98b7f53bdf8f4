"""IFA as a module, the candidate set, and the interactions that IFA is compared with."""

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.candidate_loss import CandidateSetLoss, CandidateSetLossConfig
from ifa_torchrec.modules.candidate_set import (
    CandidateSetConfig,
    CandidateSetEncoder,
    generate_set,
)
from ifa_torchrec.modules.config import IFAConfig
from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.peers import (
    DINAttention,
    ETAAttention,
    LowRankAttention,
    MeanPooling,
    SDIMAttention,
    SIMAttention,
    SoftmaxAttention,
    TWINAttention,
)
from ifa_torchrec.modules.user_state import UserState

__all__ = [
    "CandidateSetConfig",
    "CandidateSetEncoder",
    "CandidateSetLoss",
    "CandidateSetLossConfig",
    "DINAttention",
    "ETAAttention",
    "IFAConfig",
    "InteractionFidelityAttention",
    "LowRankAttention",
    "MeanPooling",
    "SDIMAttention",
    "SIMAttention",
    "SequenceInteraction",
    "SoftmaxAttention",
    "TWINAttention",
    "UserState",
    "generate_set",
]
