"""Checks of an interaction's arguments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.ops.jagged import checkable

_ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Fewer than the operators take: torch cannot compare values of the wider unsigned dtypes."""


def check_tokens(tokens: JaggedTensor, dim: int, name: str) -> None:
    """Raise a ValueError unless values are floating point [rows, dim] and lengths sum to rows."""
    if not isinstance(tokens, JaggedTensor):
        raise ValueError(f"{name} must be a JaggedTensor, got {type(tokens).__name__}")
    values = tokens.values()
    if values.dim() != 2 or values.shape[1] != dim:
        raise ValueError(f"{name}: values must be [rows, {dim}], got {list(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"{name}: values must be floating point, got {values.dtype}")
    if checkable(values):
        total = int(tokens.offsets()[-1])
        if total != len(values):
            raise ValueError(f"{name}: lengths sum to {total}, but there are {len(values)} rows")


def check_weights(tokens: JaggedTensor, name: str) -> None:
    """Raise a ValueError unless the weights are None or event weights."""
    weights, values = tokens.weights_or_none(), tokens.values()
    if weights is None:
        return
    if not weights.is_floating_point():
        raise ValueError(
            f"{name}: weights must be floating point or None, got {weights.dtype}; these seem to be ids "
            "from an EmbeddingCollection with need_indices=True"
        )
    if name != "history":
        raise ValueError(f"{name}: candidates have no weights; make a JaggedTensor without them")
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{name}: weights must be [{len(values)}], one per event, got {list(weights.shape)}"
        )
    if weights.device != values.device:
        raise ValueError(f"{name}: weights are on {weights.device}, the values on {values.device}")
    if checkable(values):
        good = (weights >= 0) & weights.isfinite()
        if not bool(good.all()):
            event = int((~good).nonzero()[0])
            raise ValueError(f"{name}: event {event} has a weight that is negative, infinite or NaN")


def check_ages(age: Tensor | None, history: JaggedTensor) -> None:
    """Raise a ValueError unless ``age`` is None or has an age for each event."""
    if age is None:
        return
    values = history.values()
    if age.shape != values.shape[:1]:
        raise ValueError(
            f"history_age must be [{len(values)}], one age per event, got {list(age.shape)}"
        )
    if age.dtype == torch.bool or age.is_complex():
        raise ValueError(f"history_age must be numbers, got {age.dtype}")
    if age.device != values.device:
        raise ValueError(f"history_age is on {age.device}, the tokens on {values.device}")
    if checkable(values) and not bool((age >= 0).all()):
        event = int((~(age >= 0)).nonzero()[0])
        raise ValueError(
            f"history_age: event {event} has a negative age or NaN; an event after the request "
            "must not be in its history"
        )


def check_ids(ids: Tensor | None, features: tuple[str, ...], tokens: JaggedTensor, name: str) -> None:
    """Raise a ValueError unless ``ids`` has a column of integers for each feature."""
    if not features:
        return
    values = tokens.values()
    wanted = (values.shape[0], len(features))  # len() would fix it in an exported graph
    if ids is None or tuple(ids.shape) != wanted:
        got = "None" if ids is None else list(ids.shape)
        raise ValueError(f"{name} must be {list(wanted)}, one for each of {features}, got {got}")
    if ids.dtype not in _ID_DTYPES:
        raise ValueError(f"{name} must be integers (uint8 or signed), got {ids.dtype}")
    if ids.device != values.device:
        raise ValueError(f"{name} is on {ids.device}, the tokens on {values.device}")


def check_gates(ids: Tensor | None, gates: Mapping[str, int], history: JaggedTensor) -> None:
    """Raise a ValueError unless ``ids`` has a column for each gate, with values of the gate's table."""
    if not gates and ids is not None:
        raise ValueError(
            f"history_gates is {list(ids.shape)}, but the configuration has no gates; add gates to it, "
            "or do not pass history_gates"
        )
    check_ids(ids, tuple(gates), history, "history_gates")
    if ids is None or not checkable(history.values()):
        return
    bad = (ids < 0) | (ids >= torch.tensor([*gates.values()], device=ids.device))
    if bool(bad.any()):
        event, column = bad.nonzero()[0].tolist()
        name, values = [*gates.items()][column]
        raise ValueError(
            f"history_gates: event {event} has {name} {int(ids[event, column])}; the gate {name!r} has "
            f"values 0 to {values - 1}"
        )
