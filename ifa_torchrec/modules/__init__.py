"""IFA as a module, and the interactions it is compared with."""

from ifa_torchrec.modules.ifa import InteractionFidelityAttention
from ifa_torchrec.modules.interaction import IFAConfig, SequenceInteraction
from ifa_torchrec.modules.peers import MeanPooling, SoftmaxAttention
from ifa_torchrec.modules.user_state import UserState

__all__ = [
    "IFAConfig",
    "InteractionFidelityAttention",
    "MeanPooling",
    "SequenceInteraction",
    "SoftmaxAttention",
    "UserState",
]
