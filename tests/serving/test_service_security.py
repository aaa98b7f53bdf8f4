"""The service from an attacker's side: real sockets, no token, no patience."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from helpers import until
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.websockets import WebSocketDisconnect

from ifa_torchrec import IFAConfig, InteractionFidelityAttention
from ifa_torchrec.commands.build_states import BuildStatesConfig
from ifa_torchrec.commands.serve import (
    ServeConfig,
    _ensure_file_handles,
    _own_names,
    _Server,
    _token,
    serve,
)
from ifa_torchrec.commands.states import StatesConfig
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import (
    EventResult,
    StateError,
    StateLayout,
    StateStore,
    StoreError,
    open_key_value_store,
)
from ifa_torchrec.serving.live import Limits, LiveRanking, LiveScorer, Metrics
from ifa_torchrec.serving.service import create_app

TOKEN = {"Authorization": "Bearer secret"}
QUESTIONS = {
    "/rank": {"requests": [{"user": 1, "candidates": [2]}]},
    "/events": {"events": [{"position": 0, "user": 1, "item": 2, "time": "2024-01-01T00:00:00Z"}]},
}
PUBLIC = {"/healthz", "/readyz", "/docs", "/openapi.json"}
METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "get", "Post", "X"]


class Stub:
    """The part of LiveScorer that the service uses, without a model."""

    version, draining, stream = "v", False, None

    def __init__(self, **limits: Any) -> None:
        self.limits, self.metrics = Limits(**limits), Metrics()

    async def check(self) -> None:
        pass

    async def rank(self, requests: list, sizes: list) -> list[LiveRanking]:
        logits = np.zeros((1, 1), np.float32)
        ranked = ([2], logits, None, 0, 0, "v", logits + 0.5, ("label",))
        return [LiveRanking(*ranked) for _ in requests]

    async def append(self, events: list) -> list[EventResult]:
        return [EventResult("taken")] * len(events)


@contextlib.contextmanager
def serving(stub: Stub, **options: Any) -> Iterator[int]:
    """The command's own server in a thread; yields its port."""
    config = ServeConfig(Path("run"), "store", port=0, drain=0, limits=stub.limits, **options)
    server = _Server(config, stub, "secret")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(Stub(max_body_bytes=20_000)) as port:
        yield port


class AnyTarget(http.client.HTTPConnection):
    def _validate_path(self, url: str) -> None:
        """Any target."""


def ask(port: int, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = AnyTarget("127.0.0.1", port, timeout=10)
    given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, target, None if body is None else json.dumps(body), given)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, text


# --------------------------------------------------------------------------------------- the token


def spellings(path: str) -> Iterator[str]:
    """Spellings of a path that some server accepts as that path."""
    name = path[1:]
    first = ord(name[0])
    yield from (path, f"/{path}", f"//{path}", f"{path}/", f"{path}//", f"/./{name}", f"/x/../{name}")
    yield from (path.upper(), path.title(), f"/healthz/..{path}", f"/healthz/%2e%2e{path}", f".{path}")
    ends = ["%0A", "%0a", "%0D", "%0D%0A", "%00", "%20", "%09", "%2F", "%2f", ".", "..", ";", ";x=1"]
    ends += ["\\", "%5C", "%3F", "%23", "?", "?x=/healthz", "#", "#/healthz", "%0A/healthz", "%C2%85"]
    ends += ["%250A", "%0A%0A", "/healthz", "/%0A", "%0B", "%0C", "%1C", "%E2%80%A8", ".json", "*", "~"]
    yield from (path + end for end in ends)
    yield from (f"/%{first:02X}{name[1:]}", f"/%{first:02x}{name[1:]}", f"%2F{name}", f"/%2F{name}")
    yield from (f"http://localhost{path}", f"http://localhost{path}%0A", f"/%0A{name}", f"/%20{name}")


def test_no_spelling_of_any_route_works_without_the_token(port):
    app = create_app(Stub(), "secret")
    paths = {route.path for route in app.routes}
    assert paths == {"/rank", "/events", "/metrics", "/users/{user:path}"} | PUBLIC
    for path in paths - PUBLIC:
        for target in spellings(path):
            for method in METHODS if target in (path, f"{path}%0A") else ("GET", "POST"):
                body = QUESTIONS.get(path)
                status, _ = ask(port, method, target, body)
                assert status in (400, 401), (method, target, status)
    for path, method in {"/rank": "POST", "/events": "POST", "/metrics": "GET"}.items():
        assert ask(port, method, path, QUESTIONS.get(path), **TOKEN)[0] == 200


def test_only_named_routes_are_public(port):
    for path in PUBLIC:
        assert ask(port, "GET", path)[0] == 200
        for method in METHODS[1:]:
            status, text = ask(port, method, path)
            assert status in (400, 401, 405) or (path, method) == ("/docs", "HEAD") or text == b"", (
                method
            )


def routes_of_others(app: FastAPI) -> None:
    """Every way to add a route."""
    router = APIRouter()

    async def answer() -> str:
        return "open"

    async def plain(_: Any) -> PlainTextResponse:
        return PlainTextResponse("open")

    async def talk(websocket: Any) -> None:
        await websocket.accept()

    app.get("/new")(answer)
    app.api_route("/healthz", methods=["POST"])(answer)
    router.get("/routed")(answer)
    app.include_router(router)
    app.include_router(router, prefix="/healthz")
    app.router.routes.append(Route("/plain", plain))
    app.router.routes.append(Mount("/mounted", routes=[Route("/healthz", plain)]))
    app.get("/{anything:path}")(answer)
    app.websocket("/talk")(talk)


def test_an_added_route_needs_the_token():
    app = create_app(Stub(), "secret")
    routes_of_others(app)
    client = TestClient(app)
    added = [
        "/new",
        "/routed",
        "/healthz/routed",
        "/plain",
        "/mounted/healthz",
        "/whatever",
        "//healthz",
    ]
    for path in added:
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers=TOKEN).status_code == 200, path
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers=TOKEN):
        pass


def test_a_spelling_the_router_takes_is_counted_as_its_route():
    stub = Stub()
    client = TestClient(create_app(stub, "secret"), headers=TOKEN)
    assert client.post("/rank%0A", json=QUESTIONS["/rank"]).status_code == 200
    assert client.get("/%0A").status_code == 404
    metrics = client.get("/metrics").text
    assert 'ifa_calls_total{path="/rank",status="200"} 1.0' in metrics
    assert 'ifa_calls_total{path="other",status="404"} 1.0' in metrics


@pytest.mark.parametrize("given", [" \n", "two words", "two\nlines\n"])
def test_a_token_is_one_word(given, tmp_path):
    (tmp_path / "token").write_text(given)
    with pytest.raises(
        ConfigError, match=r"token: the token is (empty|several words); it must be one word"
    ):
        _token(ServeConfig(Path("run"), "store", token_file=tmp_path / "token"))
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        _token(ServeConfig(Path("run"), "store", token_file=tmp_path / "token"))


# ---------------------------------------------------------------------------------------- web pages


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", ""]
)
def test_on_loopback_a_foreign_name_is_not_answered(port, host):
    for target in ("/healthz", "/rank"):
        status, _ = ask(port, "POST" if target == "/rank" else "GET", target, Host=host, **TOKEN)
        assert status == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:9", "[::1]"])
def test_on_loopback_its_own_names_are_answered(port, host):
    assert ask(port, "GET", "/healthz", Host=host)[0] == 200


def test_other_names_are_allowed_by_option_and_any_where_others_reach_it():
    assert _own_names("0.0.0.0") == _own_names("example.org") == ("*",)
    assert "[::1]" in _own_names("::1") and "127.0.0.2" in _own_names("127.0.0.2")
    app = create_app(Stub(), allowed_hosts=("ranker.example", "*.ranker.example"))
    for host, status in {"ranker.example": 200, "a.ranker.example:1": 200, "localhost": 400}.items():
        assert TestClient(app).get("/healthz", headers={"Host": host}).status_code == status
    for name in ("*ranker", "http://x", "a b", ""):
        with pytest.raises(
            ConfigError, match=r"--allowed-hosts: .* is not a host name, \*\.DOMAIN or \*"
        ):
            ServeConfig(Path("run"), "store", allowed_hosts=(name,))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_bodies_that_any_web_page_may_post_are_not_read(kind):
    """Without a preflight request a browser sends only these content types. They are refused with or
    without a token, since on loopback there may be none."""
    client = TestClient(create_app(Stub()))
    for path, question in QUESTIONS.items():
        headers = {} if kind is None else {"Content-Type": kind}
        answer = client.post(path, content=json.dumps(question), headers=headers)
        assert answer.status_code == 422, answer.text


# ------------------------------------------------------------------------------------- connections


def connect(port: int, sent: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=5)
    made.sendall(sent)
    return made


def rest(connection: socket.socket) -> bytes:
    """Everything that still arrives until the connection ends."""
    text = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            text += piece
    return text


HALF_OPEN = [
    b"",
    b"G",
    b"POST /rank HTTP/1.1\r\nHost: localhost\r\nX: ",
    # refused before the body arrives
    b"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
]

AUTHORIZED = (
    b"POST /rank HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
    b"Content-Type: application/json\r\n"
)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that the servers' loggers write."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    loggers = [logging.getLogger(name) for name in ("", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def ask_again(*call: Any, **headers: str) -> Any:
    """Retry like a client whose connection was closed, as the longest waiting, when 50 others came."""
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError):
            return ask(*call, **headers)
    return ask(*call, **headers)


@pytest.mark.parametrize("sent", HALF_OPEN)
def test_a_client_that_holds_connections_locks_no_one_out(sent, logged):
    stub = Stub(max_connections=20)
    with serving(stub) as port:
        logged.clear()
        open_ones = []
        for _ in range(3):
            open_ones += [connect(port, sent) for _ in range(50)]
            begun = time.monotonic()
            assert ask_again(port, "GET", "/healthz")[0] == 200
            assert ask_again(port, "POST", "/rank", QUESTIONS["/rank"], **TOKEN)[0] == 200
            assert time.monotonic() - begun < 5
        left = 0
        for connection in open_ones:
            connection.setblocking(False)
            try:
                while connection.recv(65536):
                    pass
            except BlockingIOError:
                left += 1
            except ConnectionError:
                pass
            connection.close()
        assert left <= 20
    assert len("\n".join(logged)) < 1000, logged


def test_a_call_under_way_is_not_closed_for_another():
    stub = Stub(max_connections=5)
    rank, go_on, begun = stub.rank, threading.Event(), []

    async def slow(*given: Any) -> list:
        begun.append(given)
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return await rank(*given)

    stub.rank = slow
    with serving(stub) as port:
        body = json.dumps(QUESTIONS["/rank"]).encode()
        head = AUTHORIZED + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        busy = [connect(port, head + body) for _ in range(4)]
        until(lambda: len(begun) == 4)
        others = [connect(port, sent) for sent in HALF_OPEN * 3]
        time.sleep(0.2)
        assert ask(port, "GET", "/healthz")[0] == 200
        go_on.set()
        for connection in busy:
            assert rest(connection).startswith(b"HTTP/1.1 200")
        for connection in others:
            connection.close()


def test_slow_headers_and_bodies_time_out(logged):
    with serving(Stub(receive=0.5)) as port:
        logged.clear()
        begun = time.monotonic()
        headers = [connect(port, sent) for sent in HALF_OPEN[:3]]
        bodies = [
            connect(port, AUTHORIZED + b"Content-Length: 1000\r\n\r\n{"),
            connect(port, AUTHORIZED + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"),
        ]
        slow = connect(port, HALF_OPEN[3])  # gets its 401, and continues sending

        def drip() -> None:
            with contextlib.suppress(OSError):
                while True:
                    slow.sendall(b" ")
                    time.sleep(0.05)

        dripping = threading.Thread(target=drip)
        dripping.start()
        for connection in headers:
            text = rest(connection)
            assert text.startswith(b"HTTP/1.1 408") and b"no request arrived within 0.5 seconds" in text
        for connection in bodies:
            text = rest(connection)
            assert text.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.5 seconds" in text
        dripping.join(5)
        assert not dripping.is_alive()
        assert time.monotonic() - begun < 5
    assert not logged or len("\n".join(logged)) < 1000


def test_a_client_that_does_not_read_is_disconnected():
    """Responses that the client does not read fill the sockets' buffers, and then the server waits."""
    with serving(Stub(receive=0.3, timeout=0.3)) as port:
        greedy = socket.socket()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.settimeout(0.2)
        greedy.connect(("127.0.0.1", port))
        question = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
        deadline = time.monotonic() + 15
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    greedy.sendall(question)


def test_traffic_that_is_not_http_does_not_flood_the_log(port, logged):
    for _ in range(20):
        for sent in (b"\x16\x03\x01\x02\x00", b"GET  / / /\r\n\r\n", b"\r\n" * 5 + b"x" * 20_000):
            connect(port, sent).close()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert ask(port, "GET", "/healthz", **headers)[0] == 200
    assert not logged


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"GET /healthz?",
        # after a response, and after a body
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\nX: ",
        AUTHORIZED + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ",
    ],
)
def test_endless_headers_and_trailers_are_not_buffered(sent):
    with serving(Stub()) as port:
        connection = connect(port, sent)
        begun, blocks = time.monotonic(), itertools.count()
        with pytest.raises(ConnectionError):
            while next(blocks) < 2000:
                connection.sendall(b"x" * 16_384)
        assert next(blocks) < 1000  # no more than the sockets hold
        assert time.monotonic() - begun < 10  # the time-out of a call that does not end


def test_pipelined_requests_are_not_buffered_without_limit():
    stub, go_on = Stub(), threading.Event()

    async def slow(*_: Any) -> list:
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return []

    stub.rank = slow
    with serving(stub) as port:
        body = json.dumps(QUESTIONS["/rank"]).encode()
        head = AUTHORIZED + b"Content-Length: %d\r\n\r\n" % len(body)
        connection = connect(port, head + body)
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
            rest(connection)
        assert time.monotonic() - begun < 5
        go_on.set()


def test_a_body_is_read_only_up_to_the_limit(port):
    body = {"requests": "x" * 30_000}
    status, text = ask(port, "POST", "/rank", body, **TOKEN)
    assert status == 413 and b"larger than 20000 bytes" in text


def test_each_connection_has_a_file_handle_from_the_beginning(monkeypatch):
    allowed = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1024))
    monkeypatch.setattr(os, "listdir", lambda _: ["0"] * 20)  # this process has many
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.append(limits))
    _ensure_file_handles(300)
    ((soft, hard),) = allowed
    assert 300 + 256 < soft <= hard == 1024
    with pytest.raises(
        ConfigError, match=r"max-connections 4000 needs \d+ .* may have only 1024; .* \(ulimit -n\)"
    ):
        _ensure_file_handles(4000)
    for unlimited in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (10_000, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=unlimited: limits)
        _ensure_file_handles(4000)
    assert len(allowed) == 1


# ------------------------------------------------------------------------------------ times, store


@pytest.mark.parametrize(
    "text, same_as",
    [
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ("2016-12-31T23:59:60.75Z", "2017-01-01T00:00:00Z"),
        ("2017-01-01T05:29:60+05:30", "2017-01-01T00:00:00Z"),
    ],
)
def test_a_leap_second_is_the_next_seconds_start(text, same_as):
    stub = Stub()
    seen: list[int] = []

    async def append(events: list) -> list[EventResult]:
        seen.extend(event.time for event in events)
        return [EventResult("taken")] * len(events)

    stub.append = append
    event = QUESTIONS["/events"]["events"][0]
    events = [{**event, "time": text}, {**event, "time": same_as}]
    assert TestClient(create_app(stub)).post("/events", json={"events": events}).status_code == 200
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "text", ["2016-12-31T23:58:60Z", "2016-12-31T12:00:60Z", "2016-12-31T23:59:61Z"]
)
def test_a_second_that_never_was_is_refused(text):
    event = {**QUESTIONS["/events"]["events"][0], "time": text}
    answer = TestClient(create_app(Stub())).post("/events", json={"events": [event]})
    assert answer.status_code == 422 and "events.0.time: " in answer.json()["error"]


@pytest.fixture
def own_redis(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A Redis server with a password, which the test kills."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    path = str(tmp_path / "socket")
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options, "--requirepass", "hunter2"], stdout=subprocess.DEVNULL)
    until(Path(path).exists)
    yield server, f"unix://:hunter2@{path}"
    server.kill()
    server.wait()


def live_on(address: str) -> LiveScorer:
    """A LiveScorer with a store but no model."""
    key_values = open_key_value_store(address)
    layout = StateLayout.of(InteractionFidelityAttention(IFAConfig(8, num_heads=2)))
    StateStore.begin(key_values, "v", layout, 0, "log").finish()
    store = StateStore(key_values, "v")
    return LiveScorer(lambda: SimpleNamespace(store=store, catch_up=lambda: 0), Limits())


def test_a_process_is_ready_only_while_its_store_answers_and_no_password_is_shown(own_redis, caplog):
    server, address = own_redis
    with live_on(address) as live:
        client = TestClient(create_app(live))
        assert client.get("/readyz").json() == {"version": "v"}
        asked = []
        key_values = live._scorers[0].store.key_values
        read = key_values.read
        key_values.read = lambda keys: (asked.append(keys), read(keys))[1]
        begun = time.monotonic()
        for _ in range(20):
            client.get("/readyz")
        assert len(asked) <= 1 + (time.monotonic() - begun)  # one per second
        server.kill()
        server.wait()
        time.sleep(1.1)
        begun = time.monotonic()
        answer = client.get("/readyz")
        assert answer.status_code == 503 and time.monotonic() - begun < 3
        assert answer.json() == {"error": "the states are lost, or the store does not respond"}
        with pytest.raises(StoreError, match=r"unix:///.*socket: ") as raised:
            key_values.read([b"a"])
        shown = f"{answer.text} {raised.value!r} {raised.getrepr()} {caplog.text} {vars(key_values)}"
        assert "hunter2" not in shown.replace(address, "")
        assert client.get("/healthz").status_code == 200


def test_a_process_whose_states_are_gone_is_not_ready(tmp_path):
    with live_on(str(tmp_path / "states")) as live:
        client = TestClient(create_app(live))
        assert client.get("/readyz").status_code == 200
        key_values = live._scorers[0].store.key_values
        key_values.delete(list(key_values.scan(b"")))
        time.sleep(1.1)
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"error": "the states are lost, or the store does not respond"}


def test_redis_takes_its_password_from_the_environment(own_redis, monkeypatch):
    _, address = own_redis
    bare = address.replace(":hunter2@", "")
    with pytest.raises(StoreError, match=r"unix:///.*(Authentication required|authenticated)"):
        open_key_value_store(bare)
    monkeypatch.setenv("IFA_REDIS_PASSWORD", "hunter2")
    store = open_key_value_store(bare)
    assert store.read([b"a"]) == [None]
    store.close()


@pytest.mark.parametrize(
    "address, shown",
    [
        ("redis://:hunter2@127.0.0.1:1/0", "redis://127.0.0.1:1/0: "),
        ("redis://me:hunter2@127.0.0.1:1", "redis://127.0.0.1:1: "),
        ("redis://127.0.0.1:1/0?password=hunter2", "redis://127.0.0.1:1/0: "),
        ("redis://127.0.0.1:1/0?password=hun@ter2", "redis://...: "),
        ("rediss://:hunter2@[::1]:1/0?ssl_password=hunter2", "rediss://[::1]:1/0: "),
        ("unix://:hunter2@/no/socket", "unix:///no/socket: "),
        ("redis://:hunter2/x@127.0.0.1:1/0", "redis://...: "),
        ("redis://:hunter2?x@127.0.0.1:1/0", "redis://...: "),
        ("redis://:hunter2#x@127.0.0.1:1/0", "redis://...: "),
        ("redis://:hunter2@x@127.0.0.1:1/0", "redis://...: "),
        ("redis://:hunter2", "redis://...: "),
        (
            "Redis://:hunter2@127.0.0.1:1/0",
            "Redis://127.0.0.1:1/0: not a store's address; expected a folder or redis://",
        ),
        (
            "valkey://:hunter2@127.0.0.1:1/0",
            "valkey://...: not a store's address; expected a folder or redis://",
        ),
    ],
)
def test_no_message_shows_the_password_of_an_address(address, shown, monkeypatch):
    def refused(self: redis.Redis) -> None:
        raise redis.ConnectionError("refused")

    monkeypatch.setattr(redis.Redis, "ping", refused)
    with pytest.raises(StateError) as raised:
        open_key_value_store(address)
    assert str(raised.value).startswith(shown)
    assert "hunter2" not in f"{raised.getrepr(style='native')}".replace(address, "")


def test_a_server_that_repeats_the_password_is_not_quoted(monkeypatch):
    def unknown(self: redis.Redis, *_: object) -> None:
        raise redis.ResponseError("unknown command `AUTH`, with args beginning with: `hunter2`, ")

    monkeypatch.setattr(redis.Redis, "info", unknown)
    with pytest.raises(StoreError, match=r"unknown command `AUTH`, with args \.\.\."):
        open_key_value_store("redis://:hunter2@127.0.0.1:1")


def test_a_configuration_shows_no_password():
    address = "redis://:hunter2@127.0.0.1"
    for config in (
        ServeConfig(Path("run"), address),
        BuildStatesConfig(Path("run"), address, 0),
        StatesConfig(address),
    ):
        assert "hunter2" not in repr(config)


@pytest.mark.parametrize("early", [True, False])
def test_a_sighup_during_loading_is_handled_after_it(early, monkeypatch):
    reloads: list[threading.Thread] = []

    class Recorder(Stub, contextlib.nullcontext):
        def __init__(self, load: Any, limits: Limits) -> None:
            super().__init__()
            self.enter_result = self

        def reload(self) -> None:
            reloads.append(threading.current_thread())

    def loading(*_: Any, **__: Any) -> None:
        if early:
            signal.raise_signal(signal.SIGHUP)  # unhandled, it would end the tests
            signal.raise_signal(signal.SIGHUP)

    def run(_: Any) -> None:
        if early:
            until(lambda: reloads)
        signal.raise_signal(signal.SIGHUP)
        until(lambda: len(reloads) > early)

    monkeypatch.delenv("IFA_TOKEN", raising=False)
    monkeypatch.setattr("ifa_torchrec.commands.serve.open_key_value_store", loading)
    monkeypatch.setattr("ifa_torchrec.commands.serve.LiveScorer", Recorder)
    monkeypatch.setattr(_Server, "run", run)
    before = signal.getsignal(signal.SIGHUP)
    try:
        serve(ServeConfig(Path("run"), "store"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(reloads) == early + 1
    # not in the handler, which interrupts this thread anywhere, with the locks that it holds
    assert threading.current_thread() not in reloads
