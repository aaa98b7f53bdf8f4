"""Errors as responses, always ``{"error": ...}``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from ifa_torchrec.serving.batching import ClosedError, QueueFullError
from ifa_torchrec.serving.errors import RequestError, StateError, StoreError, UnknownUserError
from ifa_torchrec.serving.service.messages import Problem

_STATUS = {RequestError: 422, UnknownUserError: 404, StoreError: 503, StateError: 409}
"""The status of each of the scorer's errors; the first matching class counts."""


def shown(message: str) -> str:
    """Make a message safe to send: a client's text in it may be long, or have halves of UTF-16 pairs."""
    return message[:1000].encode(errors="backslashreplace").decode()


def validation_message(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first five of pydantic's errors, each with its place in the body."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in errors[:5])


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error response."""
    return JSONResponse(Problem(error=shown(message)).model_dump(), status, headers)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for error responses with these statuses."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return problem(error.status_code, error.detail, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    # FastAPI's own handler repeats the input, in which NaN would not be valid JSON
    assert isinstance(error, RequestValidationError)
    return problem(422, validation_message([{**e, "loc": e["loc"][1:]} for e in error.errors()]))


async def _on_bug(_: Request, error: Exception) -> Response:
    return problem(500, "internal server error; see the server's log")  # uvicorn logs it


EXCEPTION_HANDLERS: dict[
    int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]
] = {
    AnyHTTPException: _on_http_exception,
    RequestValidationError: _on_invalid,
    Exception: _on_bug,
}
"""FastAPI's exception handlers."""


def check_count(limit: int, things: Sequence[object], where: str) -> None:
    """Refuse a call with more than ``limit`` of something.

    Raises:
        HTTPException: there are more.
    """
    if len(things) > limit:
        raise HTTPException(422, f"{where}: got {len(things)}; at most {limit} are accepted")


@contextmanager
def in_time(advice: str) -> Generator[None]:
    """While waiting for the scorer, raise HTTPException if it is too busy, closed or too slow.

    Args:
        advice: what the client should do after a time-out.
    """
    try:
        yield
    except QueueFullError as error:
        raise HTTPException(429, f"too many calls: {error}", {"Retry-After": "1"}) from error
    except ClosedError as error:
        raise HTTPException(503, "shutting down") from error
    except asyncio.TimeoutError as error:
        raise HTTPException(504, f"this took too long; {advice}") from error


def refusal(error: BaseException, where: str = "") -> BaseException:
    """The HTTPException for an error of the scorer, or the error itself if it is not one of those.

    Args:
        error: the error.
        where: prefix of the message, the place in the request.
    """
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return HTTPException(status, f"{where}{error}")
    return error
