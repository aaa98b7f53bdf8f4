"""Checks around every call: the token, the body's size and time; and the call's metrics."""

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
"""Routes that need no token; all others do."""


class CallMiddleware:
    """Checks the token, limits the body's size and time, and records metrics.

    It decides by the route that will respond, not by the path, since a router may accept several
    spellings of a path.

    Args:
        app: the ASGI application to wrap.
        live: provides the limits and the metrics.
        token: see ``create_app``.
        routes: the application's routes.
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
        if scope["type"] == "websocket":  # no route uses them, and none added later may skip the token
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
        """The declared path of the route that responds, so that clients cannot invent metric labels."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return getattr(route, "path", "other")
        return "other"

    def _has_token(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers decodes as latin-1; encode back to the original bytes
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self._token)


def _limited(receive: Receive, limits: Limits, start: float) -> Receive:
    """``receive`` for a call that began at ``start``; refuses a body that is too large or too slow."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        left = start + limits.receive - time.perf_counter()
        try:
            message = await asyncio.wait_for(receive(), left)
        except asyncio.TimeoutError:
            text = f"the body did not arrive within {limits.receive:g} seconds; send it again"
            raise HTTPException(408, text) from None
        size += len(message.get("body", b""))
        if size > limits.max_body_bytes:
            text = f"the body is larger than {limits.max_body_bytes} bytes; send less per call"
            raise HTTPException(413, text)
        return message

    return limited
