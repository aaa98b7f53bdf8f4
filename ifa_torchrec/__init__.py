"""IFA, Interaction Fidelity Attention, for TorchRec: whole histories at linear cost."""

from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.models import DLRM_IFA, DLRM_IFAConfig, DLRM_IFATrain
from ifa_torchrec.modules import (
    CandidateSetEncoder,
    CandidateSetLoss,
    IFAConfig,
    InteractionFidelityAttention,
    UserState,
    generate_set,
)

__all__ = [
    "DLRM_IFA",
    "CandidateSetEncoder",
    "CandidateSetLoss",
    "DLRM_IFAConfig",
    "DLRM_IFATrain",
    "IFAConfig",
    "InteractionFidelityAttention",
    "RankingBatch",
    "UserState",
    "generate_set",
]
