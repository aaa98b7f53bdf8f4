"""IFA as a module, the candidate set modules, and the interactions that IFA is compared with."""

from ifa_torchrec.modules.base import SequenceInteraction
from ifa_torchrec.modules.candidate_loss import CandidateSetLoss, CandidateSetLossConfig
from ifa_torchrec.modules.candidate_set import (
    CandidateSetConfig,
    CandidateSetEncoder,
    TakenRelation,
)
from ifa_torchrec.modules.config import IFAConfig, InteractionConfig
from ifa_torchrec.modules.generation import generate_set
from ifa_torchrec.modules.history import History
from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.interactions import INTERACTIONS
from ifa_torchrec.modules.peers import (
    DINAttention,
    ETAAttention,
    HSTUAttention,
    LowRankAttention,
    MeanPooling,
    SDIMAttention,
    SIMAttention,
    SOLARAttention,
    TWINAttention,
)
from ifa_torchrec.modules.softmax import SoftmaxAttention
from ifa_torchrec.modules.tasks import Task, predictions, ranking_score
from ifa_torchrec.modules.user_state import UserState

__all__ = [
    "INTERACTIONS",
    "CandidateSetConfig",
    "CandidateSetEncoder",
    "CandidateSetLoss",
    "CandidateSetLossConfig",
    "DINAttention",
    "ETAAttention",
    "HSTUAttention",
    "History",
    "IFAConfig",
    "InteractionConfig",
    "InteractionFidelityAttention",
    "LowRankAttention",
    "MeanPooling",
    "SDIMAttention",
    "SIMAttention",
    "SOLARAttention",
    "SequenceInteraction",
    "SoftmaxAttention",
    "TWINAttention",
    "TakenRelation",
    "Task",
    "UserState",
    "generate_set",
    "predictions",
    "ranking_score",
]
