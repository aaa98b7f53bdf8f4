"""The HTTP service: what is asked and answered, and what is refused."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    model_validator,
)
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.serving.batching import ClosedError, QueueFullError
from ifa_torchrec.serving.errors import RequestError, StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.live import LiveScorer
from ifa_torchrec.serving.scorer import RankingRequest
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.times import utc

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?(?:[Zz]|([+-]\d\d:\d\d))", re.ASCII
)
_MOST_FEATURES = 1000
_PUBLIC = {"/healthz", "/readyz", "/docs", "/openapi.json"}
"""Routes for everyone; every other is for the token's bearers only."""

# ------------------------------------------------------------------------------ questions, answers


def _microseconds(text: object) -> int:
    found = _RFC3339.fullmatch(text) if isinstance(text, str) else None
    if found is not None:
        date, clock, fraction, offset = found.groups()
        # a leap second, which comes at the end of a day of UTC only, is the next second's start here
        leap = clock.endswith(":60")
        clock = clock[:-2] + "59" if leap else clock
        moment = datetime.fromisoformat(f"{date}T{clock}{offset or '+00:00'}")
        whole = (moment - _EPOCH) // timedelta(microseconds=1)
        if leap and (whole + 1_000_000) % MICROSECONDS_PER_DAY == 0:
            return whole + 1_000_000
        if whole >= 0 and not leap:
            return whole + int((fraction or "").ljust(6, "0")[:6])
    raise ValueError('should be a time since 1970 with its zone, such as "2024-05-01T12:30:00.25Z"')


def _few(features: object) -> object:
    # max_length alone is looked at when each of them has been
    if isinstance(features, dict) and len(features) > _MOST_FEATURES:
        raise ValueError(f"{len(features)} features; at most {_MOST_FEATURES} are taken")
    return features


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Time = Annotated[
    int, BeforeValidator(_microseconds), WithJsonSchema({"type": "string", "format": "date-time"})
]
"""Microseconds since 1970; in JSON as RFC 3339 has it."""
Value = TypeVar("Value")
Features = Annotated[dict[str, Value], BeforeValidator(_few), Field(max_length=_MOST_FEATURES)]


class _Question(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, fields: object) -> object:
        # an error for each of a million unknown fields, as pydantic has it, takes seconds; see FailFast
        if isinstance(fields, dict) and (unknown := fields.keys() - cls.model_fields.keys()):
            raise ValueError(f"{sorted(unknown)[:3]} unknown; there are {[*cls.model_fields]}")
        return fields


class RankRequest(_Question):
    """A candidate set to be ranked for a user."""

    user: Int64
    candidates: Annotated[list[Natural], FailFast(), Field(min_length=1, description="Item ids.")]
    time: Annotated[Time | None, Field(description="Now, if left out.")] = None
    context: Annotated[Features[Natural], Field(description="An id for each context feature.")] = {}
    dense: Annotated[Features[float], Field(description="A number for each dense feature.")] = {}
    candidate_dense: Annotated[
        Features[Annotated[list[float], FailFast()]],
        Field(description="For each candidate_dense feature, a number for each candidate."),
    ] = {}
    k: Annotated[Positive | None, Field(description="Only the k best; all, if left out.")] = None
    new_user: Annotated[bool, Field(description="The user may have had no event yet.")] = False


class RankQuestion(_Question):
    """Ranking requests: one is a list of one."""

    requests: Annotated[list[RankRequest], FailFast(), Field(min_length=1)]


class Ranked(BaseModel):
    """The best items, best first by the first task's logit."""

    version: Annotated[str, Field(description="Of the weights that ranked.")]
    as_of: Annotated[
        str | None, Field(description="A later time that it is of, if not the request's.")
    ] = None
    items: list[int]
    logits: Annotated[dict[str, list[float]], Field(description="Of these items, for each task.")]


class RankAnswer(BaseModel):
    """A ranking for each request, in their order."""

    rankings: list[Ranked]


class UserEvent(_Question):
    """Something a user did."""

    position: Annotated[Natural, Field(description="In the stream of events; each counts once.")]
    user: Int64
    item: Natural
    time: Time


class EventsQuestion(_Question):
    """Events to be added to their users' states."""

    events: Annotated[list[UserEvent], FailFast(), Field(min_length=1)]


class EventsAnswer(BaseModel):
    """All of them are in the states: so many are new, and so many were there before."""

    new: int
    duplicates: int


class Alive(BaseModel):
    """The process runs."""

    status: str = "ok"


class Ready(BaseModel):
    """There are weights and states to answer with."""

    version: str


class Problem(BaseModel):
    """What is wrong, and what would be right."""

    error: str


# ----------------------------------------------------------------------------------------- the app


def create_app(
    live: LiveScorer, token: str | None = None, allowed_hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        live: answers; close it after the last call.
        token: all but /healthz, /readyz and the page of /docs are for its bearers only; None for
            everyone. A route that is added is for its bearers only, too.
        allowed_hosts: names that calls may be addressed to (their Host header); "*" is any.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from fastapi.testclient import TestClient
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.serving import Scorer, StateStore, open_key_value_store
        >>> from ifa_torchrec.serving.live import Limits, LiveScorer
        >>> from ifa_torchrec.serving.service import create_app
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.run import load_run
        >>> from ifa_torchrec.training.trainer import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> days = pd.date_range("2024-01-01", periods=4)
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 3}),
        ...     events=pd.DataFrame({"user": 1, "item": [0, 1, 0, 1], "time": days}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": days[3:], "candidates": [[0, 2]],
        ...                                      "exposed": [[True, True]], "label": [[1, 0]]})})
        >>> _ = train(TrainConfig(folder / "log", folder / "run", ifa=IFAConfig(8, num_heads=2)))
        >>> _ = build_states(BuildStatesConfig(folder / "run", str(folder / "states"), 4))
        >>> states = open_key_value_store(str(folder / "states"))
        >>> def load():
        ...     run = load_run(folder / "run", sharded=False)
        ...     store = StateStore(states, run.version)
        ...     return Scorer(run.dlrm, run.log.schema, run.log.items, store)
        >>> with LiveScorer(load, Limits()) as live:
        ...     client = TestClient(create_app(live))
        ...     request = {"user": 1, "candidates": [0, 2, 1], "k": 2}
        ...     ranked = client.post("/rank", json={"requests": [request]}).json()["rankings"][0]
        ...     event = {"position": 4, "user": 1, "item": 2, "time": "2024-01-05T08:00:00Z"}
        ...     added = client.post("/events", json={"events": [event]}).json()
        >>> sorted(ranked), len(ranked["items"])
        (['as_of', 'items', 'logits', 'version'], 2)
        >>> added
        {'new': 1, 'duplicates': 0}
    """
    limits = live.limits
    refused = _problems(400, 408, 409, 413, 422, 429, 500, 503, 504)
    protected: dict[str, Any] = {}
    measured: dict[int | str, dict[str, Any]] = {}
    if token is not None:  # for the OpenAPI page; it is _Gate that asks, before the body is read
        refused |= _problems(401)
        problem = {"schema": {"$ref": "#/components/schemas/Problem"}}  # else it would be plain text too
        measured = {401: {"description": "Unauthorized", "content": {"application/json": problem}}}
        protected["dependencies"] = [Depends(HTTPBearer(auto_error=False))]
    app = FastAPI(
        title="ifa_torchrec.serve",
        description="Ranks candidates by users' states, and adds events to the states.",
        exception_handlers={
            AnyHTTPException: _on_http_exception,
            RequestValidationError: _on_invalid,
            Exception: _on_bug,
        },
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)
    app.add_middleware(_Gate, live=live, token=token, routes=app.routes)

    @app.post("/rank", responses=refused | _problems(404), **protected)
    async def rank(question: RankQuestion) -> RankAnswer:
        """Rank candidates."""
        asked = question.requests
        _at_most(limits.max_requests, asked, "requests")
        for n, request in enumerate(asked):
            _at_most(limits.max_candidates, request.candidates, f"requests.{n}.candidates")
        with _in_time("send them again"):
            results = await live.rank([_ranking_request(request) for request in asked])
        answer = RankAnswer(rankings=[])
        for n, (request, result) in enumerate(zip(asked, results, strict=True)):
            if isinstance(result, BaseException):
                raise _refusal(result, where=f"requests.{n}: ")
            items, columns = result.items[: request.k], result.logits[: request.k].T.tolist()
            logits = dict(zip(result.tasks, columns, strict=True))
            as_of = None if result.as_of is None else utc(result.as_of)
            answer.rankings.append(
                Ranked(version=result.version, as_of=as_of, items=items, logits=logits)
            )
        return answer

    @app.post("/events", responses=refused, **protected)
    async def events(question: EventsQuestion) -> EventsAnswer:
        """Add events, which are safe on disk when this is answered."""
        _at_most(limits.max_events, question.events, "events")
        with _in_time("the events may still be added; send them again, each counts once"):
            new = await live.append([Event(e.position, e.user, e.item, e.time) for e in question.events])
        if isinstance(new, BaseException):
            raise _refusal(new)
        return EventsAnswer(new=sum(new), duplicates=len(new) - sum(new))

    @app.get("/healthz")
    async def healthz() -> Alive:
        """Whether the process runs."""
        return Alive()

    @app.get("/readyz", responses=_problems(503))
    async def readyz() -> Ready:
        """Whether calls should be sent here, and the weights that would answer them."""
        if live.draining:
            raise HTTPException(503, "shutting down")
        try:
            await live.check()
        # everyone may ask this, so the answer has no addresses; that of /rank says more
        except (StoreError, asyncio.TimeoutError) as error:
            raise HTTPException(503, "the store does not answer") from error
        except StateError as error:
            raise HTTPException(503, "the store has no states of these weights") from error
        return Ready(version=live.version)

    @app.get("/metrics", response_class=PlainTextResponse, responses=measured, **protected)
    async def metrics() -> Response:
        """Counters and times, for Prometheus."""
        return Response(generate_latest(live.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Gate:
    """Around every call: asks for the token, counts and times the body, measures.

    It goes by the route that will answer, not by the path, of which a router may take several spellings.
    """

    def __init__(
        self, app: ASGIApp, live: LiveScorer, token: str | None, routes: Sequence[BaseRoute]
    ) -> None:
        self._app, self._live, self._routes = app, live, routes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # there are none, and none shall come that does not ask
            await send({"type": "websocket.close"})
            return
        start, status, size = time.perf_counter(), 500, 0
        limits = self._live.limits
        path = self._route(scope)

        async def counted() -> Message:
            nonlocal size
            left = start + limits.receive - time.perf_counter()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                problem = f"the body did not come within {limits.receive:g} seconds; send it again"
                raise HTTPException(408, problem) from None
            size += len(message.get("body", b""))
            if size > limits.max_body_bytes:
                problem = f"the body is larger than {limits.max_body_bytes} bytes; send less a call"
                raise HTTPException(413, problem)
            return message

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if path in _PUBLIC or self._knows(scope):
                await self._app(scope, counted, seen)
            else:
                problem = "give the server's token, as Authorization: Bearer TOKEN"
                refusal = _problem(401, problem, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, seen)
        finally:
            self._live.metrics.calls.labels(path, status).inc()
            self._live.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _route(self, scope: Scope) -> str:
        """The path of the route that answers, as it was declared; else clients would invent labels."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return getattr(route, "path", "other")
        return "other"

    def _knows(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # latin-1 gives the header's bytes back as they came
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self._token)


def _ranking_request(request: RankRequest) -> RankingRequest:
    return RankingRequest(
        user=request.user,
        candidates=request.candidates,
        time=request.time,
        context=request.context,
        dense=request.dense,
        candidate_dense=request.candidate_dense,
        new_user=request.new_user,
    )


# ---------------------------------------------------------------------------------------- refusals


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # what a client sent may be in it: long, or with halves of UTF-16 pairs
    text = message[:1000].encode(errors="backslashreplace").decode()
    return JSONResponse(Problem(error=text).model_dump(), status, headers)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI is told of them."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return _problem(error.status_code, error.detail, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    # without the input, which FastAPI's own handler repeats: NaN in it is no JSON
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:5]]
    return _problem(422, "; ".join(found))


async def _on_bug(_: Request, error: Exception) -> Response:
    return _problem(500, "an error of the server; its log has more")  # the server logs it


def _at_most(limit: int, things: Sequence[object], where: str) -> None:
    if len(things) > limit:
        raise HTTPException(422, f"{where}: {len(things)} of them; at most {limit} are taken a call")


@contextmanager
def _in_time(advice: str) -> Generator[None]:
    try:
        yield
    except QueueFullError as error:
        raise HTTPException(429, f"too many calls: {error}", {"Retry-After": "1"}) from error
    except ClosedError as error:
        raise HTTPException(503, "shutting down") from error
    except asyncio.TimeoutError as error:
        raise HTTPException(504, f"this takes too long; {advice}") from error


_STATUS = {RequestError: 422, UnknownUserError: 404, StoreError: 503, StateError: 409}
"""Of the scorer's errors; the first kind that fits."""


def _refusal(error: BaseException, where: str = "") -> BaseException:
    """What is raised for an error of the scorer."""
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return HTTPException(status, f"{where}{error}")
    return error
