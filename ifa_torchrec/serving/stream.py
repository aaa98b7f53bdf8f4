"""Events from a topic of Kafka, added to the states that a LiveScorer serves.

The broker keeps no account of what was read: the states do, so that a store which was brought back from
a copy gets again what it lacks. After a crash some messages are read again; each counts once, by its
offset.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ifa_torchrec.errors import ConfigError, UserError, require
from ifa_torchrec.serving.errors import RequestError, StoreError, StreamError
from ifa_torchrec.serving.live import LiveScorer, StreamStatus
from ifa_torchrec.serving.scorer import Scorer
from ifa_torchrec.serving.service.bodies import JSON, read_body
from ifa_torchrec.serving.service.messages import StreamEvent
from ifa_torchrec.serving.service.refusals import shown
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.layout import Place, format_positions

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

_log = logging.getLogger(__name__)
_client_log = logging.getLogger(f"{__name__}.client")
_client_log.setLevel(logging.CRITICAL)  # it has a line for each attempt to connect, many a second
_ADDRESS = re.compile(r"kafka://([^/@\s]+)/([A-Za-z0-9._-]{1,249})")
_TOGETHER = 64
"""Most messages that are added at once: rankings wait for them."""
_WAIT = 0.5
"""Seconds until a thread that waits for messages looks whether it is to end."""
Done = TypeVar("Done")


@dataclass(frozen=True)
class KafkaTopic:
    """A topic whose messages are events.

    Args:
        servers: HOST:PORT of some of the brokers, with commas.
        name: of the topic.
        settings: more of the client's settings, by librdkafka's names: security, say.
        skip_refused: pass over messages that are no events, or refused, instead of stopping at them.

    Example:
        >>> from ifa_torchrec.serving.stream import KafkaTopic
        >>> KafkaTopic.at("kafka://kafka-1:9092,kafka-2:9092/events").servers
        'kafka-1:9092,kafka-2:9092'
    """

    servers: str
    name: str
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    skip_refused: bool = False

    @staticmethod
    def at(address: str, settings: Path | None = None, skip_refused: bool = False) -> KafkaTopic:
        """The topic at kafka://HOST:PORT/TOPIC.

        Args:
            address: of it; several brokers are separated by commas.
            settings: file with a setting of the client a line, NAME=VALUE.
            skip_refused: see KafkaTopic.

        Raises:
            ConfigError: the address or the file is not of this form.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:  # it may hold a password
            raise ConfigError(
                "--events: this is no address of a topic, which is kafka://HOST:PORT/TOPIC; user and "
                "password belong into the file of --events-settings"
            )
        return KafkaTopic(found[1], found[2], _settings(settings), skip_refused)


def _settings(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--events-settings: {file} cannot be read ({error})") from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not name:  # the line may be a password
            raise ConfigError(f"--events-settings: line {number} of {file} is not NAME=VALUE")
        settings[name] = value
    return settings


class Stream:
    """Reads a topic in a thread of its own, from where the states are, until it is closed.

    Processes that serve the same states share the topic's partitions. A process that gets new weights
    goes on from where their states are. Where the broker or the store does not respond it waits.

    Args:
        topic: KafkaTopic.
        live: gets the events; close it after this.

    Raises:
        ConfigError: the client does not take a setting.

    Example:
        >>> from ifa_torchrec.serving.stream import KafkaTopic, Stream
        >>> def read(live):  # as long as the process lives
        ...     with Stream(KafkaTopic.at("kafka://localhost:9092/events"), live):
        ...         serve_rankings(live)
    """

    def __init__(self, topic: KafkaTopic, live: LiveScorer) -> None:
        require("kafka", "confluent_kafka")
        self._topic, self._live = topic, live
        self._together = min(_TOGETHER, live.limits.max_events)
        self._next: dict[int, int] = {}
        """Of the partitions that are this process's, the offset it goes on from."""
        self._problems: dict[str, str | None] = {}
        self._error = "no broker responds"
        self._ending = threading.Event()
        self._show("waiting")
        first = live.scorer
        self._thread = threading.Thread(
            target=self._run, args=(first, self._consumer(first)), name="stream", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Add what was read, and read no more."""
        self._ending.set()
        self._thread.join()

    # ---------------------------------------------------------------------------------- reading

    def _run(self, scorer: Scorer, consumer: Consumer) -> None:
        try:
            while True:
                try:
                    while not self._ending.is_set() and self._live.scorer is scorer:
                        self._take(scorer, consumer)
                finally:
                    consumer.close()
                if self._ending.is_set():
                    return
                scorer = self._live.scorer
                consumer = self._consumer(scorer)
        except Exception as error:
            self._show("stopped")
            _log.error(
                "no more events are read from topic %s: %s",
                self._topic.name,
                error,
                exc_info=not isinstance(error, UserError),
            )

    def _take(self, scorer: Scorer, consumer: Consumer) -> None:
        """Add the messages that there are, and note in the states how far they go."""
        first = consumer.poll(_WAIT)
        if first is None:
            return
        messages = [m for m in (first, *consumer.consume(self._together - 1, 0)) if self._is_event(m)]
        if not messages:
            return
        refused = self._add(messages)
        # Of states that are no longer these it is not known which of the events they have.
        if self._live.scorer is not scorer:
            return
        further = {place.partition: place.position + 1 for place in map(_place, messages)}
        # the first one of each partition
        stops = [] if self._topic.skip_refused else {p.partition: p for p in reversed(refused)}.values()
        further |= {place.partition: place.position for place in stops}
        self._insist(lambda: scorer.store.set_stream_positions(further))
        self._next |= further
        self._live.metrics.messages.labels("accepted").inc(len(messages) - len(refused))
        self._live.metrics.messages.labels("refused").inc(len(refused))
        if stops:
            reasons = "; ".join(f"{_named(place)}: {refused[place]}" for place in stops)
            raise StreamError(
                f"{reasons}. Mend what sends such messages, and start this again with --skip-refused to "
                "pass over those that are there"
            )
        for place, reason in refused.items():
            _log.warning("%s is passed over: %s", _named(place), reason)

    def _is_event(self, message: Message) -> bool:
        """Whether it is one; else it tells of the connection.

        Raises:
            StreamError: there is nothing to wait for.
        """
        from confluent_kafka import KafkaError

        error, number = message.error(), message.partition()
        if error is None:
            return True
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise StreamError(
                f"partition {number} has no offset {self._next.get(number or 0)}, where states go on; "
                "the topic lost it, or was made anew. Build states from a log that has these events, "
                "with the --position where the stream goes on (ifa build-states)"
            )
        if error.fatal() or error.code() in (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise StreamError(error.str())
        _log.warning("topic %s: %s", self._topic.name, error.str())
        return False

    def _add(self, messages: Sequence[Message]) -> dict[Place, str]:
        """Add the events that messages are; why some were refused, in order of their places."""
        events: list[Event] = []
        refused: dict[Place, str] = {}
        for message in messages:
            place = _place(message)
            try:
                events.append(read_body(StreamEvent, JSON, message.value() or b"").at(*place))
            except RequestError as error:
                refused[place] = shown(str(error))
        if events:
            results = self._insist(lambda: self._live.add(events))
            refused |= {
                event.place: shown(result.reason or "")
                for event, result in zip(events, results, strict=True)
                if result.status == "refused"
            }
        return dict(sorted(refused.items()))

    def _insist(self, do: Callable[[], Done]) -> Done:
        """Do something with the store, as often as it takes.

        Raises:
            StoreError: the store fails, and this is to end.
        """
        while True:
            try:
                done = do()
            except StoreError as error:
                self._tell("store", str(error))
                if self._ending.wait(1):
                    raise
            else:
                self._tell("store", None)
                return done

    # ------------------------------------------------------------------------------- the client

    def _consumer(self, scorer: Scorer) -> Consumer:
        """A client that shares the partitions with those that serve the same states."""
        from confluent_kafka import Consumer, KafkaException

        ours = {
            "bootstrap.servers": self._topic.servers,
            # by the building's mark: another building of states needs all of the events, too
            "group.id": f"ifa-{scorer.store.mark}",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",  # what is not there any more is not passed over
            "partition.assignment.strategy": "range,roundrobin",  # all at once, as on_assign takes them
            "statistics.interval.ms": 1000,
            "stats_cb": self._on_statistics,
            "error_cb": self._on_error,
        }
        settings = self._topic.settings
        if taken := sorted(ours.keys() & settings.keys()):
            raise ConfigError(f"--events-settings: {taken} cannot be given, they are set here")

        def on_assign(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            numbers = [partition.partition for partition in partitions]
            self._next = self._insist(lambda: scorer.store.stream_positions(numbers))
            for partition in partitions:
                partition.offset = self._next[partition.partition]
            consumer.assign(partitions)
            where = format_positions(self._next) or "no partition, since others have them all"
            _log.info("events are read from topic %s: %s", self._topic.name, where)

        def on_revoke(_: Consumer, partitions: list[TopicPartition]) -> None:
            self._next = {}
            for partition in partitions:
                self._live.metrics.lag.labels(partition.partition).set(0)

        try:
            # sooner than by default (45 s) another takes the partitions of one that was killed
            default = {"session.timeout.ms": "10000"}
            consumer = Consumer({**default, **settings, **ours}, logger=_client_log)
        except (KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"--events-settings: {error}") from error
        consumer.subscribe([self._topic.name], on_assign=on_assign, on_revoke=on_revoke)
        return consumer

    def _on_error(self, error: KafkaError) -> None:
        if error.code() != error._ALL_BROKERS_DOWN:  # which does not say why
            self._error = error.str()

    def _on_statistics(self, text: str) -> None:
        found = json.loads(text)
        up = any(broker["state"] == "UP" for broker in found["brokers"].values())
        self._tell("broker", None if up else self._error)
        partitions = found["topics"].get(self._topic.name, {}).get("partitions", {})
        for number, position in self._next.items():
            end = partitions.get(str(number), {}).get("hi_offset", -1)
            if end >= 0:
                self._live.metrics.lag.labels(number).set(max(0, end - position))

    # ---------------------------------------------------------------------------------- telling

    def _tell(self, what: str, problem: str | None) -> None:
        """Say, once, that something does not respond or does again; the first time too."""
        before = self._problems.get(what, "")
        self._problems[what] = problem
        if problem is not None and not before:
            _log.warning("events of topic %s wait: the %s: %s", self._topic.name, what, problem)
        elif problem is None and before:
            _log.info("events of topic %s go on: the %s responds", self._topic.name, what)
        waits = any(self._problems.values()) or "broker" not in self._problems
        self._show("waiting" if waits else "flowing")

    def _show(self, status: StreamStatus) -> None:
        self._live.stream = status
        self._live.metrics.flowing.labels(self._topic.name).set(status == "flowing")


def _place(message: Message) -> Place:
    partition, offset = message.partition(), message.offset()
    assert partition is not None and offset is not None  # of a message that is no error
    return Place(partition, offset)


def _named(place: Place) -> str:
    return f"the message at offset {place.position} of partition {place.partition}"
