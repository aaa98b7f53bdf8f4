"""Several processes on one port: replaced when they die or on reload, with metrics summed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import until
from test_service_security import QUESTIONS, TOKEN, Stub

from ifa_torchrec.commands.serve import ServeConfig, _Server
from ifa_torchrec.errors import ConfigError, UserError
from ifa_torchrec.serving.live import Limits, Metrics
from ifa_torchrec.serving.service.workers import Workers, shared_sockets


class Stubs:
    """The workers' functions: they rank with a stub whose weights are read from a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self) -> None:
        sockets = shared_sockets("127.0.0.1", 0, 2)
        draft = self.folder / "draft"
        draft.write_text(str(sockets[0][0].getsockname()[1]))
        draft.rename(self.folder / "port")
        patience = 0.5 if self.load() == "stubborn" else 60
        metrics = self.folder / "metrics"
        Workers(self.load, self.work, self.afterwards, sockets, metrics, patience).run()

    def load(self) -> str:
        weights = (self.folder / "weights").read_text()
        if weights == "slow":
            (self.folder / "loading").touch()
            time.sleep(3600)
        return weights

    def work(self, loaded: str, sockets: list[socket.socket], ready: Callable[[], object]) -> None:
        if loaded == "bad":
            raise ConfigError("these weights are bad")
        if loaded == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ready()
            (self.folder / f"stubborn {os.getpid()}").touch()
            time.sleep(3600)
        stub = Stub()
        stub.metrics = Metrics(self.folder / "metrics")
        stub.version = f"{loaded} {os.getpid()}"
        config = ServeConfig(Path("run"), "store", drain=0, limits=stub.limits)
        _Server(config, stub, "secret", ready).run(sockets)

    def afterwards(self, loaded: str) -> None:
        with (self.folder / "afterwards").open("a") as tries:
            tries.write(loaded)
        if loaded == "lost" or (self.folder / "afterwards").read_text() == "again":
            raise ConfigError("no store responds")


class Service:
    """Two workers, started by a separate process: the test's process has threads and must not fork."""

    def __init__(self, folder: Path, weights: str = "first") -> None:
        self.folder, self.weights = folder, folder / "weights"
        self.weights.write_text(weights)
        (folder / "metrics").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.pid = self.process.pid

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    def ask(self, method: str, path: str, body: Any = None, token: bool = True) -> tuple[int, bytes]:
        """Send a call over a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Content-Type": "application/json"} | (TOKEN if token else {})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def versions(self) -> set[str]:
        """The versions that respond to some calls; empty before the first worker serves."""
        found: set[str] = set()
        with suppress(OSError):
            for _ in range(30):
                found.add(json.loads(self.ask("GET", "/readyz")[1])["version"])
        return found

    def reload(self, weights: str) -> None:
        """Reload with other weights."""
        self.weights.write_text(weights)
        os.kill(self.pid, signal.SIGHUP)

    def reloads(self) -> dict[str, float]:
        """The reload counts, by result."""
        shown = self.ask("GET", "/metrics")[1].decode()
        counted = re.findall(r'ifa_reloads_total{result="(\w+)"} (\S+)', shown)
        return {result: float(count) for result, count in counted}

    def workers(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ]

    def ended(self) -> int | None:
        """Wait for the end, and return the exit code."""
        return self.process.poll()


@contextmanager
def running(folder: Path) -> Iterator[Service]:
    service = Service(folder)
    try:
        until(lambda: len(service.versions()) == 2)
        yield service
    finally:
        service.process.kill()
        service.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_counts_are_summed(tmp_path):
    with running(tmp_path) as service:
        for _ in range(10):
            assert service.ask("POST", "/rank", QUESTIONS["/rank"])[0] == 200
        assert service.ask("POST", "/rank", QUESTIONS["/rank"], token=False)[0] == 401
        shown = service.ask("GET", "/metrics")[1].decode()
        assert 'ifa_calls_total{path="/rank",status="200"} 10.0\n' in shown
        assert 'ifa_calls_total{path="/rank",status="401"} 1.0\n' in shown
        assert "ifa_queue_length 0.0\n" in shown and "ifa_model_info" in shown
        before = service.versions()
        dead = service.workers()[0]
        os.kill(dead, signal.SIGKILL)
        until(lambda: len(service.workers()) == 2 and dead not in service.workers())
        until(lambda: len(service.versions() - {f"first {dead}"}) == 2)
        assert len(service.versions() & before) == 1
        # the dead worker's counts stay, its files do not
        shown = service.ask("GET", "/metrics")[1].decode()
        assert 'ifa_calls_total{path="/rank",status="200"} 10.0\n' in shown
        assert 'ifa_call_seconds_count{path="/rank"} 11.0\n' in shown
        assert not list((tmp_path / "metrics").glob(f"*_{dead}.db"))
        workers = service.workers()
        os.kill(service.pid, signal.SIGTERM)
        until(lambda: (code := service.ended()) is not None and code == 0)
        assert not any(map(alive, workers))


@pytest.mark.slow
def test_new_weights_replace_all_workers_and_bad_ones_none(tmp_path):
    with running(tmp_path) as service:
        service.reload("bad")
        until(lambda: service.reloads() == {"failed": 1})
        assert {version.split()[0] for version in service.versions()} == {"first"}
        service.reload("second")
        until(lambda: (tmp_path / "afterwards").exists())
        assert {version.split()[0] for version in service.versions()} == {"second"}
        assert len(service.workers()) == 2
        assert (tmp_path / "afterwards").read_text() == "second"
        until(lambda: service.reloads() == {"failed": 1, "ok": 1})
        # files of two workers, of their parent, and of all that ended
        assert len(list((tmp_path / "metrics").glob("counter_*.db"))) == 4


@pytest.mark.slow
def test_catching_up_after_a_reload_is_retried_and_its_failure_counts(tmp_path):
    with running(tmp_path) as service:
        service.reload("again")
        until(lambda: service.reloads() == {"ok": 1})
        assert (tmp_path / "afterwards").read_text() == "againagain"
        service.reload("lost")
        until(lambda: service.reloads() == {"ok": 1, "failed": 1})
        assert (tmp_path / "afterwards").read_text() == "againagain" + 4 * "lost"
        assert {version.split()[0] for version in service.versions()} == {"lost"}


@pytest.mark.slow
def test_it_can_be_stopped_while_it_loads(tmp_path):
    with running(tmp_path) as service:
        service.reload("slow")
        until((tmp_path / "loading").exists)
        assert {version.split()[0] for version in service.versions()} == {"first"}
        os.kill(service.pid, signal.SIGTERM)
        until(lambda: service.ended() is not None, seconds=20)
        assert service.ended() == 0


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    with running(tmp_path) as service:
        workers = service.workers()
        service.process.kill()
        service.process.wait()
        until(lambda: not any(map(alive, workers)))


@pytest.mark.slow
def test_a_worker_that_does_not_start_ends_all(tmp_path):
    service = Service(tmp_path, "bad")
    codes: list[int | None] = []
    until(lambda: codes.append(service.ended()) or codes[-1] is not None)
    assert codes[-1] == 1
    assert (tmp_path / "error").read_text() == "worker 0 did not start: these weights are bad"


@pytest.mark.slow
def test_a_worker_that_does_not_end_is_killed(tmp_path):
    service = Service(tmp_path, "stubborn")
    try:
        until(lambda: len(list(tmp_path.glob("stubborn *"))) == 2)
        workers = service.workers()
        os.kill(service.pid, signal.SIGTERM)
        until(lambda: service.ended() is not None)
        assert service.ended() == 0 and not any(map(alive, workers))
    finally:
        service.process.kill()
        service.process.wait()


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on .*--port {port}"):
            shared_sockets("127.0.0.1", port, 2)


def test_limits_are_shared_among_the_processes():
    each = Limits(max_connections=401, max_waiting=100, max_requests=64).of_each(4)
    assert (each.max_connections, each.max_waiting, each.timeout) == (100, 64, Limits().timeout)
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        ServeConfig(Path("run"), "store", workers=0)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    try:
        Stubs(place).run()
    except UserError as error:
        (place / "error").write_text(str(error))
        raise SystemExit(1) from error
