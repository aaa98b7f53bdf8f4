"""Errors of checkpoints other than damage: it cannot be read or written now, is of another
model, or contains code. One process; a run of six steps with checkpoints at 4 and 6."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.commands.export import ExportConfig, export
from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed import CheckpointError, OptimizerConfig, checkpoint, checkpoint_files
from ifa_torchrec.distributed.checkpoint import checkpoints
from ifa_torchrec.errors import WriteError
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train


@pytest.fixture(scope="module")
def whole(log: EventLog, tmp_path_factory) -> TrainConfig:
    config = TrainConfig(
        data=log.path,
        out=tmp_path_factory.mktemp("whole") / "run",
        ifa=IFAConfig(8, num_heads=2, identity_features=("item",), identity_half_lives=(math.inf,)),
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(dense_lr=0.01),
        max_requests=8,
        checkpoint_every=4,
        validate=False,
    )
    train(config)
    return config


@pytest.fixture
def run(whole: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A copy of the run, to be resumed."""
    return dataclasses.replace(whole, out=shutil.copytree(whole.out, tmp_path / "run"), resume=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_untouched(run: TrainConfig) -> None:
    assert names_in(run.out / "checkpoints") == ["step-000000004", "step-000000006"]


def last_of(run: TrainConfig) -> Path:
    return checkpoints(run.out / "checkpoints")[-1]


def rewrite_sums(path: Path) -> None:
    """As anybody can who changes a checkpoint's files."""
    names = [name for name in names_in(path) if name != "checksums.json"]
    sums = {name: checkpoint_files.checksum_of(path / name) for name in names}
    (path / "checksums.json").write_text(json.dumps(sums))


@contextmanager
def no_warning() -> Iterator[None]:
    """No checkpoint is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class TestCannotBeRead:
    """Not damage: the checkpoint is not renamed, and no earlier one is loaded."""

    @pytest.mark.parametrize(
        "error",
        [MemoryError("32 GB"), RuntimeError("DefaultCPUAllocator"), OSError(errno.ESTALE, "Stale")],
        ids=repr,
    )
    def test_amid_the_weights(self, run: TrainConfig, error: Exception) -> None:
        fails = mock.patch.object(FileSystemReader, "read_data", side_effect=error)
        with fails, no_warning(), pytest.raises(type(error), match=str(error.args[-1])):
            train(run)
        assert_untouched(run)

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EACCES])
    def test_by_the_file_system(self, run: TrainConfig, number: int) -> None:
        error = OSError(number, os.strerror(number), "somewhere")
        with mock.patch.object(checkpoint_files, "checksum_of", side_effect=error), no_warning():
            for call in (lambda: train(run), lambda: load_run(run.out)):
                with pytest.raises(CheckpointError, match="step-000000006 cannot be read now") as told:
                    call()
                assert os.strerror(number) in str(told.value)
        assert_untouched(run)

    def test_by_one_rank_of_two(self, run: TrainConfig) -> None:
        """All ranks raise the error."""
        assert run_ranks(out_of_memory_on_rank_1, 2, run) == ["MemoryError"] * 2
        assert_untouched(run)


def out_of_memory_on_rank_1(run: TrainConfig) -> str:
    error = MemoryError("no more") if os.environ["RANK"] == "1" else None
    read = checkpoint_files.checksum_of
    with (
        mock.patch.object(checkpoint_files, "checksum_of", side_effect=error or read),
        no_warning(),
        pytest.raises(MemoryError) as raised,
    ):
        train(run)
    return type(raised.value).__name__


class TestAnotherModel:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (
                {"over_arch_layer_sizes": (8,)},
                r"over_arch\S+ has shape \[16, \d+\], the model's \[8, \d+\]",
            ),
            ({"over_arch_layer_sizes": (16, 8)}, r"over_arch\S+ is not in it"),
        ],
        ids=["sizes", "a layer more"],
    )
    def test_what_differs_is_named(self, run: TrainConfig, change: dict[str, Any], named: str) -> None:
        """config.json and the checkpoint agree, but the weights differ."""
        config = dataclasses.replace(run, **change)
        with no_warning(), pytest.raises(CheckpointError, match=named) as error:
            load_with(config)
        assert "step-000000006 is of another model" in str(error.value)
        assert_untouched(run)

    def test_weights_that_the_model_has_not(self, run: TrainConfig) -> None:
        """DCP would silently leave them out."""
        metadata: Metadata = pickle.loads((last_of(run) / ".metadata").read_bytes())
        weights = metadata.state_dict_metadata
        weights["model.model.more"] = next(iter(weights.values()))
        (last_of(run) / ".metadata").write_bytes(pickle.dumps(metadata))
        rewrite_sums(last_of(run))
        with no_warning(), pytest.raises(CheckpointError, match=r"the model has no model\.model\.more;"):
            load_run(run.out)

    def test_options_of_another_training(self, run: TrainConfig) -> None:
        """A training begun in the same folder, before there was a checkpoint, with the same shapes."""
        file = run.out / "config.json"
        options = json.loads(file.read_text())
        options["ifa"]["mass_scale"], options["seed"] = 2.0, 5
        file.write_text(json.dumps(options))
        with no_warning(), pytest.raises(CheckpointError) as error:
            evaluate(EvaluateConfig(run.out))
        assert "ifa.mass_scale was 1.0, is 2.0; seed was 0, is 5" in str(error.value)

    def test_a_copy_is_no_checkpoint(self, run: TrainConfig) -> None:
        """It would always be the latest, or be deleted as the oldest."""
        folder = run.out / "checkpoints"
        for name in ("step-best", "step-6", "step-000000006-old"):
            shutil.copytree(last_of(run), folder / name)
        (folder / "step-000000004.tar").write_text("")
        assert last_of(run).name == "step-000000006"
        train(run)
        assert {"step-best", "step-6", "step-000000006-old"} <= {*names_in(folder)}

    def test_a_copy_under_the_name_of_another_step(self, run: TrainConfig) -> None:
        last_of(run).rename(run.out / "checkpoints" / "step-000000099")
        with pytest.raises(
            CheckpointError, match=r"step-000000099 is a copy of step-000000006; give it"
        ):
            load_run(run.out)


def load_with(config: TrainConfig) -> None:
    """Load a run's checkpoint into the model of these options."""
    from ifa_torchrec.distributed import init_process_group, shard
    from ifa_torchrec.models import DLRM_IFATrain
    from ifa_torchrec.training.build import build_model

    model = DLRM_IFATrain(build_model(EventLog(config.data).schema, config))
    model, _ = shard(model, init_process_group(), config.optimizers)
    checkpoint.load(config.out / "checkpoints", model)


class TestCannotBeWritten:
    def test_a_full_disk(self, whole: TrainConfig, tmp_path: Path) -> None:
        """At the second of two checkpoints; the first stays, and training resumes from it."""
        config = dataclasses.replace(whole, out=tmp_path / "run")
        folder, write = config.out / "checkpoints", FileSystemWriter.write_data

        def full(self, *args):
            if "step-000000006" not in str(self.path):
                return write(self, *args)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                written = write(self, *args)
                written.wait()
                return written
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        with (
            mock.patch.object(FileSystemWriter, "write_data", full),
            pytest.raises(WriteError, match=r"\.step-000000006 cannot be written: .*"),
        ):
            train(config)
        assert names_in(folder) == ["step-000000004"]  # and no draft that fills the disk
        assert train(dataclasses.replace(config, resume=True))["steps"] == 6
        assert names_in(folder) == ["step-000000004", "step-000000006"]

    @pytest.mark.parametrize("part", ["", "checkpoints", "tensorboard", ".config.json", ".lock"])
    def test_a_place_that_is_taken(self, whole: TrainConfig, tmp_path: Path, part: str) -> None:
        """A file in place of a folder, or the reverse: fails even for root."""
        config = dataclasses.replace(whole, out=tmp_path / "run")
        if part.startswith("."):
            (config.out / part).mkdir(parents=True)
        else:
            (config.out / part).parent.mkdir(exist_ok=True)
            (config.out / part).write_text("")
        with pytest.raises(WriteError, match=rf"{config.out}\S* cannot be written: .*irectory|exists"):
            train(config)

    def test_metrics(self, run: TrainConfig) -> None:
        (run.out / "metrics-test.json").mkdir()
        with pytest.raises(WriteError, match=r"metrics-test.json cannot be written: .*Is a directory"):
            evaluate(EvaluateConfig(run.out))

    def test_an_export_stays_whole(self, run: TrainConfig, tmp_path: Path, monkeypatch) -> None:
        out = tmp_path / "there" / "scorer.pt2"
        out.parent.mkdir()
        out.write_text("the one before")

        def full(program, file):
            file.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("ifa_torchrec.commands.export.export_scorer", lambda *args: None)
        monkeypatch.setattr("torch.export.save", full)
        with pytest.raises(WriteError, match=rf"{out} cannot be written: .*No space left"):
            export(ExportConfig(run.out, out))
        assert names_in(out.parent) == ["scorer.pt2"] and out.read_text() == "the one before"


class TestLock:
    def test_a_second_training_in_the_same_folder(self, whole: TrainConfig, tmp_path: Path) -> None:
        config = dataclasses.replace(whole, out=tmp_path / "run")
        with checkpoint.locked(config.out):
            for resume in (False, True):
                with pytest.raises(CheckpointError, match=r"run: another training writes here.*--out"):
                    train(dataclasses.replace(config, resume=resume))
            assert names_in(config.out) == [".lock"]
        train(config)

    def test_all_ranks_hear_of_it(self, tmp_path: Path) -> None:
        with checkpoint.locked(tmp_path):
            assert run_ranks(lock, 2, tmp_path) == ["refused"] * 2
        assert run_ranks(lock, 2, tmp_path) == ["locked"] * 2

    def test_a_file_system_without_locks(self, tmp_path: Path) -> None:
        no_locks = mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available"))
        with no_locks, pytest.warns(UserWarning, match="do not start a second training here"):
            assert lock(tmp_path) == "locked"


def lock(folder: Path) -> str:
    try:
        with checkpoint.locked(folder):
            return "locked"
    except CheckpointError:
        return "refused"


class Code:
    """Unpickling it calls a function that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


def code_in_metadata(path: Path, code: Code) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(code))


def code_beside_metadata(path: Path, code: Code) -> None:
    """As an attribute of otherwise intact metadata."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = code
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def code_in_an_entry(path: Path, code: Code) -> None:
    """As a non-tensor entry, which DCP loads by pickle."""
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith("model."))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    torch.save(code, path / "__9_0.distcp")
    info = _StorageInfo("__9_0.distcp", 0, (path / "__9_0.distcp").stat().st_size)
    metadata.storage_data[MetadataIndex(name)] = info
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


CALLS: dict[str, Callable[[TrainConfig, Path], Any]] = {
    "train": lambda run, folder: train(run),
    "evaluate": lambda run, folder: evaluate(EvaluateConfig(run.out)),
    "explain": lambda run, folder: explain(ExplainConfig(run.out)),
    "export": lambda run, folder: export(ExportConfig(run.out, folder / "scorer.pt2")),
    "build_states": lambda run, folder: build_states(BuildStatesConfig(run.out, str(folder / "s"), 0)),
    "serve": lambda run, folder: load_run(run.out, sharded=False),  # its first step
}


class TestCode:
    @pytest.mark.parametrize("where", [code_in_metadata, code_beside_metadata, code_in_an_entry])
    def test_is_never_run(self, run: TrainConfig, tmp_path: Path, where) -> None:
        trace = tmp_path / "trace"
        where(last_of(run), Code(trace))
        rewrite_sums(last_of(run))
        for name, call in CALLS.items():
            with (
                no_warning(),
                pytest.raises(CheckpointError, match=r"could run code; do not use") as error,
            ):
                call(run, tmp_path)
            assert str(last_of(run)) in str(error.value), name
            assert not trace.exists(), name
        assert_untouched(run)

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("os", "system"),
            ("builtins", "eval"),
            ("torch", "load"),
            ("torch", "hub.load"),
            ("torch", "Size.__init__"),
            ("torch.serialization", "load"),
            ("torch.distributed.checkpoint.metadata", "os.system"),
            ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
            ("pathlib", "os.system"),
        ],
    )
    def test_of_any_other_name(self, run: TrainConfig, module: str, name: str) -> None:
        text = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
        (last_of(run) / ".metadata").write_bytes(text + b"\x93.")  # STACK_GLOBAL, STOP
        rewrite_sums(last_of(run))
        with pytest.raises(CheckpointError, match=f"it names {module}.{name}, which could run code"):
            load_run(run.out)

    @pytest.mark.parametrize(
        "content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(torch.float32)], ids=repr
    )
    def test_what_is_no_metadata_is_damage(self, run: TrainConfig, content: bytes) -> None:
        (last_of(run) / ".metadata").write_bytes(content)
        rewrite_sums(last_of(run))
        with pytest.warns(UserWarning, match=r"step-000000006 is damaged \(.metadata"):
            assert load_run(run.out).version.startswith("step-000000004-")
