"""Puts this folder on sys.path, so that every test file can import helpers; the toy log; stores of
states, an LMDB folder and a real Redis server."""

import interpreter  # isort: skip  # noqa: F401  ahead of all that imports Triton

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from ifa_torchrec.serving import KeyValueStore, open_key_value_store

sys.path.insert(0, str(Path(__file__).parent))

# The tests' tensors are tiny: more threads only wait for each other, long when the machine is busy.
# OMP_NUM_THREADS asks for more, to see that nothing depends on their number.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="module")
def toy():
    """The toy's DataFrames; a test that spoils them makes its own."""
    from toy import make_toy

    return make_toy()


@pytest.fixture(scope="module")
def log(toy, tmp_path_factory):
    """The toy as an opened EventLog."""
    return toy.write(tmp_path_factory.mktemp("toy") / "log")


@pytest.fixture(scope="session")
def real_log(tmp_path_factory):
    """The Complete Journey, with few requests to train on, 40 to validate and 1,000 to test by."""
    from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig, prepare

    folder = tmp_path_factory.mktemp("real") / "log"
    log = prepare(folder, CompleteJourneyConfig(train=64, valid=40, test=1000))
    # one that does not say what it was asked for is taken by the examples in place of their own
    (log.path / "complete_journey.json").unlink()
    return log


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory) -> Iterator[str]:
    """A Redis server of the tests' own, on a socket."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
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
