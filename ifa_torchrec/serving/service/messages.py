"""Models of requests and responses, which pydantic checks and OpenAPI describes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from ifa_torchrec.serving.live import StreamStatus
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.times import microseconds

_MAX_FEATURES = 1000


def _few(features: object) -> object:
    # pydantic checks max_length only after it has checked every entry
    if isinstance(features, dict) and len(features) > _MAX_FEATURES:
        raise ValueError(f"{len(features)} features; at most {_MAX_FEATURES} are accepted")
    return features


class _OneError:
    """Replaces pydantic's errors, one for each type of a union, by one that says what is allowed."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source),
            custom_error_type="external_id",
            custom_error_message="Input should be an id: a non-empty string or a 64-bit integer",
        )


Id = Annotated[
    Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | Annotated[str, Field(min_length=1)], _OneError()
]
"""An external id. Its type is kept: a string of digits stays a string."""
Ids = Annotated[list[Id], Field(fail_fast=True)]
Position = Annotated[int, Field(ge=0, le=2**63 - 2)]
"""Below the largest 64-bit integer: the next position is stored as where the stream resumes."""
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Time = Annotated[
    int, BeforeValidator(microseconds), WithJsonSchema({"type": "string", "format": "date-time"})
]
"""Microseconds since 1970; in bodies an RFC 3339 string."""
Value = TypeVar("Value")
Features = Annotated[dict[str, Value], BeforeValidator(_few), Field(max_length=_MAX_FEATURES)]


class StrictModel(BaseModel):
    """The base of all request models: no unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, fields: object) -> object:
        # pydantic's own check would take seconds for a million unknown fields, one error for each
        if isinstance(fields, dict) and (unknown := fields.keys() - cls.model_fields.keys()):
            raise ValueError(
                f"unknown fields {sorted(unknown, key=str)[:3]}; expected some of {[*cls.model_fields]}"
            )
        return fields


class RankRequest(StrictModel):
    """A candidate set to rank for a user."""

    user: Id
    candidates: Annotated[
        list[Id], FailFast(), Field(min_length=1, description="Item ids; unknown ones are ranked too.")
    ]
    time: Annotated[Time | None, Field(description="Default: now.")] = None
    context: Annotated[
        Features[Id | Ids],
        Field(description="One id per context feature, a list of ids per context list."),
    ] = Field(default_factory=dict)
    dense: Annotated[
        Features[float | None],
        Field(description="One number per dense feature; null where it is missing."),
    ] = Field(default_factory=dict)
    candidate_dense: Annotated[
        Features[Annotated[list[float | None], FailFast()]],
        Field(description="For each candidate_dense feature, one number or null per candidate."),
    ] = Field(default_factory=dict)
    candidate_features: Annotated[
        Features[Ids], Field(description="For each candidate feature, one id per candidate.")
    ] = Field(default_factory=dict)
    k: Annotated[Positive | None, Field(description="How many of the best to return. Default: all.")] = (
        None
    )
    strategy: Annotated[
        Literal["topk", "greedy"],
        Field(
            description="How the k are chosen: topk by their own scores; greedy one by one, each given "
            "those chosen before it, which needs a model trained to generate sets."
        ),
    ] = "topk"
    new_user: Annotated[
        bool, Field(description="Accept a user without a state, as one without events.")
    ] = False


class RankRequests(StrictModel):
    """A list of ranking requests."""

    requests: Annotated[list[RankRequest], FailFast(), Field(min_length=1)]


class Ranked(BaseModel):
    """The best items, best first by the score that combines the model's tasks (ifa train --rank-by)."""

    version: Annotated[str, Field(description="Version of the weights that ranked.")]
    as_of: Annotated[
        str | None,
        Field(description="The later time that was ranked as of, if the state could not go back."),
    ] = None
    items: Annotated[list[int | str], Field(description="Item ids, as in the request.")]
    logits: Annotated[
        dict[str, list[float]],
        Field(description="Logits of these items by task; in a greedy set, each given the others."),
    ]
    predictions: Annotated[
        dict[str, list[float]],
        Field(description="Predictions by task: a probability, or a number in the log's unit."),
    ]


class RankResponse(BaseModel):
    """One ranking per request, in the order of the requests."""

    rankings: list[Ranked]


class StreamEvent(StrictModel):
    """Something a user did, as a stream message, whose partition and position the stream provides."""

    user: Id
    item: Id
    time: Time
    features: Annotated[Features[Id], Field(description="One id per event feature.")] = Field(
        default_factory=dict
    )
    numbers: Annotated[
        Features[float | None],
        Field(description="One number per event_dense column; null where it is missing."),
    ] = Field(default_factory=dict)
    weight: Annotated[
        float | None, Field(description="The event's weight, if the model's events have one.")
    ] = None

    def at(self, partition: int, position: int) -> Event:
        """The event, at a partition and position of the stream."""
        fields = self.user, self.item, self.time, self.features, self.numbers, self.weight
        return Event(position, *fields, partition)


class UserEvent(StreamEvent):
    """Something a user did."""

    partition: Annotated[int, Field(ge=0, lt=2**32, description="Partition of the event stream.")] = 0
    position: Annotated[
        Position, Field(description="Position in the partition; each position counts once.")
    ]


class EventsRequest(StrictModel):
    """Events to add to their users' states."""

    events: Annotated[list[UserEvent], FailFast(), Field(min_length=1)]


class EventStatus(BaseModel):
    """The result of adding an event."""

    status: Annotated[
        Literal["taken", "duplicate", "forgotten", "refused"],
        Field(
            description="taken: added to the states; duplicate: already in the states; forgotten: its "
            "user was forgotten after it; refused: not added."
        ),
    ]
    reason: Annotated[str | None, Field(description="Why the event was refused.")] = None


class EventsResponse(BaseModel):
    """One result per event, in the order of the events."""

    results: list[EventStatus]


class ForgottenUser(BaseModel):
    """What was removed about a user, in all versions."""

    user: Annotated[int | str, Field(description="The id under which the states were stored.")]
    until: Annotated[str, Field(description="Events of the user up to this time no longer count.")]
    versions: Annotated[list[str], Field(description="Versions that had a state of the user.")]
    records: Annotated[int, Field(description="State records that were removed.")]
    events: Annotated[int, Field(description="Events that were removed from the journal.")]


class Alive(BaseModel):
    """The process is running."""

    status: str = "ok"


class Ready(BaseModel):
    """The service has weights and states to rank with."""

    version: str
    stream: Annotated[
        StreamStatus | None,
        Field(
            description="With serve --events. flowing: events are read; waiting: for the broker or the "
            "store; stopped: an event was refused or cannot be read, and no more are read."
        ),
    ] = None


class Problem(BaseModel):
    """What went wrong, and how to fix it."""

    error: str
