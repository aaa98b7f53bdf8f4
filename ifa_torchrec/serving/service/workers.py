"""Several processes that serve one port from one load of the weights: forked, so that they share it."""

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
"""Seconds before each try to do what follows a reload."""
_READY = b"+"
_LONGEST = 4096
"""Bytes of what a process tells; a pipe takes so many at once."""
Loaded = TypeVar("Loaded")


def shared_sockets(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """The sockets of each of ``count`` processes, bound to one address; each gets its share of the
    connections.

    They stay open here, so that connections which wait for a process that died wait for the next one.

    Raises:
        ConfigError: the address cannot be listened on, or something does already.

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
        # alone first: another service of the same user that shares its port would share this one's calls
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
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error}") from error
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
    """Loads once, and forks a process for each of some sockets. One that dies is replaced; when its
    replacement does not come up either, all end.

    SIGHUP loads anew, and replaces one process after the other: each serves before the one before it
    ends. SIGTERM and SIGINT end them all.

    Args:
        load: gives what the processes share. It runs in a thread: OpenMP's threads belong to the thread
            that began them, and one that has some must not fork.
        work: is given that, its sockets and a function to call once it serves; returns when it got
            SIGTERM, and has finished what it took.
        afterwards: done in a process of its own when the last one has been replaced.
        sockets: of each process, as ``shared_sockets`` gives them.
        metrics: folder by which the processes add up what they count.
        patience: seconds in which a process that got SIGTERM has to end; then it is killed.

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
        # whoever has its other end sees when this process is gone
        self._alive, self._here = os.pipe()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            WorkerError: a process does not come up.
            UserError: ``load`` failed.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._loaded = self._load_anew()
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

    def _load_anew(self) -> Loaded:
        loading: Future[Loaded] = Future()

        def load() -> None:
            try:
                loading.set_result(self._load())
            except BaseException as error:  # for the thread that waits
                loading.set_exception(error)

        thread = threading.Thread(target=load, name="load", daemon=True)
        thread.start()
        _until(lambda seconds: bool(wait([loading], seconds).done))
        thread.join()  # a process must not fork beside it
        loaded = loading.result()
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # the collector would write to the pages that the processes share
        return loaded

    def _start(self, slot: int) -> None:
        """Fork a process, and wait until it serves.

        Raises:
            WorkerError: it does not.
        """
        pid, told = self._fork(lambda ready: self._work(self._loaded, self._sockets[slot], ready))
        if (why := self._said(pid, told)) != _READY.decode():
            self._reap(pid)
            raise WorkerError(f"worker {slot} did not come up: {why[1:] or 'its log may say why'}")
        self._pids[slot] = pid

    def _said(self, pid: int, told: int) -> str:
        """The first that a forked process tells; empty if it ends without a word. It is ended where this
        is stopped meanwhile."""
        try:
            _until(lambda seconds: bool(select.select([told], [], [], seconds)[0]))
            return os.read(told, _LONGEST).decode(errors="replace")
        except _StoppedError:
            self._end(pid)
            raise
        finally:
            os.close(told)

    def _fork(self, do: Callable[[Callable[[], object]], object]) -> tuple[int, int]:
        """Do something in a process of its own; its id, and what can be read of how it goes."""
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            _be(do, tell, self._alive, self._here)
        os.close(tell)
        return pid, told

    def _replace_all(self) -> None:
        before, old = self._loaded, dict(self._pids)
        try:
            self._loaded = self._load_anew()
            for slot, pid in old.items():
                self._start(slot)
                self._end(pid)
        except _StoppedError:
            raise
        except Exception:
            if self._pids != old:  # they are of different weights by now
                raise
            _log.exception("the reload failed; the weights go on")
            self._reloads.labels("failed").inc()
            self._loaded = before
            return
        caught_up = self._catch_up()
        self._reloads.labels("ok" if caught_up else "failed").inc()

    def _catch_up(self) -> bool:
        """Whether what the old processes took after the new ones had looked is taken over."""
        for pause in _PAUSES:
            if signal.sigtimedwait(_STOP, pause) is not None:
                raise _StoppedError
            pid, told = self._fork(lambda _: self._afterwards(self._loaded))
            self._said(pid, told)
            if self._reap(pid) == 0:
                return True
        _log.error("the new weights serve, but lack the last events before them; send SIGHUP again")
        return False

    @cached_property
    def _reloads(self) -> Counter:
        """Made when the first is counted: of the processes, each makes its own."""
        return Metrics(self._metrics).reloads

    def _restart_dead(self) -> None:
        for slot, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                keep_counts_of_dead(self._metrics, pid)
                del self._pids[slot]
                code = os.waitstatus_to_exitcode(status)
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                _log.error("worker %d (process %d) ended by %s; another takes its place", slot, pid, how)
                time.sleep(0.5)
                self._start(slot)

    def _end_all(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + self._patience  # for all of them, which end beside each other
        for pid in self._pids.values():
            self._reap(pid, until)
        self._pids.clear()
        for end in (self._alive, self._here):
            os.close(end)

    def _end(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        self._reap(pid)

    def _reap(self, pid: int, until: float | None = None) -> int:
        """How a process ended that is about to end; one that has not by then is killed."""
        until = time.monotonic() + self._patience if until is None else until
        ended, status = os.waitpid(pid, os.WNOHANG)
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            _log.error("process %d does not end; it is killed", pid)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        keep_counts_of_dead(self._metrics, pid)
        return status


class _StoppedError(Exception):
    """SIGTERM or SIGINT came amid something."""


def _until(done: Callable[[float], bool]) -> None:
    """Return when ``done``, which waits for so many seconds at most, says so.

    Raises:
        _StoppedError: SIGTERM or SIGINT, which are blocked, came before.
    """
    while not done(0.1):
        if signal.sigtimedwait(_STOP, 0) is not None:
            raise _StoppedError


def _be(do: Callable[[Callable[[], object]], object], tell: int, alive: int, here: int) -> None:
    """What a forked process does; it ends here."""
    code = 1
    try:
        os.close(here)
        threading.Thread(target=_end_without, args=(alive,), daemon=True).start()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which is for the process that loads
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        do(lambda: os.write(tell, _READY))
        code = 0
    except Exception as error:
        _log.exception("a worker failed")
        os.write(tell, f"-{error}".encode(errors="replace")[:_LONGEST])
    finally:
        logging.shutdown()
        os._exit(code)


def _end_without(alive: int) -> None:
    """End this process when the one that forked it is gone."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
