"""Ranking requests, events' results, and the checks of requests and events.

A request or an event that does not fit the model raises a RequestError that names the field. Ids are
external ids; any id is accepted, and one that the vocabulary does not know is "unknown".
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ifa_torchrec.data import LogSchema
from ifa_torchrec.serving.errors import RequestError
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.times import utc

Id = int | str
"""An external id: a 64-bit integer or a string."""
Strategy = Literal["topk", "greedy"]
"""How the k best are chosen: all at once, or one by one, each given those chosen before it."""
_LARGEST = 2**63 - 1
_YEAR = 365 * 86400.0  # seconds


@dataclass(frozen=True)
class RankingRequest:
    """A candidate set to rank for a user. Ids are external ids, integers or strings.

    Args:
        user: id.
        candidates: m item ids, at least one.
        time: microseconds since 1970, UTC; only events before it count. None means now, or just after
            the user's last event if that lies in the future by this machine's clock.
        context: one id per context feature of the schema, and a list of ids per context list.
        dense: one number per dense feature; None where it is missing.
        candidate_dense: m numbers per candidate_dense feature; None where one is missing.
        candidate_features: m ids per candidate feature.
        new_user: accept a user without a state, and rank as if without events.

    Example:
        >>> from ifa_torchrec.serving import RankingRequest
        >>> RankingRequest(user="anna", candidates=[4, 9], context={"store": "north"}).new_user
        False
    """

    user: Id
    candidates: Sequence[Id]
    time: int | None = None
    context: Mapping[str, Id | Sequence[Id]] = field(default_factory=dict)
    dense: Mapping[str, float | None] = field(default_factory=dict)
    candidate_dense: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    candidate_features: Mapping[str, Sequence[Id]] = field(default_factory=dict)
    new_user: bool = False


@dataclass(frozen=True)
class Ranking:
    """The best items of a candidate set, best first.

    Args:
        items: ids, as in the request.
        logits: [len(items), T] float32, one column per task. In a set that was chosen one by one, each
            item's logits are those given the other items of the set.
        as_of: microseconds; the time of the state used, if the state could not go back to the request's
            time (see ``StateStore.read``); otherwise None.
        unknown_candidates: how many candidates the vocabulary does not know.
        unknown_context: how many context and candidate feature ids the vocabulary does not know.
    """

    items: list[Id]
    logits: np.ndarray
    as_of: int | None
    unknown_candidates: int
    unknown_context: int


@dataclass(frozen=True)
class EventResult:
    """The result of adding an event.

    Args:
        status: "taken": it was added to the states; "duplicate": it was already there; "forgotten": its
            user was forgotten after it, so it does not count; "refused": it was not added.
        reason: why it was refused, and what would be accepted; None if it was not refused.
        unknown: how many of its ids, except the user's, the vocabulary does not know.

    Example:
        >>> from ifa_torchrec.serving import EventResult
        >>> EventResult("taken").reason is None
        True
    """

    status: Literal["taken", "duplicate", "forgotten", "refused"]
    reason: str | None = None
    unknown: int = 0


def checked_request(schema: LogSchema, request: RankingRequest) -> RankingRequest:
    """Check a request and convert its ids to lists of Python ints and strings.

    Raises:
        RequestError: a field is missing, not in the schema, of the wrong type or out of range.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving import RankingRequest
        >>> from ifa_torchrec.serving.requests import checked_request
        >>> request = RankingRequest(7, np.array([4, 9]))
        >>> checked_request(LogSchema(item_features={"item": 10}), request).candidates
        [4, 9]
    """
    if request.time is not None:
        _check_time("time", request.time, _YEAR)
    candidates = checked_ids("candidates", request.candidates)
    if not candidates:
        raise RequestError("candidates is empty; give at least one item")
    _check_names("context", request.context, {**schema.context_features, **schema.context_lists})
    _check_names("dense", request.dense, schema.dense_features)
    _check_names("candidate_dense", request.candidate_dense, schema.candidate_dense)
    _check_names("candidate_features", request.candidate_features, schema.candidate_features)
    context: dict[str, Id | Sequence[Id]] = {}
    for name, value in request.context.items():
        one = name in schema.context_features
        ids = checked_ids(f"context.{name}", [value] if one else value)
        context[name] = ids[0] if one else ids
    of_candidates = {
        name: checked_ids(f"candidate_features.{name}", ids)
        for name, ids in request.candidate_features.items()
    }
    for kind, columns in (("dense", request.candidate_dense), ("features", of_candidates)):
        for name, values in columns.items():
            if len(values) != len(candidates):
                what = "numbers" if kind == "dense" else "ids"
                raise RequestError(
                    f"candidate_{kind}.{name}: {len(values)} {what} for {len(candidates)} candidates"
                )
    return dataclasses.replace(
        request,
        user=_checked_id("user", request.user),
        candidates=candidates,
        context=context,
        candidate_features=of_candidates,
    )


def checked_event(schema: LogSchema, event: Event, max_ahead: float) -> Event:
    """Check an event and convert its ids to Python ints and strings, and its numbers to floats.

    Args:
        schema: names the features and numbers that the event must have.
        event: the event.
        max_ahead: seconds that the event may be ahead of this machine's clock.

    Raises:
        RequestError: a field is missing, not in the schema, of the wrong type or out of range, or the
            event lies in the future.

    Example:
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving import Event
        >>> from ifa_torchrec.serving.requests import checked_event
        >>> schema = LogSchema(item_features={"item": 10}, event_features={"act": 5})
        >>> checked_event(schema, Event(1, user=7, item=4, time=0), max_ahead=60)
        Traceback (most recent call last):
        ifa_torchrec.serving.errors.RequestError: features: ['act'] missing; the model takes ['act']
    """
    position = event.position
    if not _is_integer(position) or not 0 <= position < _LARGEST:
        # position + 1 is stored too, as the position where the stream resumes
        raise RequestError(f"position must be in 0..2**63 - 2, got {position!r}")
    if not _is_integer(event.partition) or not 0 <= event.partition < 2**32:
        raise RequestError(f"partition must be in 0..2**32 - 1, got {event.partition!r}")
    _check_time("time", event.time, max_ahead)
    _check_names("features", event.features, schema.event_features)
    _check_names("numbers", event.numbers, schema.event_dense)
    weight = event.weight
    if (weight is None) != (schema.event_weight is None):
        advice = "the model takes none; leave it out" if weight is not None else "missing; give a number"
        raise RequestError(f"weight: {advice}")
    if weight is not None:
        weight = float(float32s("weight", [weight])[0])
        if weight < 0:
            raise RequestError(f"weight: {weight} is negative; it must be at least 0")
    numbers = {name: float32s(f"numbers.{name}", [x], name in schema.log_scaled)[0].item()
               for name, x in event.numbers.items()}  # fmt: skip
    return Event(
        int(position),
        _checked_id("user", event.user),
        _checked_id("item", event.item),
        int(event.time),
        {name: _checked_id(f"features.{name}", value) for name, value in event.features.items()},
        {name: None if np.isnan(x) else x for name, x in numbers.items()},
        weight,
        int(event.partition),
    )


def checked_ids(where: str, ids: Any) -> list[Id]:
    """Check external ids and convert them to Python ints and strings.

    Args:
        where: the field's name, for errors.
        ids: a sequence or an array.

    Raises:
        RequestError: ``ids`` is not a list, or an id is neither a 64-bit integer nor a non-empty string.

    Example:
        >>> from ifa_torchrec.serving.requests import checked_ids
        >>> checked_ids("candidates", [4, "nine"])
        [4, 'nine']
    """
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise RequestError(f"{where} must be a list of ids, got {ids!r}")
    found = list(ids)
    if not set(map(type, found)) <= {int, str}:
        found = [i.item() if isinstance(i, np.integer) else i for i in found]
    for n, identifier in enumerate(found):
        if type(identifier) is int and -_LARGEST - 1 <= identifier <= _LARGEST:
            continue
        if type(identifier) is str and identifier and _is_text(identifier):
            continue
        place = where if len(found) == 1 else f"{where}[{n}]"
        raise RequestError(
            f"{place}: {identifier!r} is not an id; it must be a non-empty string or a 64-bit integer"
        )
    return found


def _checked_id(where: str, identifier: Any) -> Id:
    """Check one id like ``checked_ids``, but ten times as fast for an integer, the usual case."""
    if type(identifier) is int and -_LARGEST - 1 <= identifier <= _LARGEST:
        return identifier
    return checked_ids(where, [identifier])[0]


def float32s(where: str, values: Any, log_scaled: bool = False) -> np.ndarray:
    """Convert numbers to [n] float32, with NaN for None, a missing number.

    Args:
        where: the field's name, for errors.
        values: a sequence of numbers or an array.
        log_scaled: whether negative numbers are refused.

    Raises:
        RequestError: a value is not a number, not finite as float32, or negative where that is refused.

    Example:
        >>> from ifa_torchrec.serving.requests import float32s
        >>> float32s("dense.hour", [2, None]).tolist()
        [2.0, nan]
    """
    if isinstance(values, np.ndarray):
        values = values.tolist()
    missing = np.array([value is None for value in values], bool)
    given = [0.0 if value is None else value for value in values]
    for value in given:
        if type(value) not in (float, int) and not isinstance(value, (np.integer, np.floating)):
            raise RequestError(f"{where}: {value!r} is not a number; give null if it is missing")
    try:
        with np.errstate(over="ignore"):
            found = np.array(given, np.float64).astype(np.float32)
    except OverflowError:
        found = np.array([np.inf], np.float32)
    if not np.isfinite(found).all():
        raise RequestError(f"{where}: a number is not finite as float32; give null if it is missing")
    if log_scaled and (found < 0).any():
        raise RequestError(
            f"{where}: {found.min()} is negative; this feature is log-scaled, so give 0 or more"
        )
    found[missing] = np.nan
    return found


def _check_names(where: str, given: Mapping[str, Any], wanted: Iterable[str]) -> None:
    wanted, names = set(wanted), set(given)
    if names != wanted:
        missing, others = sorted(wanted - names), sorted(names - wanted)
        what = [f"{missing} missing"] * bool(missing) + [f"{others} unknown"] * bool(others)
        raise RequestError(f"{where}: {', '.join(what)}; the model takes {sorted(wanted)}")


def _check_time(where: str, given: int, max_ahead: float) -> None:
    """Refuse times far ahead: the decay up to such a time would erase the state for good."""
    if not _is_integer(given) or not 0 <= given <= _LARGEST:
        raise RequestError(f"{where} must be in 0..2**63 - 1 microseconds, got {given!r}")
    latest = time.time_ns() // 1000 + max_ahead * 1e6
    if given > latest:
        cause = "; give microseconds since 1970 (were these nanoseconds?)" * (given > 2 * latest)
        raise RequestError(
            f"{where} {given} is {utc(given)}, more than {max_ahead:g} seconds ahead of this machine's "
            f"clock{cause}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_text(value: str) -> bool:
    """Whether it can be encoded as UTF-8: half of a UTF-16 pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
