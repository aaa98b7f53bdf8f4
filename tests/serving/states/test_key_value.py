"""Both stores: reads are snapshots, and updates are atomic."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import lmdb
import pytest
import redis
from helpers import until

from ifa_torchrec.serving import StateError, StoreError, open_key_value_store
from ifa_torchrec.serving.errors import UnreachableError
from ifa_torchrec.serving.states.lmdb_store import _LARGEST_MAP

fork = multiprocessing.get_context("fork")


def test_reads_what_was_written_and_none_elsewhere(key_values):
    key_values.update([], lambda found: {b"a": b"1", b"\x00\xff": b""})
    assert key_values.read([b"a", b"b", b"\x00\xff", b"a"]) == [b"1", None, b"", b"1"]
    assert key_values.read([]) == []


def test_change_sees_the_values_and_may_change_nothing(key_values):
    key_values.update([], lambda found: {b"a": b"1"})
    seen = []
    key_values.update([b"a", b"b"], lambda found: seen.append(found) or {})
    assert seen == [[b"1", None]]
    assert key_values.read([b"a", b"b"]) == [b"1", None]


def test_an_update_that_fails_writes_nothing(key_values):
    with pytest.raises(ZeroDivisionError):
        key_values.update([], lambda found: {b"a": bytes([1 // 0])})
    assert key_values.read([b"a"]) == [None]
    key_values.update([], lambda found: {b"a": b"1"})  # nothing stays locked
    assert key_values.read([b"a"]) == [b"1"]


def test_scan_gives_the_keys_of_a_prefix_in_order(key_values):
    keys = [b"a", b"b*", b"b*\xff", b"b?1", b"bb", b"b\x00", b"b", b"b[", b"b\\", b"c"]
    key_values.update([], lambda found: dict.fromkeys(keys, b""))
    for prefix in (b"b", b"b*", b"b\\", b"b[", b"x", b""):
        assert list(key_values.scan(prefix)) == sorted(k for k in keys if k.startswith(prefix))
    assert list(key_values.scan(b"b", lambda key: max(key, b"b?1"))) == [b"b?1", b"b[", b"b\\", b"bb"]


def test_delete(key_values):
    key_values.update([], lambda found: {b"a": b"1", b"b": b"2"})
    key_values.delete([b"a", b"never there"])
    key_values.delete([])
    assert key_values.read([b"a", b"b"]) == [None, b"2"]


def count_up(address: str, times: int) -> None:
    store = open_key_value_store(address)
    for _ in range(times):
        store.update([b"n"], lambda found: {b"n": b"%d" % (int(found[0] or b"0") + 1)})
    store.close()


def test_two_processes_lose_no_update(address):
    writers = [fork.Process(target=count_up, args=(address, 300)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = open_key_value_store(address)
    assert store.read([b"n"]) == [b"600"]
    store.close()


def test_a_scan_during_writes_returns_each_key_once_and_holds_no_pages(tmp_path):
    """Rewritten records reuse freed pages during the scan; otherwise the file would grow with each."""
    store = open_key_value_store(str(tmp_path))
    keys = [b"k%05d" % n for n in range(5000)]
    store.update([], lambda found: dict.fromkeys(keys, b"x"))
    seen, file = [], tmp_path / "data.mdb"
    for n, key in enumerate(store.scan(b"k")):
        seen.append(key)
        if n % 50 == 0:  # a quarter of a megabyte, 100 times
            store.update(
                [], lambda found, n=n: {b"a%02d" % i: bytes([n % 256]) * 4000 for i in range(64)}
            )
    assert seen == keys
    assert file.stat().st_size < 12 << 20
    store.close()


def test_a_read_is_of_one_moment(key_values, address):
    done = Event()
    # a process may open an LMDB file only once; its threads share it
    other = open_key_value_store(address) if address.startswith("unix") else key_values

    def write() -> None:
        for n in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            other.update([], lambda found, n=n: {b"a": b"%d" % n, b"b": b"%d" % n})

    writer = Thread(target=write)
    writer.start()
    seen: set[bytes | None] = set()
    try:
        end = time.monotonic() + 60
        while len(seen) < 100 and time.monotonic() < end:
            a, b = key_values.read([b"a", b"b"])
            assert a == b
            seen.add(a)
    finally:
        done.set()
        writer.join()
    assert len(seen) == 100


def test_a_server_that_is_gone_is_reported_as_the_stores_failure(tmp_path):
    program = shutil.which("redis-server")
    socket = str(tmp_path / "socket")
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    until(Path(socket).exists)
    store = open_key_value_store(f"unix://{socket}")
    hasty = open_key_value_store(f"unix://{socket}?socket_timeout=0.1")
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(UnreachableError, match=r"unix://.*Timeout"):
        hasty.read([b"a"])
    server.kill()
    server.wait()
    for use in (
        lambda: store.read([b"a"]),
        lambda: store.update([], lambda found: {b"a": b""}),
        lambda: list(store.scan(b"a")),
        lambda: store.delete([b"a"]),
    ):
        with pytest.raises(UnreachableError, match="unix://"):
            use()


def test_a_full_map_is_reported_and_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("ifa_torchrec.serving.states.lmdb_store._LARGEST_MAP", 1 << 20)
    store = open_key_value_store(str(tmp_path / "states"))
    store.update([], lambda found: {b"a": b"1"})
    with pytest.raises(StoreError, match=r"MDB_MAP_FULL.*mapped 1,048,576 bytes.*ulimit -v"):
        store.update([], lambda found: {b"a": b"2", b"b": bytes(1 << 21)})
    assert store.read([b"a", b"b"]) == [b"1", None]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("redis://localhost:1/0", "no Redis responds"),
        ("http://localhost/0", "a folder or redis://"),
        ("{file}", "cannot open an LMDB store"),
    ],
)
def test_a_bad_address_is_named(where, message, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StateError, match=message):
        open_key_value_store(where.format(file=file))


def test_a_missing_store_is_not_created_for_reading(tmp_path):
    folder = tmp_path / "statse"
    with pytest.raises(StateError, match="no store of states here; build one"):
        open_key_value_store(str(folder), create=False)
    assert not folder.exists()
    open_key_value_store(str(folder)).close()
    open_key_value_store(str(folder), create=False).close()


# ------------------------------------------------------------------------ what LMDB may end a process by


def in_a_process(work: Callable[[], object]) -> object:
    """Run some work in a separate process; return its result, or its error as text."""
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        try:
            theirs.send(work())
        except StateError as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = fork.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return f"the process ended by {process.exitcode}"


def read_all(path: Path) -> int:
    store = open_key_value_store(str(path), create=False)
    keys = list(store.scan(b"s"))
    assert None not in store.read(keys)
    return len(keys)


def test_a_truncated_file_is_refused_and_kills_no_process(tmp_path):
    store = open_key_value_store(str(tmp_path))
    values = {b"s%d" % n: bytes(100 if n % 2 else 5000) for n in range(300)}
    store.update([], lambda found: values)
    store.close()
    file = tmp_path / "data.mdb"
    whole = file.read_bytes()
    assert in_a_process(lambda: read_all(tmp_path)) == 300
    for size in (1, 4096, 5000, 8192, 8193, len(whole) // 3, len(whole) // 2, len(whole) - 4096):
        file.write_bytes(whole[:size])
        refusal = in_a_process(lambda: read_all(tmp_path))
        assert refusal.startswith(f"StoreError: {tmp_path}: "), (size, refusal)
        truncated = f"{size:,} bytes, expected {len(whole):,}; "
        assert "not an LMDB file" in refusal or truncated in refusal


def test_a_file_whose_last_pages_are_free_is_not_truncated(tmp_path):
    """LMDB does not write pages that a transaction allocated and freed again."""
    rng, count = random.Random(0), 0
    with lmdb.open(str(tmp_path), map_size=1 << 30) as environment:
        for _ in range(400):
            with environment.begin(write=True) as transaction:
                for _ in range(rng.randrange(1, 60)):
                    key = b"s%d" % rng.randrange(3000)
                    transaction.put(key, bytes(rng.choice((100, 150, 9000))))
                for n in range(first := rng.randrange(3000), first + rng.choice((0, 1500))):
                    transaction.delete(b"s%d" % n)
                count = transaction.stat()["entries"]
            pages = environment.info()["last_pgno"] + 1
            if (tmp_path / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:
                break
        else:
            pytest.fail("the file never ended before the last page")
    assert in_a_process(lambda: read_all(tmp_path)) == count


def test_under_a_limit_of_address_space_the_map_is_smaller(tmp_path):
    def limited(more: int) -> object:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
        store = open_key_value_store(str(tmp_path))
        store.update([], lambda found: {b"s1": bytes(100_000)})
        return store._map, used + more

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    size, limit = in_a_process(lambda: limited(used + (64 << 30)))
    assert size == min(_LARGEST_MAP, limit // 2 // resource.getpagesize() * resource.getpagesize())
    assert in_a_process(lambda: read_all(tmp_path)) == 1
    refusal = in_a_process(lambda: limited(1 << 20))
    assert re.search(
        r"needs at least [\d,]+ bytes of address space.* raise the limit .*ulimit -v", refusal
    )


def test_a_file_that_grew_beyond_the_map_says_so(tmp_path, monkeypatch):
    open_key_value_store(str(tmp_path)).close()

    def grow() -> None:
        store.close()  # inherited by the fork
        other = open_key_value_store(str(tmp_path))
        other.update([], lambda found: {b"s1": bytes(4 << 20)})

    with monkeypatch.context() as patch:
        patch.setattr("ifa_torchrec.serving.states.lmdb_store._LARGEST_MAP", 1 << 20)
        store = open_key_value_store(str(tmp_path))
    assert in_a_process(grow) is None
    with pytest.raises(StoreError, match=r"MDB_MAP_RESIZED.*mapped 1,048,576 bytes.*restart"):
        store.read([b"s1"])
    store.close()


# -------------------------------------------------------------------------------- what Redis may lose


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "allkeys-random"])
def test_a_server_that_evicts_keys_is_refused(redis_address, policy):
    store = open_key_value_store(redis_address)
    client = redis.Redis.from_url(redis_address)
    client.config_set("maxmemory-policy", policy)
    try:
        for look in (lambda: open_key_value_store(redis_address), store.check):
            with pytest.raises(StoreError, match=f"maxmemory-policy is {policy}.* set it to noeviction"):
                look()
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    store.check()


def test_a_server_on_which_config_is_forbidden_is_asked_by_info(redis_address):
    client = redis.Redis.from_url(redis_address)
    client.execute_command("ACL SETUSER guest on >pw ~* +@all -config")
    store = open_key_value_store(f"{redis_address.replace('://', '://guest:pw@')}")
    with pytest.raises(redis.exceptions.NoPermissionError):
        store._client.config_get("maxmemory-policy")
    store.check()


@pytest.mark.parametrize(
    "address",
    [
        "redis://:hush@localhost:1/0",
        "redis://me:hu/hush@localhost:1/0",
        "redis://me:hush@localhost:port/0",
        "redis://localhost:1/0?password=hush",
        "redis://me:hush@[::1/0",
    ],
)
def test_a_password_is_in_no_message(address):
    with pytest.raises(StoreError, match=r"redis://localhost|not a Redis address|no Redis") as caught:
        open_key_value_store(address)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert "hush" not in shown and caught.value.__suppress_context__
