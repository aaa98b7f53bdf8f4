"""Checkpoints survive killed processes, other numbers of ranks, other sharding plans and damage.

Runs have two ranks and twelve steps, six per epoch, and save every third step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import killed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import SMALL, rendezvous, run_ranks, torchrun
from toy import SPLITS

from ifa_torchrec import IFAConfig
from ifa_torchrec.__main__ import main
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.distributed import (
    CheckpointError,
    OptimizerConfig,
    ShardingConfig,
    checkpoint,
    init_process_group,
    shard,
)
from ifa_torchrec.distributed.checkpoint import FORMAT
from ifa_torchrec.distributed.saver import CheckpointSaver
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.models.archs import CandidateArch
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import predict
from ifa_torchrec.training.trainer import train

TABLES = ("item_table", "category_table", "store_table", "weekday_table")
RUNS = [
    ("rowwise_adagrad", "table_wise"),
    ("rowwise_adagrad", "row_wise"),
    ("adagrad", "table_wise"),
    ("adagrad", "column_wise"),
]
"""Table optimiser and sharding type of the runs that are loaded."""
MIDDLE, END = 3, 12
"""Steps of the first checkpoint, in the middle of the first of two epochs, and of the last."""

State = dict[str, np.ndarray]


def config_of(log: Path, out: Path, optimizer: str = "rowwise_adagrad", kind: str = "") -> TrainConfig:
    return TrainConfig(
        data=log,
        out=out,
        ifa=IFAConfig(
            8,
            num_heads=2,
            half_lives=(math.inf, 30.0),
            identity_features=("item",),
            identity_buckets=4096,
            identity_half_lives=(math.inf,),
        ),
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(table_optimizer=optimizer, dense_lr=0.01),
        sharding=sharding_of(kind),
        warmup_steps=3,
        max_requests=4,
        epochs=2,
        checkpoint_every=3,
        keep_best="last",
        calibrate=False,
    )


def sharding_of(kind: str) -> ShardingConfig:
    return ShardingConfig(tables=dict.fromkeys(TABLES, kind) if kind else {})


def command_line_of(config: TrainConfig) -> list[str]:
    """The options that ``config_of`` sets, as the command line that starts and restarts the run."""
    options = (
        f"--data {config.data} --out {config.out} --ifa.embedding-dim 8 --ifa.num-heads 2 "
        "--ifa.feature-map elu --ifa.readout linear --ifa.half-lives inf 30 "
        "--ifa.identity-features item --ifa.identity-buckets 4096 --ifa.identity-half-lives inf "
        "--ifa.identity-head-dim None --over-arch-layer-sizes 16 "
        "--keep-best last --no-calibrate "
        "--optimizers.dense-lr 0.01 --warmup-steps 3 --max-requests 4 --epochs 2 --checkpoint-every 3 "
        "--resume --sharding.tables"
    )
    return [*options.split(), *(word for pair in config.sharding.tables.items() for word in pair)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What runs on the ranks


@dataclass
class Kept:
    """What a rank recorded of a training."""

    result: dict[str, float]
    states: dict[int, State]
    """By step, the saved weights and states, gathered from all ranks."""
    generators: dict[int, np.ndarray]
    """By step, this rank's random number generator state at the save."""
    requests: list[list[int]]
    """By step, the requests that this rank trained on, without empty ones."""


def full_state(model: torch.nn.Module, optimizer: Any = None) -> State:
    """All weights and optimiser states, gathered from the ranks' shards."""
    found: State = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, (dict, list)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{name}/{key}", part)
        elif isinstance(value, (int, float)):
            found[name] = np.array(value)
        elif type(value) in (torch.Tensor, torch.nn.Parameter):
            found[name] = value.detach().numpy().copy()
        else:  # a ShardedTensor
            found[name] = np.full(tuple(value.metadata().size), np.nan, np.float32)
            for part in value.local_shards():
                place = zip(part.metadata.shard_offsets, part.metadata.shard_sizes, strict=True)
                found[name][tuple(slice(at, at + n) for at, n in place)] = part.tensor.detach().numpy()

    walk("model", model.state_dict())
    if optimizer is not None:
        walk("optimizer", optimizer.state_dict())
    of_ranks: list[State] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, found)
    result: State = {}
    for state in of_ranks:  # states of tables on other ranks are missing here
        for name, value in state.items():
            result[name] = np.where(np.isnan(value), result.get(name, value), value)
    assert not [name for name, value in result.items() if np.isnan(value).any()]
    return result


def train_and_keep(config: TrainConfig, copy_to: Path | None = None) -> Kept:
    """Train and record; OUT at step MIDDLE is copied to ``copy_to``."""
    kept = Kept({}, {}, {}, [])
    save, forward = CheckpointSaver.save, CandidateArch.forward
    seasons = EventLog(config.data).requests("train")["season"]
    number_of = {season: number for number, season in enumerate(np.asarray(seasons))}
    assert len(number_of) == SPLITS["train"]

    def saves(self, model, optimizer, progress, *best):
        torch.rand(1 + dist.get_rank())  # move each rank's generator from its start
        kept.generators[progress["step"]] = torch.get_rng_state().numpy()
        save(self, model, optimizer, progress, *best)
        self.wait()
        kept.states[progress["step"]] = full_state(model, optimizer)
        if copy_to is not None and progress["step"] == MIDDLE and dist.get_rank() == 0:
            shutil.copytree(config.out, copy_to)

    def forwards(self, lookups, batch):
        if self.training:
            real = batch.context_features["store"].lengths() > 0
            seen = batch.dense_features[real, 1].numpy()
            kept.requests.append([number_of[season] for season in seen])
        return forward(self, lookups, batch)

    with (
        mock.patch.object(CheckpointSaver, "save", saves),
        mock.patch.object(CandidateArch, "forward", forwards),
    ):
        kept.result = train(config)
    return kept


def train_all(configs: list[TrainConfig], copies: list[Path] | None = None) -> list[Kept]:
    """Call ``train_and_keep`` for one run after the other."""
    return [
        train_and_keep(config, copy)
        for config, copy in zip(configs, copies or [None] * len(configs), strict=True)
    ]


@dataclass
class Loaded:
    """A rank's state after a load."""

    progress: dict[str, Any]
    state: State
    generator_before: np.ndarray
    generator: np.ndarray
    warned: list[str]


def load_all(configs: list[TrainConfig]) -> list[Loaded]:
    """Load each run's last checkpoint into a model that started from other weights."""
    device = init_process_group()
    result = []
    for config in configs:
        torch.manual_seed(1234 + dist.get_rank())
        model = DLRM_IFATrain(build_model(EventLog(config.data).schema, config))
        model, optimizer = shard(model, device, config.optimizers, config.sharding)
        before = torch.get_rng_state().numpy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            progress = checkpoint.load(config.out / "checkpoints", model, optimizer)
        warned = [str(w.message) for w in caught if w.category is UserWarning]
        generator = torch.get_rng_state().numpy()
        state = full_state(model, optimizer)
        result.append(Loaded(progress, state, before, generator, warned))
    return result


@dataclass
class Seen:
    """What a rank recorded of all loads, resumed runs and runs on its number of ranks."""

    loaded: list[Loaded]
    """The results of LOADS."""
    resumed: list[Kept]
    """The results of RESUMES."""
    scores: list[np.ndarray]
    """The results of RUNS."""


def load_resume_score(loads: list[TrainConfig], resumes: list[TrainConfig], runs: list[Path]) -> Seen:
    return Seen(load_all(loads), train_all(resumes), scores_of(runs))


def refusal(config: TrainConfig, wanted: dict[str, Any] | None) -> str:
    """The error of a load that must fail; a warning that a checkpoint was skipped is also an error."""
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as error:
        warnings.simplefilter("error", UserWarning)
        model = DLRM_IFATrain(build_model(EventLog(config.data).schema, config))
        model, optimizer = shard(model, init_process_group(), config.optimizers, config.sharding)
        checkpoint.load(config.out / "checkpoints", model, optimizer, wanted)
    return str(error.value)


def scores_of(runs: list[Path]) -> list[np.ndarray]:
    """Score each run's test candidates, in batches of at most three requests per rank."""
    result = []
    for run in map(load_run, runs):
        dataset = RankingDataset(run.log, "test")
        result.append(predict(run.model, dataset, run.device, run.config.max_events, 3)[0])
    return result


def command_line(arguments: list[str]) -> tuple[str, str]:
    """The output of ``ifa train``."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ifa", "train", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        main()
    return out.getvalue(), err.getvalue()


def on_rank(rank: int, environment: dict[str, str], trap: tuple, arguments: list[str]) -> None:
    """A rank of ``killed.py``, without torchrun."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    killed.arm(*trap)
    command_line(arguments)


# Fixtures


@dataclass
class Saved:
    """A run of two ranks."""

    stopped: TrainConfig
    """A copy of its OUT at step MIDDLE, to be resumed."""
    whole: TrainConfig
    """Its OUT at the end."""
    kept: list[Kept]
    """What its ranks recorded."""

    def copy(self, to: Path, **changes) -> TrainConfig:
        """The run ``stopped``, to be resumed."""
        shutil.copytree(self.stopped.out, to)
        return dataclasses.replace(self.stopped, out=to, resume=True, **changes)


@pytest.fixture(scope="module")
def runs(log: EventLog, tmp_path_factory) -> dict[tuple[str, str], Saved]:
    folder = tmp_path_factory.mktemp("runs")
    whole = [config_of(log.path, folder / "-".join(run), *run) for run in RUNS]
    stopped = [folder / f"stopped-{config.out.name}" for config in whole]
    of_ranks = run_ranks(train_all, 2, whole, stopped)
    return {
        run: Saved(dataclasses.replace(config, out=out), config, list(kept))
        for run, config, out, kept in zip(RUNS, whole, stopped, zip(*of_ranks, strict=True), strict=True)
    }


def assert_same(actual: State, expected: State, relative: float = 0.0) -> None:
    """All values are equal, or within ``relative`` of the largest."""
    assert actual.keys() == expected.keys() and len(actual) > 80
    wrong = {}
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error = np.abs(actual[name].astype(np.float64) - value).max(initial=0)
        if not error <= relative * np.abs(value).max(initial=0):
            wrong[name] = error
    assert not wrong


def assert_same_end(out: Path, saved: Saved) -> None:
    """OUT has the result of the uninterrupted run, when read by one rank."""
    [loaded] = load_all([dataclasses.replace(saved.whole, out=out)])
    assert loaded.progress["step"] == END and not loaded.warned
    assert_same(loaded.state, saved.kept[0].states[END])
    assert names_in(out / "checkpoints") == ["step-000000009", "step-000000012"]


def valid_of(result: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in result.items() if name.startswith("valid") or name == "loss"}


# Tests

LOADS = {
    1: [
        ("rowwise_adagrad", "table_wise", ""),
        ("rowwise_adagrad", "row_wise", ""),
        ("adagrad", "column_wise", ""),
    ],
    2: [
        ("rowwise_adagrad", "table_wise", "row_wise"),
        ("rowwise_adagrad", "row_wise", "table_wise"),
        ("rowwise_adagrad", "row_wise", ""),
        ("adagrad", "table_wise", "column_wise"),
        ("adagrad", "column_wise", "row_wise"),
        ("adagrad", "column_wise", "table_wise"),
    ],
    4: [
        ("rowwise_adagrad", "table_wise", "row_wise"),
        ("rowwise_adagrad", "row_wise", ""),
        ("adagrad", "table_wise", "column_wise"),
        ("adagrad", "column_wise", "table_wise"),
    ],
}
"""By number of ranks: table optimiser, sharding type when saved, and sharding type when loaded; "" is
the planner's choice."""


RESUMES = {
    1: [
        ("rowwise_adagrad", "table_wise", "", 8),
        ("rowwise_adagrad", "row_wise", "", 5),
        ("adagrad", "column_wise", "", 8),
    ],
    2: [
        *((optimizer, kind, kind, 4) for optimizer, kind in RUNS),
        ("rowwise_adagrad", "table_wise", "row_wise", 4),
        ("adagrad", "table_wise", "column_wise", 4),
    ],
    4: [
        ("rowwise_adagrad", "table_wise", "row_wise", 2),
        ("rowwise_adagrad", "row_wise", "", 4),
        ("adagrad", "column_wise", "", 2),
    ],
}
"""The same for resumed runs, and their max_requests."""


def cases(of_world: dict[int, list], only=lambda case: True) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(
            world,
            number,
            id=f"{world}-" + "-".join(map(str, case)),
            marks=pytest.mark.slow if world > 2 else (),
        )
        for world, ofs in of_world.items()
        for number, case in enumerate(ofs)
        if only((world, *case))
    ]
    return pytest.mark.parametrize(("world", "number"), parameters)


class TestOtherRanksAndPlans:
    @pytest.fixture(scope="class")
    def on_ranks(self, runs, tmp_path_factory):
        """What each of ``world`` ranks recorded."""

        @functools.cache
        def of(world: int) -> list[Seen]:
            loads = [
                dataclasses.replace(runs[optimizer, saved].stopped, sharding=sharding_of(kind))
                for optimizer, saved, kind in LOADS[world]
            ]
            folder = tmp_path_factory.mktemp("resumed")
            resumes = [
                runs[optimizer, saved].copy(
                    folder / str(number), sharding=sharding_of(kind), max_requests=max_requests
                )
                for number, (optimizer, saved, kind, max_requests) in enumerate(RESUMES[world])
            ]
            out = [saved.whole.out for saved in runs.values()]
            return run_ranks(load_resume_score, world, loads, resumes, out)

        return of

    @cases(LOADS)
    def test_all_that_was_saved_is_loaded(self, runs, on_ranks, world: int, number: int) -> None:
        """Weights, tables' states and dense states are equal."""
        optimizer, saved, _ = LOADS[world][number]
        wanted = runs[optimizer, saved].kept[0].states[MIDDLE]
        assert len(on_ranks(world)) == world
        for seen in on_ranks(world):
            loaded = seen.loaded[number]
            position = {name: loaded.progress[name] for name in ("step", "epoch", "request")}
            assert position == {"step": MIDDLE, "epoch": 0, "request": 24}
            assert not loaded.warned
            assert_same(loaded.state, wanted)

    def test_what_is_compared_moves_in_training(self, runs) -> None:
        """Otherwise loading nothing would pass."""
        for saved in runs.values():
            states = saved.kept[0].states
            arrays = [n for n, value in states[END].items() if value.ndim and "_extra_state" not in n]
            for kind in ("weight", "bias", "exp_avg", "exp_avg_sq", "item_table.momentum1"):
                assert [name for name in arrays if name.endswith(kind)], kind
            still = [n for n in arrays if np.array_equal(states[MIDDLE][n], states[END][n])]
            # the weight for missing numbers, which this log does not have
            assert [n for n in still if ".missing" not in n] == []

    @cases(LOADS)
    def test_generators_are_each_ranks_own(self, runs, on_ranks, world: int, number: int) -> None:
        """A rank that did not exist at the save keeps its generator."""
        optimizer, saved, _ = LOADS[world][number]
        kept = runs[optimizer, saved].kept
        assert not np.array_equal(kept[0].generators[MIDDLE], kept[1].generators[MIDDLE])
        for rank, seen in enumerate(on_ranks(world)):
            loaded = seen.loaded[number]
            if rank < len(kept):
                assert np.array_equal(loaded.generator, kept[rank].generators[MIDDLE])
                assert not np.array_equal(loaded.generator_before, loaded.generator)
            else:
                assert np.array_equal(loaded.generator, loaded.generator_before)

    @cases(RESUMES, only=lambda case: case[0] == 2 and case[2] == case[3])
    def test_the_same_ranks_and_plan_train_on_as_if_never_stopped(
        self, runs, on_ranks, world: int, number: int
    ) -> None:
        """Bit for bit: losses, weights and states of each checkpoint, validation."""
        optimizer, saved, *_ = RESUMES[world][number]
        for seen, whole in zip(on_ranks(world), runs[optimizer, saved].kept, strict=True):
            resumed = seen.resumed[number]
            assert valid_of(resumed.result) == valid_of(whole.result)
            assert len(valid_of(resumed.result)) > 5 and resumed.result["steps"] == END
            assert list(resumed.states) == [6, 9, 12]
            for step, state in resumed.states.items():
                assert_same(state, whole.states[step])
            assert resumed.requests == whole.requests[MIDDLE:]

    @cases(RESUMES, only=lambda case: case[0] * case[4] == 8)
    def test_other_ranks_and_plans_train_on_the_same_to_rounding(
        self, runs, on_ranks, world: int, number: int
    ) -> None:
        """If the ranks together take the same requests per step, they train the same: the loss
        and its gradients do not depend on how many share them."""
        optimizer, saved, *_ = RESUMES[world][number]
        whole = runs[optimizer, saved].kept
        resumed = [seen.resumed[number] for seen in on_ranks(world)]
        assert steps_of(resumed) == steps_of(whole)[MIDDLE:]
        assert valid_of(resumed[0].result) == pytest.approx(valid_of(whole[0].result), rel=1e-5)
        for step, state in resumed[0].states.items():
            assert_same(state, whole[0].states[step], relative=1e-5)

    @cases(RESUMES)
    def test_requests_that_are_left_are_trained_once(
        self, runs, on_ranks, world: int, number: int
    ) -> None:
        optimizer, saved, _, max_requests = RESUMES[world][number]
        resumed = steps_of([seen.resumed[number] for seen in on_ranks(world)])
        assert max(map(len, resumed)) == world * max_requests
        both = steps_of(runs[optimizer, saved].kept)[:MIDDLE] + resumed
        flat = [request for step in both for request in step]
        everything = list(range(SPLITS["train"]))
        assert sorted(flat[: len(everything)]) == sorted(flat[len(everything) :]) == everything

    @pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
    def test_scores_do_not_depend_on_the_ranks(self, runs, on_ranks, log, world: int) -> None:
        alone = scores_of([saved.whole.out for saved in runs.values()])
        candidates = len(RankingDataset(log, "test").requests["candidates"])
        assert len(alone) == len(RUNS)
        for number, wanted in enumerate(alone):
            assert wanted.shape == (candidates, 1) and wanted.std() > 0.1
            for seen in on_ranks(world):
                np.testing.assert_allclose(seen.scores[number], wanted, rtol=0, atol=1e-5)


def steps_of(ranks: list[Kept]) -> list[list[int]]:
    """For each step, the requests of all ranks together."""
    return [sorted(chain(*step)) for step in zip(*(kept.requests for kept in ranks), strict=True)]


class TestWhatIsWritten:
    @pytest.mark.parametrize("run", RUNS, ids="-".join)
    def test_the_last_two_are_kept_and_no_draft(self, runs, run) -> None:
        folder = runs[run].whole.out / "checkpoints"
        assert checkpoint.KEEP == 2
        assert names_in(folder) == ["step-000000009", "step-000000012"]

    def test_each_file_has_its_checksum(self, runs) -> None:
        for saved in runs.values():
            for folder in checkpoint.checkpoints(saved.whole.out / "checkpoints"):
                sums = json.loads((folder / "checksums.json").read_text())
                assert sorted([*sums, "checksums.json"]) == names_in(folder)
                assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "progress.json"} <= sums.keys()


@pytest.mark.slow
class TestKilled:
    """By SIGKILL, in a run started with --resume and restarted by the same command."""

    RUN = ("rowwise_adagrad", "row_wise")

    def test_the_other_rank_ends_and_the_run_goes_on(self, runs, tmp_path: Path) -> None:
        """However often it is killed. No launcher ends the other rank here."""
        config = dataclasses.replace(runs[self.RUN].whole, out=tmp_path / "run")
        folder = config.out / "checkpoints"
        for (place, rank, step), left in [
            (("training", 0, 2), []),
            (("writing", 1, 6), [".step-000000006", "step-000000003"]),
            (("renaming", 0, 9), [".step-000000009", "step-000000003", "step-000000006"]),
        ]:
            codes = run_killed((place, rank, step), command_line_of(config))
            assert codes[rank] == -9 and codes[1 - rank] == 1, place
            assert (names_in(folder) if folder.exists() else []) == left
            if place == "renaming":
                assert "progress.json" in names_in(folder / left[0])
        [(printed, said), _] = run_ranks(command_line, 2, command_line_of(config))
        assert "resuming from step 6" in said
        assert valid_of(json.loads(printed)) == valid_of(runs[self.RUN].kept[0].result)
        assert_same_end(config.out, runs[self.RUN])

    @pytest.mark.slow
    def test_under_torchrun(self, runs, tmp_path: Path) -> None:
        """Without restarts the job ends soon; with restarts the same command finishes by itself."""
        config = dataclasses.replace(runs[self.RUN].whole, out=tmp_path / "run")
        folder = config.out / "checkpoints"
        died = torchrun(killed.__file__, "train", *command_line_of(config), KILL="training 1 8")
        ended = time.time()
        assert died.returncode == 1 and "SIGKILL" in died.stderr
        assert "no checkpoint here; starting" in died.stderr
        last = folder / "step-000000006" / "progress.json"
        # waiting for the dead rank would take minutes
        assert ended - last.stat().st_mtime < 120

        line = ["--max-restarts", "1", killed.__file__, "train", *command_line_of(config)]
        done = torchrun(*line, KILL="writing 1 9")
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("resuming from step 6") == 2
        result = json.loads(done.stdout)
        assert valid_of(result) == valid_of(runs[self.RUN].kept[0].result)
        assert_same_end(config.out, runs[self.RUN])
        # one process measures the same as two
        metrics = evaluate(EvaluateConfig(config.out, split="valid"))
        for name in ("gauc", "auc", "ndcg@10", "ne", "calibration"):
            assert metrics[name] == pytest.approx(result[f"valid_{name}"], abs=1e-4)


def run_killed(trap: tuple[str, int, int], arguments: list[str], timeout: float = 60) -> list[int]:
    """The exit codes of two ranks, one of which is killed; the other must end by itself."""
    environment = rendezvous(2)
    context = get_context("forkserver")
    with mock.patch.dict(os.environ, SMALL):
        ranks = [
            context.Process(target=on_rank, args=(rank, environment, trap, arguments), daemon=True)
            for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes, f"a rank hangs: {codes}"
    return codes


def flip(file: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_object(file: Path) -> None:
    file.write_text("null")


def other_digit(file: Path) -> None:
    """A position changed by a flipped bit."""
    text = file.read_text()
    assert text.count('"step": 12') == 1
    file.write_text(text.replace('"step": 12', '"step": 13'))


DAMAGE = [
    (file, how)
    for file in ("__0_0.distcp", "__1_0.distcp", ".metadata")
    for how in (flip, truncate, empty, Path.unlink)
]
DAMAGE += [
    (file, how)
    for file in ("progress.json", "checksums.json")
    for how in (truncate, empty, no_object, Path.unlink)
]
DAMAGE += [("progress.json", other_digit)]


def damaged_id(value: Any) -> str:
    return getattr(value, "__name__", value)


class TestDamage:
    @pytest.fixture
    def run(self, runs, tmp_path: Path) -> Saved:
        """A copy of a run with checkpoints at steps 9 and 12."""
        saved = runs["rowwise_adagrad", "row_wise"]
        out = shutil.copytree(saved.whole.out, tmp_path / "run")
        return dataclasses.replace(saved, whole=dataclasses.replace(saved.whole, out=out))

    @pytest.mark.parametrize(("file", "how"), DAMAGE, ids=damaged_id)
    def test_the_checkpoint_before_is_used(self, run: Saved, file: str, how) -> None:
        last = run.whole.out / "checkpoints" / "step-000000012"
        how(last / file)
        [loaded] = load_all([run.whole])
        self.assert_passed_over(loaded, run, last)

    def test_by_two_ranks_of_which_one_finds_it(self, run: Saved, tmp_path: Path) -> None:
        configs = []
        for file, how in DAMAGE[::2]:
            out = shutil.copytree(run.whole.out, tmp_path / f"{file}-{how.__name__}")
            how(out / "checkpoints" / "step-000000012" / file)
            configs.append(dataclasses.replace(run.whole, out=out))
        ranks = run_ranks(load_all, 2, configs)
        for config, first, second in zip(configs, *ranks, strict=True):
            self.assert_passed_over(first, run, config.out / "checkpoints" / "step-000000012")
            assert second.progress == first.progress and not second.warned
            assert_same(second.state, first.state)

    def assert_passed_over(self, loaded: Loaded, run: Saved, last: Path) -> None:
        [warning] = loaded.warned
        assert str(last) in warning and "damaged" in warning
        assert loaded.progress["step"] == 9
        assert_same(loaded.state, run.kept[0].states[9])
        assert np.array_equal(loaded.generator, run.kept[0].generators[9])

    def test_training_sets_it_aside(self, run: Saved) -> None:
        """Otherwise training would write steps below the damaged one."""
        folder = run.whole.out / "checkpoints"
        flip(folder / "step-000000012" / "__0_0.distcp")
        with pytest.warns(UserWarning, match="step-000000012 is damaged"):
            load_run(run.whole.out)  # loading for scoring changes nothing
        assert names_in(folder) == ["step-000000009", "step-000000012"]
        (folder / "damaged-step-000000012").mkdir()
        (folder / "damaged-step-000000012" / "of before").touch()
        with pytest.warns(UserWarning, match="step-000000012 is damaged"):
            result = train(dataclasses.replace(run.whole, resume=True, max_requests=32))
        assert result["steps"] < 12
        assert names_in(folder) == [
            "damaged-step-000000012",
            "damaged-step-000000012-2",
            "step-000000009",
            f"step-{result['steps']:09d}",
        ]

    def test_whole_checkpoints_are_not_passed_over(self, run: Saved) -> None:
        [loaded] = load_all([run.whole])
        assert loaded.progress["step"] == END and not loaded.warned

    def test_no_checkpoint_is_whole(self, run: Saved) -> None:
        folder = run.whole.out / "checkpoints"
        flip(folder / "step-000000012" / "__0_0.distcp")
        truncate(folder / "step-000000009" / "progress.json")
        with pytest.raises(CheckpointError) as error:
            load_all([run.whole])
        for word in (str(folder / "step-000000009"), "no earlier checkpoint", "another folder"):
            assert word in str(error.value)

    @pytest.mark.parametrize("how", [how for file, how in DAMAGE if file == "progress.json"])
    def test_the_latest_progress_is_that_of_the_checkpoint_before(self, run: Saved, how) -> None:
        init_process_group()
        folder = run.whole.out / "checkpoints"
        assert checkpoint.latest_progress(folder)["step"] == 12
        how(folder / "step-000000012" / "progress.json")
        assert checkpoint.latest_progress(folder)["step"] == 9

        (folder / "step-000000009" / "progress.json").write_text("[]")
        assert checkpoint.latest_progress(folder) is None

    def test_a_checkpoint_that_is_deleted_while_it_is_read(self, run: Saved, monkeypatch) -> None:
        """As by a training that continues, which keeps only its latest checkpoints."""
        folder = run.whole.out / "checkpoints"
        progress = checkpoint.latest_progress(folder)
        check = checkpoint._check  # pyright: ignore[reportPrivateUsage]

        def deletes(path: Path) -> dict[str, Any]:
            progress = check(path)
            shutil.rmtree(path)
            return progress

        monkeypatch.setattr(checkpoint, "_check", deletes)
        with pytest.raises(CheckpointError, match=r"step-000000012 was deleted by a training while"):
            load_all([run.whole])
        with pytest.raises(CheckpointError, match=r"step-000000012 was deleted by a training while"):
            checkpoint.version(folder, progress)

    def test_the_whole_of_the_latest_is_looked_at_where_asked(self, run: Saved) -> None:
        init_process_group()
        folder = run.whole.out / "checkpoints"
        truncate(next((folder / "step-000000012").glob("*.distcp")))
        steps = [checkpoint.latest_progress(folder, whole)["step"] for whole in (False, True)]
        assert steps == [12, 9]

    def test_no_checkpoint_is_whole_on_the_command_line(self, run: Saved) -> None:
        """Python ends a process by printing the SystemExit's text, with exit code 1."""
        for step in checkpoint.checkpoints(run.whole.out / "checkpoints"):
            flip(step / "__1_0.distcp")
        ends = run_ranks(command_line, 2, command_line_of(run.whole), check=False)
        for end in ends:
            assert isinstance(end, SystemExit)
            assert end.code.startswith("error: ") and "step-000000009 is damaged" in end.code
            assert "\n" not in end.code


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Change a checkpoint's progress.json, and its checksum with it."""
    file = path / "progress.json"
    progress = json.loads(file.read_text())
    change(progress)
    file.write_text(json.dumps(progress))
    sums = json.loads((path / "checksums.json").read_text())
    sums["progress.json"] = zlib.crc32(file.read_bytes())
    (path / "checksums.json").write_text(json.dumps(sums))
    return progress


class TestAnotherConfiguration:
    """Not damage: it is refused with its name, even if the previous checkpoint would fit."""

    @pytest.fixture
    def run(self, runs, tmp_path: Path) -> tuple[TrainConfig, dict[str, Any]]:
        """A copy of a run whose checkpoint 9 has seed 7, and the configuration that fits it."""
        config = runs["rowwise_adagrad", "row_wise"].whole
        out = shutil.copytree(config.out, tmp_path / "run")
        progress = rewrite(
            out / "checkpoints" / "step-000000009",
            lambda progress: progress["config"].update(seed=7),
        )
        return dataclasses.replace(config, out=out), progress["config"]

    def test_on_all_ranks(self, run) -> None:
        config, wanted = run
        for error in [refusal(config, wanted), *run_ranks(refusal, 2, config, wanted)]:
            assert "step-000000012 has another configuration: seed was 0, is 7;" in error

    def test_what_differs_is_named_to_its_depth(self, run) -> None:
        config, wanted = run
        wanted = {**wanted, "seed": 0, "ifa": {**wanted["ifa"], "num_heads": 4}, "more": 1}
        del wanted["warmup_steps"]  # options that the caller does not give are not compared
        error = refusal(config, wanted)
        assert "configuration: ifa.num_heads was 2, is 4; more was None, is 1; use" in error
        assert "use the same options, or another folder" in error

    @pytest.mark.parametrize("written", [None, FORMAT - 1, FORMAT + 1])
    def test_another_format(self, run, written: int | None) -> None:
        """From before formats had numbers, from an older version, or from a newer one."""
        config, wanted = run
        last = config.out / "checkpoints" / "step-000000012"
        rewrite(last, lambda progress: progress.update(format=written))
        for error in [refusal(config, wanted), *run_ranks(refusal, 2, config, wanted)]:
            assert f"{last} has format {written}, this version of ifa_torchrec reads {FORMAT}" in error
            assert "use the version that wrote it, or train again in another folder" in error

    def test_a_model_of_another_shape(self, run, tmp_path: Path) -> None:
        """Without a configuration to compare, the weights' shapes show it."""
        config, _ = run
        config = dataclasses.replace(config, ifa=dataclasses.replace(config.ifa, embedding_dim=16))
        with pytest.raises(CheckpointError, match="of another model"):
            load_all([config])

    def test_no_checkpoint(self, run, tmp_path: Path) -> None:
        config, _ = run
        config = dataclasses.replace(config, out=tmp_path / "nothing")
        assert f"{config.out / 'checkpoints'}: no checkpoint here" in refusal(config, None)
