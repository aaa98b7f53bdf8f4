"""The stores that serving is tested on: LMDB in a folder, and a real Redis server."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
import redis

from ifa_torchrec.serving import KeyValueStore, open_key_value_store


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory) -> Iterator[str]:
    """A Redis server of the tests' own, on a socket."""
    program = shutil.which("redis-server")
    assert program, "the tests need redis-server; .ci/run installs it"
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", "0", "--unixsocket", str(folder / "socket"), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(folder / "socket"))
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    yield f"unix://{folder / 'socket'}"
    server.terminate()
    server.wait()


@pytest.fixture(params=["lmdb", "redis"])
def address(request, tmp_path) -> str:
    """Where an empty store is."""
    if request.param == "lmdb":
        return str(tmp_path / "states")
    server = request.getfixturevalue("redis_address")
    redis.Redis.from_url(server).flushall()
    return server


@pytest.fixture
def key_values(address) -> Iterator[KeyValueStore]:
    """An empty store of each kind."""
    store = open_key_value_store(address)
    yield store
    store.close()
