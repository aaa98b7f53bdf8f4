"""Encode every user's history into a store of states.

    ifa build-states --run runs/mine --store runs/states --position 0
    torchrun --nproc-per-node 2 -m ifa_torchrec build-states -- --run runs/mine \\
        --store redis://host:6379/0 --position 0

The store is a folder, an LMDB file that the processes of one machine share, or a Redis server or
cluster. Killed, the same line goes on where it stopped. Other versions' states stay; ifa states drops
them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import tyro

from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset
from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.modules import UserState
from ifa_torchrec.serving import (
    StateError,
    StateLayout,
    StateStore,
    forgotten_until,
    open_key_value_store,
)
from ifa_torchrec.serving.times import utc
from ifa_torchrec.training.progress import progress_bar
from ifa_torchrec.training.run import Run, load_run

Answer = TypeVar("Answer")

_NEVER = np.iinfo(np.int64).min + 1  # the least one is numpy's NaT


@dataclass(frozen=True)
class BuildStatesConfig:
    """Options of ``ifa build-states``."""

    run: Path
    """Folder of a training run (its --out)."""
    store: str = field(repr=False)
    """Where the states go: a folder, or redis://HOST:PORT/NUMBER."""
    position: int | dict[int, int]
    """The first position of the event stream whose event the log has not: 0 where the stream begins
    after the log. Events of the stream before it count as being in the states. Of a stream of several
    partitions each and its position: --position 0 1200 1 981; of those not named it is 0."""
    data: str | Path | None = None
    """Event log, a folder or a URI; by default the one the run was trained on."""
    until: datetime | None = None
    """Only events before this time (UTC); by default all."""
    dtype: Literal["float32", "float16"] = "float32"
    """How states are stored; float16 halves their dense heads (docs/serving.md has the error)."""
    max_events: int = 65536
    """Budget of history events a batch and rank."""
    max_requests: int = 128
    """Most users a batch and rank."""


@torch.no_grad()
def build_states(config: BuildStatesConfig) -> dict[str, float | str]:
    """Encode every user of a log that has events. Called by all ranks.

    Returns:
        "version" of the weights; "users" written now, by all ranks, and "users_per_second";
        "bytes_per_user", keys included, and "events_per_user", both means over them.

    Raises:
        ValueError: the run's interaction has no user states.
        StateError: they are built already, or were begun with other options; or the run was trained on
            shortened histories; or the log has events of the future.
        CheckpointError: the run has no checkpoint.
        LogError: the event log is not there.
    """
    run = load_run(config.run, config.data)
    rank = dist.get_rank()
    histories = _histories(run.log, config.until)
    store = _begin(config, run, histories)
    users = _external_users(run.log)
    forgotten = _by_parts(lambda some: forgotten_until(store.key_values, some), users)
    if any(until is not None for until in forgotten):
        histories = _histories(run.log, config.until, forgotten)
    start = time.perf_counter()
    written, size, events = _write(config, run, histories, store, _Users(users, forgotten))
    seconds = time.perf_counter() - start
    if rank == 0:
        store.finish()
    dist.barrier()
    store.key_values.close()
    return {
        "version": run.version,
        "users": int(written),
        "users_per_second": written / seconds,
        "bytes_per_user": size / max(written, 1),
        "events_per_user": events / max(written, 1),
    }


class _Histories(NamedTuple):
    """Each of the log's users' events but those of the last one's time, and then these: as requests
    without candidates, each made just after the last event in it; and the times of those events."""

    earlier: RankingDataset
    earlier_times: np.ndarray
    last: RankingDataset
    last_times: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Events of each user."""
        return self.earlier.history_lengths + self.last.history_lengths


class _Users(NamedTuple):
    """The log's users by their external ids, and until when each one's events do not count."""

    ids: list[int | str]
    forgotten: list[int | None]


def _by_parts(
    ask: Callable[[Sequence[int | str]], Sequence[Answer]], users: Sequence[int | str]
) -> list[Answer]:
    """What ``ask`` says of each user, asked of some thousands at a time."""
    parts = [ask(users[n : n + 10_000]) for n in range(0, len(users), 10_000)]
    return [answer for part in parts for answer in part]


def _begin(config: BuildStatesConfig, run: Run, histories: _Histories) -> StateStore:
    """A store of the run's version, begun now or before; refused where its states would be wrong."""
    layout = StateLayout.of(run.dlrm.candidate_arch.ifa, config.dtype)
    if run.config.history_length is not None:
        raise StateError(
            f"{config.run} was trained on the latest {run.config.history_length} events; a state holds "
            "all of them. Train without --history-length"
        )
    if "://" not in config.store and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise StateError(f"{config.store}: LMDB serves one machine; on several use redis://")
    latest = int(histories.last_times[histories.lengths > 0].max(initial=_NEVER))
    if latest > time.time_ns() // 1000 + MICROSECONDS_PER_DAY:
        raise StateError(
            f"{run.log.place}: its last event is at {utc(latest)}, in the future, and what its user "
            "does before then would not count. Leave such events out with --until, or mend their "
            "times (of nanoseconds, perhaps?)"
        )
    source = f"{run.log.fingerprint()} until {config.until}"
    key_values = open_key_value_store(config.store)
    vocabulary = run.log.vocabulary.digest
    return StateStore.begin(key_values, run.version, layout, config.position, source, latest, vocabulary)


def _write(
    config: BuildStatesConfig, run: Run, histories: _Histories, store: StateStore, who: _Users
) -> tuple[float, float, float]:
    """Encode the users that the store has not; how many, their bytes and events, of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    lengths = histories.lengths
    known = np.array(_by_parts(lambda some: store.known(some).tolist(), who.ids), bool)
    left = np.flatnonzero(~known & (lengths > 0))
    dist.barrier()  # before anyone writes, so that all ranks share the same users
    sampler = EventBudgetSampler(
        lengths[left], config.max_events, config.max_requests, shard=(rank, world)
    )
    written = torch.zeros(3, dtype=torch.float64)  # users, bytes, events
    model = run.dlrm.eval()
    done = len(who.ids) - len(left)
    with progress_bar(rank, total=len(who.ids), initial=done, desc="states", unit="user") as bar:
        for step, indices in enumerate(sampler, 1):
            users_of_batch = [EMPTY_REQUEST if i == EMPTY_REQUEST else left[i] for i in indices]
            states: list[UserState] = []
            for part in (histories.earlier, histories.last):
                batch = part[users_of_batch].to(run.device)
                states.append(model.encode(batch).to("cpu"))
            mine = [place for place, i in enumerate(indices) if i != EMPTY_REQUEST]
            rows = left[[indices[place] for place in mine]]
            if mine:
                size = store.write(
                    [who.ids[row] for row in rows],
                    states[0][mine],
                    histories.earlier_times[rows].tolist(),
                    states[1][mine],
                    histories.last_times[rows].tolist(),
                    [who.forgotten[row] for row in rows],
                )
                written += torch.tensor([len(rows), size, lengths[rows].sum()])
            bar.update(done + sampler.requests_taken(step) - bar.n)
    dist.all_reduce(written)
    users_written, size, events = written.tolist()
    return users_written, size, events


def _external_users(log: EventLog) -> list[int | str]:
    """What the world calls each of the log's users, which their states go by."""
    if "user" not in log.vocabulary.names:
        return log.users.tolist()
    found = log.vocabulary["user"].at(log.users)
    users = [user for user in found if user is not None]
    if len(users) < len(found):
        nameless = log.users[[user is None for user in found]]
        raise StateError(
            f"{log.place}: its vocabulary has no id of user {nameless[0]}, nor of {len(nameless) - 1} "
            "others, by which a state could be found; list the users in the vocabulary"
        )
    return users


def _histories(
    log: EventLog, until: datetime | None, forgotten: Sequence[int | None] | None = None
) -> _Histories:
    """Of the events before a time, and after that until when their users were forgotten."""
    begin, end = log.user_offsets[:-1], log.user_offsets[1:]
    since = np.full(len(log.users), _NEVER)
    if forgotten is not None:
        since = np.array([_NEVER if time is None else time + 1 for time in forgotten])
        begin = np.maximum(begin, log.history_range(log.users, since)[1])
    time_of = log.events["time"]
    if until is not None:
        if until.tzinfo is not None:
            until = until.astimezone(timezone.utc).replace(tzinfo=None)
        bound = np.full(len(log.users), np.datetime64(until, "us").astype(np.int64))
        end = log.history_range(log.users, bound)[1]
    end = np.maximum(end, begin)  # where there is no event before it

    def last_before(end: np.ndarray) -> np.ndarray:
        return np.where(end > begin, time_of[np.maximum(end, 1) - 1], _NEVER)

    last = last_before(end)
    earlier = last_before(np.maximum(log.history_range(log.users, last)[1], begin))
    before_last = np.minimum(earlier + 1, last)
    return _Histories(
        RankingDataset.of_users(log, log.users, before_last, since=np.minimum(since, before_last)),
        earlier,
        RankingDataset.of_users(log, log.users, last + 1, since=last),
        last,
    )


def main(config: Annotated[BuildStatesConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    result = build_states(config)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2))
    dist.destroy_process_group()


main.__doc__ = __doc__
