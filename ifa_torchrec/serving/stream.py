"""Reads events from a Kafka topic and adds them to the states that a LiveScorer serves.

The states, not the broker, record which messages were read, so a store restored from a copy gets the
messages that it lacks. After a crash some messages are read again; each counts once, by its offset.
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
_client_log.setLevel(logging.CRITICAL)  # the client logs every connection attempt, many per second
_ADDRESS = re.compile(r"kafka://([^/@\s]+)/([A-Za-z0-9._-]{1,249})")
_TOGETHER = 64
"""Most messages that are added at once; rankings wait meanwhile."""
_WAIT = 0.5
"""Seconds between checks whether a thread that waits for messages should stop."""
Done = TypeVar("Done")


@dataclass(frozen=True)
class KafkaTopic:
    """A topic whose messages are events.

    Args:
        servers: HOST:PORT of some of the brokers, separated by commas.
        name: the topic's name.
        settings: more client settings by librdkafka's names, for security, say.
        skip_refused: skip messages that are not events or are refused, instead of stopping there.

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
            address: the topic's address; separate several brokers by commas.
            settings: file with one client setting per line, NAME=VALUE.
            skip_refused: see KafkaTopic.

        Raises:
            ConfigError: the address is malformed, or the file is malformed or cannot be read.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:  # the address may contain a password, so it is not shown
            raise ConfigError(
                "--events: not a topic address; expected kafka://HOST:PORT/TOPIC. Put user and password "
                "into the file of --events-settings"
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
        if not equals or not name:  # the line may contain a password, so it is not shown
            raise ConfigError(f"--events-settings: line {number} of {file} is not NAME=VALUE")
        settings[name] = value
    return settings


class Stream:
    """Reads a topic in its own thread, from the position that the states record, until it is closed.

    Processes that serve the same states share the topic's partitions. After a reload, reading resumes
    from the position of the new weights' states. While the broker or the store does not respond, the
    thread waits.

    Args:
        topic: KafkaTopic.
        live: receives the events; close it after this.

    Raises:
        ConfigError: the client rejects a setting.

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
        """The next offset to read in each partition assigned to this process."""
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
        """Finish adding the messages that were read, and stop reading."""
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
                "stopped reading events from topic %s: %s",
                self._topic.name,
                error,
                exc_info=not isinstance(error, UserError),
            )

    def _take(self, scorer: Scorer, consumer: Consumer) -> None:
        """Add the available messages, and record the new positions in the states."""
        first = consumer.poll(_WAIT)
        if first is None:
            return
        messages = [m for m in (first, *consumer.consume(self._together - 1, 0)) if self._is_event(m)]
        if not messages:
            return
        refused = self._add(messages)
        # After a reload it is unknown which of these events the new states have.
        if self._live.scorer is not scorer:
            return
        further = {place.partition: place.position + 1 for place in map(_place, messages)}
        # the first refused message of each partition
        stops = [] if self._topic.skip_refused else {p.partition: p for p in reversed(refused)}.values()
        further |= {place.partition: place.position for place in stops}
        self._insist(lambda: scorer.store.set_stream_positions(further))
        self._next |= further
        self._live.metrics.messages.labels("accepted").inc(len(messages) - len(refused))
        self._live.metrics.messages.labels("refused").inc(len(refused))
        if stops:
            reasons = "; ".join(f"{_named(place)}: {refused[place]}" for place in stops)
            raise StreamError(
                f"{reasons}. Fix the sender of such messages, and restart with --skip-refused to skip "
                "those already in the topic"
            )
        for place, reason in refused.items():
            _log.warning("skipped %s: %s", _named(place), reason)

    def _is_event(self, message: Message) -> bool:
        """Whether a message is an event; otherwise it reports a problem of the connection.

        Raises:
            StreamError: waiting cannot solve the problem.
        """
        from confluent_kafka import KafkaError

        error, number = message.error(), message.partition()
        if error is None:
            return True
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise StreamError(
                f"partition {number} has no offset {self._next.get(number or 0)}, from which these "
                "states must continue: the topic's retention deleted it, or the topic was recreated. "
                "Build states from a log that has these events (ifa build-states), with --position at "
                "the first event that the log lacks"
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
        """Add messages' events; return the reasons for those refused, in order of their places."""
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
        """Retry a store operation until it succeeds.

        Raises:
            StoreError: the store fails, and this stream is closing.
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
        """A client that shares the topic's partitions with processes that serve the same states."""
        from confluent_kafka import Consumer, KafkaException

        ours = {
            "bootstrap.servers": self._topic.servers,
            # one group per build of states: each build needs all of the events
            "group.id": f"ifa-{scorer.store.mark}",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",  # deleted messages must not be skipped silently
            # not cooperative: on_assign expects all partitions at once
            "partition.assignment.strategy": "range,roundrobin",
            "statistics.interval.ms": 1000,
            "stats_cb": self._on_statistics,
            "error_cb": self._on_error,
        }
        settings = self._topic.settings
        if taken := sorted(ours.keys() & settings.keys()):
            raise ConfigError(
                f"--events-settings: remove {taken}, which ifa serve sets itself (servers come from "
                "--events)"
            )

        def on_assign(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            numbers = [partition.partition for partition in partitions]
            self._next = self._insist(lambda: scorer.store.stream_positions(numbers))
            for partition in partitions:
                partition.offset = self._next[partition.partition]
            consumer.assign(partitions)
            where = format_positions(self._next) or "no partition, since other processes have them all"
            _log.info("reading events from topic %s: %s", self._topic.name, where)

        def on_revoke(_: Consumer, partitions: list[TopicPartition]) -> None:
            self._next = {}
            for partition in partitions:
                self._live.metrics.lag.labels(partition.partition).set(0)

        try:
            # another process takes over the partitions of a killed one sooner than by default (45 s)
            default = {"session.timeout.ms": "10000"}
            consumer = Consumer({**default, **settings, **ours}, logger=_client_log)
        except (KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"--events-settings: {error}") from error
        consumer.subscribe([self._topic.name], on_assign=on_assign, on_revoke=on_revoke)
        return consumer

    def _on_error(self, error: KafkaError) -> None:
        if error.code() != error._ALL_BROKERS_DOWN:  # that one does not say why
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
        """Log, once per change, that the broker or the store does not respond, or responds again."""
        before = self._problems.get(what, "")
        self._problems[what] = problem
        if problem is not None and not before:
            _log.warning("events of topic %s wait for the %s: %s", self._topic.name, what, problem)
        elif problem is None and before:
            _log.info("events of topic %s resume: the %s responds again", self._topic.name, what)
        waits = any(self._problems.values()) or "broker" not in self._problems
        self._show("waiting" if waits else "flowing")

    def _show(self, status: StreamStatus) -> None:
        self._live.stream = status
        self._live.metrics.flowing.labels(self._topic.name).set(status == "flowing")


def _place(message: Message) -> Place:
    partition, offset = message.partition(), message.offset()
    assert partition is not None and offset is not None  # true of every message that is not an error
    return Place(partition, offset)


def _named(place: Place) -> str:
    return f"the message at offset {place.position} of partition {place.partition}"
