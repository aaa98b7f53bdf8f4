"""The JSON of requests and responses, as pydantic checks and OpenAPI describes it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    model_validator,
)

from ifa_torchrec.serving.times import microseconds

_MAX_FEATURES = 1000


def _few(features: object) -> object:
    # max_length alone is looked at when each of them has been
    if isinstance(features, dict) and len(features) > _MAX_FEATURES:
        raise ValueError(f"{len(features)} features; at most {_MAX_FEATURES} are taken")
    return features


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Time = Annotated[
    int, BeforeValidator(microseconds), WithJsonSchema({"type": "string", "format": "date-time"})
]
"""Microseconds since 1970; in JSON as RFC 3339 has it."""
Value = TypeVar("Value")
Features = Annotated[dict[str, Value], BeforeValidator(_few), Field(max_length=_MAX_FEATURES)]


class StrictModel(BaseModel):
    """What all that clients send has in common: no unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, fields: object) -> object:
        # an error for each of a million unknown fields, as pydantic has it, takes seconds; see FailFast
        if isinstance(fields, dict) and (unknown := fields.keys() - cls.model_fields.keys()):
            raise ValueError(f"{sorted(unknown)[:3]} unknown; there are {[*cls.model_fields]}")
        return fields


class RankRequest(StrictModel):
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


class RankRequests(StrictModel):
    """Ranking requests: one is a list of one."""

    requests: Annotated[list[RankRequest], FailFast(), Field(min_length=1)]


class Ranked(BaseModel):
    """The best items, best first by the score that the model's tasks make (the training's --rank-by)."""

    version: Annotated[str, Field(description="Of the weights that ranked.")]
    as_of: Annotated[
        str | None, Field(description="A later time that it is of, if not the request's.")
    ] = None
    items: list[int]
    logits: Annotated[dict[str, list[float]], Field(description="Of these items, for each task.")]


class RankResponse(BaseModel):
    """A ranking for each request, in their order."""

    rankings: list[Ranked]


class UserEvent(StrictModel):
    """Something a user did."""

    position: Annotated[Natural, Field(description="In the stream of events; each counts once.")]
    user: Int64
    item: Natural
    time: Time


class EventsRequest(StrictModel):
    """Events to be added to their users' states."""

    events: Annotated[list[UserEvent], FailFast(), Field(min_length=1)]


class EventsResponse(BaseModel):
    """All of them are in the states: so many are new, and so many were there before."""

    new: int
    duplicates: int


class Alive(BaseModel):
    """The process runs."""

    status: str = "ok"


class Ready(BaseModel):
    """There are weights and states to rank with."""

    version: str


class Problem(BaseModel):
    """What is wrong, and what would be right."""

    error: str
