"""Requests and responses, JSON or MessagePack, as pydantic checks and OpenAPI describes them."""

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
    # max_length alone is looked at when each of them has been
    if isinstance(features, dict) and len(features) > _MAX_FEATURES:
        raise ValueError(f"{len(features)} features; at most {_MAX_FEATURES} are taken")
    return features


class _OneError:
    """In place of an error for each type of a union, one that says what is allowed."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source),
            custom_error_type="external_id",
            custom_error_message="Input should be an id: a string, not empty, or an integer of 64 bits",
        )


Id = Annotated[
    Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | Annotated[str, Field(min_length=1)], _OneError()
]
"""An external id. It stays what it is: a string of digits is a string."""
Ids = Annotated[list[Id], Field(fail_fast=True)]
Position = Annotated[int, Field(ge=0, le=2**63 - 2)]
"""Below the largest of 64 bits: the one after it says where the stream goes on."""
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
            raise ValueError(f"{sorted(unknown, key=str)[:3]} unknown; there are {[*cls.model_fields]}")
        return fields


class RankRequest(StrictModel):
    """A candidate set to be ranked for a user."""

    user: Id
    candidates: Annotated[
        list[Id], FailFast(), Field(min_length=1, description="Item ids; unknown ones are ranked, too.")
    ]
    time: Annotated[Time | None, Field(description="Now, if left out.")] = None
    context: Annotated[
        Features[Id | Ids],
        Field(description="An id for each context feature, a list of ids for each context list."),
    ] = Field(default_factory=dict)
    dense: Annotated[
        Features[float | None],
        Field(description="A number for each dense feature; null where it is missing."),
    ] = Field(default_factory=dict)
    candidate_dense: Annotated[
        Features[Annotated[list[float | None], FailFast()]],
        Field(description="For each candidate_dense feature, a number for each candidate, or null."),
    ] = Field(default_factory=dict)
    candidate_features: Annotated[
        Features[Ids], Field(description="For each candidate feature, an id for each candidate.")
    ] = Field(default_factory=dict)
    k: Annotated[Positive | None, Field(description="Only the k best; all, if left out.")] = None
    strategy: Annotated[
        Literal["topk", "greedy"],
        Field(
            description="How the k are chosen: by their own scores, or one by one, each beside those "
            "chosen before it, by a model that was trained for that."
        ),
    ] = "topk"
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
    items: Annotated[list[int | str], Field(description="As the request gave them.")]
    logits: Annotated[
        dict[str, list[float]],
        Field(description="Of these items, for each task; of a greedy set, of each beside the others."),
    ]
    predictions: Annotated[
        dict[str, list[float]],
        Field(description="What they say: a probability, or the number in the unit of the log."),
    ]


class RankResponse(BaseModel):
    """A ranking for each request, in their order."""

    rankings: list[Ranked]


class StreamEvent(StrictModel):
    """Something a user did, as a message of a stream, which says where in the stream it stands."""

    user: Id
    item: Id
    time: Time
    features: Annotated[Features[Id], Field(description="An id for each event feature.")] = Field(
        default_factory=dict
    )
    numbers: Annotated[
        Features[float | None],
        Field(description="A number for each event_dense column; null where it is missing."),
    ] = Field(default_factory=dict)
    weight: Annotated[float | None, Field(description="Where the model's events have one.")] = None

    def at(self, partition: int, position: int) -> Event:
        """The event at a place in the stream."""
        fields = self.user, self.item, self.time, self.features, self.numbers, self.weight
        return Event(position, *fields, partition)


class UserEvent(StreamEvent):
    """Something a user did."""

    partition: Annotated[int, Field(ge=0, lt=2**32, description="Of the stream of events.")] = 0
    position: Annotated[Position, Field(description="In the partition; each counts once.")]


class EventsRequest(StrictModel):
    """Events to be added to their users' states."""

    events: Annotated[list[UserEvent], FailFast(), Field(min_length=1)]


class EventStatus(BaseModel):
    """What became of an event."""

    status: Annotated[
        Literal["taken", "duplicate", "forgotten", "refused"],
        Field(
            description="In the states now, there before, of a user who was forgotten after it, or not "
            "there."
        ),
    ]
    reason: Annotated[str | None, Field(description="Why it was refused.")] = None


class EventsResponse(BaseModel):
    """What became of each event, in their order."""

    results: list[EventStatus]


class ForgottenUser(BaseModel):
    """What was removed of a user, of all versions."""

    user: Annotated[int | str, Field(description="As the states go by it.")]
    until: Annotated[str, Field(description="The user's events up to this time count no more.")]
    versions: Annotated[list[str], Field(description="Weights that had a state of the user.")]
    records: Annotated[int, Field(description="Records of states that were removed.")]
    events: Annotated[int, Field(description="Events that were removed from the journal.")]


class Alive(BaseModel):
    """The process runs."""

    status: str = "ok"


class Ready(BaseModel):
    """There are weights and states to rank with."""

    version: str
    stream: Annotated[
        StreamStatus | None,
        Field(
            description="Of serve --events: events are read; the broker or the store is waited for; or "
            "an event was refused, and no more are read."
        ),
    ] = None


class Problem(BaseModel):
    """What is wrong, and what would be right."""

    error: str
