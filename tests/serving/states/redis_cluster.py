"""A Redis Cluster of three primaries and three replicas on this machine."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from ifa_torchrec.serving import StoreError

SLOTS = 16384


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait until ``holds`` returns something true, and return it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if found := holds():
                return found
        except (redis.RedisError, StoreError):
            pass
        time.sleep(0.02)
    raise TimeoutError(what)


class Cluster:
    """Servers by port; the first three start as primaries, each with a third of the slots."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed")
        self.servers: dict[int, subprocess.Popen] = {}
        for port in _free_ports(6):
            (folder / str(port)).mkdir()
            options = {
                "port": port,
                "bind": "127.0.0.1",
                "dir": folder / str(port),
                "save": "",
                "cluster-enabled": "yes",
                "cluster-node-timeout": 1000,
                "cluster-replica-validity-factor": 0,
                "repl-diskless-sync-delay": 0,
            }
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            self.servers[port] = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
        self.address = f"redis://127.0.0.1:{next(iter(self.servers))}"
        self._join()

    def client(self, port: int) -> redis.Redis:
        """A client of one server."""
        return redis.Redis("127.0.0.1", port, socket_timeout=5)

    def _join(self) -> None:
        ports = list(self.servers)
        for port in ports:
            wait_until(self.client(port).ping, f"no server at {port}")
        for n, port in enumerate(ports):
            self.client(port).execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
            self.client(ports[0]).execute_command("CLUSTER MEET", "127.0.0.1", port)
        bounds = [SLOTS * n // 3 for n in range(4)]
        for n, port in enumerate(ports[:3]):
            slots = bounds[n], bounds[n + 1] - 1
            self.client(port).execute_command("CLUSTER ADDSLOTSRANGE", *slots)
        for port in ports:
            wait_until(lambda port=port: len(self._nodes(port)) == 6, "they do not meet")
        for primary, replica in zip(ports[:3], ports[3:], strict=True):
            self.client(replica).execute_command("CLUSTER REPLICATE", self.id(primary))
        self.wait_until_whole()

    def _nodes(self, port: int) -> dict[str, dict[str, Any]]:
        return self.client(port).execute_command("CLUSTER NODES")

    def id(self, port: int) -> str:
        """A server's name in the cluster."""
        return self.client(port).execute_command("CLUSTER MYID").decode()

    def wait_until_whole(self) -> None:
        """Wait until all running servers know the same primaries, and each replica follows one."""

        def whole() -> bool:
            running = [port for port, server in self.servers.items() if server.poll() is None]
            for port in running:
                if self.client(port).info("replication").get("master_link_status", "up") != "up":
                    return False
                if self.client(port).cluster("INFO")["cluster_state"] != "ok":
                    return False
            views = [
                {address: node["slots"] for address, node in self._nodes(port).items() if node["slots"]}
                for port in running
            ]
            return all(view == views[0] for view in views)

        wait_until(whole, "the cluster does not become whole")

    def primary_of(self, key: bytes) -> int:
        """The port of the primary that has a key's slot, according to the running servers."""
        port = next(port for port, server in self.servers.items() if server.poll() is None)
        for first, last, (_, owner, *_), *_ in self.client(port).execute_command("CLUSTER SLOTS"):
            if first <= key_slot(key) <= last:
                return owner
        raise AssertionError("the slot has no owner")

    def move(self, key: bytes, to: int, between: Callable[[], object] = lambda: None) -> None:
        """Move a key's slot to a primary, as an operator does; ``between`` is called while it moves."""
        slot, source = key_slot(key), self.primary_of(key)
        here, there = self.client(source), self.client(to)
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.id(source))
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.id(to))
        between()
        # in two words, since redis-py would decode the reply of the full command
        while keys := here.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 12):
            moved = here.execute_command("MIGRATE", "127.0.0.1", to, "", 0, 5000, "KEYS", *keys)
            assert moved == b"OK"
            between()
        for port in (to, source):
            self.client(port).execute_command("CLUSTER SETSLOT", slot, "NODE", self.id(to))

    def kill(self, port: int) -> None:
        """Kill a server, as a failure would."""
        self.servers[port].kill()
        self.servers[port].wait()

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        for server in self.servers.values():
            server.wait()


def _free_ports(count: int) -> list[int]:
    """Free ports whose ports 10,000 above, the cluster bus, are free too."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as each:
                    each.bind(("127.0.0.1", number))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found
