"""IFA as a module, the candidate set, and the interactions that IFA is compared with."""

from ifa_torchrec.modules.candidate_loss import CandidateSetLoss, CandidateSetLossConfig
from ifa_torchrec.modules.candidate_set import (
    CandidateSetConfig,
    CandidateSetEncoder,
    generate_set,
)
from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.interaction import IFAConfig, SequenceInteraction
from ifa_torchrec.modules.peers import MeanPooling, SoftmaxAttention
from ifa_torchrec.modules.user_state import UserState

__all__ = [
    "CandidateSetConfig",
    "CandidateSetEncoder",
    "CandidateSetLoss",
    "CandidateSetLossConfig",
    "IFAConfig",
    "InteractionFidelityAttention",
    "MeanPooling",
    "SequenceInteraction",
    "SoftmaxAttention",
    "UserState",
    "generate_set",
]
