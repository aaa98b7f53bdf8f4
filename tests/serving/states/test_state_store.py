"""States in a store: they equal one encoding of all events."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import signal
import struct
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import IFAConfig, InteractionFidelityAttention, UserState
from ifa_torchrec.serving import (
    Event,
    StateError,
    StateLayout,
    StateStore,
    StoreError,
    UnknownUserError,
    drop,
    open_key_value_store,
    versions,
)
from ifa_torchrec.serving.states import pages
from ifa_torchrec.serving.states.dense import DenseCodec, Latest
from ifa_torchrec.serving.states.layout import JOURNAL, Keys, Place, journal_key, user_key
from ifa_torchrec.serving.states.pages import RowCodec, Rows
from ifa_torchrec.serving.states.versions import pack_header

DAY = 86_400_000_000
CONFIG = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    feature_map="hedgehog",
    half_lives=(math.inf, 30.0),
    identity_features=("item", "category"),
    identity_buckets=7,  # so that some items collide
    identity_half_lives=(math.inf, 30.0, 7.0),
)
COUNTS = dataclasses.replace(CONFIG, identity_head_dim=0)
DENSE = dataclasses.replace(CONFIG, identity_features=())
NUM_ITEMS, NUM_CATEGORIES = 20, 3
fork = multiprocessing.get_context("fork")
generator = torch.Generator().manual_seed(0)
TOKENS = torch.randn(NUM_ITEMS, 8, generator=generator)


class Model:
    """Encodes events: a module and the tokens of its items."""

    def __init__(self, config: IFAConfig = CONFIG) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.ifa = InteractionFidelityAttention(config)
            for parameter in self.ifa.parameters():
                torch.nn.init.normal_(parameter, std=0.5)

    @torch.no_grad()
    def encode(self, histories: Sequence[Sequence[Event]], now: Sequence[int]) -> UserState:
        items = torch.tensor([e.item for h in histories for e in h], dtype=torch.int64)
        age = [(t - e.time) / DAY for h, t in zip(histories, now, strict=True) for e in h]
        ids = torch.stack([items, items % NUM_CATEGORIES], dim=1) if self.ifa.identity else None
        lengths = torch.tensor([len(h) for h in histories])
        return self.ifa.encode(JaggedTensor(TOKENS[items], lengths=lengths), torch.tensor(age), ids)

    def encode_each(self, events: Sequence[Event]) -> UserState:
        return self.encode([[event] for event in events], [event.time for event in events])

    @property
    def every_key(self) -> np.ndarray:
        return np.arange(self.ifa.config.identity_key_range)


def new_store(
    key_values, model: Model, version="v1", dtype="float32", position: int | dict[int, int] = 0
) -> StateStore:
    StateStore.begin(key_values, version, StateLayout.of(model.ifa, dtype), position).finish()
    return StateStore(key_values, version)


def random_events(count: int, users: Sequence[int], seed: int = 0) -> list[Event]:
    rng = random.Random(seed)
    return [
        Event(position, rng.choice(users), rng.randrange(NUM_ITEMS), rng.randrange(90 * DAY))
        for position in range(count)
    ]


def write(store: StateStore, model: Model, events: Sequence[Event]) -> int:
    """Write the states of all events, as a build does."""
    users = sorted({event.user for event in events})
    histories = [[e for e in events if e.user == user] for user in users]
    last = [max(e.time for e in history) for history in histories]
    earlier = [[e for e in h if e.time < t] for h, t in zip(histories, last, strict=True)]
    earlier_times = [max((e.time for e in h), default=0) for h in earlier]
    at_last = [[e for e in h if e.time == t] for h, t in zip(histories, last, strict=True)]
    return store.write(
        users, model.encode(earlier, earlier_times), earlier_times, model.encode(at_last, last), last
    )


def read(store: StateStore, model: Model, users: Sequence[int], now: int) -> UserState:
    states = store.read(users, [now] * len(users), [model.every_key] * len(users), [True] * len(users))
    return states[0]


def assert_holds(
    store: StateStore, model: Model, events: Sequence[Event], rtol: float = 1e-5, now: int = 100 * DAY
) -> None:
    """Check that the store's states equal one encoding of all events."""
    users = sorted({event.user for event in events})
    expected = model.encode([[e for e in events if e.user == u] for u in users], [now] * len(users))
    actual = read(store, model, users, now)
    assert actual.count.tolist() == expected.count.tolist()
    for name, value in expected.state_dict().items():
        if isinstance(value, torch.Tensor):
            scale = value.abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(
                actual.state_dict()[name], value, rtol=rtol, atol=rtol * scale, msg=name
            )


both_configs = pytest.mark.parametrize(
    "config", [CONFIG, COUNTS, DENSE], ids=["identity", "counts", "dense"]
)


@both_configs
def test_written_states_come_back_later_and_decayed(key_values, config):
    model, events = Model(config), random_events(60, users=[7, -3, 2**40])
    store = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), position=60)
    size = write(store, model, events)
    assert size > 3 * 2 * 4 * (8 + 1) * 2
    store.finish()
    assert_holds(StateStore(key_values, "v1"), model, events)
    assert store.known([7, 8, -3]).tolist() == [True, False, True]


@both_configs
def test_appended_states_are_those_of_all_events_in_any_order(key_values, config):
    model, events = Model(config), random_events(200, users=[1, 2, 3])
    store = new_store(key_values, model)
    shuffled = random.Random(1).sample(events, len(events))
    for first in range(0, len(shuffled), 17):
        assert all(store.append(shuffled[first : first + 17], model.encode_each))
    assert_holds(store, model, events)


def test_string_and_integer_users_never_collide(key_values):
    users = [7, "7", -7, "seven", 2**63 - 1, -(2**63)]
    model, events = Model(), random_events(120, users=users)
    store = new_store(key_values, model)
    assert all(store.append(events, model.encode_each))
    for user in users:
        assert_holds(store, model, [event for event in events if event.user == user])
    assert store.known([*users, "anna", 8]).tolist() == [True] * 6 + [False] * 2
    in_order = [user_key(user) for user in (-(2**63), -7, 0, 7, 2**63 - 1, "anything")]
    assert in_order == sorted(in_order)


def test_the_journal_gives_events_back_as_they_were(key_values):
    """The next version misses events that one version took, and gets them in full."""
    model = Model()
    events = [
        Event(0, "anna", 3, 5, {"action": "buy", "shop": -4}, {"amount": 2.5, "dwell": None}, 0.1),
        Event(2**62, -7, 4, 6),
        Event(9, 2**63 - 1, 5, 7, {"action": "\u00fcber"}, {}, 0.0),
    ]
    new_store(key_values, model).append(events, model.encode_each)
    missed = [event for some in new_store(key_values, model, "v2").missed() for event in some]
    assert sorted(missed, key=lambda event: event.position) == sorted(
        events, key=lambda event: event.position
    )


def test_only_the_rows_asked_for_are_read(key_values):
    model, events = Model(), random_events(50, users=[1])
    store = new_store(key_values, model)
    store.append(events, model.encode_each)
    state, _ = store.read([1, 1], [100 * DAY] * 2, [np.array([9, 3, 3]), np.array([], np.int64)])
    assert state.identity_key.tolist() == [3, 9]
    assert state.identity_offsets.tolist() == [0, 2, 2]


def test_replays_and_duplicates_change_nothing(key_values):
    model, events = Model(), random_events(300, users=[1, 2])
    store = new_store(key_values, model)
    twice = events[:10] + events[5:15]
    assert store.append(twice, model.encode_each) == [True] * 10 + [False] * 5 + [True] * 5
    for first in (0, 7, 100, 3, 200, 250, 0):
        store.append(events[first : first + 110], model.encode_each)
    assert store.append(events, model.encode_each) == [False] * 300
    assert_holds(store, model, events)


def test_places_far_apart(key_values):
    model = Model()
    store = new_store(key_values, model)
    places = [(0, 0), (0, 2**62), (0, 5), (1, 0), (1, 5), (7, 5), (2**32 - 1, 2**63 - 1)]
    events = [Event(position, 1, 3, 0, partition=partition) for partition, position in places]
    assert all(store.append(events, model.encode_each))
    assert not any(store.append(events[::-1], model.encode_each))
    later = new_store(key_values, model, "v2", position={7: 5, 1: 1})
    missed = [event for some in later.missed() for event in some]
    assert missed == [events[n] for n in (0, 2, 1, 4, 5, 6)]


def test_positions_in_the_log_are_in_the_states(key_values):
    model, events = Model(), random_events(20, users=[1])
    store = new_store(key_values, model, position=10)
    assert store.append(events, model.encode_each) == [False] * 10 + [True] * 10
    assert_holds(store, model, events[10:])


def test_the_log_has_each_partitions_events_before_its_position(key_values):
    """The log's end in one partition implies nothing for another, however early its event."""
    model = Model()
    store = new_store(key_values, model, position={0: 10, 2: 3})
    events = [
        Event(position, 1, 3, position, partition=partition)
        for partition in range(4)
        for position in (0, 2, 3, 9, 10)
    ]
    new = [event.position >= {0: 10, 2: 3}.get(event.partition, 0) for event in events]
    assert new == [False] * 4 + [True] * 6 + [False] * 2 + [True] * 8
    assert store.append(events, model.encode_each) == new
    assert not any(store.append(events, model.encode_each))
    assert_holds(store, model, [event for event, is_new in zip(events, new, strict=True) if is_new])
    assert StateStore(key_values, "v1").positions == {0: 10, 2: 3}
    layout = StateLayout.of(model.ifa)
    StateStore.begin(key_values, "v2", layout, {2: 3, 0: 10})
    StateStore.begin(key_values, "v2", layout, {0: 10, 2: 3})  # the same
    with pytest.raises(StateError, match="begun with another positions"):
        StateStore.begin(key_values, "v2", layout, 10)


def test_a_consumer_resumes_where_the_states_are(key_values):
    model = Model()
    store = new_store(key_values, model, position={0: 7, 2: 9000})
    assert store.stream_positions([2, 0, 1]) == {2: 9000, 0: 7, 1: 0}
    assert store.stream_positions([]) == {}
    store.set_stream_positions({0: 20, 1: 30, 2: 8000})
    store.set_stream_positions({0: 19, 1: 31})
    store.set_stream_positions({})
    again = StateStore(key_values, "v1")
    assert again.stream_positions([0, 1, 2]) == {0: 20, 1: 31, 2: 9000}
    other = new_store(key_values, model, "v2")
    assert other.stream_positions([0, 1]) == {0: 0, 1: 0}
    drop(key_values, "v1")
    assert new_store(key_values, model).stream_positions([0, 1]) == {0: 0, 1: 0}
    with pytest.raises(StoreError, match="rebuilt since"):
        store.set_stream_positions({0: 21})


def test_a_consumer_skips_complete_blocks_that_came_by_another_route(key_values):
    model = Model(DENSE)
    store = new_store(key_values, model, position={1: 4090})
    events = [Event(position, 7, 1, position, partition=1) for position in range(4090, 4100)]
    store.append(events, model.encode_each)
    assert store.stream_positions([0, 1]) == {0: 0, 1: 4096}
    store.set_stream_positions({1: 4100})
    assert store.stream_positions([1]) == {1: 4100}


def append_all(address: str, events: Sequence[Event], model: Model, batch: int) -> None:
    key_values = open_key_value_store(address)
    store = StateStore(key_values, "v1")
    for first in range(0, len(events), batch):
        store.append(events[first : first + batch], model.encode_each)
    key_values.close()


def test_two_writers_lose_no_update(address):
    model, events = Model(), random_events(400, users=[1, 2])
    key_values = open_key_value_store(address)
    new_store(key_values, model)
    key_values.close()
    # even and odd positions, so that the writers conflict all the time
    writers = [
        fork.Process(target=append_all, args=(address, events[part::2], model, 3)) for part in (0, 1)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    key_values = open_key_value_store(address)
    assert_holds(StateStore(key_values, "v1"), model, events)
    key_values.close()


def test_killed_at_any_moment_nothing_is_lost_and_nothing_counts_twice(address):
    model, events = Model(), random_events(600, users=[1, 2, 3])
    key_values = open_key_value_store(address)
    new_store(key_values, model)
    key_values.close()
    rng, kills = random.Random(0), 0
    while (
        True
    ):  # each start replays the stream from the beginning, like a consumer that records no position
        writer = fork.Process(target=append_all, args=(address, events, model, 2))
        reader = fork.Process(target=append_all, args=(address, events[::-1], model, 5))
        writer.start()
        reader.start()
        if kills < 12:
            time.sleep(rng.uniform(0.01, 0.25))
            for process in (writer, reader):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
        writer.join()
        reader.join()
        if kills >= 12 and writer.exitcode == reader.exitcode == 0:
            break
    key_values = open_key_value_store(address)
    assert_holds(StateStore(key_values, "v1"), model, events)
    key_values.close()


def test_states_of_other_weights_are_refused(key_values):
    model = Model()
    with pytest.raises(StateError, match=r": no states of weights 'v1' here; .* versions: none"):
        StateStore(key_values, "v1")
    new_store(key_values, model, "v1")
    with pytest.raises(StateError, match=r": no states of weights 'v2' here; .*\['v1'\]"):
        StateStore(key_values, "v2")
    assert list(versions(key_values)) == ["v1"]


def test_a_record_of_other_weights_in_their_place_is_refused(key_values):
    model, events = Model(), random_events(5, users=[1])
    one, other = (new_store(key_values, model, version) for version in ("v1", "v2"))
    one.append(events, model.encode_each)
    (record,) = key_values.read([Keys("v1").head(1)])
    key_values.update([], lambda found: {Keys("v2").head(1): record})
    with pytest.raises(StoreError, match=r"record of user 1 .* is damaged or from another build"):
        read(other, model, [1], 100 * DAY)


def test_incomplete_states_are_refused_and_resuming_needs_the_same_options(key_values):
    model = Model()
    layout = StateLayout.of(model.ifa)
    StateStore.begin(key_values, "v1", layout, 5, "log until June")
    with pytest.raises(StateError, match="incomplete states of weights"):
        StateStore(key_values, "v1")
    for other in (
        (StateLayout.of(model.ifa, "float16"), 5, "log until June"),
        (layout, 6, "log until June"),
        (layout, 5, "log until July"),
    ):
        with pytest.raises(StateError, match=r"begun with another (layout|positions|source);"):
            StateStore.begin(key_values, "v1", *other)
    StateStore.begin(key_values, "v1", layout, 5, "log until June").finish()
    with pytest.raises(StateError, match="are already built"):
        StateStore.begin(key_values, "v1", layout, 5, "log until June")


def test_a_layout_records_the_gates(key_values):
    def layout_of(**gates: int) -> StateLayout:
        return StateLayout.of(Model(dataclasses.replace(CONFIG, gates=gates)).ifa)

    layout, others = layout_of(action=5), [layout_of(), layout_of(action=6), layout_of(kind=5)]
    StateStore.begin(key_values, "v1", layout, 5)
    for other in others:
        with pytest.raises(StateError, match="begun with another layout;"):
            StateStore.begin(key_values, "v1", other, 5)
    StateStore.begin(key_values, "v1", layout, 5).finish()
    found = StateStore(key_values, "v1").layout
    assert found == layout and found not in others
    assert "gates={'action': 5}" in str(found)  # as in the scorer's message


def test_an_unknown_user_is_refused_unless_new(key_values):
    model = Model()
    store = new_store(key_values, model)
    with pytest.raises(UnknownUserError, match="user 9 has no state"):
        store.read([9], [0], [model.every_key])
    state, _ = store.read([9], [0], [model.every_key], [True])
    assert state.count.tolist() == [0]
    assert state.key_sum.abs().sum() == 0
    assert state.identity_offsets.tolist() == [0, 0]


def test_a_time_too_early_is_read_as_of_a_later_one_or_refused(key_values):
    model = Model()
    store = new_store(key_values, model)
    events = [Event(n, 1, n, time * DAY) for n, time in enumerate((9, 10, 11))]
    store.append(events, model.encode_each)
    for asked, as_of, seen in ((12, 12, 3), (11, 11, 2), (10.5, 10.5, 2), (10, 10 + 1 / DAY, 2)):
        state, at = store.read([1], [int(asked * DAY)], [model.every_key])
        assert at.tolist() == [int(as_of * DAY)]
        expected = model.encode([events[:seen]], at)
        assert state.count.tolist() == [seen]
        torch.testing.assert_close(state.key_value, expected.key_value, rtol=1e-5, atol=1e-6)
    assert store.read([1], [0], [model.every_key])[1].tolist() == [10 * DAY + 1]
    assert store.read([1], [10 * DAY + 1], strict=True)[1].tolist() == [10 * DAY + 1]
    with pytest.raises(StateError, match=r"1970-01-11.* and 1970-01-12.*, neither before .* 1970-01-11"):
        store.read([1], [10 * DAY], strict=True)


@both_configs
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("built", [0, 25, 40])
def test_a_request_sees_the_events_strictly_before_it_ties_or_not(tmp_path, config, dtype, built):
    """As in training. There are few distinct times, so that most have several events. A build writes the
    first ``built`` events in time; the others are appended in any order and batch size."""
    model, rng, users = Model(config), random.Random(built), [1, 2]
    events = [Event(n, rng.choice(users), rng.randrange(NUM_ITEMS), rng.randrange(8)) for n in range(60)]
    events = [dataclasses.replace(event, time=event.time * 5 * DAY) for event in events]
    events.sort(key=lambda event: event.time)
    key_values = open_key_value_store(str(tmp_path))
    store = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa, dtype), 0)
    if built:
        write(store, model, events[:built])
    store.finish()
    seen, left = events[:built], events[built:]
    rng.shuffle(left)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    asked = [(user, day * DAY + d) for user in users for day in range(0, 41, 5) for d in (-1, 0, 1)]
    exact = 0
    while True:
        histories = {user: [event for event in seen if event.user == user] for user in users}
        states, as_of = store.read(*zip(*asked, strict=True), [model.every_key] * len(asked), asked)
        before = [
            [e for e in histories[u] if e.time < t] for (u, _), t in zip(asked, as_of, strict=True)
        ]
        expected = model.encode(before, as_of.tolist()).state_dict()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                scale = value.abs().max().item() if value.numel() else 0
                torch.testing.assert_close(
                    getattr(states, name), value, rtol=tolerance, atol=tolerance * scale, msg=name
                )
        for (user, now), at in zip(asked, as_of.tolist(), strict=True):
            times = sorted({event.time for event in histories[user]})
            if now != at:  # only for times before the last time but one
                assert now <= times[-2] == at - 1
            elif len(times) > 1:
                assert now > times[-2]
            exact += now in times and now == at
        if not left:
            break
        part = rng.choice([1, 2, 7])
        assert all(store.append(left[:part], model.encode_each))
        seen, left = seen + left[:part], left[part:]
    assert exact >= 2
    key_values.close()


def test_without_a_time_it_is_now_or_the_last_event(key_values):
    model = Model()
    store = new_store(key_values, model)
    now = time.time_ns() // 1000
    ahead, past = now + DAY, now - 30 * DAY  # a half-life ago
    store.append([Event(0, 1, 2, ahead), Event(1, 2, 2, past)], model.encode_each)
    state, _ = store.read([1, 2], [None, None], [model.every_key] * 2)
    expected = model.encode([[Event(0, 1, 2, ahead)], [Event(1, 2, 2, past)]], [ahead, now])
    torch.testing.assert_close(state.key_sum, expected.key_sum, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.identity_sum, expected.identity_sum, rtol=1e-4, atol=1e-6)


def test_the_journal_brings_a_later_version_up_to_date(key_values):
    model, events = Model(), random_events(3000, users=range(5))
    old = new_store(key_values, model, "v1")
    for first in range(0, 3000, 500):
        old.append(events[first : first + 500], model.encode_each)
    # from a log with the first 1,000 events; 500 more arrived while it was being loaded
    new = new_store(key_values, model, "v2", position=1000)
    new.append(events[1500:2000], model.encode_each)
    for missed in new.missed():
        new.append(missed, model.encode_each)
    assert [event for part in new.missed() for event in part] == []
    assert_holds(new, model, events[1000:])
    assert_holds(old, model, events)


def test_drop_deletes_one_version_and_events_that_no_other_needs(key_values):
    model, events = Model(), random_events(50, users=[1, 2])
    old, new = new_store(key_values, model, "v1"), new_store(key_values, model, "v2", position=20)
    for store in (old, new):
        store.append(events, model.encode_each)
    drop(key_values, "v1")
    assert list(versions(key_values)) == ["v2"]
    with pytest.raises(StateError, match="no states of weights"):
        StateStore(key_values, "v1")
    assert_holds(StateStore(key_values, "v2"), model, events[20:])
    assert len(list(key_values.scan(JOURNAL))) == 30
    ours = [key for kind in b"suika" for key in key_values.scan(bytes([kind]) + Keys("v1").id)]
    assert ours == []
    with pytest.raises(StateError, match=r"'v1' here; there are \['v2'\]"):
        drop(key_values, "v1")


def test_a_bucket_of_one_value_stores_it_once(key_values):
    model = Model()
    store = new_store(key_values, model)
    store.append([Event(n, 1, 3, n * DAY) for n in range(9)], model.encode_each)
    page = Keys("v1").pages(1, np.zeros(1, np.int64))
    (once,) = key_values.read(page)
    store.append([Event(9, 1, 3 + 7, 9 * DAY)], model.encode_each)  # same bucket
    (each,) = key_values.read(page)
    rows_and_means = [struct.unpack_from("<II", page) for page in (once, each)]
    assert rows_and_means == [(1, 1), (2, 3 + 1)]  # including the mean of the second event's category


@both_configs
def test_users_read_together_equal_those_read_separately(key_values, monkeypatch, config):
    """No user gets another's row, although their keys are adjacent."""
    monkeypatch.setattr(pages, "PAGE_ROWS", 3)
    model, users = Model(config), [5, 2, 9, 5, 8, 2]  # 8 has no event
    store = new_store(key_values, model)
    for first in range(0, 60, 20):
        store.append(random_events(60, users=[5, 2, 9])[first : first + 20], model.encode_each)
    end = model.ifa.config.identity_key_range
    keys = [np.arange(-3, end + 3), np.array([0, end - 1]), *[np.array([], np.int64)] * 2]
    keys += [np.arange(end), np.array([end - 1, 7, -1, 0, end])]
    at = [100 * DAY] * len(users)
    together, _ = store.read(users, at, keys, [True] * len(users))
    alone = [store.read([u], [t], [k], [True])[0] for u, t, k in zip(users, at, keys, strict=True)]
    for name, value in UserState.cat(alone).state_dict().items():
        assert torch.equal(torch.as_tensor(together.state_dict()[name]), torch.as_tensor(value)), name


@both_configs
def test_events_added_together_make_the_same_records_as_separately(tmp_path, monkeypatch, config):
    """Some users are new; others have events at, before or after their last time, or all three."""
    monkeypatch.setattr(pages, "PAGE_ROWS", 3)
    model, rng = Model(config), random.Random(1)
    events = [
        Event(n, rng.choice([5, 2, 9, "anna", 8]), rng.randrange(NUM_ITEMS), rng.randrange(9) * DAY)
        for n in range(200)
    ]
    of_whom: list[dict] = []
    for name in ("together", "alone"):
        store = new_store(open_key_value_store(str(tmp_path / name)), model)
        for first in range(0, 200, 40):
            some = events[first : first + 40]
            whose = [e.user for e in some]
            for user in [None] if name == "together" else dict.fromkeys(whose):
                added = [e for e in some if user in (None, e.user)]
                assert all(store.append(added, model.encode_each))
        key_values = store.key_values
        mine = [key for kind in (b"s", b"u", b"i") for key in key_values.scan(kind)]
        # without the checksums, which depend on the build's mark
        of_whom.append({k: v[:-4] for k, v in zip(mine, key_values.read(mine), strict=True) if v})
    together, alone = of_whom
    assert together == alone
    assert len(together) >= 10  # a head and a record u of each user


@pytest.mark.parametrize("built", [0, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_many_keys_lie_in_several_pages(key_values, monkeypatch, dtype, built):
    """An event writes the pages of its own keys, and a request reads those of its candidates' keys."""
    monkeypatch.setattr(pages, "PAGE_ROWS", 8)
    model = Model(dataclasses.replace(COUNTS, identity_buckets=2**33))
    rng = random.Random(0)
    events = [Event(n, 1, rng.randrange(NUM_ITEMS), rng.randrange(90 * DAY)) for n in range(400)]
    store = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa, dtype), 0)
    if built:
        write(store, model, events[:built])
    store.finish()
    for first in range(built, 400, 7):
        store.append(events[first : first + 7], model.encode_each)
    mine = list(key_values.scan(b"i" + Keys("v1").id))
    assert len(mine) >= 3
    keys = np.array([-1, 1, 5, 19, 20, 2**33, 2**33 + 2, 2**33 + 3])  # -1: an unknown id
    state, _ = store.read([1], [100 * DAY], [keys])
    expected = model.encode([events], [100 * DAY])
    assert state.identity_key.tolist() == [1, 5, 19, 2**33 + 2]
    place = torch.searchsorted(expected.identity_key, state.identity_key)
    torch.testing.assert_close(
        state.identity_sum,
        expected.identity_sum[place],
        rtol=1e-5 if dtype == "float32" else 5e-3,
        atol=1e-6,
    )
    before = dict(zip(mine, key_values.read(mine), strict=True))
    store.append([Event(400, 1, 1, 95 * DAY)], model.encode_each)
    changed = [
        key for key, value in zip(mine, key_values.read(mine), strict=True) if before[key] != value
    ]
    assert changed == [mine[0], mine[-1]]


def test_float16_states_are_half_the_size_and_as_near_as_stated(key_values):
    model, events = Model(), random_events(400, users=[1, 2])
    for dtype, tolerance in (("float32", 1e-5), ("float16", 2e-3)):
        store = StateStore.begin(key_values, dtype, StateLayout.of(model.ifa, dtype), 0)
        write(store, model, events)
        store.finish()
        assert_holds(store, model, events, rtol=tolerance)


def test_float16_does_not_swallow_small_steps(key_values):
    """After many events each new one moves a mean by less than float16's precision."""
    model = Model(dataclasses.replace(DENSE, half_lives=None))
    same = [Event(n, 1, 0, 0) for n in range(4000)]
    others = [Event(4000 + n, 1, 1, 0) for n in range(4000)]
    store = new_store(key_values, model, dtype="float16")
    store.append(same, model.encode_each)
    for first in range(0, 4000, 8):  # each step is a transaction, so it is rounded
        store.append(others[first : first + 8], model.encode_each)
    expected = model.encode([same + others], [0])
    actual = read(store, model, [1], 1)
    error = (actual.key_value - expected.key_value).abs().max() / expected.key_value.abs().max()
    assert error < 0.01


def test_a_mean_beyond_float16_is_refused(key_values):
    model = Model()
    with torch.no_grad():
        model.ifa.value_proj.weight.mul_(1e6)
    store = new_store(key_values, model, dtype="float16")
    with pytest.raises(StateError, match=r"beyond float16; build states with --dtype float32"):
        store.append([Event(0, 1, 2, 0)], model.encode_each)
    assert not store.known([1]).any()


def test_sums_beyond_float32_are_packed_by_neither_codec():
    layout = StateLayout.of(Model().ifa)
    dense, weight = DenseCodec(layout), np.full((layout.num_heads, layout.feature_dim), 1e38)
    values = np.ones((layout.num_heads, 1, layout.head_dim))
    one = Latest(5, 1, weight, np.ones((*weight.shape, 1)), values)
    dense.pack(dense.no_head, one)
    with pytest.raises(StateError, match="add up to 2e\\+38, beyond float32"):
        dense.pack(one.head, one)
    with pytest.raises(StateError, match="add up to 3e\\+38, beyond float32"):
        dense.pack(dense.no_head, dataclasses.replace(one, right=3 * values))
    numbers, half_lives = np.zeros(1, np.int64), len(layout.identity_decay)
    mean, row_weight = np.ones((1, half_lives, layout.identity_width)), np.full((1, half_lives), 1e38)
    rows = RowCodec(layout)
    rows.pack(Rows(numbers, numbers, row_weight, mean), [0, 1], [0])
    for times in ((2, 1), (1, 2)):
        with pytest.raises(StateError, match="add up to 2e\\+38, beyond float32"):
            rows.pack(Rows(numbers, numbers, times[0] * row_weight, times[1] * mean), [0, 1], [0])


def test_an_unknown_dtype_is_refused():
    with pytest.raises(StateError, match="'float32' or 'float16', got 'int8'"):
        StateLayout.of(Model().ifa, "int8")


# ------------------------------------------------------------------------------- lost and damaged


def records(key_values, store: StateStore) -> dict[str, bytes]:
    """The key of one record of each kind, for user 1, by kind."""
    kinds = {"head": b"s", "before": b"u", "page": b"i"}
    keys = Keys(store.version)
    found = {what: next(key_values.scan(kind + keys.id)) for what, kind in kinds.items()}
    positions = {"positions": keys.block(Place(0, 0)), "journal": journal_key(Place(0, 0))}
    return {**found, **positions, "header": keys.header()}


def use(store: StateStore, model: Model) -> None:
    """Read and change every record of user 1."""
    store.read([1], [100 * DAY], [model.every_key])
    store.read([1], [0], [model.every_key])
    store.append([Event(0, 1, 3, 5 * DAY), Event(99, 1, 3, 5 * DAY)], model.encode_each)


@pytest.mark.parametrize("what", ["head", "before", "page", "positions", "journal", "header"])
def test_a_flipped_bit_is_detected_and_the_store_named(tmp_path, what):
    model, key_values = Model(), open_key_value_store(str(tmp_path))
    store = new_store(key_values, model)
    store.append([Event(0, 1, 3, 5 * DAY)], model.encode_each)
    store.append([Event(1, 1, 4, 6 * DAY)], model.encode_each)
    key = records(key_values, store)[what]
    (whole,) = key_values.read([key])
    rng = random.Random(0)
    for byte in range(0, len(whole), 1 + len(whole) // 60):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << rng.randrange(8)
        key_values.update([], lambda _, damaged=damaged: {key: bytes(damaged)})
        with pytest.raises(StoreError, match=rf"{tmp_path}.* damaged.* build"):
            use(store, model)
    for size in (0, 3, len(whole) - 1):
        key_values.update([], lambda _, size=size: {key: whole[:size]})
        with pytest.raises(StoreError, match=rf"{tmp_path}.* damaged.* build"):
            use(store, model)
    key_values.update([], lambda _: {key: whole})
    use(store, model)
    key_values.close()


@pytest.mark.parametrize("what", ["head", "before", "page"])
def test_a_missing_part_of_a_state_is_detected(key_values, what):
    model = Model()
    store = new_store(key_values, model)
    store.append([Event(n, 1, n, n * DAY) for n in range(5)], model.encode_each)
    key_values.delete([records(key_values, store)[what]])
    lost = pytest.raises(StoreError, match=r"part of the state of user 1 is missing.* --drop v1")
    for new_user in (False, True):
        with lost:
            store.read([1], [0], [model.every_key], [new_user])
    with lost:
        store.append([Event(9, 1, 1, 9 * DAY)], model.encode_each)


def test_a_missing_head_is_detected_without_rows(key_values):
    model = Model(DENSE)
    store = new_store(key_values, model)
    store.append([Event(0, 1, 3, 0)], model.encode_each)
    key_values.delete([Keys("v1").head(1)])
    for use_it in (
        lambda: store.read([1], [DAY], new_users=[True]),
        lambda: store.append([Event(1, 1, 3, 0)], model.encode_each),
    ):
        with pytest.raises(StoreError, match="part of the state of user 1 is missing"):
            use_it()


def refuses(store: StateStore, model: Model, message: str) -> None:
    for use_it in (
        store.check,
        lambda: store.known([1]),
        lambda: store.read([1], [DAY], [model.every_key], [True]),
        lambda: store.append([Event(50, 1, 2, 0)], model.encode_each),
        lambda: store.write([1], *[model.encode([[Event(0, 1, 2, 0)]], [0]), [0]] * 2),
    ):
        with pytest.raises(StoreError, match=message):
            use_it()


def test_a_store_that_lost_its_keys_is_refused_and_takes_no_event(key_values):
    model = Model()
    store = new_store(key_values, model)
    store.append([Event(0, 1, 2, 0)], model.encode_each)
    key_values.delete(list(key_values.scan(b"")))
    refuses(store, model, r"states of weights 'v1' are gone.* events from position 0 on again")
    assert list(key_values.scan(b"")) == []


def test_rebuilt_states_are_refused_until_they_are_reopened(key_values):
    """Reopened states lack no event, since the journal keeps them while another version exists."""
    model, events = Model(), random_events(20, users=[1, 2])
    store = new_store(key_values, model)
    new_store(key_values, model, "v2")
    store.append(events, model.encode_each)
    drop(key_values, "v1")
    refuses(store, model, "are gone")
    building = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), 0)
    refuses(
        store,
        model,
        r"rebuilt since this process opened them; .* restart the service or send it SIGHUP",
    )
    write(building, model, [dataclasses.replace(event, user=7) for event in events])
    building.finish()
    refuses(store, model, "dropped and rebuilt")
    store = StateStore(key_values, "v1")
    assert store.known([1, 7]).tolist() == [False, True]
    for missed in store.missed():
        store.append(missed, model.encode_each)
    assert_holds(store, model, events)


def test_nothing_is_built_on_the_remains_of_an_interrupted_drop(key_values, monkeypatch):
    model = Model()
    store = new_store(key_values, model)
    store.append([Event(0, 1, 2, 0)], model.encode_each)
    with monkeypatch.context() as patch:
        patch.setattr(type(key_values), "delete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drop(key_values, "v1")
    refuses(store, model, "are being dropped")
    for opened in (
        lambda: StateStore(key_values, "v1"),
        lambda: StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), 0),
    ):
        with pytest.raises(StateError, match=r"half dropped; finish dropping them .*--drop v1"):
            opened()
    drop(key_values, "v1")
    assert list(key_values.scan(b"s")) == []
    assert not new_store(key_values, model).known([1]).any()


def test_ranks_that_begin_together_share_one_mark(key_values):
    model = Model()
    layout = StateLayout.of(model.ifa)
    one, other = (StateStore.begin(key_values, "v1", layout, 0) for _ in range(2))
    for user, store in enumerate((one, other)):
        write(store, model, [Event(0, user, 2, 0)])
    one.finish()
    assert StateStore(key_values, "v1").known([0, 1]).all()


def test_a_store_of_another_format_says_what_to_do(key_values):
    model = Model()
    new_store(key_values, model)
    key = Keys("v1").header()
    old = {"format": "ifa-states/1", "version": "v1", "complete": True, "position": 0}
    key_values.update([], lambda _: {key: pack_header(old)})
    for opened in (
        lambda: StateStore(key_values, "v1"),
        lambda: StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), 0),
    ):
        with pytest.raises(StateError, match=r"'ifa-states/1', .*drop them .*--drop v1.* rebuild them"):
            opened()
    drop(key_values, "v1")
    new_store(key_values, model)


# ------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("field", ["user", "item", "time"])
def test_a_position_that_arrives_again_with_another_event_is_refused(key_values, field):
    model = Model()
    store = new_store(key_values, model)
    first = Event(3, 1, 2, DAY)
    other = dataclasses.replace(first, **{field: 7})
    store.append([first], model.encode_each)
    message = r"position 3 already holds user 1, item 2 at 1970-01-02.* again with user . item ."
    message = message.replace("user .", f"user {other.user},").replace("item .", f"item {other.item} at")
    for events in ([Event(4, 5, 2, 0), other], [Event(4, 5, 2, 0), first, other]):
        with pytest.raises(StateError, match=message):
            store.append(events, model.encode_each)
    assert not store.known([5, 7]).any()
    with pytest.raises(StateError, match=r"position 9 already holds user 1"):  # in one call
        store.append([dataclasses.replace(e, position=9) for e in (first, other)], model.encode_each)
    # the journal also knows the position for states that have not had it
    later = new_store(key_values, model, "v2", position=4)
    with pytest.raises(StateError, match=message):
        later.append([other], model.encode_each)
    assert later.append([first], model.encode_each) == [False]


def test_an_event_that_the_log_cannot_have_is_not_a_duplicate(key_values):
    """For example an event of another partition, if --position named only one."""
    model = Model()
    layout = StateLayout.of(model.ifa)
    StateStore.begin(key_values, "v1", layout, 2**40 + 5, latest=10 * DAY).finish()
    store = StateStore(key_values, "v1")
    assert store.append([Event(2**40 + 4, 1, 2, 10 * DAY)], model.encode_each) == [False]
    with pytest.raises(StateError, match=r"position 17 is before 1099511627781, .*several partitions"):
        store.append([Event(17, 1, 2, 10 * DAY + 1)], model.encode_each)
    assert store.append([Event(2**40 + 5, 1, 2, 10 * DAY + 1)], model.encode_each) == [True]
    StateStore.begin(key_values, "v3", layout, {3: 5}, latest=10 * DAY).finish()
    with pytest.raises(StateError, match="position 4 of partition 3 is before 5, "):
        StateStore(key_values, "v3").append([Event(4, 1, 2, 11 * DAY, partition=3)], model.encode_each)
