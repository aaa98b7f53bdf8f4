"""A sharded model trains like the unsharded one, for any plan, number of ranks and optimiser.

The sharded model is trained by ``train`` itself; the expected one by a plain loop in float64 on the
union of the ranks' batches, with optimisers written out here. The largest error may be 1e-5 of the
largest value; it is 5e-7 for logits and tables, 2e-6 for dense weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_near
from ranks import run_ranks
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import DLRM_IFA, IFAConfig
from ifa_torchrec.batch import RankingBatch, Scale
from ifa_torchrec.data import EventBudgetSampler, EventLog, LogSchema, RankingDataset
from ifa_torchrec.data.sampler import EMPTY_REQUEST
from ifa_torchrec.distributed import (
    OptimizerConfig,
    ShardingConfig,
    init_process_group,
    shard,
    zero_rows,
)
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig
from ifa_torchrec.training import trainer as train_module
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.touched import touched_rows
from ifa_torchrec.training.trainer import Trainer, train

STEP = 8
DENSE_LR = 0.01
"""Requests per step, over all ranks."""
BUSY, ONE_EVENT, SOME_EVENTS, NEW = 1, 2, 3, 4
NUM_EVENTS = {BUSY: 10_000, ONE_EVENT: 1, SOME_EVENTS: 30}
USERS = [NEW, BUSY, ONE_EVENT, NEW, SOME_EVENTS, NEW, BUSY, SOME_EVENTS] * 3 + [NEW]
"""Of the requests: four steps, of which the last has a single request."""
WITHOUT_CANDIDATES = (1, 3, 4, 13)
SCHEMA = LogSchema(
    # not multiples of the ranks; and fewer rows than ranks
    item_features={"item": 37, "category": 7},
    context_features={"store": 3, "weekday": 7},
    dense_features=("hour",),
    candidate_dense=("price",),
    item_lists={"genre": 9, "tag": 5},
    item_dense=("cost",),
    item_vectors={"text": 3},
    event_features={"action": 4},
    event_dense=("dwell",),
    event_weight="importance",
    context_lists={"interest": 8},
    candidate_features={"place": 5},
    log_scaled=("dwell",),
)
ITEMS, UNKNOWN = 41, 0.2
"""Number of items, the last of which have no row, and the share made unknown."""
WIDTHS = {"sequences": 24, "store": 8, "weekday": 16, "interest": 16, "genre": 8, "tag": 16}
"""Widths of the tables; D is 16."""
OF_SEQUENCES = ("item_table", "category_table", "action_table", "place_table")
OF_ITEMS = ("genre_table", "tag_table")
TABLES = (*OF_SEQUENCES, "store_table", "weekday_table", "interest_table", *OF_ITEMS)

SHARDINGS = {kind: dict.fromkeys(TABLES, kind) for kind in ("table_wise", "row_wise", "column_wise")}
SHARDINGS["row_wise"] |= dict.fromkeys(
    # a rank without a row of a width, and pooled rows of another number on each rank, cannot be
    ("store_table", "action_table", "place_table", "interest_table", *OF_ITEMS),
    "table_wise",
)
SHARDINGS["planner's choice"] = {}
SHARDINGS["mix of whole rows"] = dict(
    zip(TABLES, ("row_wise", *["table_wise"] * 4, "row_wise", *["table_wise"] * 3), strict=True)
)
SHARDINGS["mix"] = dict(
    zip(
        TABLES,
        (
            *("column_wise", "table_wise", "table_wise", "column_wise"),
            *("column_wise", "row_wise", "table_wise", "column_wise", "table_wise"),
        ),
        strict=True,
    )
)
CASES = {
    2: [
        *product(("table_wise", "row_wise"), ("rowwise_adagrad", "adagrad", "sgd")),
        *product(("column_wise",), ("adagrad", "sgd")),
        ("planner's choice", "rowwise_adagrad"),
        ("mix of whole rows", "rowwise_adagrad"),
        ("mix", "adagrad"),
    ],
    4: [
        *product(("table_wise", "row_wise"), ("rowwise_adagrad", "adagrad")),
        ("column_wise", "sgd"),
        ("planner's choice", "adagrad"),
        ("mix of whole rows", "rowwise_adagrad"),
        ("mix", "adagrad"),
    ],
}
"""By the number of ranks: sharding and the tables' optimiser."""


class Dataset(RankingDataset):
    """Some requests have no candidates, which a log forbids but a model allows."""

    def candidate_rows(self, indices):
        rows, lengths = super().candidate_rows(indices)
        empty = np.isin(indices, WITHOUT_CANDIDATES)
        return rows[~np.repeat(empty, lengths)], np.where(empty, 0, lengths)


@dataclass
class Trained:
    """The result of a training; for a sharded one, on one rank."""

    losses: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    dense: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, list[tuple[list[int], Tensor]]] = field(default_factory=dict)
    """By name, the rank's parts and their offsets."""
    kinds: dict[str, str] = field(default_factory=dict)
    """The sharding type of each table."""
    optimized: dict[str, set[str]] = field(default_factory=dict)
    """Parameters by the name of their optimiser."""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> EventLog:
    rng = np.random.default_rng(0)
    start = pd.Timestamp(2024, 1, 1)
    users = np.repeat(list(NUM_EVENTS), list(NUM_EVENTS.values()))
    days = pd.to_timedelta(90 * rng.random(len(users)), unit="D")
    count, items = len(USERS), ITEMS
    candidates = [rng.permutation(items)[: rng.integers(1, 20)] for _ in USERS]

    def numbers(size: int) -> np.ndarray:
        """Some of them missing."""
        return np.where(rng.random(size) < 0.2, np.nan, rng.gamma(2.0, 3.0, size))

    def lists(size: int, rows: int) -> list[list[int]]:
        """Some of them empty."""
        return [rng.integers(1, rows, rng.integers(4)).tolist() for _ in range(size)]

    described = pd.DataFrame({"item": range(items), "category": np.arange(items) % 7})
    described["genre"], described["tag"] = [[], *lists(items - 1, 9)], [[], *lists(items - 1, 5)]
    described["cost"] = [math.nan, *numbers(items - 1)]
    described["text"] = [np.zeros(3), *rng.normal(size=(items - 1, 3))]
    requests = {
        "user": USERS,
        "time": start + pd.to_timedelta(90 + rng.random(count), unit="D"),
        "store": rng.integers(3, size=count),
        "weekday": rng.integers(7, size=count),
        "hour": rng.random(count),
        "candidates": candidates,
        "exposed": [rng.random(len(c)) < 0.6 for c in candidates],
        "label": [rng.integers(2, size=len(c)) for c in candidates],
        "price": [numbers(len(c)) for c in candidates],
        "place": [rng.integers(5, size=len(c)) for c in candidates],
        "interest": lists(count, 8),
    }
    return EventLog.from_pandas(
        tmp_path_factory.mktemp("uneven") / "log",
        pd.DataFrame(
            {
                "user": users,
                "time": start + days,
                "item": rng.integers(items, size=len(users)),
                "action": rng.integers(4, size=len(users)),
                "dwell": numbers(len(users)),
                "importance": rng.integers(3, size=len(users)) / 2,
            }
        ),
        SCHEMA,
        described,
        {"train": pd.DataFrame(requests)},
    )


def config_of(data: Path, out: Path, world: int, sharding: str, optimizer: str) -> TrainConfig:
    return TrainConfig(
        data=data,
        out=out,
        ifa=IFAConfig(
            embedding_dim=16,
            num_heads=2,
            half_lives=(math.inf, 30.0),
            identity_features=("item",),
            identity_buckets=4096,
            identity_half_lives=(math.inf,),
        ),
        candidate_set=CandidateSetConfig("softmax"),
        loss=CandidateSetLossConfig(listwise=0.5, consistency=0.2, unexposed=0.5),
        over_arch_layer_sizes=(16,),
        optimizers=OptimizerConfig(optimizer, table_lr=0.05, dense_lr=DENSE_LR, weight_decay=0.1),
        sharding=ShardingConfig(SHARDINGS[sharding]),
        warmup_steps=2,
        max_events=48_000 // world,
        max_requests=STEP // world,
        unknown_items=UNKNOWN,
        validate=False,
    )


def model_of(schema: LogSchema, config: TrainConfig, scales: dict[str, Scale]) -> DLRM_IFA:
    """``build_model``'s model, with tables of other widths."""
    model, meta = build_model(schema, config, scales), torch.device("meta")
    context, lists = (
        EmbeddingBagCollection(
            device=meta,
            tables=[
                dataclasses.replace(table, embedding_dim=WIDTHS[table.name.removesuffix("_table")])
                for table in arch.embedding_bag_collection.embedding_bag_configs()
            ],
        )
        for arch in (model.sparse_arch, model.item_sparse_arch)
    )
    tables = [
        dataclasses.replace(table, embedding_dim=WIDTHS["sequences"])
        for table in model.sequence_arch.embedding_collection.embedding_configs()
    ]
    return DLRM_IFA((context, lists), EmbeddingCollection(tables, meta), model.config)


def unsharded(config: TrainConfig) -> DLRM_IFATrain:
    """The model with the weights from which all start."""
    log = EventLog(config.data)
    model = DLRM_IFATrain(model_of(SCHEMA, config, log.scales), config.loss)
    for arch in (model.model.sparse_arch, model.model.item_sparse_arch, model.model.sequence_arch):
        arch.to_empty(device="cpu")
    model.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # in float32, which the sharded model must have exactly
        start = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(start)
    touched = touched_rows(RankingDataset(log, "train"), histories=True, unknown_items=True)
    assert not touched["genre"].all()
    zero_rows(model, {f"{name}_table": ~rows for name, rows in touched.items()})
    return model


def train_on_this_rank(config: TrainConfig) -> Trained:
    """``train`` from the weights of ``unsharded``, with records."""
    start = {name: value.float() for name, value in unsharded(config).state_dict().items()}
    result, made = Trained(), []

    def shard_and_load(*args):
        made[:] = model, optimizer = shard(*args)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name not in parts(model):
                    value.copy_(start[name])
            for name, of_table in parts(model).items():
                for (row, column), part in of_table:
                    rows, columns = part.shape
                    part.copy_(start[name][row : row + rows, column : column + columns])
        model.register_forward_hook(watch)
        return model, optimizer

    def watch(module, arguments, output):
        loss, (_, logits, _) = output
        result.losses.append(loss.item())
        result.logits.append(logits.squeeze(1))

    with (
        mock.patch.object(train_module, "shard", shard_and_load),
        mock.patch.object(train_module, "build_model", model_of),
        mock.patch.object(train_module, "RankingDataset", Dataset),
    ):
        train(config)
    model, optimizer = made
    result.tables = parts(model)
    configurations = {n for n in model.state_dict() if n.endswith("_extra_state")}
    result.dense = {
        n: v for n, v in model.state_dict().items() if n not in result.tables.keys() | configurations
    }
    result.kinds = {
        table: sharding.sharding_type
        for module in model.plan.plan.values()
        for table, sharding in module.items()
    }
    result.optimized = {name: set(part.params) for name, part in optimizer.optimizers}
    return result


def parts(model) -> dict[str, list[tuple[list[int], Tensor]]]:
    """This rank's parts of each table."""
    return {
        name: [(part.metadata.shard_offsets, part.tensor) for part in value.local_shards()]
        for name, value in model.state_dict().items()
        if hasattr(value, "local_shards")
    }


def requests_of_steps(log: EventLog, world: int) -> list[list[list[int]]]:
    """For each step, the requests of each rank."""
    lengths = RankingDataset(log, "train").history_lengths
    config = config_of(log.path, log.path, world, "table_wise", "sgd")
    samplers = [
        EventBudgetSampler(lengths, config.max_events, config.max_requests, config.seed, (rank, world))
        for rank in range(world)
    ]
    return [list(step) for step in zip(*samplers, strict=True)]


@cache
def train_unsharded(data: Path, world: int, optimizer: str) -> Trained:
    """A plain loop over the union of the ranks' batches, in float64."""
    config = config_of(data, data, world, "table_wise", optimizer)
    model, result, log = unsharded(config), Trained(), EventLog(data)
    dataset = Dataset(log, "train", None, UNKNOWN, config.seed)
    is_table = {name: ".embedding" in name for name, _ in model.named_parameters()}
    tables = [p for name, p in model.named_parameters() if is_table[name]]
    dense = [p for name, p in model.named_parameters() if not is_table[name]]
    assert len(tables) == len(TABLES)
    squares = [torch.zeros_like(table) for table in tables]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in dense if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in dense if p.dim() == 1], "weight_decay": 0.0},
        ]
    )
    taken = 0
    for step, of_ranks in enumerate(requests_of_steps(log, world)):
        requests = [r for of_rank in of_ranks for r in of_rank if r != EMPTY_REQUEST]
        rates = SimpleNamespace(optimizers=[("dense", adamw)])
        train_module.set_learning_rate(rates, config, step, taken / len(dataset))
        taken += len(requests)
        # plain collections convert looked-up rows to float32
        with mock.patch.object(Tensor, "float", Tensor.double):
            loss, (_, logits, _) = model(in_float64(dataset[requests]))
        model.zero_grad()
        loss.backward()
        adamw.step()
        with torch.no_grad():
            for table, square in zip(tables, squares, strict=True):
                table -= 0.05 * table_update(optimizer, table.grad, square)
        result.losses.append(loss.item())
        result.logits.append(logits.squeeze(1))
    result.dense = {n: p.detach() for n, p in model.named_parameters() if not is_table[n]}
    result.tables = {n: [([0, 0], p.detach())] for n, p in model.named_parameters() if is_table[n]}
    return result


def table_update(optimizer: str, gradient: Tensor, squares: Tensor) -> Tensor:
    """A table optimiser's update without the learning rate; ``squares`` is its state."""
    if optimizer == "sgd":
        return gradient
    square = gradient**2
    squares += square if optimizer == "adagrad" else square.mean(dim=1, keepdim=True)
    return gradient / (squares.sqrt() + 1e-8)


def in_float64(batch: RankingBatch) -> RankingBatch:
    for name in ("dense_features", "candidate_dense", "history_age", "history_weight", "labels"):
        setattr(batch, name, getattr(batch, name).double())
    return batch


def train_cases(folder: Path, data: Path, world: int) -> list[Trained]:
    """Run all CASES on this rank."""
    results = []
    for number, case in enumerate(CASES[world]):
        config = config_of(data, folder / str(number), world, *case)
        try:
            results.append(train_on_this_rank(config))
        except Exception as error:
            raise RuntimeError(f"{case}") from error
    return results


def train_on_ranks(world: int, log: EventLog, folder: Path) -> dict[tuple[str, str], list[Trained]]:
    """By case, the result on each rank."""
    ranks = run_ranks(train_cases, world, folder, log.path, world, timeout=300)
    return dict(zip(CASES[world], zip(*ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def two_ranks(log, tmp_path_factory):
    return train_on_ranks(2, log, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(log, tmp_path_factory):
    return train_on_ranks(4, log, tmp_path_factory.mktemp("four"))


@pytest.fixture
def trained(request, world, case) -> list[Trained]:
    """The case's result on each of ``world`` ranks."""
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])[case]


each_case = pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(
            world,
            case,
            id=f"{world} ranks, {', '.join(case)}",
            marks=[pytest.mark.slow] if world == 4 else [],
        )
        for world, cases in CASES.items()
        for case in cases
    ],
)


@each_case
def test_losses_and_logits_equal_those_of_the_unsharded_model(world, case, trained, log):
    truth = train_unsharded(log.path, world, case[1])
    assert len(truth.losses) == 4
    for step, (loss, logits) in enumerate(zip(truth.losses, truth.logits, strict=True)):
        of_ranks = torch.cat([rank.logits[step] for rank in trained])
        assert_near(of_ranks, logits, 1e-5, f"logits of step {step}")
        of_ranks = [rank.losses[step] for rank in trained]
        assert sum(of_ranks) / world == pytest.approx(loss, rel=1e-5)


@each_case
def test_weights_after_four_steps_equal_those_of_the_unsharded_model(world, case, trained, log):
    truth = train_unsharded(log.path, world, case[1])
    for rank in trained:
        assert rank.dense.keys() == truth.dense.keys()
        off = 0
        for name, weight in truth.dense.items():
            # Adam divides a gradient by its own size: if that is only rounding, which may happen
            # to a few of some 10,000 weights, the step may go either way
            error = (rank.dense[name] - weight).abs()
            off += int((error > 1e-5 * weight.abs().max()).sum())
            assert error.max() <= 2 * 4 * DENSE_LR, name
        assert off <= 3
    for name, [(_, table)] in truth.tables.items():
        whole, times_held = torch.full(table.shape, math.nan), torch.zeros(table.shape)
        for rank in trained:
            for (row, column), part in rank.tables[name]:
                here = slice(row, row + part.shape[0]), slice(column, column + part.shape[1])
                whole[here] = part
                times_held[here] += 1
        assert (times_held == 1).all(), f"{name}: parts of it are nowhere, or twice"
        assert_near(whole, table, 1e-5, name)


@each_case
def test_tables_are_sharded_as_asked(world, case, trained):
    sharding, optimizer = case
    for rank in trained:
        assert rank.kinds.keys() == set(TABLES)
        assert rank.kinds.items() >= SHARDINGS[sharding].items()
        assert "row_wise" not in {rank.kinds[table] for table in OF_ITEMS}
        if optimizer == "rowwise_adagrad":
            assert "column_wise" not in rank.kinds.values()


@each_case
def test_tables_have_the_fused_optimiser_and_the_dense_part_adamw(world, case, trained, log):
    """A table left to AdamW would get a gradient of its full size, which no plan shows."""
    truth = train_unsharded(log.path, world, case[1])
    for rank in trained:
        assert rank.optimized.keys() == {"", "dense"}
        assert rank.optimized["dense"] == truth.dense.keys()
    of_ranks = set().union(*(rank.optimized[""] for rank in trained))
    assert of_ranks == truth.tables.keys()


@pytest.mark.parametrize("world", CASES)
def test_the_steps_hold_the_uneven_cases(world, log):
    """The special cases of the tests above occur in their data."""
    dataset = Dataset(log, "train")
    steps = requests_of_steps(log, world)
    real = [[[r for r in rank if r != EMPTY_REQUEST] for rank in step] for step in steps]
    assert len(steps) == 4
    assert any(len({len(rank) for rank in step}) > 1 for step in real), "a rank with fewer requests"
    assert any([] in step for step in real), "a rank without requests"
    events = [dataset.history_lengths[[r for rank in step for r in rank]] for step in real]
    assert any({0, NUM_EVENTS[BUSY]} <= set(of_step) for of_step in events), "a busy user among new"
    batches = [[dataset[rank] for rank in step] for step in steps]
    candidates = [[len(batch.labels) for batch in step] for step in batches]
    assert any(0 in of_step for of_step in candidates), "a rank without candidates"
    for step in batches:
        ranks_of = Counter(item for batch in step for item in bought(batch) & asked(batch))
        if any(count > 1 for count in ranks_of.values()):
            break
    else:
        pytest.fail("an item in histories and candidate sets of several ranks")


def bought(batch: RankingBatch) -> set[int]:
    return set(batch.sequence_features["history_item"].values().tolist())


def asked(batch: RankingBatch) -> set[int]:
    return set(batch.sequence_features["candidate_item"].values().tolist())


@pytest.mark.parametrize("epoch", range(2))
@pytest.mark.parametrize("max_requests", [1, 3, 100])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_of_all_ranks_hold_each_request_once_an_epoch(world, max_requests, epoch, log):
    dataset = RankingDataset(log, "train")
    samplers = [
        EventBudgetSampler(dataset.history_lengths, 12_000, max_requests, 0, (rank, world))
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.start_at(epoch)
    steps = list(zip(*samplers, strict=True))
    assert all(len({len(rank) for rank in step}) == 1 for step in steps), "equal batches"
    taken = [request for step in steps for rank in step for request in rank]
    assert sorted(r for r in taken if r != EMPTY_REQUEST) == list(range(len(dataset)))
    requests = sum(
        batch.context_features["store"].lengths().sum()
        for step in steps
        for batch in map(dataset.__getitem__, step)
    )
    assert requests == len(dataset)


def test_the_decay_of_tables_is_of_touched_rows_alone() -> None:
    """And the same for any gradient: here 0."""
    tables = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name="item",
                embedding_dim=8,
                num_embeddings=3,
                feature_names=["item"],
                init_fn=torch.nn.init.ones_,
            )
        ],
    )
    optimizers = OptimizerConfig(table_lr=0.1, table_weight_decay=0.5)
    model, _ = shard(tables, init_process_group(), optimizers)
    ids = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([1, 1]), torch.tensor([2]))
    (0 * model(ids)["item"].values()).sum().backward()
    (rows,) = model.state_dict()["embeddings.item.weight"].local_shards()
    assert rows.tensor[:, 0].tolist() == pytest.approx([1, 0.95, 1])
    with pytest.raises(ConfigError, match=r"table_weight_decay 0\.5: 'sgd' does not support it"):
        OptimizerConfig("sgd", table_weight_decay=0.5)


def buffers(log: Path, out: Path) -> dict[str, Tensor]:
    config = TrainConfig(log, out, ifa=IFAConfig(8, num_heads=2), interaction="eta")
    return dict(Trainer(config).model.named_buffers())


def test_all_ranks_have_the_same_random_buffers(log: EventLog, tmp_path: Path) -> None:
    """A search's hash, for one: a checkpoint keeps that of one rank."""
    first, second = run_ranks(buffers, 2, log.path, tmp_path / "run")
    assert any(name.endswith("hyperplanes") for name in first)
    assert first.keys() == second.keys()
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name]), name
