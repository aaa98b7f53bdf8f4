"""Events from Kafka: each counts once, whatever fails, and none is skipped silently."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from kafka_broker import Broker, wait_until
from shop import Shop, make_shop

from ifa_torchrec.commands.serve import ServeConfig
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    Event,
    KeyValueStore,
    Scorer,
    StateLayout,
    StateStore,
    StoreError,
    open_key_value_store,
)
from ifa_torchrec.serving.live import Limits, LiveScorer
from ifa_torchrec.serving.service import create_app
from ifa_torchrec.serving.stream import KafkaTopic, Stream
from ifa_torchrec.serving.times import utc

confluent_kafka = pytest.importorskip("confluent_kafka")
TOPIC = KafkaTopic("nowhere:9092", "events")
ONE_BY_ONE = Limits(max_events=1, timeout=20)
"""Keeps the order of additions the same, however often reading is interrupted."""


def message_of(event: Event) -> bytes:
    fields = {name: getattr(event, name) for name in ("user", "item", "features", "numbers", "weight")}
    return json.dumps({**fields, "time": utc(event.time)}).encode()


def events_of(shop: Shop, count: int = 16) -> dict[int, list[Event]]:
    """Some events; each user's are in one partition."""
    found: dict[int, list[Event]] = {0: [], 1: []}
    for row in range(count):
        event = shop.event(row)
        partition = ("anna", "bob").index(str(event.user))
        found[partition].append(replace(event, partition=partition, position=len(found[partition])))
    return found


@pytest.fixture
def states(shop, tmp_path) -> Path:
    """A store with two versions' states, without events."""
    store = open_key_value_store(str(tmp_path / "states"))
    for version in ("weights-1", "weights-2"):
        layout = StateLayout.of(shop.model.candidate_arch.ifa)
        StateStore.begin(store, version, layout, 0, vocabulary=shop.log.vocabulary.digest).finish()
    store.close()
    shutil.copytree(tmp_path / "states", tmp_path / "posted")
    return tmp_path / "states"


@pytest.fixture
def key_values(states) -> Iterator[KeyValueStore]:
    store = open_key_value_store(str(states))
    yield store
    store.close()


def load(shop: Shop, store: KeyValueStore, version: str = "weights-1") -> Callable[[], Scorer]:
    return lambda: Scorer(shop.model, shop.log, StateStore(store, version))


def records(store: KeyValueStore) -> dict[bytes, bytes | None]:
    """Everything in a store, except the stream positions."""
    keys = [key for key in store.scan(b"") if key[:1] != b"p"]
    return dict(zip(keys, store.read(keys), strict=True))


def positions(store: KeyValueStore, version: str = "weights-1") -> list[int]:
    return list(StateStore(store, version).stream_positions([0, 1]).values())


def posted_once(shop: Shop, states: Path, events: dict[int, list[Event]]) -> dict[bytes, bytes | None]:
    """The contents of a copy of the empty states after all events were posted one by one."""
    store = open_key_value_store(str(states.with_name("posted")))
    scorer = load(shop, store)()
    for event in (event for of_partition in events.values() for event in of_partition):
        assert scorer.append([event])[0].status == "taken"
    found = records(store)
    store.close()
    return found


# ----------------------------------------------------------------------------- without a broker


class Message:
    def __init__(self, partition: int, offset: int, value: bytes | None, error: Any = None) -> None:
        self.fields = {"partition": partition, "offset": offset, "value": value, "error": error}

    def __getattr__(self, name: str) -> Callable[[], Any]:
        return lambda: self.fields[name]


class Topic:
    """A topic of two partitions, and the clients that read it."""

    def __init__(self) -> None:
        self.partitions: list[list[bytes | None]] = [[], []]
        self.error: Any = None
        self.up = True
        self.groups: list[str] = []

    def client(self, config: dict[str, Any], logger: Any) -> Client:
        self.groups.append(config["group.id"])
        return Client(self, config["stats_cb"])


class Client:
    """A confluent_kafka.Consumer that a Topic assigns both partitions to."""

    def __init__(self, topic: Topic, on_statistics: Callable[[str], None]) -> None:
        self.topic, self.on_statistics = topic, on_statistics
        self.next: dict[int, int] = {}

    def subscribe(self, names: list[str], on_assign: Any, on_revoke: Any) -> None:
        assert names == ["events"]
        self.on_assign, self.on_revoke = on_assign, on_revoke

    def assign(self, partitions: list) -> None:
        self.next = {partition.partition: partition.offset for partition in partitions}

    def poll(self, timeout: float) -> Message | None:
        state, ends = "UP" if self.topic.up else "INIT", map(len, self.topic.partitions)
        of_topic = {str(n): {"hi_offset": end} for n, end in enumerate(ends)}
        brokers, topics = {"b": {"state": state}}, {"events": {"partitions": of_topic}}
        self.on_statistics(json.dumps({"brokers": brokers, "topics": topics}))
        if not self.next:
            parts = [confluent_kafka.TopicPartition("events", number) for number in (0, 1)]
            self.on_assign(self, parts)
        if self.topic.error is not None:
            return Message(0, 0, None, self.topic.error)
        found = self.consume(1, 0)
        if not found:
            time.sleep(0.01)
        return found[0] if found else None

    def consume(self, count: int, timeout: float) -> list[Message]:
        found: list[Message] = []
        for number, messages in enumerate(self.topic.partitions):
            while len(found) < count and self.next[number] < len(messages):
                offset = self.next[number]
                found.append(Message(number, offset, messages[offset]))
                self.next[number] += 1
        return found

    def close(self) -> None:
        self.on_revoke(self, [])


@pytest.fixture
def topic(monkeypatch) -> Topic:
    made = Topic()
    monkeypatch.setattr(confluent_kafka, "Consumer", made.client)
    return made


@pytest.fixture
def live(shop, key_values) -> Iterator[LiveScorer]:
    with LiveScorer(load(shop, key_values), ONE_BY_ONE) as live:
        yield live


def shown(live: LiveScorer) -> str:
    return live.metrics.text().decode()


def test_an_event_counts_once_where_reading_ends_between_writing_and_noting(
    shop, states, key_values, topic, monkeypatch
):
    events = events_of(shop)
    topic.partitions = [[message_of(event) for event in events[number]] for number in (0, 1)]
    ends = [len(of_partition) for of_partition in topic.partitions]
    note, noted = StateStore.set_stream_positions, []

    def dies(self: StateStore, further: dict[int, int]) -> None:
        if len(noted) == 5:
            raise SystemError("killed")
        noted.append(further)
        note(self, further)

    with LiveScorer(load(shop, key_values), ONE_BY_ONE) as live:
        monkeypatch.setattr(StateStore, "set_stream_positions", dies)
        with Stream(TOPIC, live):
            wait_until(lambda: live.stream == "stopped", "it did not die")
        monkeypatch.setattr(StateStore, "set_stream_positions", note)
        assert sum(positions(key_values)) == 5
        with Stream(TOPIC, live):
            wait_until(lambda: positions(key_values) == ends, "not all were read")
            wait_until(lambda: live.stream == "flowing", "it does not flow")
        text = shown(live)
    assert records(key_values) == posted_once(shop, states, events)
    assert 'ifa_events_total{status="duplicate"} 1.0\n' in text
    assert f'ifa_events_total{{status="taken"}} {float(sum(ends))}\n' in text
    assert f'ifa_stream_messages_total{{result="accepted"}} {float(sum(ends))}\n' in text
    assert 'ifa_stream_flowing{topic="events"} 1.0\n' in text


BAD = {
    b"{": "body: not valid JSON",
    None: "body: not valid JSON",
    b"\xff": "body: not valid JSON",
    b"[]": "body: Input should be",
    b'{"user": "anna"}': "item: Field required",
}
BAD_FIELDS = [
    ({"position": 4}, "unknown fields ['position']; expected some of ['user', 'item'"),
    ({"features": {"\ud800": "red"}}, "['\\ud800'] unknown"),
    ({"user": 1.5}, "user: Input should be an id"),
    ({"time": "yesterday"}, "time: Value error, should be a time since 1970 with a zone"),
    ({"time": "2999-01-01T00:00:00Z"}, "more than 60 seconds ahead of this machine's clock"),
    ({"features": {"colour": "red"}}, "features: ['action', 'device'] missing, ['colour'] unknown"),
]


@pytest.mark.parametrize("value, reason", [*BAD.items(), *BAD_FIELDS])
def test_a_refused_message_stops_the_stream_or_is_skipped_and_counted(
    shop, key_values, live, topic, caplog, value, reason
):
    good = [message_of(event) for event in events_of(shop)[0]][:3]
    if isinstance(value, dict):
        value = json.dumps(json.loads(good[0]) | value).encode()
    topic.partitions[1] = [good[0], value, good[2]]
    for _ in range(2):  # after a restart it stops at the same message
        caplog.clear()
        with Stream(TOPIC, live):
            wait_until(lambda: live.stream == "stopped", "it goes on")
        assert positions(key_values) == [0, 1]
        assert "the message at offset 1 of partition 1: " in caplog.text and reason in caplog.text
        assert "--skip-refused" in caplog.text and "Traceback" not in caplog.text
    with Stream(replace(TOPIC, skip_refused=True), live):
        wait_until(lambda: positions(key_values) == [0, 3], "it does not go on")
        refused = 'ifa_stream_messages_total{result="refused"} 3.0\n'
        wait_until(lambda: refused in shown(live), "they are not counted")
    assert "skipped the message at offset 1 of partition 1: " in caplog.text
    assert 'ifa_stream_messages_total{result="accepted"} 2.0\n' in shown(live)


def test_of_messages_added_together_the_good_are_added_and_none_is_skipped(shop, key_values, topic):
    good = [message_of(event) for event in events_of(shop)[0]][:4]
    topic.partitions = [[good[0], b"?", good[1], b"?"], [good[2], good[3]]]
    with LiveScorer(load(shop, key_values), Limits(timeout=20)) as live:
        with Stream(TOPIC, live):
            wait_until(lambda: live.stream == "stopped", "it goes on")
        assert positions(key_values) == [1, 2]
        assert 'ifa_events_total{status="taken"} 4.0\n' in shown(live)


def test_a_store_that_fails_is_waited_for(shop, key_values, live, topic, monkeypatch, caplog):
    update = key_values.update

    def fails(*_: Any) -> None:
        raise StoreError("no room left")

    monkeypatch.setattr(key_values, "update", fails)
    with Stream(TOPIC, live):
        wait_until(lambda: live.stream == "flowing", "it does not flow")
        topic.partitions[0] = [message_of(event) for event in events_of(shop)[0]]
        wait_until(lambda: live.stream == "waiting", "it does not wait")
        assert "events of topic events wait for the store: no room left" in caplog.text
        monkeypatch.setattr(key_values, "update", update)
        wait_until(lambda: positions(key_values)[0] == len(topic.partitions[0]), "it does not go on")
        wait_until(lambda: live.stream == "flowing", "it does not flow")


def test_a_failing_store_does_not_block_closing(shop, key_values, live, topic, monkeypatch):
    def fails(*_: Any) -> None:
        raise StoreError("no room left")

    topic.partitions[0] = [message_of(events_of(shop)[0][0])]
    monkeypatch.setattr(key_values, "update", fails)
    with Stream(TOPIC, live):
        wait_until(lambda: live.stream == "waiting", "it does not wait")
    assert positions(key_values) == [0, 0]


def test_a_full_queue_is_waited_for(shop, key_values, topic):
    events = events_of(shop)[0]
    topic.partitions[0] = [message_of(event) for event in events]
    begun, free = threading.Event(), threading.Event()

    def wait(items: list) -> list:
        begun.set()
        free.wait()
        return items

    limits = replace(ONE_BY_ONE, max_waiting=1, max_requests=1)
    with LiveScorer(load(shop, key_values), limits) as live:
        live._batcher.submit(wait, [0], [1.0])
        begun.wait()
        live._batcher.submit(wait, [1], [1.0])
        with Stream(TOPIC, live):
            wait_until(lambda: live.stream == "flowing", "it does not flow")
            time.sleep(0.1)
            free.set()
            wait_until(lambda: positions(key_values)[0] == len(events), "it does not go on")


def test_new_weights_get_what_their_states_lack(shop, key_values, topic):
    """Including events that another process with the old weights added only to the old states."""
    events = events_of(shop)
    topic.partitions = [[message_of(event) for event in events[number]] for number in (0, 1)]
    ends = [len(of_partition) for of_partition in topic.partitions]
    version = "weights-1"
    with LiveScorer(lambda: load(shop, key_values, version)(), ONE_BY_ONE) as live, Stream(TOPIC, live):
        wait_until(lambda: positions(key_values) == ends, "not all were read")
        version = "weights-2"
        live.reload()
        wait_until(lambda: positions(key_values, version) == ends, "the new states lack some")
    old, new = (StateStore(key_values, name).mark for name in ("weights-1", "weights-2"))
    assert topic.groups == [f"ifa-{old}", f"ifa-{new}"]
    for user, of_user in (("anna", events[0]), ("bob", events[1])):
        found = StateStore(key_values, version).read([user], [None])[0]
        assert found.count.tolist() == [len(of_user)]


def test_the_lag_counts_unread_messages(shop, key_values, live, topic):
    topic.partitions[1] = [message_of(events_of(shop)[0][0]), b"?", b"?"]
    with Stream(TOPIC, live):
        wait_until(lambda: live.stream == "stopped", "it goes on")
    topic.up = False
    with Stream(TOPIC, live):
        wait_until(lambda: 'ifa_stream_lag{partition="1"} 2.0\n' in shown(live), shown(live))


def test_readiness_tells_of_the_stream_and_rankings_go_on(live, topic, caplog):
    client = TestClient(create_app(live))
    assert "stream" not in client.get("/readyz").json()
    topic.up = False
    with Stream(TOPIC, live):
        waits = "events of topic events wait for the broker: no broker responds"
        wait_until(lambda: waits in caplog.text, "it is not told")
        for up, told in ((False, "waiting"), (True, "flowing")):
            topic.up = up
            wait_until(lambda told=told: client.get("/readyz").json().get("stream") == told, told)
        topic.error = confluent_kafka.KafkaError(confluent_kafka.KafkaError._AUTO_OFFSET_RESET)
        wait_until(lambda: client.get("/readyz").json()["stream"] == "stopped", "it goes on")
    assert client.get("/readyz").status_code == 200
    assert "partition 0 has no offset 0, from which these states must continue" in caplog.text
    assert 'ifa_stream_flowing{topic="events"} 0.0\n' in shown(live)


def test_errors_of_the_client_are_waited_for_unless_there_is_nothing_to_wait_for(live, topic, caplog):
    error = confluent_kafka.KafkaError
    topic.error = error(error.COORDINATOR_NOT_AVAILABLE, "no coordinator")
    with Stream(TOPIC, live):
        wait_until(lambda: "topic events: no coordinator" in caplog.text, "it is not told")
        assert live.stream == "flowing"
        topic.error = error(error.UNKNOWN_TOPIC_OR_PART, "no such topic")
        wait_until(lambda: live.stream == "stopped", "it goes on")
    assert "stopped reading events from topic events: no such topic" in caplog.text


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "address",
    [
        "kafka://user:secret@kafka-1:9092/events",
        "kafka://kafka-1:9092",
        "kafka://kafka-1:9092/events?password=secret",
        "http://kafka-1:9092/events",
        "kafka://kafka-1:9092/events/0",
    ],
)
def test_a_malformed_topic_address_is_refused_without_its_password(address):
    with pytest.raises(ConfigError, match="kafka://HOST:PORT/TOPIC") as raised:
        KafkaTopic.at(address)
    assert "secret" not in str(raised.value)
    assert "secret" not in str(ServeConfig(Path("run"), "store", events=address))


def test_settings_of_the_client_come_from_a_file(tmp_path, live):
    file = tmp_path / "client.properties"
    file.write_text("# ours\nsecurity.protocol=SASL_SSL\n\n sasl.password = a=b # c\n")
    topic = KafkaTopic.at("kafka://a:1,b:2/events", file, skip_refused=True)
    assert (topic.servers, topic.name, topic.skip_refused) == ("a:1,b:2", "events", True)
    assert topic.settings == {"security.protocol": "SASL_SSL", "sasl.password": "a=b # c"}
    assert "a=b" not in str(topic)
    for text, message in (
        ("secret", "line 1 of .* is not NAME=VALUE"),
        ("group.id=mine\n", r"remove \['group.id'\], which ifa serve sets itself"),
        ("sasl.pasword=secret\n", "sasl.pasword"),
        ("security.protocol=none\n", "security.protocol"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as raised:
            Stream(KafkaTopic.at("kafka://a:1/events", file), live)
        assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        KafkaTopic.at("kafka://a:1/events", tmp_path / "none")


def test_options_of_a_topic_need_one():
    with pytest.raises(ConfigError, match="give --events too"):
        ServeConfig(Path("run"), "store", skip_refused=True)


# --------------------------------------------------------------------------------- with a broker


def stream(folder: Path, states: Path, address: str, dies_at: int) -> None:
    """A process that reads a topic until SIGTERM, or dies after it wrote events and before it recorded
    the last position."""
    shop = make_shop(folder)
    store = open_key_value_store(str(states))
    note, count = StateStore.set_stream_positions, 0

    def noted(self: StateStore, further: dict[int, int]) -> None:
        nonlocal count
        count += 1
        if count == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        note(self, further)

    StateStore.set_stream_positions = noted
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with LiveScorer(load(shop, store), ONE_BY_ONE) as live, Stream(KafkaTopic.at(address), live):
        ended.wait()
    store.close()


@pytest.mark.slow
def test_after_kills_the_states_have_every_event_once(
    shop, states, key_values, broker: Broker, tmp_path
):
    events = events_of(shop, 40)
    address = broker.topic("killed")
    broker.send("killed", [(n, message_of(event)) for n in (0, 1) for event in events[n]])

    def start(dies_at: int) -> subprocess.Popen:
        words = [str(tmp_path / f"log-{dies_at}"), str(states), address, str(dies_at)]
        return subprocess.Popen(
            [sys.executable, __file__, *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    assert start(dies_at=15).wait(120) == -signal.SIGKILL
    assert sum(positions(key_values)) == 14
    again = start(dies_at=-1)
    try:
        ends = [len(events[n]) for n in (0, 1)]
        # importing torch takes time, and the broker waits for the killed process
        wait_until(lambda: positions(key_values) == ends, "not all were read", 180)
        again.terminate()
        assert again.wait(60) == 0
    finally:
        again.kill()
    assert records(key_values) == posted_once(shop, states, events)


@pytest.mark.slow
def test_a_broker_that_goes_away_and_comes_back(shop, key_values, live, broker: Broker, caplog):
    caplog.set_level(logging.INFO)
    events = events_of(shop)
    address = broker.topic("away")
    half = [events[n][:3] for n in (0, 1)]
    broker.send("away", [(n, message_of(event)) for n in (0, 1) for event in half[n]])
    broker.line.cut = True
    with Stream(KafkaTopic.at(address), live):
        waits = "events of topic away wait for the broker: "
        wait_until(lambda: waits in caplog.text, "nothing tells that the broker is away")
        caplog.clear()
        broker.line.cut = False
        wait_until(lambda: positions(key_values) == [3, 3], "not all were read")
        wait_until(lambda: live.stream == "flowing", "it does not flow")
        broker.line.cut = True
        wait_until(lambda: live.stream == "waiting", "nothing tells that the broker is away")
        broker.line.cut = False
        broker.send("away", [(n, message_of(event)) for n in (0, 1) for event in events[n][3:]])
        ends = [len(events[n]) for n in (0, 1)]
        wait_until(lambda: positions(key_values) == ends, "it does not go on")
        wait_until(lambda: live.stream == "flowing", "it does not flow")
        lags = [f'ifa_stream_lag{{partition="{n}"}} 0.0\n' for n in (0, 1)]
        wait_until(lambda: all(lag in shown(live) for lag in lags), shown(live))
    assert waits in caplog.text
    assert "events of topic away resume: the broker responds again" in caplog.text


@pytest.mark.slow
def test_processes_share_the_partitions(shop, key_values, broker: Broker):
    """Processes with the same states share them; with other states each reads all."""
    events = events_of(shop)
    topic = KafkaTopic.at(broker.topic("shared"))
    versions = ("weights-1", "weights-1", "weights-2")
    lives = [LiveScorer(load(shop, key_values, version), ONE_BY_ONE) for version in versions]
    streams = [Stream(topic, live) for live in lives]
    wait_until(lambda: [len(stream._next) for stream in streams] == [1, 1, 2], "they do not share")
    broker.send("shared", [(n, message_of(event)) for n in (0, 1) for event in events[n]])
    ends = [len(events[n]) for n in (0, 1)]
    for version in ("weights-1", "weights-2"):
        wait_until(lambda v=version: positions(key_values, v) == ends, "not all were read")
    for opened in (*streams, *lives):
        opened.close()
    for live in lives:
        assert 'status="duplicate"' not in shown(live)


@pytest.mark.slow
def test_a_missing_topic_or_one_without_the_events_that_states_lack(shop, key_values, live, caplog):
    """Uses the Kafka client's mock brokers, which report this; Tansu does not."""
    mock = confluent_kafka.Producer({"test.mock.num.brokers": 1})
    address = next(iter(mock.list_topics(timeout=10).brokers.values()))
    servers = f"{address.host}:{address.port}"
    with Stream(KafkaTopic.at(f"kafka://{servers}/none"), live):
        wait_until(lambda: live.stream == "stopped", "it goes on")
    assert "none" in caplog.text
    mock.produce("short", b"?", partition=0)
    mock.flush(30)
    live.scorer.store.set_stream_positions({0: 1000})
    with Stream(KafkaTopic.at(f"kafka://{servers}/short"), live):
        wait_until(lambda: "partition 0 has no offset 1000" in caplog.text, "it goes on")


if __name__ == "__main__":
    stream(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
