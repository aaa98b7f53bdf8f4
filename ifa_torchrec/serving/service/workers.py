"""Several processes that serve one port; they are forked, so that they share one copy of the weights."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from prometheus_client import Counter

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving.counted import keep_counts_of_dead
from ifa_torchrec.serving.errors import WorkerError
from ifa_torchrec.serving.live import Metrics

_log = logging.getLogger(__name__)
_STOP = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = {*_STOP, signal.SIGHUP, signal.SIGCHLD}
_PAUSES = (0, 1, 4, 15)
"""Seconds before each attempt to catch up after a reload."""
_READY = b"+"
_LONGEST = 4096
"""Most bytes that a process reports; a pipe takes that many in one atomic write."""
Loaded = TypeVar("Loaded")


def shared_sockets(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """The sockets of ``count`` processes, all bound to one address; each process gets its share of the
    connections.

    The sockets stay open here, so that connections waiting for a process that died are served by its
    replacement.

    Raises:
        ConfigError: the address cannot be bound, or is in use.

    Example:
        >>> from ifa_torchrec.serving.service.workers import shared_sockets
        >>> (one,), (other,) = shared_sockets("127.0.0.1", 0, 2)
        >>> one.getsockname() == other.getsockname()
        True
        >>> one.close(), other.close()
        (None, None)
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # first without SO_REUSEPORT: otherwise this service would share calls with another of this user
        for family, *_, address in found:
            with _bound(family, address, alone=True) as alone:
                alone.listen()
        result: list[list[socket.socket]] = []
        for _ in range(count):
            mine: list[socket.socket] = []
            for family, *_, address in found:
                mine.append(_bound(family, (address[0], port, *address[2:])))
                port = port or mine[0].getsockname()[1]
            result.append(mine)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return result


def _bound(family: int, address: tuple[Any, ...], alone: bool = False) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not alone:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


class Workers(Generic[Loaded]):
    """Loads once, and forks one worker process per element of ``sockets``. A worker that dies is
    replaced; if its replacement does not start, all workers are stopped.

    SIGHUP loads again and replaces the workers one after the other: each new worker serves before its
    predecessor is stopped. SIGTERM and SIGINT stop all workers.

    Args:
        load: returns what the workers share. It runs in a thread: OpenMP's threads belong to the thread
            that started them, and a thread that has some must not fork.
        work: runs in each worker. It takes what ``load`` returned, the worker's sockets, and a function
            to call once it serves; it returns after SIGTERM, when accepted calls are finished.
        afterwards: runs in its own process after the last worker has been replaced.
        sockets: the sockets of each worker, from ``shared_sockets``.
        metrics: folder in which the workers sum their metrics.
        patience: seconds after SIGTERM until a process is killed.

    Example:
        >>> from ifa_torchrec.serving.service.workers import Workers, shared_sockets
        >>> def serve_with_two(load, work, catch_up, folder):  # until SIGTERM
        ...     sockets = shared_sockets("127.0.0.1", 8000, 2)
        ...     Workers(load, work, catch_up, sockets, folder).run()
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        work: Callable[[Loaded, list[socket.socket], Callable[[], object]], None],
        afterwards: Callable[[Loaded], object],
        sockets: list[list[socket.socket]],
        metrics: Path,
        patience: float = 60,
    ) -> None:
        self._load, self._work, self._afterwards = load, work, afterwards
        self._sockets, self._metrics, self._patience = sockets, metrics, patience
        self._pids: dict[int, int] = {}
        # a worker that reads the other end notices when this process is gone
        self._alive, self._here = os.pipe()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            WorkerError: a worker did not start.
            UserError: ``load`` failed.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._loaded = self._load_again()
            for slot in range(len(self._sockets)):
                self._start(slot)
            while (number := signal.sigwait(_SIGNALS)) not in _STOP:
                if number == signal.SIGHUP:
                    self._replace_all()
                self._restart_dead()
        except _StoppedError:
            pass
        finally:
            self._end_all()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _load_again(self) -> Loaded:
        loading: Future[Loaded] = Future()

        def load() -> None:
            try:
                loading.set_result(self._load())
            except BaseException as error:  # passed on to the waiting thread
                loading.set_exception(error)

        thread = threading.Thread(target=load, name="load", daemon=True)
        thread.start()
        _until(lambda seconds: bool(wait([loading], seconds).done))
        thread.join()  # this process must not fork while the thread runs
        loaded = loading.result()
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # otherwise the collector would write to pages that the workers share
        return loaded

    def _start(self, slot: int) -> None:
        """Fork a worker, and wait until it serves.

        Raises:
            WorkerError: it did not start.
        """
        pid, reports = self._fork(lambda ready: self._work(self._loaded, self._sockets[slot], ready))
        if (report := self._first_report(pid, reports)) != _READY.decode():
            self._reap(pid)
            raise WorkerError(f"worker {slot} did not start: {report[1:] or 'see its log lines above'}")
        self._pids[slot] = pid

    def _first_report(self, pid: int, reports: int) -> str:
        """The first report of a forked process; empty if it ends without one. If this process is told to
        stop meanwhile, the forked process is stopped too."""
        try:
            _until(lambda seconds: bool(select.select([reports], [], [], seconds)[0]))
            return os.read(reports, _LONGEST).decode(errors="replace")
        except _StoppedError:
            self._end(pid)
            raise
        finally:
            os.close(reports)

    def _fork(self, do: Callable[[Callable[[], object]], object]) -> tuple[int, int]:
        """Run ``do`` in a forked process; return its id, and a pipe end to read its reports from."""
        reports, to_report = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reports)
            _be(do, to_report, self._alive, self._here)
        os.close(to_report)
        return pid, reports

    def _replace_all(self) -> None:
        before, old = self._loaded, dict(self._pids)
        try:
            self._loaded = self._load_again()
            for slot, pid in old.items():
                self._start(slot)
                self._end(pid)
        except _StoppedError:
            raise
        except Exception:
            if self._pids != old:  # some workers already have the new weights
                raise
            _log.exception("the reload failed; the old weights keep serving")
            self._reloads.labels("failed").inc()
            self._loaded = before
            return
        caught_up = self._catch_up()
        self._reloads.labels("ok" if caught_up else "failed").inc()

    def _catch_up(self) -> bool:
        """Add to the new weights' states the events that old workers added after the new workers caught
        up; return whether that succeeded."""
        for pause in _PAUSES:
            if signal.sigtimedwait(_STOP, pause) is not None:
                raise _StoppedError
            pid, reports = self._fork(lambda _: self._afterwards(self._loaded))
            self._first_report(pid, reports)
            if self._reap(pid) == 0:
                return True
        _log.error(
            "the new weights are serving, but their states lack the last events added before the "
            "reload; send SIGHUP again"
        )
        return False

    @cached_property
    def _reloads(self) -> Counter:
        """Created on first use, after the workers were forked: each process has its own metrics."""
        return Metrics(self._metrics).reloads

    def _restart_dead(self) -> None:
        for slot, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                keep_counts_of_dead(self._metrics, pid)
                del self._pids[slot]
                code = os.waitstatus_to_exitcode(status)
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                _log.error("worker %d (process %d) ended by %s; starting another", slot, pid, how)
                time.sleep(0.5)
                self._start(slot)

    def _end_all(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + self._patience  # shared by all workers, which stop in parallel
        for pid in self._pids.values():
            self._reap(pid, until)
        self._pids.clear()
        for end in (self._alive, self._here):
            os.close(end)

    def _end(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        self._reap(pid)

    def _reap(self, pid: int, until: float | None = None) -> int:
        """Wait for a process to end, kill it after ``until``, and return its exit status."""
        until = time.monotonic() + self._patience if until is None else until
        ended, status = os.waitpid(pid, os.WNOHANG)
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            _log.error("process %d did not end in time; killing it", pid)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        keep_counts_of_dead(self._metrics, pid)
        return status


class _StoppedError(Exception):
    """SIGTERM or SIGINT arrived during another operation."""


def _until(done: Callable[[float], bool]) -> None:
    """Call ``done``, which waits for at most the given seconds, until it returns True.

    Raises:
        _StoppedError: SIGTERM or SIGINT, which are blocked, arrived first.
    """
    while not done(0.1):
        if signal.sigtimedwait(_STOP, 0) is not None:
            raise _StoppedError


def _be(do: Callable[[Callable[[], object]], object], to_report: int, alive: int, here: int) -> None:
    """The body of a forked process, which exits here."""
    code = 1
    try:
        os.close(here)
        threading.Thread(target=_end_without, args=(alive,), daemon=True).start()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # only the process that loads handles it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        do(lambda: os.write(to_report, _READY))
        code = 0
    except Exception as error:
        _log.exception("a worker failed")
        os.write(to_report, f"-{error}".encode(errors="replace")[:_LONGEST])
    finally:
        logging.shutdown()
        os._exit(code)


def _end_without(alive: int) -> None:
    """Stop this process when the one that forked it is gone."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
