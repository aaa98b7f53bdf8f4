"""Request and response bodies in JSON or MessagePack, each parsed, checked and written once."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

import msgpack
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from ifa_torchrec.serving.errors import RequestError
from ifa_torchrec.serving.service.refusals import refusal, validation_message

JSON, MSGPACK = "application/json", "application/msgpack"
Body = TypeVar("Body", bound=BaseModel)


class BodyRoute(APIRoute):
    """A route whose endpoint takes ``body``, a pydantic model, and returns another model.

    The response has the request body's content type. FastAPI's own handler would take longer than the
    service's work on a call: it looks for parameters that these calls do not have, and validates the
    response. The endpoint's signature suits both handlers, and OpenAPI is generated from it.

    Example:
        >>> from fastapi import FastAPI
        >>> from fastapi.testclient import TestClient
        >>> from pydantic import BaseModel
        >>> from ifa_torchrec.serving.service.bodies import BodyRoute
        >>> class Number(BaseModel):
        ...     n: int
        >>> async def double(body: Number) -> Number:
        ...     return Number(n=2 * body.n)
        >>> app = FastAPI()
        >>> app.router.add_api_route("/", double, methods=["POST"], route_class_override=BodyRoute)
        >>> TestClient(app).post("/", json={"n": 4}).json()
        {'n': 8}
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        endpoint, model = self.endpoint, get_type_hints(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            kind = _kind(request)
            try:
                content = await request.body()
            except ClientDisconnect:
                raise HTTPException(400, "the client disconnected before its body arrived") from None
            try:
                body = read_body(model, kind, content)
            except RequestError as error:
                raise refusal(error) from error
            response: BaseModel = await endpoint(body)
            if kind == JSON:
                return Response(response.__pydantic_serializer__.to_json(response), media_type=JSON)
            return Response(msgpack.packb(response.model_dump()), media_type=MSGPACK)

        return handle


def also_msgpack(body: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI entries for a BodyRoute's MessagePack bodies, for ``add_api_route``'s openapi_extra."""

    def content(model: type[BaseModel]) -> dict[str, Any]:
        return {"content": {MSGPACK: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}}

    return {"requestBody": content(body), "responses": {"200": content(response)}}


def _kind(request: Request) -> str:
    """The body's content type, JSON or MSGPACK.

    Raises:
        HTTPException: the body has another content type, as has every body that a browser sends to
            another site without a preflight request.
    """
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == MSGPACK:
        return MSGPACK
    if kind == JSON or (kind.startswith("application/") and kind.endswith("+json")):
        return JSON
    raise HTTPException(422, f"body: the Content-Type is {given!r}; it must be {JSON} or {MSGPACK}")


def read_body(model: type[Body], kind: str, content: bytes) -> Body:
    """Parse a body into its model.

    Args:
        model: the pydantic model.
        kind: JSON or MSGPACK.
        content: the body.

    Raises:
        RequestError: the body is not valid JSON or MessagePack, or does not fit the model.

    Example:
        >>> from ifa_torchrec.serving.service.bodies import JSON, read_body
        >>> from ifa_torchrec.serving.service.messages import StreamEvent
        >>> content = b'{"user": 1, "item": "tea", "time": "2024-06-01T10:00:00Z"}'
        >>> read_body(StreamEvent, JSON, content).item
        'tea'
    """
    try:
        given = json.loads(content) if kind == JSON else msgpack.unpackb(content)
    except (ValueError, RecursionError) as error:  # msgpack's errors are all ValueErrors
        name = "JSON" if kind == JSON else "MessagePack"
        problem = str(error) or type(error).__name__
        raise RequestError(f"body: not valid {name} ({problem})") from error
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise RequestError(
            validation_message(error.errors(include_url=False, include_input=False))
        ) from error
