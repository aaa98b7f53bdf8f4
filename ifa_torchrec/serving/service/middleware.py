"""Around every call: the token, the body's size and time, the call's metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifa_torchrec.serving.live import Limits, LiveScorer
from ifa_torchrec.serving.service.refusals import problem

_PUBLIC = {"/healthz", "/readyz", "/docs", "/openapi.json"}
"""Routes for everyone; every other is for the token's bearers only."""


class CallMiddleware:
    """Asks for the token, limits the body, and measures.

    It goes by the route that will respond, not by the path, of which a router may take several
    spellings.

    Args:
        app: what is called within.
        live: its limits hold, and its metrics count.
        token: as ``create_app``.
        routes: the application's.
    """

    def __init__(
        self, app: ASGIApp, live: LiveScorer, token: str | None, routes: Sequence[BaseRoute]
    ) -> None:
        self._app, self._live, self._routes = app, live, routes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # there are none, and none shall come that does not ask
            await send({"type": "websocket.close"})
            return
        start, status = time.perf_counter(), 500
        path = self._route(scope)

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if path in _PUBLIC or self._has_token(scope):
                await self._app(scope, _limited(receive, self._live.limits, start), seen)
            else:
                advice = "give the server's token, as Authorization: Bearer TOKEN"
                refusal = problem(401, advice, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, seen)
        finally:
            self._live.metrics.calls.labels(path, status).inc()
            self._live.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _route(self, scope: Scope) -> str:
        """The path of the route that responds, as it was declared; else clients would invent labels."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return getattr(route, "path", "other")
        return "other"

    def _has_token(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # latin-1 gives the header's bytes back as they came
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self._token)


def _limited(receive: Receive, limits: Limits, start: float) -> Receive:
    """``receive`` of a call that began at ``start``; refuses a body that is too large or too slow."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        left = start + limits.receive - time.perf_counter()
        try:
            message = await asyncio.wait_for(receive(), left)
        except asyncio.TimeoutError:
            text = f"the body did not come within {limits.receive:g} seconds; send it again"
            raise HTTPException(408, text) from None
        size += len(message.get("body", b""))
        if size > limits.max_body_bytes:
            text = f"the body is larger than {limits.max_body_bytes} bytes; send less a call"
            raise HTTPException(413, text)
        return message

    return limited
