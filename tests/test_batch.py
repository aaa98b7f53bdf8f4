"""RankingBatch can be moved by TorchRec's pipelines: to a device, to pinned memory, across streams."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import Mock, sentinel

import pytest
import torch
from every_field import make_rich
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ifa_torchrec import RankingBatch
from ifa_torchrec.data import RankingDataset

FIELDS = [f.name for f in dataclasses.fields(RankingBatch)]


@pytest.fixture
def batch(tmp_path: Path) -> RankingBatch:
    return RankingDataset(make_rich().write(tmp_path / "log"), "valid")[[0, 5, 3]]


@pytest.fixture
def mocks() -> RankingBatch:
    """A batch of mocks that record their calls."""
    return RankingBatch(**{name: Mock(name=name) for name in FIELDS})


def tensors(batch: RankingBatch) -> dict[str, torch.Tensor]:
    result = {}
    for name in FIELDS:
        field = getattr(batch, name)
        if isinstance(field, KeyedJaggedTensor):
            result[f"{name}.values"], result[f"{name}.lengths"] = field.values(), field.lengths()
        else:
            result[name] = field
    return result


def test_is_pipelineable(batch: RankingBatch) -> None:
    assert isinstance(batch, Pipelineable)


def test_num_requests(batch: RankingBatch) -> None:
    assert batch.num_requests == 3


def test_to_moves_everything(batch: RankingBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert {name: t.device.type for name, t in tensors(moved).items()} == dict.fromkeys(
        tensors(batch), "meta"
    )
    assert moved.sequence_features.keys() == batch.sequence_features.keys()
    assert batch.labels.device.type == "cpu", "the original stays where it is"


def test_to_keeps_the_values(batch: RankingBatch) -> None:
    moved = tensors(batch.to(torch.device("cpu"), non_blocking=True))
    for name, tensor in tensors(batch).items():
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def test_to_hands_non_blocking_on(mocks: RankingBatch) -> None:
    moved = mocks.to(sentinel.device, non_blocking=True)
    for name in FIELDS:
        field = getattr(mocks, name)
        field.to.assert_called_once_with(device=sentinel.device, non_blocking=True)
        assert getattr(moved, name) is field.to.return_value


def test_record_stream_reaches_every_field(mocks: RankingBatch) -> None:
    mocks.record_stream(sentinel.stream)
    for name in FIELDS:
        getattr(mocks, name).record_stream.assert_called_once_with(sentinel.stream)


def test_pin_memory_reaches_every_field(mocks: RankingBatch) -> None:
    pinned = mocks.pin_memory()
    for name in FIELDS:
        assert getattr(pinned, name) is getattr(mocks, name).pin_memory.return_value


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_and_on_a_stream(batch: RankingBatch) -> None:
    pinned = batch.pin_memory()
    assert all(t.is_pinned() for t in tensors(pinned).values() if t.numel())
    moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert torch.equal(moved.labels.cpu(), batch.labels)
