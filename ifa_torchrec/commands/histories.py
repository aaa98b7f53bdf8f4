"""Encodes users' histories as states, for a build of all users and for builds on demand."""

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

NEVER = np.iinfo(np.int64).min + 1  # the least int64 is numpy's NaT
EVER = np.iinfo(np.int64).max
MAX_EVENTS, MAX_REQUESTS = 65536, 128
"""Most events and users per batch."""


class UserHistories(NamedTuple):
    """Each user's events before the last event's time (``earlier``), and those at that time (``last``):
    as requests without candidates, each just after its last event; and the times of those events."""

    earlier: RankingDataset
    earlier_times: np.ndarray
    last: RankingDataset
    last_times: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of events per user."""
        return self.earlier.history_lengths + self.last.history_lengths


def histories_of(
    log: EventLog, users: np.ndarray, until: int = EVER, forgotten: Sequence[int | None] | None = None
) -> UserHistories:
    """The histories of users.

    Args:
        log: the event log.
        users: [U] int64, the log's numbers of the users.
        until: microseconds; only events before it are included.
        forgotten: [U] times up to which each user's events do not count, or None; by default no user
            was forgotten.
    """
    since = np.full(len(users), NEVER)
    begin, end = log.history_range(users, np.full(len(users), until))
    if forgotten is not None:
        since = np.array([NEVER if time is None else time + 1 for time in forgotten], np.int64)
        begin = np.maximum(begin, log.history_range(users, since)[1])
    time_of = log.events["time"]
    end = np.maximum(end, begin)  # if no event is left

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
    """External ids of users, and the time up to which each user's events do not count, or None."""

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
    """Encode some users, and write the states of those who have none.

    Args:
        model: in eval mode. If its tables are sharded, all ranks call this together.
        device: the model's device.
        store: the store to write to.
        histories, users: histories and ids of the same users.
        indices: which users; EMPTY_REQUEST fills an empty place.

    Returns:
        The number of users encoded, and the bytes written.
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
    """Builds the states of given users, from the log that the full build reads.

    Args:
        model: the model to encode with, on the CPU with unsharded tables.
        log: the event log.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.commands.histories import BuildFromLog
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> from ifa_torchrec.serving.states.lazy import LazyStateStore
        >>> from ifa_torchrec.training.run import load_run
        >>> def lazily(trained, folder):  # a run whose states were begun
        ...     run = load_run(trained, sharded=False)
        ...     build = BuildFromLog(run.dlrm, run.log)
        ...     return LazyStateStore(open_key_value_store(folder), run.version, build, within=1)
    """

    def __init__(self, model: DLRM_IFA, log: EventLog) -> None:
        self._model, self._log = model.eval(), log
        self._source = log.fingerprint()
        self._numbers([""])  # build the vocabulary's index now, so that forked processes share it

    def check(self, store: StateStore) -> None:
        """Check that the store's states were begun from this log.

        Raises:
            StateError: they were not.
        """
        if store.source.split(" ")[0] != self._source:
            raise StateError(
                f"states of weights {store.version!r} were begun from another log than "
                f"{self._log.place}, or the log changed since; give their log (--data)"
            )

    @torch.no_grad()
    def __call__(self, store: StateStore, users: Sequence[int | str]) -> None:
        """Write the states of those users who have events in the log and no state.

        Args:
            store: states that were begun from this log.
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
        """The log's number of each user; None for users that it cannot have."""
        if USER not in self._log.vocabulary.names:
            return [integer_of(user) for user in users]
        return [row or None for row in self._log.vocabulary[USER].rows_of(users).tolist()]
