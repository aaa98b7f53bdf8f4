"""Check the values of a schema, at any depth, against their annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ifa_torchrec.data.prepare.columns import Hashed, Listed, Npy, Regression
from ifa_torchrec.data.schema import LogError

_WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    Hashed: "a column with its hash",
    Listed: "a column with its delimiter",
    Npy: "an object with npy",
    Regression: "an object with regression",
    Mapping: "an object",
    Sequence: "a list",
}


def refuse_same_names(where: str, names: Iterable[str]) -> None:
    """Raise if two names are the same in SQL, which ignores case.

    Raises:
        LogError: two names are equal, or differ only in case.

    Example:
        >>> from ifa_torchrec.data.prepare.values import refuse_same_names
        >>> refuse_same_names("log.parquet", ["user", "Time", "time"])
        Traceback (most recent call last):
        ifa_torchrec.data.schema.LogError: log.parquet: the names 'Time' and 'time' differ only in \
case, which SQL ignores; rename one
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.get(name.lower())) is not None:
            raise LogError(
                f"{where}: the names {other!r} and {name!r} differ only in case, which SQL ignores; "
                "rename one"
                if name != other
                else f"{where}: the name {name!r} is used twice or is reserved; rename it"
            )
        seen[name.lower()] = name


def check_value(
    where: str, hint: Any, value: Any, may_be_empty: Collection[str] = (), empty: bool = False
) -> None:
    """Raise unless a value, and all values in it, match the annotation.

    Args:
        where: the name of the value in errors.
        hint: the annotation.
        value: the value to check.
        may_be_empty: names of fields, at any depth, whose strings may be empty.
        empty: whether the value itself may be an empty string.

    Raises:
        LogError: it has another type, is an empty string, or is a number that is not finite.

    Example:
        >>> from ifa_torchrec.data.prepare.values import check_value
        >>> check_value("events.user", str, 5)
        Traceback (most recent call last):
        ifa_torchrec.data.schema.LogError: events.user must be a string, got 5
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next((kind for kind in kinds if _is(value, kind)), None)
    if kind is types.NoneType:
        return
    if kind is None:
        words = [
            _WORDS.get(typing.get_origin(k) or k, str(k.__name__))
            for k in kinds
            if k is not types.NoneType
        ]
        raise LogError(f"{where} must be {' or '.join(words)}, got {value!r}")
    if isinstance(value, str) and not value.strip() and not empty:
        raise LogError(f"{where} is empty; name a column, or leave it out if it is optional")
    if dataclasses.is_dataclass(value):
        for name, inner in typing.get_type_hints(type(value)).items():
            given = getattr(value, name)
            check_value(f"{where}.{name}", inner, given, may_be_empty, name in may_be_empty)
    elif isinstance(value, Mapping):
        of_keys, of_values = typing.get_args(kind)
        for key, item in typing.cast(Mapping[Any, Any], value).items():
            check_value(f"a name in {where}", of_keys, key)
            check_value(f"{where}.{key}", of_values, item, may_be_empty)
    elif isinstance(value, (list, tuple)):
        for item in typing.cast(Sequence[Any], value):
            check_value(f"a value of {where}", typing.get_args(kind)[0], item, may_be_empty, empty)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has a type, without checking its contents."""
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and -math.inf < typing.cast(Any, value) < math.inf
    kind = typing.get_origin(kind) or kind
    return isinstance(value, (list, tuple) if kind is Sequence else kind)
