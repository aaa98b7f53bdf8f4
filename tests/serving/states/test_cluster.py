"""States in a Redis Cluster of three primaries, each with a replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from threading import Event as Flag
from threading import Thread

import pytest
from redis_cluster import Cluster, wait_until
from test_forgetting import assert_never_seen
from test_state_store import DAY, Model, assert_holds, new_store, random_events, write

from ifa_torchrec.serving import (
    Event,
    StateError,
    StateLayout,
    StateStore,
    StoreError,
    Trimmed,
    drop,
    forget,
    forgotten_until,
    open_key_value_store,
    trim_journal,
    versions,
)
from ifa_torchrec.serving.states.layout import JOURNAL, tag_in
from ifa_torchrec.serving.states.redis_store import RedisClusterStore

pytestmark = pytest.mark.slow
USERS, ANNA = [*range(30)], 7


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def key_values(cluster) -> Iterator[RedisClusterStore]:
    """An empty store."""
    store = open_key_value_store(cluster.address)
    assert isinstance(store, RedisClusterStore)
    store._client.flushall(target_nodes="primaries")
    yield store
    store.close()


def append(store: StateStore, events: Sequence[Event], model: Model) -> list[bool | None]:
    """The result of ``append`` for each event, of users in any parts."""
    results: dict[int, bool | None] = {}
    for mine in store.apart([event.user for event in events]):
        results |= zip(mine, store.append([events[n] for n in mine], model.encode_each), strict=True)
    return [results[n] for n in range(len(events))]


class Sender(Thread):
    """Sends events one at a time, each until it is taken, like a consumer."""

    def __init__(self, address: str, events: Sequence[Event], model: Model) -> None:
        super().__init__()
        self.sent, self.failures = 0, Counter[str]()
        self.a_few_were_sent, self._address = Flag(), address
        self._events, self._model = events, model
        self.start()

    def run(self) -> None:
        key_values = open_key_value_store(self._address)
        store = StateStore(key_values, "v1")
        for event in self._events:
            while True:
                try:
                    store.append([event], self._model.encode_each)
                    break
                except StoreError as error:
                    self.failures[str(error)] += 1
            self.sent += 1
            if self.sent > 20:
                self.a_few_were_sent.set()
        key_values.close()


def test_states_are_as_in_one_server(key_values):
    """Build, append, read, catch up with a later version, forget, trim and drop."""
    model = Model()
    events = [
        Event(event.position // 2, USERS[event.user], event.item, event.time, partition=n % 2)
        for n, event in enumerate(random_events(300, range(len(USERS))))
    ]
    store = StateStore.begin(key_values, "v1", StateLayout.of(model.ifa), {0: 50, 1: 50})
    write(store, model, events[:100])
    with pytest.raises(StateError, match="incomplete states of weights"):
        StateStore(key_values, "v1")
    store.finish()
    store = StateStore(key_values, "v1")
    assert append(store, events, model) == [False] * 100 + [True] * 200
    assert append(store, events, model) == [False] * 300
    assert_holds(store, model, events)
    assert len({tag_in(key_values.tags, key) for key in key_values.scan(JOURNAL)}) > 20
    assert store.known([*USERS, 1000]).tolist() == [True] * len(USERS) + [False]
    store.set_stream_positions({0: 120, 1: 60})
    store.set_stream_positions({})
    assert store.stream_positions([0, 1, 2]) == {0: 120, 1: 60, 2: 0}

    later = new_store(key_values, model, "v2", position={0: 100, 1: 50})
    for missed in later.missed():
        assert all(append(later, missed, model))
    assert list(later.missed()) == [] and list(versions(key_values)) == ["v1", "v2"]
    assert_holds(later, model, [e for e in events if e.position >= (100, 50)[e.partition]])

    mine = [event for event in events if event.user == ANNA]
    gone = forget(key_values, ANNA)
    assert set(gone.versions) == {"v1", "v2"}
    assert gone.events == sum(event.position >= 50 for event in mine)
    for each in (store, later):
        assert_never_seen(key_values, each, ANNA)
        assert append(each, mine, model) == [None] * len(mine)
    until = forgotten_until(key_values, [ANNA, 3])
    assert until[0] is not None and until[1] is None

    old = [e for e in events[100:] if e.time < 45 * DAY and e.user != ANNA]
    assert trim_journal(key_values, 45 * DAY) == Trimmed(deleted=len(old), kept=0)
    with pytest.raises(StateError, match="the journal no longer has the events"):
        new_store(key_values, model, "v3")
    assert not versions(key_values).get("v3", {}).get("complete")
    for version in versions(key_values):
        drop(key_values, version)
    assert {key[:1] for key in key_values.scan(b"")} == {b"t"}


def test_every_primary_must_keep_its_keys(cluster, key_values):
    port = cluster.primary_of(key_values.tags[-1])
    cluster.client(port).config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreError, match="maxmemory-policy is allkeys-lru"):
            open_key_value_store(cluster.address)
        with pytest.raises(StoreError, match="maxmemory-policy is allkeys-lru"):
            key_values.check()
    finally:
        cluster.client(port).config_set("maxmemory-policy", "noeviction")


def test_a_primary_that_lost_its_keys_is_noticed(cluster, key_values):
    model = Model()
    store = new_store(key_values, model)
    port = cluster.primary_of(key_values.tags[0])
    there, lost = (
        next(n for n in range(100) if (cluster.primary_of(store._codec.keys.head(n)) == port) == is_lost)
        for is_lost in (False, True)
    )
    append(store, [Event(n, user, 3, DAY) for n, user in enumerate((there, lost))], model)
    cluster.client(port).flushall()
    store.read([there], [2 * DAY], [model.every_key])
    for use in (
        store.check,
        lambda: store.read([lost], [2 * DAY], [model.every_key], [True]),
        lambda: store.append([Event(9, lost, 3, DAY)], model.encode_each),
        lambda: store.known([there, lost]),
    ):
        with pytest.raises(StoreError, match="states of weights 'v1' are gone"):
            use()
    with pytest.raises(StateError, match=r"(incomplete|no) states of weights"):
        StateStore(key_values, "v1")
    drop(key_values, "v1")
    new_store(key_values, model)


def test_a_slot_moves_while_events_are_added(cluster, key_values):
    model, events = Model(), random_events(200, range(6))
    store = new_store(key_values, model)
    senders = [Sender(cluster.address, events[part::2], model) for part in (0, 1)]
    walks = Counter[bool]()

    def walk() -> None:
        try:
            walks[len(list(key_values.scan(b"v"))) == len(key_values.tags)] += 1
        except StoreError as error:
            assert "slots of the cluster are being moved" in str(error)

    for user in range(2):
        key = store._codec.keys.head(user)
        to = next(port for port in list(cluster.servers)[:3] if port != cluster.primary_of(key))
        cluster.move(key, to, walk)
    for sender in senders:
        sender.join()
    cluster.wait_until_whole()
    assert not walks[False]
    assert len(list(key_values.scan(b"v"))) == len(key_values.tags)
    assert_holds(store, model, events)
    assert append(store, events, model) == [False] * len(events)


def test_a_primary_is_killed_while_events_are_added(cluster, key_values):
    """An event that Redis confirmed and lost is lost completely, and counts when it is sent again. This
    test is last: it leaves the cluster one server short."""
    model, events = Model(), random_events(500, range(12))
    store = new_store(key_values, model)
    senders = [Sender(cluster.address, events[part::2], model) for part in (0, 1)]
    for sender in senders:
        assert sender.a_few_were_sent.wait(60)
    cluster.kill(cluster.primary_of(store._codec.keys.head(0)))
    for sender in senders:
        sender.join()
    assert wait_until(lambda: len(list(key_values.scan(b"v"))) == len(key_values.tags), "no walk")
    store.check()
    again = append(store, events, model)
    assert sum(map(bool, again)) < 20  # confirmed, but not yet on the replica
    assert_holds(store, model, events)
    assert append(store, events, model) == [False] * len(events)
