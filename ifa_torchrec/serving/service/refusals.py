"""What is refused, and what went wrong, as responses: always ``{"error": ...}``."""

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
"""Of the scorer's errors; the first kind that fits."""


def shown(message: str) -> str:
    """A message with what a client sent in it: it may be long, or have halves of UTF-16 pairs."""
    return message[:1000].encode(errors="backslashreplace").decode()


def validation_message(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors in a body, each with its place."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in errors[:5])


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A response that says what is wrong."""
    return JSONResponse(Problem(error=shown(message)).model_dump(), status, headers)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI is told of responses with these statuses."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return problem(error.status_code, error.detail, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    # without the input, which FastAPI's own handler repeats: NaN in it is no JSON
    assert isinstance(error, RequestValidationError)
    return problem(422, validation_message([{**e, "loc": e["loc"][1:]} for e in error.errors()]))


async def _on_bug(_: Request, error: Exception) -> Response:
    return problem(500, "an error of the server; its log has more")  # the server logs it


EXCEPTION_HANDLERS: dict[
    int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]
] = {
    AnyHTTPException: _on_http_exception,
    RequestValidationError: _on_invalid,
    Exception: _on_bug,
}
"""What FastAPI is to do with exceptions."""


def check_count(limit: int, things: Sequence[object], where: str) -> None:
    """Refuse more than ``limit`` of something in a call.

    Raises:
        HTTPException: there are more.
    """
    if len(things) > limit:
        raise HTTPException(422, f"{where}: {len(things)} of them; at most {limit} are taken a call")


@contextmanager
def in_time(advice: str) -> Generator[None]:
    """Where the scorer is waited for: its being too busy, closed or slow as an HTTPException.

    Args:
        advice: what to do after a time-out.
    """
    try:
        yield
    except QueueFullError as error:
        raise HTTPException(429, f"too many calls: {error}", {"Retry-After": "1"}) from error
    except ClosedError as error:
        raise HTTPException(503, "shutting down") from error
    except asyncio.TimeoutError as error:
        raise HTTPException(504, f"this takes too long; {advice}") from error


def refusal(error: BaseException, where: str = "") -> BaseException:
    """What is raised for an error of the scorer; ``where`` in the request it is."""
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return HTTPException(status, f"{where}{error}")
    return error
