"""Encode every user's history into a store of states.

    ifa build-states --run runs/mine --store runs/states --position 0
    torchrun --nproc-per-node 2 -m ifa_torchrec build-states -- --run runs/mine \\
        --store redis://host:6379/0 --position 0

    ifa build-states --run runs/mine/tuesday --store runs/states --position 9000 \\
        --unchanged-from runs/mine/monday

The store is a folder, with an LMDB file that the processes of one machine share, or a Redis server or
cluster. If the build is killed, the same command resumes it. While it runs, `ifa serve --lazy` can rank
from the same store and builds requested users first; --warm-start DAYS begins with recently active
users. Other versions' states stay in the store; ifa states drops them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import tyro

from ifa_torchrec.commands.histories import (
    EVER,
    MAX_EVENTS,
    MAX_REQUESTS,
    NEVER,
    UserHistories,
    Users,
    histories_of,
    write_states,
)
from ifa_torchrec.data import EventBudgetSampler, EventLog
from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.distributed import checkpoint
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    StateError,
    StateLayout,
    StateStore,
    forgotten_until,
    open_key_value_store,
)
from ifa_torchrec.serving.times import utc
from ifa_torchrec.training.own import all_reduce_sum
from ifa_torchrec.training.progress import progress_bar
from ifa_torchrec.training.run import Run, load_run, version_of

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class BuildStatesConfig:
    """Options of ``ifa build-states``."""

    run: Path
    """Folder of a training run (its --out)."""
    store: str = field(repr=False)
    """Store to write the states to: a folder, or redis://HOST:PORT/NUMBER."""
    position: int | dict[int, int]
    """The first position of the event stream that is not in the log: 0 if the stream begins after the
    log. Events of the stream before it count as being in the states. For a stream with several
    partitions, each partition and its position: --position 0 1200 1 981; the default is 0."""
    data: str | Path | None = None
    """Event log, a folder or a URI; by default the one the run was trained on."""
    until: datetime | None = None
    """Only events before this time (UTC); by default all."""
    dtype: Literal["float32", "float16"] = "float32"
    """How states are stored; float16 halves their dense heads (docs/serving.md has the error)."""
    unchanged_from: Path | None = None
    """An earlier run whose states are in the store: users without events since then keep those states,
    made by its weights, instead of being encoded with the new weights."""
    warm_start: float | None = None
    """Build users with an event in the last DAYS days of the log first, then the others."""
    max_events: int = MAX_EVENTS
    """Most history events per batch and rank."""
    max_requests: int = MAX_REQUESTS
    """Most users per batch and rank."""

    def __post_init__(self) -> None:
        if self.warm_start is not None and not 0 <= self.warm_start < float("inf"):
            raise ConfigError(f"--warm-start: got {self.warm_start}; give days, 0 or more")
        given = {0: self.position} if isinstance(self.position, int) else self.position
        for partition, position in given.items():
            if not (0 <= partition < 2**32 and 0 <= position < 2**63):
                raise ConfigError(
                    f"--position: got {position} for partition {partition}; positions must be in "
                    "0..2**63 - 1, partitions in 0..2**32 - 1"
                )


@torch.no_grad()
def build_states(config: BuildStatesConfig) -> dict[str, float | str]:
    """Encode every user with events in the log. All ranks call this.

    Returns:
        "version" of the weights; "users" written by this call, on all ranks, and "users_per_second";
        "bytes_per_user", keys included, and "events_per_user", means over these users; "unchanged", how
        many of them keep the states of the earlier run.

    Raises:
        ValueError: the run's interaction has no user states.
        StateError: the states are complete, or were begun with other options; or the run was trained on
            truncated histories; or the log has events in the future.
        CheckpointError: the run has no checkpoint.
        LogError: the event log does not exist.
    """
    run = load_run(config.run, config.data)
    rank = dist.get_rank()
    histories = histories_of(run.log, run.log.users, _until(config))
    store = _begin(config, run, histories)
    users = _external_users(run.log)
    forgotten = _of_rank_0(lambda some: forgotten_until(store.key_values, some), users)
    if any(until is not None for until in forgotten):
        histories = histories_of(run.log, run.log.users, _until(config), forgotten)
    start, who = time.perf_counter(), Users(users, forgotten)
    kept = _keep_unchanged(config, store, histories, who)
    written, size, events = (kept + _write(config, run, histories, store, who)).tolist()
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
        "unchanged": int(kept[0]),
    }


def _of_rank_0(
    ask: Callable[[Sequence[int | str]], Sequence[Answer]], users: Sequence[int | str]
) -> list[Answer]:
    """Call ``ask`` on rank 0, for thousands of users at a time, and return all answers on every rank. If
    ranks looked for themselves, they would see each other's writes and divide different users."""
    parts = (users[n : n + 10_000] for n in range(0, len(users), 10_000))
    return checkpoint.on_rank_0(lambda: [answer for part in parts for answer in ask(part)])


def _begin(config: BuildStatesConfig, run: Run, histories: UserHistories) -> StateStore:
    """Begin or resume the build of the run's version; refuse options that would make wrong states."""
    layout = StateLayout.of(run.dlrm.candidate_arch.ifa, config.dtype)
    if run.config.history_length is not None:
        raise StateError(
            f"{config.run} was trained on only the latest {run.config.history_length} events of each "
            "user, but a state contains all of them; train without --history-length"
        )
    if "://" not in config.store and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise StateError(f"{config.store}: LMDB works on one machine only; on several use redis://")
    latest = int(histories.last_times[histories.lengths > 0].max(initial=NEVER))
    if latest > time.time_ns() // 1000 + MICROSECONDS_PER_DAY:
        raise StateError(
            f"{run.log.place}: the last event is at {utc(latest)}, in the future; what its user does "
            "before then would not count. Leave such events out with --until, or fix their times (are "
            "they in nanoseconds?)"
        )
    source = f"{run.log.fingerprint()} until {config.until}"
    key_values = open_key_value_store(config.store)
    vocabulary = run.log.vocabulary.digest
    return StateStore.begin(key_values, run.version, layout, config.position, source, latest, vocabulary)


def _left(store: StateStore, lengths: np.ndarray, who: Users) -> np.ndarray:
    """The users with events that have no state in the store."""
    known = np.array(_of_rank_0(lambda some: store.known(some).tolist(), who.ids), np.bool_)
    return np.flatnonzero(~known & (lengths > 0))


def _keep_unchanged(
    config: BuildStatesConfig, store: StateStore, histories: UserHistories, who: Users
) -> np.ndarray:
    """Copy the earlier run's states of users without new events; return the number of users, bytes and
    events over all ranks."""
    written = np.zeros(3)
    if config.unchanged_from is None:
        return written
    before = StateStore(store.key_values, version_of(config.unchanged_from))
    lengths, times = histories.lengths, histories.last_times
    left = _left(store, lengths, who)
    # the earlier vocabulary may not know the ids of later events
    left = left[times[left] <= (NEVER if before.latest is None else before.latest)]
    mine = left[dist.get_rank() :: dist.get_world_size()]
    for rows in np.array_split(mine, len(mine) // config.max_requests + 1):
        events = list(zip(lengths[rows].tolist(), times[rows].tolist(), strict=True))
        users, forgotten = [who.ids[row] for row in rows], [who.forgotten[row] for row in rows]
        found, size = store.take_over(before, users, events, forgotten)
        written += [found.sum(), size, lengths[rows][found].sum()]
    return all_reduce_sum(written)


def _write(
    config: BuildStatesConfig, run: Run, histories: UserHistories, store: StateStore, who: Users
) -> np.ndarray:
    """Encode the users without a state; return the number of users, bytes and events over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    lengths = histories.lengths
    left = _left(store, lengths, who)
    written = np.zeros(3)  # users, bytes, events
    model = run.dlrm.eval()
    done = len(who.ids) - len(left)
    with progress_bar(rank, total=len(who.ids), initial=done, desc="states", unit="user") as bar:
        for some in _by_turns(config, histories.last_times, left):
            sampler = EventBudgetSampler(
                lengths[some], config.max_events, config.max_requests, shard=(rank, world)
            )
            for step, indices in enumerate(sampler, 1):
                rows = [EMPTY_REQUEST if i == EMPTY_REQUEST else int(some[i]) for i in indices]
                count, size = write_states(model, run.device, store, histories, who, rows)
                events = sum(int(lengths[row]) for row in rows if row != EMPTY_REQUEST)
                written += [count, size, events]
                bar.update(done + sampler.requests_taken(step) - bar.n)
            done += len(some)
    return all_reduce_sum(written)


def _by_turns(config: BuildStatesConfig, last: np.ndarray, left: np.ndarray) -> list[np.ndarray]:
    """The remaining users in groups, in the order to build them: first those of --warm-start.

    Args:
        config: the options.
        last: [U], the time of each user's last event.
        left: indices of the remaining users.
    """
    if config.warm_start is None or not len(left):
        return [left]
    since = last.max() - round(config.warm_start * MICROSECONDS_PER_DAY)
    recent = last[left] >= since
    return [some for some in (left[recent], left[~recent]) if len(some)]


def _external_users(log: EventLog) -> list[int | str]:
    """The external id of each of the log's users, under which the states are stored."""
    if "user" not in log.vocabulary.names:
        return log.users.tolist()
    found = log.vocabulary["user"].at(log.users)
    users = [user for user in found if user is not None]
    if len(users) < len(found):
        nameless = log.users[[user is None for user in found]]
        raise StateError(
            f"{log.place}: the vocabulary has no id for user {nameless[0]} and {len(nameless) - 1} "
            "others, without which their states cannot be found; list all users in the vocabulary"
        )
    return users


def _until(config: BuildStatesConfig) -> int:
    """--until in microseconds."""
    if config.until is None:
        return EVER
    until = config.until
    if until.tzinfo is not None:
        until = until.astimezone(timezone.utc).replace(tzinfo=None)
    return int(np.datetime64(until, "us").astype(np.int64))


def main(config: Annotated[BuildStatesConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    result = build_states(config)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2))
    dist.destroy_process_group()


main.__doc__ = __doc__
