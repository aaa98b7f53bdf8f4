"""TrainPipelineSparseDist pipelines both collections, also on a CPU, without changing results."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from every_field import make_rich
from ranks import run_ranks
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import IFAConfig
from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.models import DLRM_IFA, DLRM_IFATrain
from ifa_torchrec.models.archs import Lookups
from ifa_torchrec.modules import INTERACTIONS, CandidateSetConfig
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig

PIPELINE_LOGS = "torchrec.distributed.train_pipeline"
COLLECTIONS = ["ShardedEmbeddingBagCollection", "ShardedEmbeddingCollection"]
STEPS = 6


@torch.fx.wrap
def folded(features: KeyedJaggedTensor, rows: int) -> KeyedJaggedTensor:
    """Ids beyond the table's rows wrap around."""
    return KeyedJaggedTensor(features.keys(), features.values() % rows, lengths=features.lengths())


class Folding(DLRM_IFA):
    """Changes its ids before the lookup, so that the lookup cannot be pipelined."""

    def look_up(self, batch: RankingBatch) -> Lookups:
        context = self.sparse_arch(batch.context_features)
        history, candidates = self.sequence_arch(folded(batch.sequence_features, 40))
        return Lookups(context, None, history, candidates)


def sharded(log: EventLog, interaction: str, seed: int = 0, kind: type[DLRM_IFA] = DLRM_IFA):
    """A model with the same weights each time, and its optimiser."""
    identity = ("item",) if interaction != "none" else ()
    ifa = IFAConfig(8, num_heads=2, half_lives=(math.inf, 30.0), identity_features=identity)
    model = build_model(log.schema, TrainConfig(log.path, log.path, interaction=interaction, ifa=ifa))
    torch.manual_seed(seed)
    model = kind(
        model.sparse_arch.embedding_bag_collection,
        model.sequence_arch.embedding_collection,
        model.config,
    )
    return shard(DLRM_IFATrain(model), init_process_group(), OptimizerConfig(dense_lr=0.01))


def batches_of(log: EventLog, split: str = "train") -> Iterator[RankingBatch]:
    """STEPS batches of the 48 requests."""
    dataset, ranks = RankingDataset(log, split), (dist.get_rank(), dist.get_world_size())
    return iter(
        make_loader(
            dataset,
            EventBudgetSampler(dataset.history_lengths, 10_000, 8 // ranks[1], seed=0, shard=ranks),
        )
    )


def plain_losses(model: nn.Module, optimizer, batches: Iterator[RankingBatch]) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pipeline_losses(pipeline: TrainPipelineSparseDist, batches: Iterator[RankingBatch]) -> list[float]:
    return [pipeline.progress(batches)[0].item() for _ in range(STEPS)]


@contextmanager
def pipeline_log() -> Iterator[list[logging.LogRecord]]:
    """Record the messages of the pipelines' loggers."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(PIPELINE_LOGS)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def complaints(records: list[logging.LogRecord]) -> list[str]:
    return [r.getMessage() for r in records if r.levelno >= logging.WARNING]


def pipelined(records: list[logging.LogRecord]) -> int:
    """Modules that the log says are pipelined."""
    return sum("will be pipelined" in record.getMessage() for record in records)


def modules(model: nn.Module) -> list[str]:
    """Kinds of the modules whose forward is the pipeline's."""
    return sorted(
        type(m).__name__
        for m in model.modules()
        if type(getattr(m, "forward", None)).__name__ == "PipelinedForward"
    )


def in_both_ways(path: Path, interaction: str) -> dict:
    """Losses of the plain loop and of the pipeline, and the pipeline's log."""
    log = EventLog(path)
    return both_ways(log, lambda: sharded(log, interaction))


def both_ways(log: EventLog, made: Callable[[], tuple[nn.Module, Any]]) -> dict:
    """Losses of the plain loop and of the pipeline, with equal models and optimisers."""
    plain = plain_losses(*made(), batches_of(log))
    model, optimizer = made()
    pipeline = TrainPipelineSparseDist(model, optimizer, init_process_group())
    with pipeline_log() as records:
        losses = pipeline_losses(pipeline, batches_of(log))
    return {
        "plain": plain,
        "pipeline": losses,
        "complaints": complaints(records),
        "pipelined": pipelined(records),
        "modules": modules(model),
    }


def check(found: dict) -> None:
    assert found["complaints"] == []
    assert found["pipelined"] == 2
    assert found["modules"] == COLLECTIONS
    assert len(found["plain"]) == STEPS
    assert found["pipeline"] == pytest.approx(found["plain"], rel=1e-6)


@pytest.mark.parametrize(
    "interaction",
    [
        pytest.param(name, marks=() if name in ("none", "sim", "ifa") else pytest.mark.slow)
        for name in INTERACTIONS
    ],
)
def test_both_collections_are_pipelined_and_losses_are_the_plain_loops(interaction, log):
    init_process_group()
    check(in_both_ways(log.path, interaction))


def test_a_model_that_generates_sets_is_pipelined_too(log):
    def made():
        torch.manual_seed(0)
        relations = CandidateSetConfig("softmax", generate=True)
        ifa = IFAConfig(8, num_heads=2)
        model = build_model(
            log.schema, TrainConfig(log.path, log.path, ifa=ifa, candidate_set=relations)
        )
        train = DLRM_IFATrain(model)
        # the same are taken: the loaders of both ways draw numbers too, and not at the same time
        train.taken_sample.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
        return shard(train, init_process_group(), OptimizerConfig(dense_lr=0.01))

    init_process_group()
    check(both_ways(log, made))


def test_both_collections_are_pipelined_and_losses_are_the_plain_loops_on_two_ranks(log):
    for found in run_ranks(in_both_ways, 2, log.path, "ifa"):
        check(found)


def of_all_fields(path: Path) -> dict:
    """As ``in_both_ways``, with event features, lists, numbers and vectors."""
    log = EventLog(path)

    def made():
        ifa = IFAConfig(8, num_heads=2, identity_features=("item",))
        torch.manual_seed(0)
        model = build_model(log.schema, TrainConfig(log.path, log.path, ifa=ifa), log.scales)
        return shard(DLRM_IFATrain(model), init_process_group(), OptimizerConfig(dense_lr=0.01))

    return both_ways(log, made)


def test_three_collections_are_pipelined_on_two_ranks(tmp_path):
    """Also the collection of item lists, which has one row per item in a rank's batch."""
    log = make_rich().write(tmp_path / "log")
    for found in run_ranks(of_all_fields, 2, log.path):
        assert found["complaints"] == []
        assert found["pipelined"] == 3
        assert found["modules"] == [COLLECTIONS[0], *COLLECTIONS]
        assert found["pipeline"] == pytest.approx(found["plain"], rel=1e-6)


def test_ids_changed_before_the_lookup_would_be_noticed(log):
    """The tests above fail for a model that trains but cannot be pipelined."""
    init_process_group()
    plain = plain_losses(*sharded(log, "ifa"), batches_of(log))
    model, optimizer = sharded(log, "ifa", kind=Folding)
    pipeline = TrainPipelineSparseDist(model, optimizer, init_process_group())
    with pipeline_log() as records:
        losses = pipeline_losses(pipeline, batches_of(log))
    assert losses == pytest.approx(plain, rel=1e-6)
    assert any("embedding_collection' will NOT be pipelined" in text for text in complaints(records))
    assert pipelined(records) == 1
    assert modules(model) == ["ShardedEmbeddingBagCollection"]


def test_ids_of_the_next_batch_are_on_their_way_before_a_batch_is_done(log):
    model, optimizer = sharded(log, "ifa")
    happened: list[tuple[str, int]] = []
    [items] = [m for m in model.modules() if type(m).__name__ == "ShardedEmbeddingCollection"]
    send = items.input_dist

    def sent(*arguments, **options):
        happened.append(("sent", sum(kind == "sent" for kind, _ in happened)))
        return send(*arguments, **options)

    def scored(*_):
        happened.append(("scored", sum(kind == "scored" for kind, _ in happened)))

    items.input_dist = sent
    model.register_forward_hook(scored)
    pipeline_losses(TrainPipelineSparseDist(model, optimizer, init_process_group()), batches_of(log))
    assert len(happened) == 2 * STEPS
    for step in range(STEPS - 1):
        assert happened.index(("sent", step + 1)) < happened.index(("scored", step))


@pytest.mark.parametrize("interaction", ["ifa", "none"])
def test_detached_the_model_scores_as_a_fresh_one_with_its_weights(interaction, log):
    model, optimizer = sharded(log, interaction)
    pipeline = TrainPipelineSparseDist(model, optimizer, init_process_group())
    pipeline_losses(pipeline, batches_of(log))
    assert modules(model) == COLLECTIONS
    assert pipeline.detach() is model
    assert modules(model) == []
    fresh, _ = sharded(log, interaction, seed=1)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        for batch in batches_of(log, "test"):
            _, (_, logits, _) = model(batch)
            assert torch.equal(logits, fresh(batch)[1][1])


def test_an_epoch_after_a_detachment_is_pipelined_again(log):
    """As in ``train`` after a validation between two epochs."""
    device = init_process_group()
    model, optimizer = sharded(log, "ifa")
    plain = [plain_losses(model, optimizer, batches_of(log)) for _ in range(2)]
    model, optimizer = sharded(log, "ifa")
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    first = pipeline_losses(pipeline, batches_of(log))
    pipeline.detach()
    with torch.no_grad():
        model(next(batches_of(log, "valid")))
    with pipeline_log() as records:
        second = pipeline_losses(pipeline, batches_of(log))
    assert first + second == pytest.approx([*plain[0], *plain[1]], rel=1e-6)
    assert complaints(records) == []
    assert modules(model) == COLLECTIONS
