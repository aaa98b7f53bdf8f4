"""Checks that the fields of a batch fit each other and the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.ops.jagged import checkable

HISTORY, CANDIDATES = "history", "candidates"
"""The sides of a batch: its histories with their ages, and its candidates with their requests."""


def check_features(
    features: RankingFeatures,
    config: DLRM_IFAConfig,
    num_items: int | None,
    sides: tuple[str, ...] = (HISTORY, CANDIDATES),
) -> None:
    """Raise a ValueError for features that do not fit each other or the model.

    Values are only checked on the CPU and outside compiled graphs: reading them on a GPU would wait for
    the device.

    Args:
        features: features of B requests.
        config: the model's configuration.
        num_items: U, the number of items in the pooled lists; None if the model has no item lists.
        sides: which parts of the features are used.

    Raises:
        ValueError: a field is missing, has the wrong size or is out of range; the message names it.

    Example:
        >>> import torch
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.batch import RankingFeatures
        >>> from ifa_torchrec.models.checks import check_features
        >>> none, sequence = KeyedJaggedTensor.empty(), KeyedJaggedTensor.from_lengths_sync(
        ...     ["history_item", "candidate_item"], torch.tensor([5, 6]), torch.tensor([1, 1]))
        >>> features = RankingFeatures(
        ...     torch.zeros(1, 0), none, sequence, torch.zeros(1, 0), history_age=torch.ones(1))
        >>> check_features(features, DLRM_IFAConfig(("item",), ifa=IFAConfig(8)), None)
    """
    requests, sequences = features.num_requests, features.sequence_features
    if sequences.stride() != requests:
        raise ValueError(
            f"batch: sequence_features have {sequences.stride()} requests, dense_features have "
            f"{requests}"
        )
    events, candidates = features.history_age.shape[0], features.candidate_dense.shape[0]
    items = num_items
    for name, columns in (
        ("item_dense", config.columns("item_dense")),
        ("item_vectors", config.vector_columns),
    ):
        value = _columns(features, name, columns)
        if value is not None:
            items = value.shape[0] if items is None else items
            _check_rows(name, value, items, "items")
    if CANDIDATES in sides:
        _columns(features, "dense_features", config.columns("dense_features"))
        _columns(features, "candidate_dense", config.columns("candidate_dense"))
        _check_items(features, "candidate_items", candidates, items)
        _check_ids(features, "candidate_item_ids", candidates)
        _check_lengths(features, config.candidate_keys.values(), candidates, "candidate_dense")
    if HISTORY in sides and config.history_keys:
        value = _columns(features, "history_dense", config.columns("history_dense"))
        if value is not None:
            _check_rows("history_dense", value, events, "events")
        if features.history_weight is not None and features.history_weight.shape != (events,):
            raise ValueError(
                f"batch: history_weight is {list(features.history_weight.shape)} for {events} events"
            )
        _check_items(features, "history_items", events, items)
        _check_ids(features, "history_item_ids", events)
        _check_lengths(features, config.history_keys.values(), events, "history_age")


def _columns(features: RankingFeatures, name: str, wanted: int) -> Tensor | None:
    """The field, checked to have the wanted number of columns; None if the model does not take it."""
    value: Tensor | None = getattr(features, name)
    if value is None and wanted:
        raise ValueError(f"batch: {name} is None, but the model takes {wanted} columns")
    if value is not None and (value.dim() != 2 or value.shape[1] != wanted):
        found = f"{value.shape[1]} columns" if value.dim() == 2 else f"shape {list(value.shape)}"
        raise ValueError(f"batch: {name} has {found}, but the model takes {wanted} columns")
    return value if wanted else None


def _check_rows(name: str, value: Tensor, rows: int, what: str) -> None:
    if value.shape[0] != rows:
        raise ValueError(f"batch: {name} has {value.shape[0]} rows for {rows} {what}")


def _check_items(features: RankingFeatures, name: str, rows: int, items: int | None) -> None:
    """Check the item rows of the events or candidates."""
    if items is None:
        return
    value: Tensor | None = getattr(features, name)
    if value is None:
        raise ValueError(f"batch: {name} is None, but the model has item features; pass the items' rows")
    _check_integers(name, value, rows)
    if checkable(value) and len(value) and not 0 <= int(value.min()) <= int(value.max()) < items:
        wrong = value[(value < 0) | (value >= items)][0]
        raise ValueError(f"batch: {name} has {int(wrong)}, but items are 0 to {items - 1}")


def _check_ids(features: RankingFeatures, name: str, rows: int) -> None:
    value: Tensor | None = getattr(features, name)
    if value is not None:
        _check_integers(name, value, rows)


def _check_integers(name: str, value: Tensor, rows: int) -> None:
    if value.shape != (rows,) or value.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"batch: {name} must be [{rows}] int64, got {list(value.shape)} {value.dtype}")


def _check_lengths(features: RankingFeatures, keys: Iterable[str], rows: int, of: str) -> None:
    """Check that all these features have the same lengths."""
    sequences = features.sequence_features
    first, *others = keys
    if not checkable(sequences.values()):
        return
    lengths = sequences[first].lengths()
    for name in others:
        if not torch.equal(sequences[name].lengths(), lengths):
            raise ValueError(f"batch: {name} and {first} have different lengths")
    if int(lengths.sum()) != rows:
        raise ValueError(f"batch: {of} has {rows} rows, but {first} has {int(lengths.sum())} values")
