"""Both stores: what is read is of one moment, what is updated is so whole."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from ifa_torchrec.serving import StateError, StoreError, open_key_value_store

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
    key_values.update([], lambda found: {b"a": b"1"})  # and leaves nothing locked
    assert key_values.read([b"a"]) == [b"1"]


def test_scan_gives_the_keys_of_a_prefix_in_order(key_values):
    keys = [b"a", b"b*", b"b*\xff", b"b?1", b"bb", b"b\x00", b"b", b"b[", b"b\\", b"c"]
    key_values.update([], lambda found: dict.fromkeys(keys, b""))
    for prefix in (b"b", b"b*", b"b\\", b"b[", b"x", b""):
        assert list(key_values.scan(prefix)) == sorted(k for k in keys if k.startswith(prefix))
    assert list(key_values.scan(b"b", b"?1")) == [b"b?1", b"b[", b"b\\", b"bb"]


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


def test_a_read_is_of_one_moment(key_values, address):
    done = Event()
    # LMDB is opened once a process; its threads may share it
    other = open_key_value_store(address) if address.startswith("unix") else key_values

    def write() -> None:
        for n in range(300):
            other.update([], lambda found, n=n: {b"a": b"%d" % n, b"b": b"%d" % n})
        done.set()

    writer = Thread(target=write)
    writer.start()
    while not done.is_set():
        a, b = key_values.read([b"a", b"b"])
        assert a == b
    writer.join()


def test_a_server_that_is_gone_is_reported_as_the_stores_failure(tmp_path):
    program = shutil.which("redis-server")
    socket = str(tmp_path / "socket")
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    while not Path(socket).exists():
        time.sleep(0.05)
    store = open_key_value_store(f"unix://{socket}")
    server.kill()
    server.wait()
    for use in (
        lambda: store.read([b"a"]),
        lambda: store.update([], lambda found: {b"a": b""}),
        lambda: list(store.scan(b"a")),
        lambda: store.delete([b"a"]),
    ):
        with pytest.raises(StoreError, match="unix://"):
            use()


def test_a_full_map_is_reported_and_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("ifa_torchrec.serving.key_value._LARGEST_MAP", 1 << 20)
    store = open_key_value_store(str(tmp_path / "states"))
    store.update([], lambda found: {b"a": b"1"})
    with pytest.raises(StoreError, match="MDB_MAP_FULL"):
        store.update([], lambda found: {b"a": b"2", b"b": bytes(1 << 21)})
    assert store.read([b"a", b"b"]) == [b"1", None]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("redis://localhost:1/0", "no Redis answers"),
        ("http://localhost/0", "a folder, or redis://"),
        ("{file}", "no LMDB store can be opened"),
    ],
)
def test_a_bad_address_is_named(where, message, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StateError, match=message):
        open_key_value_store(where.format(file=file))


def test_a_store_that_is_not_there_is_not_made_where_it_is_to_be_read(tmp_path):
    folder = tmp_path / "statse"
    with pytest.raises(StateError, match="there is no store of states; build one"):
        open_key_value_store(str(folder), create=False)
    assert not folder.exists()
    open_key_value_store(str(folder)).close()
    open_key_value_store(str(folder), create=False).close()
