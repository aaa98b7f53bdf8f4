"""States built on demand equal those of the full build, which runs at the same time."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import BUSY_USER, NEW_USER, NUM_EVENTS

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, _begin, build_states
from ifa_torchrec.commands.histories import BuildFromLog, histories_of
from ifa_torchrec.commands.serve import ServeConfig, _load
from ifa_torchrec.data import EventLog
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    Event,
    KeyValueStore,
    Scorer,
    StateError,
    StateStore,
    StoreError,
    UnknownUserError,
    open_key_value_store,
)
from ifa_torchrec.serving.states.layout import CHECKSUM_BYTES
from ifa_torchrec.serving.states.lazy import LazyStateStore
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

LATER = int(np.datetime64("2024-07-19", "us").astype(np.int64))
POSITION = 1000


@pytest.fixture(scope="module")
def folder(log, tmp_path_factory) -> Path:
    ifa = IFAConfig(
        8, 2, half_lives=(math.inf, 30.0), identity_features=("item",), identity_half_lives=(7.0,)
    )
    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(log.path, out, ifa=ifa, max_requests=8, validate=False))
    return out


@pytest.fixture(scope="module")
def run(folder) -> Run:
    return load_run(folder, sharded=False)


def begun(run: Run, folder: Path, store: str) -> KeyValueStore:
    """A store whose build was begun, as if it had been killed."""
    config = BuildStatesConfig(folder, store, POSITION)
    _begin(config, run, histories_of(run.log, run.log.users)).key_values.close()
    return open_key_value_store(store)


def lazily(run: Run, key_values: KeyValueStore) -> LazyStateStore:
    store = LazyStateStore(key_values, run.version, BuildFromLog(run.dlrm, run.log), within=60)
    return store


def records(key_values: KeyValueStore) -> dict[bytes, bytes]:
    """All states, without the checksums, which differ between builds."""
    keys = [key for kind in (b"s", b"u", b"i") for key in key_values.scan(kind)]
    values = zip(keys, key_values.read(keys), strict=True)
    return {key: value[:-CHECKSUM_BYTES] for key, value in values if value is not None}


def event(user: int, position: int = POSITION) -> Event:
    return Event(position, user, 3, LATER)


def test_a_state_built_on_demand_equals_the_full_builds(run, folder, tmp_path):
    for name, most in (("alone", 1), ("together", 128)):
        build_states(BuildStatesConfig(folder, str(tmp_path / name), POSITION, max_requests=most))
    alone, together = (open_key_value_store(str(tmp_path / name)) for name in ("alone", "together"))
    key_values = begun(run, folder, str(tmp_path / "lazy"))
    lazy = lazily(run, key_values)
    with pytest.raises(StateError, match="incomplete states of weights"):
        StateStore(key_values, run.version)
    with pytest.raises(UnknownUserError):
        lazy.read([NEW_USER], [None])
    assert not records(key_values)
    for user in NUM_EVENTS:
        lazy.read([user], [None])
    assert lazy.read([NEW_USER], [None], new_users=[True])[0].count.tolist() == [0]
    # equal byte for byte if each is encoded alone, otherwise up to the order of float additions
    assert records(key_values) == records(alone)
    users, keys = list(NUM_EVENTS), np.arange(run.dlrm.config.ifa.identity_key_range)
    found, wanted = (
        store.read(users, [LATER] * len(users), [keys] * len(users))[0].state_dict()
        for store in (lazy, StateStore(together, run.version))
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_events_are_added_to_whole_states_and_a_concurrent_build_keeps_them(
    run, folder, tmp_path, monkeypatch
):
    config = BuildStatesConfig(folder, str(tmp_path / "built"), POSITION, max_requests=1)
    build_states(config)
    built = open_key_value_store(str(tmp_path / "built"))
    key_values = begun(run, folder, str(tmp_path / "lazy"))
    lazy = lazily(run, key_values)
    events = [event(BUSY_USER), event(NEW_USER, POSITION + 1)]
    for store in (StateStore(built, run.version), lazy):
        results = Scorer(run.dlrm, run.log, store).append(events)
        assert [result.status for result in results] == ["taken", "taken"]
    assert not lazy.whole
    # a process can open a folder only once
    monkeypatch.setattr(key_values, "close", lambda: None)
    monkeypatch.setattr("ifa_torchrec.commands.build_states.open_key_value_store", lambda _: key_values)
    assert build_states(config)["users"] == len(NUM_EVENTS) - 1
    assert records(key_values) == records(built)
    # the lazy store keeps serving, and no longer looks for missing users
    lazy.check()
    assert lazy.whole
    assert StateStore(key_values, run.version).whole


def test_journal_events_are_added_to_whole_states(run, folder, tmp_path):
    build_states(BuildStatesConfig(folder, str(tmp_path / "states"), POSITION))
    key_values = open_key_value_store(str(tmp_path / "states"))
    other = StateStore(key_values, run.version)
    Scorer(run.dlrm, run.log, other).append([event(BUSY_USER)])
    # the journal is another version's; this one's states are begun again under another name
    store = StateStore.begin(
        key_values, "again", other.layout, POSITION, other.source, other.latest, other.vocabulary
    )
    lazy = LazyStateStore(key_values, store.version, BuildFromLog(run.dlrm, run.log), within=60)
    scorer = Scorer(run.dlrm, run.log, lazy)
    assert scorer.catch_up() == 1
    count = lazy.read([BUSY_USER], [LATER + 1])[0].count
    assert count.tolist() == [NUM_EVENTS[BUSY_USER] + 1]
    key_values.close()


def test_a_user_not_built_in_time_is_an_error_first_and_ranked_later(run, folder, tmp_path):
    key_values = begun(run, folder, str(tmp_path / "lazy"))
    go_on, build, calls = threading.Event(), BuildFromLog(run.dlrm, run.log), []

    def slow(store, users):
        calls.append(list(users))
        go_on.wait()
        build(store, users)

    lazy = LazyStateStore(key_values, run.version, slow, within=0.05)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"1 users, {BUSY_USER} among them, are still being built"):
            lazy.read([BUSY_USER], [None])
    go_on.set()
    # an event waits without a time limit
    Scorer(run.dlrm, run.log, lazy).append([event(BUSY_USER)])
    assert lazy.read([BUSY_USER], [LATER + 1])[0].count.tolist() == [NUM_EVENTS[BUSY_USER] + 1]
    assert calls == [[BUSY_USER]]


def test_the_log_must_be_that_of_the_build(run, folder, toy, tmp_path):
    key_values = begun(run, folder, str(tmp_path / "lazy"))
    config = ServeConfig(folder, str(tmp_path / "lazy"), lazy=True)
    assert not _load(config).scorer(config, key_values).store.whole
    toy.events = toy.events[:-1]
    toy.write(tmp_path / "other")
    config = ServeConfig(folder, config.store, data=tmp_path / "other", lazy=True)
    with pytest.raises(StateError, match=r"begun from another log than .*other"):
        _load(config).scorer(config, key_values)
    with pytest.raises(StateError, match=r"no states of weights .* here; run ifa build-states"):
        LazyStateStore(key_values, "unheard of", lambda *_: None, within=1)


def test_a_warm_start_builds_the_latest_users_first(run, folder, log: EventLog, tmp_path, monkeypatch):
    written: list[int] = []
    write = StateStore.write

    def noted(self, users, *rest):
        written.extend(users)
        return write(self, users, *rest)

    monkeypatch.setattr(StateStore, "write", noted)
    last = {
        int(user): int(log.events["time"][end - 1])
        for user, end in zip(log.users, log.user_offsets[1:], strict=True)
    }
    by_time = sorted(last, key=last.__getitem__)
    days = (max(last.values()) - last[by_time[-2]]) / 86_400_000_000
    build_states(BuildStatesConfig(folder, str(tmp_path / "states"), 0, warm_start=days))
    assert set(written[:2]) == set(by_time[-2:]) and sorted(written) == sorted(last)
    with pytest.raises(ConfigError, match=r"--warm-start: got .*; give days"):
        BuildStatesConfig(folder, "states", 0, warm_start=-1)
