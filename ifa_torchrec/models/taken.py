"""What is taken into a set already, and what one more candidate is worth to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ifa_torchrec.models.archs import Candidates
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.modules import TakenRelation, Task
from ifa_torchrec.modules.candidate_set import Related
from ifa_torchrec.modules.tasks import ranking_weights


class TakenArch(nn.Module):
    """What those that are taken already do to the logits of the candidates.

    A module beside SetArch, which it does not touch: of a set that grows it is all that changes.

    Args:
        config: DLRM_IFAConfig.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import Candidates
        >>> from ifa_torchrec.models.taken import TakenArch
        >>> arch = TakenArch(DLRM_IFAConfig(("item",), ifa=IFAConfig(8)))
        >>> ids = torch.tensor([[5], [6], [5]])
        >>> candidates = Candidates(torch.randn(3, 8), torch.tensor([0, 2, 3]), (), (), ids)
        >>> arch(candidates, torch.tensor([True, False, False])).shape
        torch.Size([3, 1])
    """

    def __init__(self, config: DLRM_IFAConfig) -> None:
        super().__init__()
        dim = config.ifa.embedding_dim
        self.member_norm = nn.LayerNorm(dim)
        self.relation = TakenRelation(dim, config.num_tasks, len(config.item_names))

    def forward(self, candidates: Candidates, taken: Tensor) -> Tensor:
        """What is added to the logits, [M, T], of ``taken`` [M] bool; 0 where nothing is taken."""
        return self.relation.terms(candidates.related or self.related(candidates), taken)

    def related(self, candidates: Candidates) -> Related:
        """What does not depend on what is taken."""
        return self.relation.related(candidates.members(self.member_norm), candidates.ids)

    def gain(self, candidates: Candidates, taken: Tensor, tasks: Sequence[Task]) -> Tensor:
        """What a set is worth more with each candidate: what that one is worth given the taken, and
        what it does to these.

        Args:
            candidates: with their logits.
            taken: [M] bool.
            tasks: T of them; worth are the tasks that rank, see ``set_worth``.

        Returns:
            [M], float32 at least; of a candidate that is taken, nothing that means anything.
        """
        if candidates.logits is None:
            raise ValueError("TakenArch.gain: the candidates have no logits; give scored ones")
        related = candidates.related or self.related(candidates)
        given = candidates.logits + self.relation.terms(related, taken)
        worth = set_worth(given, tasks)
        changes: list[Tensor] = []
        for rows, _, terms in self.relation.between(related, taken):
            changed = set_worth((given[rows][:, None] + terms).flatten(0, 1), tasks)
            changes.append(changed.unflatten(0, terms.shape[:2]).sum(0) - worth[rows].sum())
        return worth + torch.cat([worth[:0], *changes])


def set_worth(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """What each of the candidates of a set adds to its worth: the sum over the tasks that rank of rank
    times the probability of a binary task, or the standardised prediction of a regression.

    Unlike ``ranking_score``, which of one task is its logit, this can be added up over a set.

    Args:
        logits: [M, T] floating point.
        tasks: T of them.

    Returns:
        [M], float32 at least.

    Example:
        >>> import torch
        >>> from ifa_torchrec.models.taken import set_worth
        >>> from ifa_torchrec.modules import Task
        >>> set_worth(torch.zeros(2, 2), (Task("click", rank=1.0), Task("buy", rank=5.0))).tolist()
        [3.0, 3.0]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ranking = ranking_weights(tasks)
    parts = [
        ranking[task.name] * (logit.sigmoid() if task.kind == "binary" else logit)
        for task, logit in zip(tasks, logits.unbind(1), strict=True)
        if task.name in ranking
    ]
    return torch.stack(parts).sum(0)
