"""Rank candidates and accept events over HTTP.

    ifa serve --run runs/mine --store runs/states
    curl -s localhost:8000/rank -H 'Content-Type: application/json' \\
        -d '{"requests": [{"user": 7, "candidates": [4, 9, 23], "k": 2}]}'

The store is one that ifa build-states filled from the same run. /docs describes the calls.
SIGHUP reloads the run while the old weights keep serving; if --run is a link, it may by then point to
another run whose states were built into the same store. --run may also be a bundle (ifa export
--bundle), which needs no log on the serving machine. SIGTERM finishes accepted calls, then exits.
Without a bearer token (--token-file) it listens on loopback only. docs/howto/serve.md says who may call
what. With --events kafka://HOST:PORT/TOPIC it also reads events from a topic, each once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import re
import resource
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from ifa_torchrec.commands.histories import BuildFromLog
from ifa_torchrec.errors import ConfigError, require

require("serve", "uvicorn")

# ruff: noqa: E402 (missing packages are named before an import fails)
import uvicorn
from uvicorn.config import LOGGING_CONFIG

from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.serving import (
    KeyValueStore,
    Scorer,
    StateStore,
    open_key_value_store,
    quantize_tables,
)
from ifa_torchrec.serving.compiled import DENSE_FILE, CompiledDense
from ifa_torchrec.serving.live import Limits, LiveScorer, Metrics
from ifa_torchrec.serving.service import create_app
from ifa_torchrec.serving.service.connections import Connection
from ifa_torchrec.serving.service.logs import LogFormat, log_as
from ifa_torchrec.serving.service.workers import Workers, shared_sockets
from ifa_torchrec.serving.states.lazy import LazyStateStore
from ifa_torchrec.serving.stream import KafkaTopic, Stream
from ifa_torchrec.training.bundle import Bundle, is_bundle, read_bundle
from ifa_torchrec.training.run import Run, load_run

_log = logging.getLogger(__name__)
_BACKLOG = 64
"""Most connections waiting to be accepted; that many are accepted at once, before any is closed."""
_CLOSING = 60
"""Seconds that a worker has after its last call to finish accepted work, even with a slow store."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of ``ifa serve``."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--bundle",))]
    """Folder of a training run (its --out), or of a bundle (``ifa export --bundle``), which needs no
    log; or a link to either."""
    store: str = field(repr=False)
    """The store of its states: a folder, or redis://HOST:PORT/NUMBER, with the password in the
    environment variable IFA_REDIS_PASSWORD."""
    data: str | Path | None = None
    """Event log, a folder or a URI; by default the one the run was trained on. Not for a bundle, which
    includes what it needs of the log."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses."""
    port: int = 8000
    """Port to listen on."""
    token_file: Path | None = None
    """File with the bearer token that calls must have; by default the environment variable IFA_TOKEN."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that calls may be addressed to (their Host header), *.DOMAIN for all of a domain, * for
    any. The default is any; on loopback it is localhost and the loopback addresses, so that a web page
    cannot reach the service through its own host name."""
    events: str | None = field(default=None, repr=False)
    """A Kafka topic to read events from: kafka://HOST:PORT/TOPIC."""
    events_settings: Path | None = None
    """File with settings of the Kafka client, such as user and password: one NAME=VALUE per line, with
    librdkafka's names."""
    skip_refused: bool = False
    """Skip refused messages of the topic, and log each; by default reading stops at the first one."""
    int8: bool = False
    """Round the tables to 8 bits: a third of their memory (docs/serving.md says what that changes)."""
    compiled: bool = False
    """Score with the dense part that ``ifa export --run RUN`` compiled into the run. It is machine code
    that runs in this process: use only runs that you made."""
    workers: int = 1
    """Processes that share the port and the memory of the weights. The threads of one process are
    divided among them."""
    lazy: bool = False
    """Serve while ``ifa build-states`` still builds the states, or after it was stopped: a missing user
    is built from the log at the first request or event. Needs the log."""
    strict: bool = False
    """Refuse (409) a request too far before the user's last event to be ranked as of its time; by
    default it is ranked as of a later time, which the response reports."""
    log: LogFormat = "text"
    """Format of log lines, which go to stderr: text, or json for log collectors."""
    drain: float = 2
    """Seconds after SIGTERM during which calls are still accepted, so that load balancers notice that
    /readyz responds 503."""
    limits: Limits = field(default_factory=Limits)
    """Limits on clients' calls."""

    def __post_init__(self) -> None:
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|(\*\.)?[^*/\s]+", name):
                raise ConfigError(f"--allowed-hosts: {name!r} is not a host name, *.DOMAIN or *")
        if self.events is None and (self.events_settings is not None or self.skip_refused):
            raise ConfigError("--events-settings and --skip-refused need a topic; give --events too")
        if self.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.workers}")


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CheckpointError, LogError, BundleError: the run, its log or the bundle is missing or damaged.
        StateError: the store cannot be opened, or has no states of the run's weights.
        ConfigError: the token is empty, or there is none and the address is not loopback; there are too
            few file handles for all connections; the port is in use; or --events is not a topic address.
        WorkerError: a worker did not start.
    """
    # A SIGHUP during loading is kept, and does not end the process. The handler may do little: it
    # interrupts this thread anywhere, with the locks that it holds; SimpleQueue.put is allowed anywhere.
    hung_up: SimpleQueue[bool] = SimpleQueue()
    signal.signal(signal.SIGHUP, lambda *_: hung_up.put(True))
    token = _token(config)
    if token is None and not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} can be reached from other machines: set a token with --token-file or "
            "the environment variable IFA_TOKEN, or listen on 127.0.0.1"
        )
    topic = _topic(config)
    if config.workers > 1:
        _serve_together(config, token, topic)
        return
    key_values = open_key_value_store(config.store, create=False)
    with (
        LiveScorer(lambda: _load(config).scorer(config, key_values), config.limits) as live,
        _reading(topic, live),
        _reloading(live, hung_up),
    ):
        _ensure_file_handles(config.limits.max_connections)
        _Server(config, live, token).run()


@contextmanager
def _reloading(live: LiveScorer, hung_up: SimpleQueue[bool]) -> Generator[None]:
    """Run a thread that reloads whenever True is put into ``hung_up``."""

    def reload() -> None:
        while hung_up.get():
            live.reload()

    if not hung_up.empty():
        while not hung_up.empty():
            hung_up.get()
        hung_up.put(True)  # once, however many SIGHUPs arrived before this serves
    thread = threading.Thread(target=reload, name="hangup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        hung_up.put(False)
        thread.join()


@dataclass(frozen=True)
class _Loaded:
    """A loaded run or bundle, without its states."""

    run: Run | Bundle
    model: DLRM_IFA
    compiled: CompiledDense | None
    build: BuildFromLog | None

    def scorer(self, config: ServeConfig, key_values: KeyValueStore) -> Scorer:
        if self.build is None:
            states = StateStore(key_values, self.run.version)
        else:
            within = config.limits.timeout / 2  # the other half is for ranking
            states = LazyStateStore(key_values, self.run.version, self.build, within)
            self.build.check(states)
        return Scorer(self.model, self.run.log, states, config.strict, self.compiled)


def _load(config: ServeConfig) -> _Loaded:
    # resolve a link once, so that all files are from the same run
    folder = config.run.resolve()
    if not is_bundle(folder):
        run = load_run(folder, config.data, sharded=False)
    elif config.data is None:
        run = read_bundle(folder)
    else:
        raise ConfigError(f"--data: {config.run} is a bundle, which needs no log; leave --data out")
    # build the vocabularies' indexes now, before any fork: the first ranking must not wait for them
    for name in run.log.schema.tables:
        run.log.vocabulary[name].rows_of([])
    model = quantize_tables(run.dlrm) if config.int8 else run.dlrm
    compiled = None
    if config.compiled:
        compiled = CompiledDense(model, run.log.schema, run.log.items, folder / DENSE_FILE)
    build = None
    if config.lazy:
        if isinstance(run, Bundle):
            raise ConfigError(
                f"--lazy: {config.run} is a bundle, which has no events to build states from; give the "
                "run instead"
            )
        build = BuildFromLog(run.dlrm, run.log)
    return _Loaded(run, model, compiled, build)


def _serve_together(config: ServeConfig, token: str | None, topic: KafkaTopic | None) -> None:
    """``serve`` with several processes."""
    limits = config.limits.of_each(config.workers)
    threads = max(1, torch.get_num_threads() // config.workers)

    def work(loaded: _Loaded, sockets: list[socket.socket], ready: Callable[[], object]) -> None:
        torch.set_num_threads(threads)
        key_values = open_key_value_store(config.store, create=False)  # forks must not share it

        def scorer() -> Scorer:
            return loaded.scorer(config, key_values)

        with LiveScorer(scorer, limits, Metrics(Path(folder))) as live, _reading(topic, live):
            _ensure_file_handles(limits.max_connections)
            _log.info("weights %s are serving now", live.version)
            _Server(replace(config, limits=limits), live, token, ready).run(sockets)

    def catch_up(loaded: _Loaded) -> None:
        torch.set_num_threads(threads)
        loaded.scorer(config, open_key_value_store(config.store, create=False)).catch_up()

    with tempfile.TemporaryDirectory(prefix="ifa-metrics-") as folder:
        sockets = shared_sockets(config.host, config.port, config.workers)
        patience = config.drain + _grace(config.limits) + _CLOSING
        Workers(lambda: _load(config), work, catch_up, sockets, Path(folder), patience).run()


def _grace(limits: Limits) -> int:
    """Seconds that running calls get to finish: each ends by its timeout, unless its client stops in the
    middle of a body."""
    return math.ceil(limits.timeout) + 5


class _Server(uvicorn.Server):
    """uvicorn's server, which here drains before it closes, calls ``ready`` once it serves, and does not
    treat a signal as a failure."""

    def __init__(
        self,
        config: ServeConfig,
        live: LiveScorer,
        token: str | None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(live, token, config.allowed_hosts or _own_names(config.host)),
                host=config.host,
                port=config.port,
                http=Connection.within(config.limits),
                ws="none",
                backlog=_BACKLOG,
                timeout_keep_alive=math.ceil(min(5, config.limits.receive / 2)),
                access_log=False,
                # None sends uvicorn's lines where all others go
                log_config=None if config.log == "json" else LOGGING_CONFIG,
                proxy_headers=False,  # nothing here uses the caller's address
                timeout_graceful_shutdown=_grace(config.limits),
            )
        )
        self._live, self._drain, self._ready = live, config.drain, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True  # uvicorn's own handler would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._live.draining = True
        await asyncio.sleep(self._drain)
        await super().shutdown(sockets)


def _topic(config: ServeConfig) -> KafkaTopic | None:
    if config.events is None:
        return None
    return KafkaTopic.at(config.events, config.events_settings, config.skip_refused)


def _reading(topic: KafkaTopic | None, live: LiveScorer) -> AbstractContextManager[object]:
    return nullcontext() if topic is None else Stream(topic, live)


def _token(config: ServeConfig) -> str | None:
    if config.token_file is not None:
        try:
            text, source = config.token_file.read_text(), str(config.token_file)
        except UnicodeDecodeError:
            raise ConfigError(f"--token-file: {config.token_file} is not UTF-8 text") from None
        except OSError as error:
            raise ConfigError(f"--token-file: {error}") from error
    elif "IFA_TOKEN" in os.environ:
        text, source = os.environ["IFA_TOKEN"], "IFA_TOKEN"
    else:
        return None
    words = text.split()
    if len(words) != 1:
        raise ConfigError(
            f"{source}: the token is {'several words' if words else 'empty'}; it must be one word"
        )
    return words[0]


def _ensure_file_handles(connections: int) -> None:
    """Make sure that there is a file handle for every connection; without, the process would fail."""
    # a reload opens the files a second time, and closed connections release their handles with a delay
    needed = connections + 4 * _BACKLOG + 2 * len(os.listdir("/dev/fd")) + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"--limits.max-connections {connections} needs {needed} file handles, but this process may "
            f"have only {hard}; raise the limit (ulimit -n), or allow fewer connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _own_names(host: str) -> tuple[str, ...]:
    if not _is_loopback(host):
        return ("*",)
    return "localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(config: Annotated[ServeConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    log_as(config.log)
    serve(config)
    if dist.is_initialized():  # not for a bundle
        dist.destroy_process_group()


main.__doc__ = __doc__
