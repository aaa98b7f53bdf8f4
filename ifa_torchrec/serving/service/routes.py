"""The routes, by subject: rankings, events, users, health and metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Response, params
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.live import LiveRanking, LiveScorer
from ifa_torchrec.serving.requests import RankingRequest
from ifa_torchrec.serving.service.bodies import BodyRoute, also_msgpack
from ifa_torchrec.serving.service.messages import (
    Alive,
    EventsRequest,
    EventsResponse,
    EventStatus,
    ForgottenUser,
    Ranked,
    RankRequest,
    RankRequests,
    RankResponse,
    Ready,
)
from ifa_torchrec.serving.service.refusals import check_count, in_time, problems, refusal, shown
from ifa_torchrec.serving.states.forgetting import id_of
from ifa_torchrec.serving.times import utc


def add_routes(app: FastAPI, live: LiveScorer, with_token: bool) -> None:
    """Add all routes.

    Args:
        app: the application. CallMiddleware looks at its own routes, not at an included router's.
        live: serves the calls.
        with_token: whether the OpenAPI page says that all but the public routes need a token.
            CallMiddleware checks it, before the body is read.
    """
    bearer = [Depends(HTTPBearer(auto_error=False))] if with_token else []
    _add_ranking(app, live, bearer)
    _add_events(app, live, bearer)
    _add_users(app, live, bearer)
    _add_health(app, live)
    _add_metrics(app, live, bearer)


def _add_ranking(app: FastAPI, live: LiveScorer, bearer: list[params.Depends]) -> None:
    limits = live.limits

    async def rank(body: RankRequests) -> RankResponse:
        """Rank candidates."""
        requests = body.requests
        check_count(limits.max_requests, requests, "requests")
        for n, request in enumerate(requests):
            check_count(limits.max_candidates, request.candidates, f"requests.{n}.candidates")
            listed = [i for ids in request.context.values() if isinstance(ids, list) for i in ids]
            check_count(limits.max_context_ids, listed, f"requests.{n}.context: ids in lists")
            _check_set(limits.max_set, request, f"requests.{n}.k")
        sizes = [request.k if request.strategy == "greedy" else None for request in requests]
        with in_time("send them again"):
            results = await live.rank([_ranking_request(request) for request in requests], sizes)
        response = RankResponse(rankings=[])
        for n, (request, result) in enumerate(zip(requests, results, strict=True)):
            if isinstance(result, BaseException):
                raise refusal(result, where=f"requests.{n}: ")
            response.rankings.append(_ranked(result, request.k))
        return response

    app.router.add_api_route(
        "/rank",
        rank,
        methods=["POST"],
        responses=_refused(bearer) | problems(404),
        dependencies=bearer,
        route_class_override=BodyRoute,
        openapi_extra=also_msgpack(RankRequests, RankResponse),
    )


def _refused(bearer: list[params.Depends]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the errors of a call with a body."""
    return problems(400, 408, 409, 413, 422, 429, 500, 503, 504, *[401] * bool(bearer))


def _check_set(most: int, request: RankRequest, where: str) -> None:
    if request.strategy != "greedy":
        return
    if request.k is None:
        raise HTTPException(422, f"{where}: strategy 'greedy' chooses the k best one by one; give k")
    if min(request.k, len(request.candidates)) > most:
        text = f"{where}: got {request.k}; strategy 'greedy' chooses at most {most}"
        raise HTTPException(422, text)


def _ranking_request(request: RankRequest) -> RankingRequest:
    return RankingRequest(
        user=request.user,
        candidates=request.candidates,
        time=request.time,
        context=request.context,
        dense=request.dense,
        candidate_dense=request.candidate_dense,
        candidate_features=request.candidate_features,
        new_user=request.new_user,
    )


def _ranked(ranking: LiveRanking, k: int | None) -> Ranked:
    """The k best of a ranking."""
    return Ranked(
        version=ranking.version,
        as_of=None if ranking.as_of is None else utc(ranking.as_of),
        items=ranking.items[:k],
        logits=dict(zip(ranking.tasks, ranking.logits[:k].T.tolist(), strict=True)),
        predictions=dict(zip(ranking.tasks, ranking.predictions[:k].T.tolist(), strict=True)),
    )


def _add_events(app: FastAPI, live: LiveScorer, bearer: list[params.Depends]) -> None:
    async def events(body: EventsRequest) -> EventsResponse:
        """Add events; when the response arrives, those with status taken are in the store."""
        check_count(live.limits.max_events, body.events, "events")
        with in_time("the events may still be added; send them again, each counts once"):
            results = await live.append(
                [event.at(event.partition, event.position) for event in body.events]
            )
        if isinstance(results, BaseException):
            raise refusal(results)
        return EventsResponse(
            results=[EventStatus(status=r.status, reason=r.reason and shown(r.reason)) for r in results]
        )

    app.router.add_api_route(
        "/events",
        events,
        methods=["POST"],
        responses=_refused(bearer),
        dependencies=bearer,
        route_class_override=BodyRoute,
        openapi_extra=also_msgpack(EventsRequest, EventsResponse),
    )


def _add_users(app: FastAPI, live: LiveScorer, bearer: list[params.Depends]) -> None:
    # a user with a line break matches no route (404)
    refused = _refused(bearer) | problems(404)

    @app.delete("/users/{user:path}", responses=refused, dependencies=bearer)
    async def forget(
        user: Annotated[
            str,
            Path(min_length=1, description="An id: an integer or a string; double quotes are optional."),
        ],
    ) -> ForgottenUser:
        """Forget a user: delete the state in all versions and the events in the journal. The user's
        events up to now no longer count; later ones do."""
        with in_time("the user is still being forgotten; repeat the call to see it done"):
            try:
                gone = await live.forget(id_of(user))
            except StateError as error:
                raise refusal(error) from error
        return ForgottenUser(
            user=gone.user,
            until=utc(gone.until),
            versions=list(gone.versions),
            records=gone.records,
            events=gone.events,
        )


def _add_health(app: FastAPI, live: LiveScorer) -> None:
    @app.get("/healthz")
    async def healthz() -> Alive:
        """Whether the process is running."""
        return Alive()

    @app.get("/readyz", responses=problems(503), response_model_exclude_none=True)
    async def readyz() -> Ready:
        """Whether calls should be sent here, and the version of the weights that rank."""
        if live.draining:
            raise HTTPException(503, "shutting down")
        try:
            await live.check()
        # this route needs no token, so its response names no addresses; /rank's errors say more
        except (StateError, asyncio.TimeoutError) as error:
            raise HTTPException(503, "the states are lost, or the store does not respond") from error
        return Ready(version=live.version, stream=live.stream)


def _add_metrics(app: FastAPI, live: LiveScorer, bearer: list[params.Depends]) -> None:
    # content type spelled out; otherwise OpenAPI would list it as plain text too
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    refused: dict[int | str, dict[str, Any]] = (
        {401: {"description": "Unauthorized", "content": schema}} if bearer else {}
    )

    @app.get("/metrics", response_class=PlainTextResponse, responses=refused, dependencies=bearer)
    def metrics() -> Response:  # not async, so that it reads all processes' files in a thread
        """Counters and times, for Prometheus."""
        return Response(live.metrics.text(), media_type=CONTENT_TYPE_LATEST)
