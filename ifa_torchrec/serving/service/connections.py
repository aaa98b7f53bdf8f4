"""Connections of the HTTP service: no more than the limit, and none that is waited for without end."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ifa_torchrec.serving.live import Limits

_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)  # that a client speaks no HTTP is not worth a line each time

_WAITS, _SENDS, _BUSY = range(3)
_MOST_HEADERS = 1 << 16
"""Bytes of a request's headers, and of whatever else is no body."""
_MOST_AHEAD = 128
"""Requests that a client may send before it has the response to the first of them."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which anyone can open, within limits.

    Whoever opens more than there may be closes the one that has waited longest for its client: a request
    of a client that gets on is through before it is that old. So nobody keeps others out by waiting.

    The parser keeps headers, trailers and requests that are ahead however many come; here they are
    counted, and a client that sends too much of them is closed.

    ``Connection.within(limits)`` is the class to give to uvicorn.
    """

    limits = Limits()

    @classmethod
    def within(cls, limits: Limits) -> type[Connection]:
        """The class with limits of its own."""
        return type("Connection", (cls,), {"limits": limits})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _log
        self._since = self._until = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._without_end, self._ended = 0, False  # bytes since something of a request was complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for it."""
        super().connection_made(transport)
        self._wait(self.limits.receive)
        if len(self.connections) > self.limits.max_connections:
            others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
            last = min(others, key=Connection._precedence, default=self)
            if last._precedence()[0] == _BUSY:
                last = self
            self.connections.discard(last)  # it leaves by itself later, when more may have come
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
        """See HttpToolsProtocol; a request begins here, or waits for the one before."""
        self._ended, self._in_body = True, True
        super().on_headers_complete()
        if not self.pipeline:
            self._wait_for_call()
        elif len(self.pipeline) > _MOST_AHEAD:
            self.transport.abort()
            raise RuntimeError("too many requests at once")  # the parser ends by it

    def on_body(self, body: bytes) -> None:
        """See HttpToolsProtocol."""
        self._ended = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See HttpToolsProtocol."""
        self._ended, self._in_body = True, False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See HttpToolsProtocol; the next request may have come already."""
        if self.pipeline:
            self._wait_for_call()
        else:
            self._wait(self.limits.receive)
        super().on_response_complete()

    def _wait_for_call(self) -> None:
        # for the body, for the response, and for the client to take it
        self._wait(2 * self.limits.receive + self.limits.timeout)

    def _wait(self, seconds: float) -> None:
        """Be closed unless something else happens first."""
        self._since = self.loop.time()
        self._until = self._since + seconds
        # one timer for many waits: most come to nothing
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
            problem = f"no request came within {self.limits.receive:g} seconds"
            body = json.dumps({"error": problem}).encode()
            head = (
                "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
            )
            self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()
        else:
            self.transport.abort()  # a close would wait for the client to read

    def _precedence(self) -> tuple[int, float]:
        """Who is closed first."""
        if not self.cycle or self.cycle.response_complete or self.flow.write_paused:
            return _WAITS, self._since
        # a body is read only from those who have the token
        return _SENDS if self.cycle.more_body else _BUSY, self._since
