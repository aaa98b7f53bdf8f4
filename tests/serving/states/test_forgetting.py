"""Forgetting users, dropping and trimming, with concurrent changes and kills at any step."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis
from test_state_store import (
    DAY,
    DENSE,
    Model,
    assert_holds,
    new_store,
    random_events,
    write,
)

from ifa_torchrec.serving import (
    Event,
    KeyValueStore,
    StateError,
    StateLayout,
    StateStore,
    StoreError,
    Trimmed,
    UnknownUserError,
    drop,
    forget,
    forgotten_until,
    open_key_value_store,
    trim_journal,
)
from ifa_torchrec.serving.states import lmdb_store
from ifa_torchrec.serving.states.journal import user_prefix
from ifa_torchrec.serving.states.layout import (
    BLOCK,
    JOURNAL,
    Keys,
    Place,
    journal_key,
    place_of,
    user_key,
)
from ifa_torchrec.serving.states.shared import tombstone_key

fork = multiprocessing.get_context("fork")
ANNA, NUMBER = "anna@example.org", 4_815_162_342_108
USERS = [ANNA, NUMBER, 3]


def traces(user: int | str) -> list[bytes]:
    """The bytes by which a user could be found in a store."""
    named = [str(user).encode()] if len(str(user)) > 6 else []
    return [user_key(user), user_prefix(user), *named]


def later_event(position: int, user: int | str) -> Event:
    return Event(position, user, 4, time.time_ns() // 1000 + 1_000_000)


def assert_never_seen(key_values: KeyValueStore, store: StateStore, user: int | str) -> None:
    assert not store.known([user]).any()
    with pytest.raises(UnknownUserError):
        store.read([user], [100 * DAY])
    keys = list(key_values.scan(b""))
    values = key_values.read(keys)
    for trace in traces(user):
        assert not [key for key in keys if trace in key]
        assert not [value for value in values if trace in (value or b"")]


@pytest.mark.parametrize("user", [ANNA, NUMBER])
def test_nothing_is_left_in_any_version_and_only_later_events_count(key_values, user):
    model, events = Model(), random_events(120, USERS)
    stores = [new_store(key_values, model, "v1"), new_store(key_values, model, "v2", position=30)]
    for store in stores:
        store.append(events, model.encode_each)
    gone = forget(key_values, user)
    mine = [event for event in events if event.user == user]
    assert gone.versions == ("v1", "v2") and gone.events == len(mine) and gone.records == 6
    assert abs(gone.until - time.time_ns() // 1000) < 60_000_000
    for store, rest in zip(stores, (events, events[30:]), strict=True):
        assert_never_seen(key_values, store, user)
        for other in {*USERS} - {user}:
            assert_holds(store, model, [event for event in rest if event.user == other])
        # sent again, at the same or other positions, the events do not count and leave nothing
        moved = Event(900, user, 3, gone.until)
        assert store.append([*mine, moved], model.encode_each) == [None] * (len(mine) + 1)
        assert_never_seen(key_values, store, user)
    after = later_event(1000, user)
    for store in stores:
        assert store.append([after], model.encode_each) == [True]
        assert_holds(store, model, [after], now=after.time + DAY)
    assert not forget(key_values, "nobody").anything


def test_a_clock_that_is_ahead_does_not_save_an_event_from_forgetting(key_values):
    model = Model()
    store = new_store(key_values, model)
    ahead = later_event(0, 1)
    store.append([ahead], model.encode_each)
    assert forget(key_values, 1).until == ahead.time
    assert store.append([ahead], model.encode_each) == [None]
    assert forget(key_values, 1).until == ahead.time  # the second time it is not earlier


def test_a_version_that_is_built_later_does_not_count_them(key_values):
    """From its log, whether its build has begun or not, and from the journal."""
    model, events = Model(), random_events(60, [1, 2])
    old = new_store(key_values, model, "v1")
    half = StateStore.begin(key_values, "v2", StateLayout.of(model.ifa), 40)
    write(half, model, events[:40])
    old.append(events, model.encode_each)
    forget(key_values, 1)
    drop(key_values, "v1")
    write(half, model, events[:40])  # the build read its log before
    half.finish()
    new = StateStore(key_values, "v2")
    for missed in new.missed():
        new.append(missed, model.encode_each)
    assert_never_seen(key_values, new, 1)
    assert_holds(new, model, [event for event in events if event.user == 2])
    until = forgotten_until(key_values, [1, 2])
    assert until[0] is not None and until[1] is None


def test_a_user_whose_events_were_left_out_is_written(key_values):
    model, after = Model(), later_event(0, 1)
    until = forget(key_values, 1).until
    store = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), 1)
    state = model.encode([[after]], [after.time])
    none = model.encode([[]], [0])
    store.write([1], none, [0], state, [after.time], [until])
    store.finish()
    assert_holds(StateStore(key_values, "v1"), model, [after], now=after.time + DAY)


def test_states_of_another_format_are_not_half_forgotten(key_values, monkeypatch):
    monkeypatch.setattr("ifa_torchrec.serving.states.store.FORMAT", "ifa-states/3")
    with pytest.raises(StateError, match="format"):  # the header is written, but cannot be read back
        StateStore.begin(key_values, "v1", StateLayout.of(Model().ifa), 0)
    with pytest.raises(StateError, match=r"have format 'ifa-states/3'.*drop them .*--drop v1"):
        forget(key_values, 1)
    assert forgotten_until(key_values, [1]) == [None]


# ---------------------------------------------------------------------------- between the steps


class Killed(BaseException):
    """Simulates the end of a process."""


def steps(key_values: KeyValueStore, monkeypatch, at: int | None, act: Callable[[], None]) -> list[str]:
    """Call ``act`` before the ``at``-th call of the store; return the names of the calls."""
    called: list[str] = []

    def watched(name: str, method: Callable) -> Callable:
        def call(*arguments, **named):
            called.append(name)
            if len(called) - 1 == at:
                with monkeypatch.context() as patch:
                    for each, original in originals.items():
                        patch.setattr(key_values, each, original)
                    act()
            return method(*arguments, **named)

        return call

    originals = {name: getattr(key_values, name) for name in ("read", "update", "scan", "delete")}
    for name, method in originals.items():
        monkeypatch.setattr(key_values, name, watched(name, method))
    return called


def kill() -> None:
    raise Killed


def test_killed_between_any_steps_all_or_nothing_is_forgotten(key_values, monkeypatch):
    model, events = Model(), random_events(40, [1, 2])
    mine = [event for event in events if event.user == 1]
    store = new_store(key_values, model)
    new_store(key_values, model, "v2")
    store.append(events, model.encode_each)
    step = 0
    while True:
        with monkeypatch.context() as patch:
            called = steps(key_values, patch, step, kill)
            try:
                forget(key_values, 1)
                break
            except Killed:
                step += 1
        if "update" not in called[:-1]:
            assert_holds(store, model, events)
            assert store.append(events, model.encode_each) == [False] * 40
        else:
            assert_never_seen(key_values, store, 1)
            assert store.append(mine, model.encode_each) == [None] * len(mine)
    assert step > 8
    assert_never_seen(key_values, store, 1)
    assert_holds(store, model, [event for event in events if event.user == 2])


@pytest.mark.parametrize("what", ["append", "append elsewhere", "build"])
def test_an_event_between_any_steps_is_forgotten_or_not_taken(key_values, monkeypatch, what):
    model, events = Model(), random_events(40, [1, 2])
    others = [event for event in events if event.user == 2]
    step, done = 0, False
    while not done:
        key_values.delete(list(key_values.scan(b"")))
        store, other = new_store(key_values, model, "v1"), new_store(key_values, model, "v2")
        store.append(events[:30], model.encode_each)
        other.append(events[:10], model.encode_each)

        def between(store=store, other=other) -> None:
            if what == "append":
                store.append(events[30:], model.encode_each)
            elif what == "append elsewhere":
                other.append(events[10:20], model.encode_each)
            else:
                building = StateStore.begin(key_values, "v3", StateLayout.of(model.ifa), 40)
                write(building, model, events)
                building.finish()

        with monkeypatch.context() as patch:
            called = steps(key_values, patch, step, between)
            forget(key_values, 1)
            done = len(called) <= step
        step += 1
        store.append(events, model.encode_each)
        for missed in other.missed():
            other.append(missed, model.encode_each)
        last = [store, other]
        if what == "build" and not done:
            last.append(StateStore(key_values, "v3"))
        for each in last:
            assert_never_seen(key_values, each, 1)
            assert_holds(each, model, others)


def append_or_forget(address: str, events: Sequence[Event], model: Model, user: int | None) -> None:
    store = StateStore(open_key_value_store(address), "v1")
    for first in range(0, len(events), 4):
        store.append(events[first : first + 4], model.encode_each)
        if user is not None and first % 20 == 0:
            forget(store.key_values, user)


def test_killed_at_any_moment_others_lose_nothing_and_count_once(address):
    model, events = Model(DENSE), random_events(240, [1, 2, 3])
    key_values = open_key_value_store(address)
    new_store(key_values, model)
    key_values.close()
    rng, kills = random.Random(0), 0
    while True:
        processes = [
            fork.Process(target=append_or_forget, args=(address, events[::step], model, user))
            for step, user in ((1, None), (-1, 2))
        ]
        for process in processes:
            process.start()
        if kills < 8:
            time.sleep(rng.uniform(0.02, 0.3))
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
        for process in processes:
            process.join()
        if kills >= 8 and [process.exitcode for process in processes] == [0, 0]:
            break
    key_values = open_key_value_store(address)
    store = StateStore(key_values, "v1")
    assert_never_seen(key_values, store, 2)
    assert_holds(store, model, [event for event in events if event.user != 2])
    key_values.close()


# ---------------------------------------------------------------------------- every byte


def test_after_compaction_no_byte_of_the_user_is_in_the_file(tmp_path):
    model, events = Model(), random_events(400, USERS)
    path = tmp_path / "states"
    key_values = open_key_value_store(str(path))
    stores = [new_store(key_values, model, version) for version in ("v1", "v2")]
    for store in stores:
        for first in range(0, 400, 50):
            store.append(events[first : first + 50], model.encode_each)
    for user in (ANNA, NUMBER):
        pages = key_values.read(list(key_values.scan(b"i" + Keys("v1").id + user_key(user))))
        wanted = [*traces(user), *(page[8:-4] for page in pages if page)]
        assert all(trace in (path / "data.mdb").read_bytes() for trace in traces(user))
        forget(key_values, user)
        key_values.compact()
        found = {file.name: file.read_bytes() for file in path.iterdir()}
        assert set(found) == {"data.mdb", "lock.mdb", "open.lock"}
        assert not [trace for trace in wanted for body in found.values() if trace in body]
        for store in stores:
            assert_never_seen(key_values, store, user)
    assert tombstone_key(ANNA) in found["data.mdb"]
    after = later_event(500, 3)
    for store in stores:
        assert_holds(store, model, [event for event in events if event.user == 3])
        assert store.append(events, model.encode_each).count(None) == len(
            [event for event in events if event.user != 3]
        )
        assert store.append([after], model.encode_each) == [True]
    key_values.close()
    key_values = open_key_value_store(str(path))
    assert StateStore(key_values, "v2").known(USERS).tolist() == [False, False, True]
    key_values.close()


def test_in_redis_no_key_or_value_has_the_user(redis_address):
    client = redis.Redis.from_url(redis_address)
    client.flushall()
    key_values, model = open_key_value_store(redis_address), Model()
    new_store(key_values, model).append(random_events(100, USERS), model.encode_each)
    for user in (ANNA, NUMBER):
        forget(key_values, user)
    keys = list(client.scan_iter(count=1000))
    found = [*keys, *client.mget(keys)]
    assert not [trace for user in (ANNA, NUMBER) for trace in traces(user) if trace in b"\0".join(found)]
    assert any(trace in b"\0".join(found) for trace in traces(3))
    with pytest.raises(StateError, match="BGREWRITEAOF"):
        key_values.compact()
    key_values.close()


def hold(address: str, held, release) -> None:
    store = open_key_value_store(address)
    held.set()
    release.wait(60)
    store.close()


def test_a_store_that_others_have_open_is_not_compacted(tmp_path):
    address = str(tmp_path / "states")
    open_key_value_store(address).close()
    held, release = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(address, held, release))
    other.start()
    assert held.wait(60)
    key_values = open_key_value_store(address)
    key_values.update([], lambda _: {b"a": b"1"})
    with pytest.raises(StoreError, match="another process has it open; stop all services"):
        key_values.compact()
    assert key_values.read([b"a"]) == [b"1"]  # it still works
    release.set()
    other.join()
    key_values.compact()
    assert key_values.read([b"a"]) == [b"1"]
    key_values.close()


def compact(address: str) -> None:
    open_key_value_store(address).compact()


def test_a_compaction_that_is_killed_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    address = str(tmp_path / "states")
    store = open_key_value_store(address)
    store.update([], lambda _: {b"%d" % n: bytes(100) for n in range(1000)})
    store.close()
    monkeypatch.setattr(lmdb_store.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    process = fork.Process(target=compact, args=(address,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert (Path(address) / "compact.mdb").exists()
    compact(address)
    assert not (Path(address) / "compact.mdb").exists()
    store = open_key_value_store(address)
    assert len(list(store.scan(b""))) == 1000
    store.close()


# ---------------------------------------------------------------------------- the journal


def journal(key_values: KeyValueStore) -> int:
    return len(list(key_values.scan(JOURNAL)))


def test_old_events_leave_the_journal_once_every_version_has_them(key_values):
    model = Model()
    events = [Event(n, 1, n % 7, n * DAY) for n in range(20)]
    first = new_store(key_values, model, "v1")
    first.append(events, model.encode_each)
    second = new_store(key_values, model, "v2", position=5)
    second.append(events[8:], model.encode_each)
    assert trim_journal(key_values, before=12 * DAY) == Trimmed(deleted=9, kept=3)
    assert journal(key_values) == 11
    assert [event.position for some in second.missed() for event in some] == [5, 6, 7]
    second.append(events[5:8], model.encode_each)
    assert trim_journal(key_values, before=12 * DAY) == Trimmed(deleted=3, kept=0)
    for store, rest in ((first, events), (second, events[5:])):
        assert not any(store.append(events, model.encode_each))  # still, each counts once
        assert_holds(store, model, rest)
    with pytest.raises(
        StateError, match=r"no longer has .* before position 12, .*only those before 11, .*--position 12"
    ):
        new_store(key_values, model, "v3", position=11)
    third = new_store(key_values, model, "v3", position=12)
    assert [event.position for some in third.missed() for event in some] == list(range(12, 20))


def test_each_partition_is_trimmed_by_itself(key_values):
    model = Model()
    events = [Event(n, 1, n % 7, n * DAY, partition=p) for p in range(3) for n in range(6 + p)]
    first = new_store(key_values, model, "v1", position={1: 2})
    first.append(events, model.encode_each)
    new_store(key_values, model, "v2", position={0: 5, 2: 1})
    # before day 4: all of partition 0; in the others, events that the second version lacks stay
    assert trim_journal(key_values, before=4 * DAY) == Trimmed(deleted=5, kept=5)
    message = r"before position 1 of partition 2, .*only those before 0, .*--position 1 or higher"
    with pytest.raises(StateError, match=message):
        new_store(key_values, model, "v3", position={0: 4})
    new_store(key_values, model, "v3", position={0: 4, 2: 1})
    drop(key_values, "v1")
    drop(key_values, "v2")
    left = [(place.partition, place.position) for place in map(place_of, key_values.scan(JOURNAL))]
    assert left == [(0, 4), (0, 5), *((1, n) for n in range(2, 7)), *((2, n) for n in range(1, 8))]


def test_a_version_that_begins_while_the_journal_is_trimmed_keeps_or_is_refused(key_values, monkeypatch):
    model, layout = Model(), StateLayout.of(Model().ifa)
    events = [Event(n, 1, n % 7, n) for n in range(8)]
    for end in (lambda: trim_journal(key_values, 100), lambda: drop(key_values, "v1")):
        step, begun = 0, 0
        while True:
            key_values.delete(list(key_values.scan(b"")))
            new_store(key_values, model).append(events, model.encode_each)
            refused: list[StateError] = []

            def begin(refused=refused) -> None:
                try:
                    StateStore.begin(key_values, "v2", layout, 3).finish()
                except StateError as error:
                    refused.append(error)

            with monkeypatch.context() as patch:
                called = steps(key_values, patch, step, begin)
                end()
            if len(called) <= step:
                break
            step += 1
            if not refused and called[step - 1 :].count("update") + called[step - 1 :].count("delete"):
                found = [e for some in StateStore(key_values, "v2").missed() for e in some]
                ended = journal(key_values) == 0 and "update" not in called[step - 1 :]
                assert ended or found == events[3:]
                begun += not ended
        assert step > 3 and begun


def test_the_last_versions_drop_ends_the_journal_not_the_tombstones(key_values):
    model, events = Model(), random_events(30, [1, 2])
    new_store(key_values, model, "v1").append(events, model.encode_each)
    forget(key_values, 1)
    trim_journal(key_values, 45 * DAY)
    drop(key_values, "v1")
    assert {key[:1] for key in key_values.scan(b"")} == {b"t"}
    store = new_store(key_values, model, "v1")
    taken = [None if event.user == 1 else True for event in events]
    assert store.append(events, model.encode_each) == taken


def test_a_start_reads_only_the_events_that_it_lacks(key_values, monkeypatch):
    model = Model(DENSE)
    count = BLOCK + 300
    events = [Event(n, 1, n % 7, n) for n in range(7, count)]
    store, other = (new_store(key_values, model, v, position=5) for v in ("v1", "v2"))
    other.append(events[count - 107 : count - 57], model.encode_each)
    store.append([*events[: count - 107], *events[count - 57 :]], model.encode_each)
    scanned, read = [], []
    scan, get = key_values.scan, key_values.read

    def watched(prefix: bytes, skip: Callable[[bytes], bytes]) -> Iterator[bytes]:
        return (scanned.append(key) or key for key in scan(prefix, skip))

    monkeypatch.setattr(key_values, "scan", watched)
    monkeypatch.setattr(key_values, "read", lambda keys, *then: read.extend(keys) or get(keys, *then))
    missed = [event for some in store.missed() for event in some]
    assert missed == events[count - 107 : count - 57]
    assert scanned == [journal_key(Place(0, n)) for n in range(BLOCK, count)]
    assert sum(key[:1] == JOURNAL for key in read) == len(missed) == 50
    assert sum(key[:1] == b"a" for key in read) < 300
