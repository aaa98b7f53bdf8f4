"""``ifa build-states``: every user's state, from any number of ranks, resumed."""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from ranks import run_ranks
from toy import BUSY_USER, NEW_USER, NUM_EVENTS

from ifa_torchrec import IFAConfig, UserState
from ifa_torchrec.__main__ import main
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    StateError,
    StateStore,
    forget,
    open_key_value_store,
    versions,
)
from ifa_torchrec.serving.states.shared import pack_number, tombstone_key
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(math.inf, 30.0),
    identity_features=("item", "category"),
    identity_half_lives=(math.inf, 7.0),
    identity_buckets=64,
)
USERS = list(NUM_EVENTS)
END = int(np.datetime64("2024-05-01", "us").astype(np.int64))


@pytest.fixture(scope="module")
def run(log, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(log.path, out, ifa=IFA, max_requests=8, validate=False))
    return out


@torch.no_grad()
def expected(run: Run, before: int = END) -> UserState:
    """The users' states at END, from their events before a time."""
    histories = RankingDataset.of_users(run.log, np.array(USERS), np.full(len(USERS), before))
    batch = histories[list(range(len(USERS)))]
    batch.history_age += (END - before) / 86_400_000_000
    return run.dlrm.encode(batch)


def assert_built(store: str, run: Path, before: int = END) -> StateStore:
    loaded = load_run(run, sharded=False)
    states = StateStore(open_key_value_store(store), loaded.version)
    wanted = expected(loaded, before)
    every_key = np.arange(loaded.dlrm.config.ifa.identity_key_range)
    users = len(USERS)
    found, _ = states.read(USERS, [END] * users, [every_key] * users, [True] * users)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name, check_dtype=False
        )
    states.key_values.close()
    return states


def test_every_user_with_events_has_a_state(run, tmp_path):
    store = str(tmp_path / "states")
    result = build_states(BuildStatesConfig(run, store, position=5, max_events=60))
    assert result["users"] == len(USERS)
    assert result["events_per_user"] == sum(NUM_EVENTS.values()) / len(USERS)
    assert result["bytes_per_user"] > 4 * 2 * 4 * 5
    states = assert_built(store, run)
    assert states.positions == {0: 5}
    states = StateStore(open_key_value_store(store), result["version"])
    assert states.known([NEW_USER, BUSY_USER]).tolist() == [False, True]


@pytest.mark.parametrize("zone", [None, timezone(timedelta(hours=2))], ids=str)
def test_only_the_events_before_a_time(run, tmp_path, zone):
    store = str(tmp_path / "states")
    hour = 0 if zone is None else 2  # the same moment in that time zone
    build_states(BuildStatesConfig(run, store, 0, until=datetime(2024, 2, 10, hour, tzinfo=zone)))
    before = int(np.datetime64("2024-02-10", "us").astype(np.int64))
    assert_built(store, run, before)


def test_a_log_with_events_of_the_future_is_refused(run, tmp_path, monkeypatch):
    day = datetime(2024, 2, 10, tzinfo=timezone.utc)
    clock = SimpleNamespace(time_ns=lambda: int(day.timestamp()) * 10**9, perf_counter=time.perf_counter)
    monkeypatch.setattr("ifa_torchrec.commands.build_states.time", clock)
    with pytest.raises(StateError, match=r"last event is at 2024-03-.*, in the future.* --until"):
        build_states(BuildStatesConfig(run, str(tmp_path / "states"), 0))
    assert not (tmp_path / "states").exists()
    build_states(BuildStatesConfig(run, str(tmp_path / "states"), 0, until=day))


def test_a_user_who_was_forgotten_is_not_built_but_for_later_events(run, tmp_path):
    store = str(tmp_path / "states")
    key_values = open_key_value_store(store)
    forget(key_values, BUSY_USER)
    log = load_run(run, sharded=False).log
    other = next(user for user in USERS if NUM_EVENTS[user] > 5 and user != BUSY_USER)
    mine = slice(*log.user_offsets[np.searchsorted(log.users, other) + np.arange(2)])
    middle = int(np.sort(log.events["time"][mine])[2])
    key = tombstone_key(other)
    key_values.update([], lambda _: {key: pack_number(key, middle)})
    key_values.close()
    result = build_states(BuildStatesConfig(run, store, position=5))
    assert result["users"] == len(USERS) - 1
    states = StateStore(open_key_value_store(store), result["version"])
    assert states.known([BUSY_USER, other]).tolist() == [False, True]
    loaded = load_run(run, sharded=False)
    after = np.array([middle + 1])
    histories = RankingDataset.of_users(loaded.log, np.array([other]), np.array([END]), since=after)
    with torch.no_grad():
        wanted = loaded.dlrm.encode(histories[[0]])
    every_key = np.arange(loaded.dlrm.config.ifa.identity_key_range)
    found, _ = states.read([other], [END], [every_key])
    assert 0 < found.count.item() == (log.events["time"][mine] > middle).sum()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name, check_dtype=False
        )
    states.key_values.close()


def test_users_without_new_events_keep_the_states_of_the_run_before(run, log, tmp_path, address):
    other = tmp_path / "other"
    train(TrainConfig(log.path, other, ifa=IFA, max_requests=8, validate=False, seed=1))
    last = np.array([log.events["time"][end - 1] for end in log.user_offsets[1:]])
    until = np.sort(last)[1] + 1
    idle = (last < until).tolist()
    moment = datetime.fromtimestamp(until / 1e6, timezone.utc)
    built = build_states(BuildStatesConfig(run, address, 0, until=moment))
    assert built["unchanged"] == 0
    found = build_states(BuildStatesConfig(other, address, 0, unchanged_from=run))
    assert found["version"] != built["version"]
    assert (found["users"], found["unchanged"]) == (len(USERS), sum(idle))
    assert found["events_per_user"] == sum(NUM_EVENTS.values()) / len(USERS)

    every_key = np.arange(load_run(run, sharded=False).dlrm.config.ifa.identity_key_range)
    key_values = open_key_value_store(address)

    def states_of(version: str, users: list[int]) -> dict[str, torch.Tensor]:
        store = StateStore(key_values, version)
        return store.read(users, [END] * len(users), [every_key] * len(users))[0].state_dict()

    mine = [user for user, is_idle in zip(USERS, idle, strict=True) if is_idle]
    of_before = states_of(built["version"], mine)
    for name, value in states_of(found["version"], mine).items():
        torch.testing.assert_close(value, of_before[name], rtol=0, atol=0, msg=name)
    of_others = expected(load_run(other, sharded=False))
    active = [row for row, is_idle in enumerate(idle) if not is_idle]
    for name, value in states_of(found["version"], [USERS[row] for row in active]).items():
        wanted = of_others[active].state_dict()[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, msg=name, check_dtype=False)
    before = StateStore(key_values, built["version"])
    half = dataclasses.replace(before.layout, dtype="float16")
    with pytest.raises(StateError, match="have another layout than those of 'half'; build all"):
        begun = StateStore.begin(key_values, "half", half, 0)
        begun.take_over(before, USERS[:1], [(1, int(last[0]))], None)
    key_values.close()


class Stopped(Exception):
    """Simulates the end of a process."""


def build_on_ranks(run: Path, address: str, fail_after: int | None) -> dict:
    if fail_after is not None:
        write, written = StateStore.write, []

        def failing(self, *arguments):
            written.append(arguments)
            if len(written) > fail_after:
                raise Stopped
            return write(self, *arguments)

        StateStore.write = failing
    return build_states(BuildStatesConfig(run, address, 0, max_events=60, max_requests=1))


@pytest.mark.parametrize(("address", "world"), [("lmdb", 1), ("redis", 2)], indirect=["address"])
def test_ranks_share_the_users_and_resume_where_they_were_stopped(run, address, world):
    stopped = run_ranks(build_on_ranks, world, run, address, 1, check=False)
    assert {type(result) for result in stopped} == {Stopped}
    version = load_run(run, sharded=False).version
    key_values = open_key_value_store(address)
    with pytest.raises(StateError, match="incomplete states of weights"):
        StateStore(key_values, version)
    key_values.close()
    results = run_ranks(build_on_ranks, world, run, address, None)
    assert [result["users"] for result in results] == [len(USERS) - world] * world
    assert_built(address, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interaction": "softmax"}, "'softmax' has no user state; train with 'ifa'"),
        ({"history_length": 20}, "latest 20 events"),
    ],
)
def test_runs_without_states_are_refused(changes, message, log, tmp_path):
    config = TrainConfig(log.path, tmp_path / "run", ifa=IFA, validate=False)
    train(dataclasses.replace(config, **changes))
    with pytest.raises((StateError, ValueError), match=message):
        build_states(BuildStatesConfig(tmp_path / "run", str(tmp_path / "states"), 0))


def test_lmdb_serves_one_machine(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(StateError, match="LMDB works on one machine"):
        build_states(BuildStatesConfig(run, str(tmp_path / "states"), 0))


def test_position_takes_several_partitions():
    arguments = ["--run", "run", "--store", "states", "--position"]
    for given, position in ((["5"], 5), (["0", "1200", "1", "981"], {0: 1200, 1: 981})):
        assert tyro.cli(BuildStatesConfig, args=[*arguments, *given]).position == position
    with pytest.raises(SystemExit):
        tyro.cli(BuildStatesConfig, args=[*arguments, "0", "1200", "1"])


def test_versions_are_listed_and_dropped_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    store = str(tmp_path / "states")
    version = build_states(BuildStatesConfig(run, store, 7))["version"]
    command = ["ifa", "states", "--store", store]
    monkeypatch.setattr("sys.argv", command)
    main()
    digest = load_run(run, sharded=False).log.vocabulary.digest
    wanted = f"{version}: complete, float32, from a log up to position 7, vocabulary {digest}\n"
    assert capsys.readouterr().out == wanted
    monkeypatch.setattr("sys.argv", [*command, "--drop", "other"])
    with pytest.raises(SystemExit, match=rf"error: no states of weights 'other' here.*{version}"):
        main()
    monkeypatch.setattr("sys.argv", [*command, "--drop", version])
    main()
    assert versions(open_key_value_store(store)) == {}


def test_a_user_is_forgotten_and_the_journal_trimmed_on_the_command_line(
    run, tmp_path, monkeypatch, capsys
):
    store = str(tmp_path / "states")
    build_states(BuildStatesConfig(run, store, 7))
    command = ["ifa", "states", "--store", store]

    def said(*options: str) -> str:
        monkeypatch.setattr("sys.argv", [*command, *options])
        main()
        return capsys.readouterr().out

    assert f"user {BUSY_USER}: " in (out := said("--forget", str(BUSY_USER)))
    assert "and 0 journal events; events up to 20" in out and "on disk" not in out
    assert "nothing of the integer 123456; for the string of digits give" in said("--forget", "123456")
    assert "user '7': removed 0 state records" in said("--forget", '"7"')
    assert said("--trim-journal", "30").startswith("removed 0 events older than 30 days")
    assert said("--compact") == said()
    for bad in (["--forget", ""], ["--trim-journal", "-1"]):
        with pytest.raises(SystemExit, match=bad[0]):
            said(*bad)


@pytest.mark.parametrize("position", [-1, 2**63, {1: 2**63}, {2**32: 0}, {-1: 0}])
def test_an_impossible_position_is_refused(position: int | dict[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"--position: .*positions must be in 0"):
        BuildStatesConfig(Path("run"), "states", position)
