"""Ranking models around the sequence interactions."""

from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.dlrm_ifa import DLRM_IFA, DLRM_IFATrain

__all__ = ["DLRM_IFA", "DLRM_IFAConfig", "DLRM_IFATrain"]
