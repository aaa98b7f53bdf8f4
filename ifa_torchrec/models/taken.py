"""How taken candidates change the others' logits, and what one more candidate adds to a set's worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ifa_torchrec.models.archs import Candidates
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.modules import TakenRelation, Task
from ifa_torchrec.modules.candidate_set import Related, check_taken
from ifa_torchrec.modules.generation import first_rows
from ifa_torchrec.modules.tasks import ranking_weights


class TakenArch(nn.Module):
    """How the candidates already taken change the logits of all candidates.

    It is separate from SetArch, whose output does not change: while a set grows, only this is computed
    again.

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
        """The term to add to the logits, [M, T], for ``taken`` [M] bool; 0 if nothing is taken."""
        return self.relation.terms(self.related(candidates), taken)

    def related(self, candidates: Candidates) -> Related:
        """The part of the computation that does not depend on what is taken."""
        return self.relation.related(candidates.members(self.member_norm), candidates.ids)

    def step(
        self, logits: Tensor, related: Related, rows: Tensor, tasks: Sequence[Task]
    ) -> tuple[Tensor, Tensor]:
        """One step of growing one request's set; what SetGain computes, but without its memory.

        Args:
            logits: [M, T] with nothing taken.
            related: the result of ``related``.
            rows: [K] int64, the taken candidates, each once.
            tasks: T of them.

        Returns:
            Logits [M, T] given the taken candidates, and what each candidate would add to the set's
            worth, [M], at least float32, meaningless for taken ones.
        """
        other = rows[:, None]
        to, back = self.relation.all_pairs(related, rows)
        itself = other == torch.arange(logits.shape[0], device=rows.device)
        given = logits + to.masked_fill(itself[..., None], 0.0).sum(0)
        return given, _gain(given, other, back, tasks)


class SetGain:
    """What each candidate would add to a set's worth: its own worth given the taken candidates, and the
    change in theirs. For ``generate_set``.

    It remembers what was taken in the previous call, so that a step only computes what the newly taken
    candidate changes, without running the model and however many are already taken.

    Args:
        arch: TakenArch.
        candidates: M candidates of B requests, with their logits [M, T].
        tasks: T of them; the tasks that rank define the worth, see ``set_worth``.

    Raises:
        ValueError: the candidates have no logits.

    Example:
        >>> import torch
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.models.archs import Candidates
        >>> from ifa_torchrec.models.taken import SetGain, TakenArch
        >>> from ifa_torchrec.modules import Task
        >>> arch = TakenArch(DLRM_IFAConfig(("item",), ifa=IFAConfig(8)))
        >>> ids, logits = torch.tensor([[5], [6], [5]]), torch.zeros(3, 1)
        >>> offsets = torch.tensor([0, 2, 3])
        >>> candidates = Candidates(torch.randn(3, 8), offsets, (), (), ids, logits)
        >>> gain = SetGain(arch, candidates, (Task("label"),))
        >>> gain(torch.tensor([False, True, False])).tolist()  # relations start at 0
        [0.5, 0.5, 0.5]
    """

    def __init__(self, arch: TakenArch, candidates: Candidates, tasks: Sequence[Task]) -> None:
        if candidates.logits is None:
            raise ValueError(
                "SetGain: the candidates have no logits; pass the result of DLRM_IFA.scored"
            )
        self._relation, self._tasks = arch.relation, tasks
        related, numbers = arch.related(candidates), arch.relation.pair_queries
        self._related = related._replace(numbers=None if numbers is None else numbers.table())
        self._start(candidates.logits)

    def _start(self, logits: Tensor) -> None:
        rows = logits.shape[0]
        self._alone = self._logits = logits  # with nothing taken, and given what is taken
        self._taken = torch.zeros(rows, dtype=torch.bool, device=logits.device)
        self._row = torch.arange(rows, device=logits.device)
        # for each step: the candidate taken in each row's request, and each row's term for it
        self._members: list[Tensor] = []
        self._back = logits.new_empty(0, *logits.shape)

    @torch.no_grad()
    def __call__(self, taken: Tensor) -> Tensor:
        """
        Args:
            taken: [M] bool.

        Returns:
            [M], at least float32; meaningless for taken candidates.

        Raises:
            ValueError: ``taken`` is not one bool per candidate.
        """
        check_taken(taken, self._row)
        if bool((self._taken & ~taken).any()):
            self._start(self._alone)
        request, requests = self._related.request, self._related.offsets.shape[0] - 1
        new = taken & ~self._taken
        while bool(new.any()):
            first = first_rows(new, request, requests)
            new = new & (self._row != (other := first if requests == 1 else first[request]))
            self._take(other)
        self._taken = taken
        members = self._row.new_empty(0, 1) if not self._members else torch.stack(self._members)
        return _gain(self._logits, members, self._back, self._tasks)

    def _take(self, other: Tensor) -> None:
        """Take candidate ``other[i]`` in the request of candidate i; [M] or [1]; M for none."""
        none = (other == self._row.shape[0]) | (other == self._row)
        if self._related.offsets.shape[0] == 2:
            to, back = (terms[0] for terms in self._relation.all_pairs(self._related, other))
        else:
            other = other.clamp(max=self._row.shape[0] - 1)
            to, back = self._relation.pairs(self._related, other)
        self._logits = self._logits + to.masked_fill(none[:, None], 0.0)
        self._members.append(other)
        self._back = torch.cat([self._back, back.masked_fill(none[:, None], 0.0)[None]])


def _gain(logits: Tensor, members: Tensor, back: Tensor, tasks: Sequence[Task]) -> Tensor:
    """What each candidate would add to the set's worth, from logits [M, T] given its members, rows
    [S, M] or [S, 1], and what each candidate adds to the terms of the members, ``back`` [S, M, T]."""
    worth = set_worth(logits, tasks)
    return worth + (set_worth(logits[members] + back, tasks) - worth[members]).sum(0)


def set_worth(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """What each candidate of a set contributes to its worth: the sum over the tasks that rank of rank
    times the probability for a binary task, or the standardised prediction for a regression.

    Unlike ``ranking_score``, which for one task is its logit, this can be summed over a set.

    Args:
        logits: [..., T] floating point.
        tasks: T of them.

    Returns:
        [...], at least float32.

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
        for task, logit in zip(tasks, logits.unbind(-1), strict=True)
        if task.name in ranking
    ]
    return torch.stack(parts).sum(0)
