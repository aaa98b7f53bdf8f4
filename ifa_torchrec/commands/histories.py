"""The histories of a log's users as states: for what builds all of them, and for what builds some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.data.schema import USER
from ifa_torchrec.data.vocabulary import integer_of
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.serving import StateError, StateStore, forgotten_until

NEVER = np.iinfo(np.int64).min + 1  # the least one is numpy's NaT
EVER = np.iinfo(np.int64).max
MAX_EVENTS, MAX_REQUESTS = 65536, 128
"""Most events and users of a batch."""


class UserHistories(NamedTuple):
    """Each of some users' events but those of the last one's time, and then these: as requests without
    candidates, each made just after the last event in it; and the times of those events."""

    earlier: RankingDataset
    earlier_times: np.ndarray
    last: RankingDataset
    last_times: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Events of each user."""
        return self.earlier.history_lengths + self.last.history_lengths


def histories_of(
    log: EventLog, users: np.ndarray, until: int = EVER, forgotten: Sequence[int | None] | None = None
) -> UserHistories:
    """The histories of users.

    Args:
        log: the event log.
        users: [U] int64, the log's numbers of them.
        until: microseconds; only events before.
        forgotten: [U], until when each one's events do not count; by default none was forgotten.
    """
    since = np.full(len(users), NEVER)
    begin, end = log.history_range(users, np.full(len(users), until))
    if forgotten is not None:
        since = np.array([NEVER if time is None else time + 1 for time in forgotten], np.int64)
        begin = np.maximum(begin, log.history_range(users, since)[1])
    time_of = log.events["time"]
    end = np.maximum(end, begin)  # where there is no event before it

    def last_before(end: np.ndarray) -> np.ndarray:
        return np.where(end > begin, time_of[np.maximum(end, 1) - 1], NEVER)

    last = last_before(end)
    earlier = last_before(np.maximum(log.history_range(users, last)[1], begin))
    before_last = np.minimum(earlier + 1, last)
    return UserHistories(
        RankingDataset.of_users(log, users, before_last, since=np.minimum(since, before_last)),
        earlier,
        RankingDataset.of_users(log, users, last + 1, since=last),
        last,
    )


class Users(NamedTuple):
    """Users by their external ids, and until when each one's events do not count."""

    ids: Sequence[int | str]
    forgotten: Sequence[int | None]


def write_states(
    model: DLRM_IFA,
    device: torch.device,
    store: StateStore,
    histories: UserHistories,
    users: Users,
    indices: Sequence[int],
) -> tuple[int, int]:
    """Encode some of the users, and write those who have no state.

    Args:
        model: in eval mode; its tables may be spread over ranks, which all call this then.
        device: the model's.
        store: where to.
        histories, users: of the same users.
        indices: which of them, EMPTY_REQUEST in place of one.

    Returns:
        How many users it was, and the bytes written.
    """
    states = [
        model.encode(part[list(indices)].to(device)).to("cpu")
        for part in (histories.earlier, histories.last)
    ]
    mine = [place for place, i in enumerate(indices) if i != EMPTY_REQUEST]
    rows = [indices[place] for place in mine]
    if not rows:
        return 0, 0
    size = store.write(
        [users.ids[row] for row in rows],
        states[0][mine],
        histories.earlier_times[rows].tolist(),
        states[1][mine],
        histories.last_times[rows].tolist(),
        [users.forgotten[row] for row in rows],
    )
    return len(rows), size


class BuildFromLog:
    """Builds states of users who are named, from the log that a build of all reads.

    Args:
        model: whose weights the states are of, its tables whole on this process, on the CPU.
        log: the event log.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.histories import BuildFromLog
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> from ifa_torchrec.serving.states.lazy import LazyStateStore
        >>> from ifa_torchrec.training.run import load_run
        >>> def lazily(trained, folder):  # of a run whose states were begun
        ...     run = load_run(trained, sharded=False)
        ...     build = BuildFromLog(run.dlrm, run.log)
        ...     return LazyStateStore(open_key_value_store(folder), run.version, build, within=1)
    """

    def __init__(self, model: DLRM_IFA, log: EventLog) -> None:
        self._model, self._log = model.eval(), log
        self._source = log.fingerprint()
        self._numbers([""])  # makes what ids are looked up by, for processes that are forked to share

    def check(self, store: StateStore) -> None:
        """See that the store's states were begun from this log.

        Raises:
            StateError: they were not.
        """
        if store.source.split(" ")[0] != self._source:
            raise StateError(
                f"states of weights {store.version!r} were begun from another log than "
                f"{self._log.place}, or it has changed since; give that log (--data)"
            )

    @torch.no_grad()
    def __call__(self, store: StateStore, users: Sequence[int | str]) -> None:
        """Write the states of those of the users who have events in the log and no state.

        Args:
            store: begun from this log.
            users: external ids.
        """
        numbers = dict(zip(users, self._numbers(users), strict=True))
        ids = [user for user, number in numbers.items() if number is not None]
        if not ids or store.latest is None or not len(self._log.users):
            return
        found = Users(ids, forgotten_until(store.key_values, ids))
        rows = np.array([numbers[user] for user in ids], np.int64)
        histories = histories_of(self._log, rows, store.latest + 1, found.forgotten)
        left = np.flatnonzero(histories.lengths > 0)
        for indices in EventBudgetSampler(histories.lengths[left], MAX_EVENTS, MAX_REQUESTS):
            some = left[indices].tolist()
            write_states(self._model, torch.device("cpu"), store, histories, found, some)

    def _numbers(self, users: Sequence[int | str]) -> list[int | None]:
        """The log's number of each user, None of those that it cannot have."""
        if USER not in self._log.vocabulary.names:
            return [integer_of(user) for user in users]
        return [row or None for row in self._log.vocabulary[USER].rows_of(users).tolist()]
