"""Connections of the HTTP service: a limited number, and time limits for slow clients."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ifa_torchrec.serving.live import Limits

_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)  # a client that does not speak HTTP is not worth a log line

_WAITS, _SENDS, _BUSY = range(3)
_MOST_HEADERS = 1 << 16
"""Most bytes that may arrive without completing a request's headers, a part of its body or its end."""
_MOST_AHEAD = 128
"""Most requests that a client may pipeline before it has the response to the first of them."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits, since anyone can open one.

    A connection beyond the limit closes the one that has waited longest for its client; a client that
    makes progress finishes its request before it becomes the oldest. So no client can lock others out by
    waiting.

    uvicorn's parser buffers any number of headers, trailers and pipelined requests; this class counts
    them, and closes the connection of a client that sends too many.

    Pass ``Connection.within(limits)`` to uvicorn.
    """

    limits = Limits()

    @classmethod
    def within(cls, limits: Limits) -> type[Connection]:
        """A subclass with these limits."""
        return type("Connection", (cls,), {"limits": limits})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _log
        self._since = self._until = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._without_end, self._ended = 0, False  # bytes since a part of a request was complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol; closes another connection if there are too many."""
        super().connection_made(transport)
        self._wait(self.limits.receive)
        if len(self.connections) > self.limits.max_connections:
            others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
            last = min(others, key=Connection._precedence, default=self)
            if last._precedence()[0] == _BUSY:
                last = self
            self.connections.discard(last)  # now: connection_lost removes it only later
            last.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._ended = False
        super().data_received(data)
        self._without_end = 0 if self._ended else self._without_end + len(data)
        if self._without_end > _MOST_HEADERS and not self.transport.is_closing():
            self.send_400_response(f"More than {_MOST_HEADERS} bytes of headers.")

    def on_headers_complete(self) -> None:
        """See HttpToolsProtocol; the request starts now, or after the ones before it."""
        self._ended, self._in_body = True, True
        super().on_headers_complete()
        if not self.pipeline:
            self._wait_for_call()
        elif len(self.pipeline) > _MOST_AHEAD:
            self.transport.abort()
            raise RuntimeError("too many requests at once")  # stops the parser

    def on_body(self, body: bytes) -> None:
        """See HttpToolsProtocol."""
        self._ended = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See HttpToolsProtocol."""
        self._ended, self._in_body = True, False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See HttpToolsProtocol; the next request may have arrived already."""
        if self.pipeline:
            self._wait_for_call()
        else:
            self._wait(self.limits.receive)
        super().on_response_complete()

    def _wait_for_call(self) -> None:
        # time for the body, for the response, and for the client to read it
        self._wait(2 * self.limits.receive + self.limits.timeout)

    def _wait(self, seconds: float) -> None:
        """Close the connection after this time, unless another wait starts first."""
        self._since = self.loop.time()
        self._until = self._since + seconds
        # one timer serves many waits, since most waits never expire
        if self._timer is None or self._timer.when() > self._until:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._until, self._look)

    def _look(self) -> None:
        if self.loop.time() < self._until:
            self._set_timer()
        else:
            self._too_late()

    def _too_late(self) -> None:
        waits_for_headers = not self._in_body and (not self.cycle or self.cycle.response_complete)
        if waits_for_headers and self.transport.get_write_buffer_size() == 0:
            problem = f"no request arrived within {self.limits.receive:g} seconds"
            body = json.dumps({"error": problem}).encode()
            head = (
                "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
            )
            self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()
        else:
            self.transport.abort()  # close() would wait for the client to read

    def _precedence(self) -> tuple[int, float]:
        """Sort key: the connection with the lowest is closed first."""
        if not self.cycle or self.cycle.response_complete or self.flow.write_paused:
            return _WAITS, self._since
        # only clients with the token get their bodies read
        return _SENDS if self.cycle.more_body else _BUSY, self._since
