"""Checkpoints written while training continues: of the state at the save, complete or absent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig

from ifa_torchrec.distributed import OptimizerConfig, checkpoint, init_process_group, shard
from ifa_torchrec.distributed.checkpoint_writer import CheckpointWriter, StateCopies
from ifa_torchrec.distributed.saver import CheckpointSaver
from ifa_torchrec.errors import WriteError


@pytest.fixture(scope="module")
def sharded():
    tables = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(name="item", embedding_dim=8, num_embeddings=50, feature_names=["item"])
        ],
    )
    model = torch.nn.ModuleDict({"tables": tables, "over": torch.nn.Linear(8, 1)})
    return shard(model, init_process_group(), OptimizerConfig())


def fill(model, value: float) -> None:
    with torch.no_grad():
        for weights in model.state_dict().values():
            parts = getattr(weights, "local_shards", None)
            for part in [p.tensor for p in parts()] if parts else [weights]:
                part.fill_(value)


def values(model) -> set[float]:
    result: set[float] = set()
    for weights in model.state_dict().values():
        parts = getattr(weights, "local_shards", None)
        for part in [p.tensor for p in parts()] if parts else [weights]:
            result |= set(part.unique().tolist())
    return result


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    gate, write_data = threading.Event(), CheckpointWriter.write_data

    def waits(self, *arguments):
        assert gate.wait(20)
        return write_data(self, *arguments)

    with mock.patch.object(CheckpointWriter, "write_data", waits):
        yield gate
        gate.set()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_of_the_state_as_it_was(sharded, held: threading.Event, tmp_path: Path) -> None:
    model, optimizer = sharded
    with CheckpointSaver(tmp_path) as saver:
        for step in (1, 2):  # the second copy reuses the first one's memory
            fill(model, step)
            saver.save(model, optimizer, {"step": step})
            fill(model, 7.0)
            held.set()
            saver.wait()
            assert f"step-00000000{step}" in names(tmp_path)
            assert checkpoint.load(tmp_path, model, optimizer) == {"step": step}
            assert values(model) == {step}
        assert saver.waited > 0


@pytest.mark.parametrize(
    "value",
    [
        torch.rand(600, 1000),  # large enough for the copy that bypasses the caches
        torch.rand(600, 1000).bfloat16(),
        torch.nn.Parameter(torch.rand(600, 1000)),
        torch.rand(1000, 600).t(),
        torch.empty(0, 8),
        torch.tensor(3),
        torch.tensor([True, False]),
    ],
)
def test_a_copy_is_of_what_was_and_its_memory_is_kept(value: torch.Tensor) -> None:
    copies, was = StateCopies(), value.detach().clone()
    copies.take({"value": value})
    first = copies.of["value", ()]
    assert first.dtype == was.dtype
    with torch.no_grad():
        value.fill_(0)
    assert torch.equal(first, was)
    copies.take({"value": value})
    second = copies.of["value", ()]
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, value)


def test_training_goes_on_while_it_is_written(sharded, held: threading.Event, tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path) as saver:
        saver.save(*sharded, {"step": 1})
        assert not checkpoint.checkpoints(tmp_path)  # save returned before the write
        threading.Timer(0.2, held.set).start()
    assert names(tmp_path) == ["step-000000001"]


@pytest.mark.parametrize("told", ["wait", "save", "end"])
def test_what_cannot_be_written_is_told_and_the_one_before_stays(
    sharded, tmp_path: Path, told: str
) -> None:
    checkpoint.save(tmp_path, *sharded, {"step": 1})
    full = mock.patch.object(CheckpointWriter, "write_data", side_effect=OSError(28, "No space left"))
    with full, pytest.raises(WriteError, match="No space left"), CheckpointSaver(tmp_path) as saver:
        saver.save(*sharded, {"step": 2})
        if told == "wait":
            saver.wait()
        if told == "save":
            saver.save(*sharded, {"step": 3})
    assert names(tmp_path) == ["step-000000001"]
    assert checkpoint.load(tmp_path, *sharded) == {"step": 1}


def test_a_training_that_fails_leaves_its_last_checkpoint(
    sharded, held: threading.Event, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError), CheckpointSaver(tmp_path) as saver:
        saver.save(*sharded, {"step": 1})
        threading.Timer(0.2, held.set).start()
        raise ZeroDivisionError
    assert checkpoint.load(tmp_path, *sharded) == {"step": 1}


def test_checksums_are_those_of_the_files(sharded, tmp_path: Path) -> None:
    """``load`` compares them with what it reads."""
    path = checkpoint.save(tmp_path, *sharded, {"step": 1})
    read: list[Path] = []
    checksum = checkpoint.checksum_of
    with mock.patch.object(checkpoint, "checksum_of", lambda file: read.append(file) or checksum(file)):
        checkpoint.save(tmp_path, *sharded, {"step": 2})
        assert {file.name for file in read} == {".metadata", "progress.json"}  # not the others
    checkpoint.load(tmp_path, *sharded)
    assert "__0_0.distcp" in names(path)
