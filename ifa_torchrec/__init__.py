"""IFA (Interaction Fidelity Attention) for TorchRec: attention over whole histories at linear cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_FROM = {
    "RankingBatch": "batch",
    "DLRM_IFA": "models",
    "DLRM_IFAConfig": "models",
    "DLRM_IFATrain": "models",
    "CandidateSetEncoder": "modules",
    "CandidateSetLoss": "modules",
    "IFAConfig": "modules",
    "InteractionFidelityAttention": "modules",
    "UserState": "modules",
    "generate_set": "modules",
}

_PARTS = ("data", "distributed", "models", "modules", "ops", "serving", "training")

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


def __getattr__(name: str) -> object:
    # imported on first use: torch and torchrec take seconds to import, and ``ifa --help`` needs neither
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_PARTS]
