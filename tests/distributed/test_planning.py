"""Plans: refused options, on one rank or all; reserved memory; a hypothetical cluster."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ifa_torchrec import IFAConfig
from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.data import LogSchema
from ifa_torchrec.distributed import (
    BatchSize,
    OptimizerConfig,
    ShardingConfig,
    ShardingError,
    init_process_group,
    shard,
)
from ifa_torchrec.distributed import (
    sharding as sharding_module,
)
from ifa_torchrec.distributed.planning import (
    CANDIDATE_COPIES,
    DENSE_COPIES,
    EVENT_COPIES,
    DenseAndTokenReservation,
    make_planner,
    topology,
)
from ifa_torchrec.distributed.sharders import sharders
from ifa_torchrec.models import DLRM_IFATrain
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig

GB = 2**30
SMALL = BatchSize(requests=2, events=10, candidates=4)
CONTEXT, ITEM = {"store": 50, "weekday": 7}, {"item": 1000, "category": 50}


def model_of(
    item: dict[str, int] | None = None,
    context: dict[str, int] | None = None,
    dim: int = 16,
    interaction: str = "ifa",
) -> DLRM_IFATrain:
    schema = LogSchema(item_features=item or ITEM, context_features=context or CONTEXT)
    identity = ("item",) if interaction != "none" else ()
    config = TrainConfig(
        Path("data"),
        Path("out"),
        interaction=interaction,
        # the reserve is also for GPUs, which run this backend; native needs less
        ifa=IFAConfig(dim, num_heads=2, identity_features=identity, backend="torch"),
    )
    return DLRM_IFATrain(build_model(schema, config))


def plan_of(
    model: DLRM_IFATrain,
    there: Topology,
    config: ShardingConfig | None = None,
    batch: BatchSize = SMALL,
    whole_rows: bool = True,
):
    """Each table's ParameterSharding."""
    planner = make_planner(model, there, config or ShardingConfig(), batch, whole_rows)
    plan = planner.plan(model, sharders())
    return {table: found for module in plan.plan.values() for table, found in module.items()}


def cpus(world: int, memory: int = GB) -> Topology:
    return Topology(world_size=world, local_world_size=world, compute_device="cpu", ddr_cap=memory)


def gpus(world: int, memory: int = 80 * GB) -> Topology:
    return Topology(world_size=world, local_world_size=8, compute_device="cuda", hbm_cap=memory)


# ------------------------------------------------------------------------- what is refused, one rank


def refusal(config: ShardingConfig, optimizer: str = "rowwise_adagrad", batch=SMALL, **model) -> str:
    with pytest.raises(ShardingError) as refused:
        shard(model_of(**model), init_process_group(), OptimizerConfig(optimizer), config, batch)
    return str(refused.value)


def test_an_unknown_table_is_refused_with_the_names_there_are():
    message = refusal(ShardingConfig({"itm_table": "row_wise"}))
    assert "'itm_table'" in message
    assert all(table in message for table in ("item_table", "category_table", "store_table"))


@pytest.mark.parametrize(
    "kind", ["data_parallel", "table_row_wise", "table_column_wise", "grid_shard", "rowwise"]
)
def test_a_type_that_a_cpu_has_not_is_refused_with_those_it_has(kind):
    message = refusal(ShardingConfig({"item_table": kind}), "sgd")
    assert "item_table" in message and repr(kind) in message
    assert all(good in message for good in ("table_wise", "row_wise", "column_wise"))


@pytest.mark.parametrize("table", ["item_table", "store_table"])
def test_columns_are_not_split_under_an_optimizer_of_one_state_a_row(table):
    message = refusal(ShardingConfig({table: "column_wise"}))
    assert table in message and "'column_wise'" in message
    assert "'adagrad'" in message and "'sgd'" in message


@pytest.mark.parametrize("kind", ["column_wise", "table_column_wise", "grid_shard"])
def test_columns_are_not_split_under_an_optimizer_of_one_state_a_row_on_gpus(kind):
    config = ShardingConfig({"store_table": kind})
    with pytest.raises(ShardingError, match=f"store_table.*{kind}.*adagrad"):
        plan_of(model_of(), gpus(16), config)
    assert plan_of(model_of(), gpus(16), config, whole_rows=False)["store_table"].sharding_type == kind


@pytest.mark.parametrize("kind", ["table_row_wise", "table_column_wise", "grid_shard"])
def test_a_type_that_sequences_have_not_is_refused_with_those_they_have(kind):
    """TorchRec supports these only for bags."""
    with pytest.raises(ShardingError, match=rf"item_table.*{kind}.*\['table_wise', 'row_wise'"):
        plan_of(model_of(), gpus(16), ShardingConfig({"item_table": kind}), whole_rows=False)


@pytest.mark.parametrize("kind", [None, "table_wise"])
def test_too_little_memory_for_the_tables_names_one_and_what_would_help(kind):
    config = ShardingConfig({"item_table": kind} if kind else {}, memory_gb=0.5)
    message = refusal(config, item={"item": 10**7})
    assert "item_table" in message
    assert "number of devices" in message


def test_too_little_memory_for_a_batch_names_what_needs_it():
    message = refusal(ShardingConfig(memory_gb=0.001), batch=BatchSize())
    assert "0.001 GB" in message
    assert "dense part" in message and "tokens" in message
    assert "max_events" in message and "memory_gb" in message


@pytest.mark.parametrize("collection", ["item", "context"])
def test_rows_are_not_split_where_a_rank_would_get_none(collection):
    """With five rows, four ranks would get 2, 2, 1 and 0; on a CPU the last one's lookup fails in the
    first step, and the others wait for it."""
    five = {"few": 5}
    model = model_of(item={"item": 1000} | five) if collection == "item" else model_of(context=five)
    assert plan_of(model, cpus(4))["few_table"].sharding_type != "row_wise"
    with pytest.raises(ShardingError, match=r"few_table.*row_wise"):
        plan_of(model, cpus(4), ShardingConfig({"few_table": "row_wise"}))
    assert plan_of(model, cpus(3), ShardingConfig({"few_table": "row_wise"}))


# ----------------------------------------------------------------------------- on all ranks, or none


def shard_in_vain(
    config: ShardingConfig, batch: BatchSize = SMALL, error: type[Exception] = ShardingError
) -> tuple[str, float]:
    """The message of this rank's error, and the seconds until it was raised."""
    start = time.perf_counter()
    with pytest.raises(error) as refused:
        shard(model_of(), torch.device("cpu"), OptimizerConfig(), config, batch)
    return str(refused.value), time.perf_counter() - start


def failures() -> tuple[dict[str, tuple[str, float]], list[int]]:
    """This rank's outcome for each kind of error, and the memory that each rank reports."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    good = ShardingConfig({"item_table": "table_wise"})
    bad = ShardingConfig({"item_table": "grid_shard"})
    found = {
        "too little memory": shard_in_vain(ShardingConfig(memory_gb=0.001), BatchSize()),
        "rank 1 is asked for what cannot be": shard_in_vain(bad if rank == 1 else good),
        "rank 0 is asked for what cannot be": shard_in_vain(bad if rank == 0 else good),
        "the last rank plans otherwise": shard_in_vain(
            ShardingConfig({"item_table": "row_wise"}) if rank == last else good
        ),
        "the last rank has less memory": shard_in_vain(
            ShardingConfig(memory_gb=0.01 if rank == last else 1), BatchSize()
        ),
    }
    broken = mock.Mock(side_effect=MemoryError("no room to plan"))
    with mock.patch.object(sharding_module, "make_planner", broken if rank == last else make_planner):
        # an error that the user cannot fix
        found["the last rank's planner breaks"] = shard_in_vain(good, error=RuntimeError)
    # the ranks are still in step
    shard(model_of(), torch.device("cpu"), OptimizerConfig(), good, SMALL)
    there = topology(torch.device("cpu"), ShardingConfig())
    return found, [device.storage.ddr for device in there.devices]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} ranks")
def failed(request) -> list[tuple[dict[str, tuple[str, float]], list[int]]]:
    """The ``failures`` of each rank."""
    return run_ranks(failures, request.param)


@pytest.mark.parametrize(
    ("case", "first", "words"),
    [
        ("too little memory", None, ("0.001 GB", "max_events", "memory_gb")),
        ("rank 1 is asked for what cannot be", 1, ("item_table", "'grid_shard'", "'table_wise'")),
        ("rank 0 is asked for what cannot be", 0, ("item_table", "'grid_shard'", "'table_wise'")),
        ("the last rank plans otherwise", -1, ("another sharding plan than rank 0", "same options")),
        ("the last rank has less memory", -1, ("0.010 GB", "more memory")),
        ("the last rank's planner breaks", -1, ("no room to plan",)),
    ],
)
def test_all_ranks_end_with_the_reason_and_the_rank_that_had_it(case, first, words, failed):
    messages, seconds = zip(*(found[case] for found, _ in failed), strict=True)
    assert max(seconds) < 120
    assert len(set(messages)) == 1
    assert all(word in messages[0] for word in words), messages[0]
    if first is not None:
        assert f"rank {first % len(failed)} " in messages[0]


def test_ranks_of_a_machine_share_its_memory(failed):
    for _, memory in failed:
        assert memory == [machine_memory() // len(failed)] * len(failed)


# -------------------------------------------------------------------------------------------- memory


def machine_memory() -> int:
    """The machine's memory, or the container's limit."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        memory = min(memory, int(limit.read_text()))
    return memory


def test_memory_is_the_machines_unless_told(monkeypatch):
    device = init_process_group()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    [found] = topology(device, ShardingConfig()).devices
    assert found.storage.ddr == machine_memory()
    [found] = topology(device, ShardingConfig(memory_gb=2.5)).devices
    assert found.storage.ddr == 2.5 * GB


def reserve(there: Topology, batch: BatchSize, model: torch.nn.Module) -> tuple[Topology, Topology]:
    reservation = DenseAndTokenReservation(batch)
    left = reservation.reserve(there, batch.requests, model, sharders(), {})
    return left, reservation.last_reserved_topology


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dense_copies_and_tokens_are_reserved_on_each_device(device):
    there = cpus(2) if device == "cpu" else gpus(8)
    before = [(d.storage.hbm, d.storage.ddr) for d in there.devices]
    model, batch = model_of(dim=16), BatchSize(requests=3, events=1000, candidates=70)
    archs = (model.model.candidate_arch, model.model.set_arch)
    dense = sum(p.numel() * 4 for arch in archs for p in arch.parameters())
    needed = DENSE_COPIES * dense + (EVENT_COPIES * 1000 + CANDIDATE_COPIES * 70) * 16 * 4
    left, last = reserve(there, batch, model)
    for (hbm, ddr), now, kept in zip(before, left.devices, last.devices, strict=True):
        expected = (hbm - needed, ddr) if device == "cuda" else (hbm, ddr - needed)
        assert (now.storage.hbm, now.storage.ddr) == expected
        assert (kept.storage.hbm, kept.storage.ddr) == expected
    assert [(d.storage.hbm, d.storage.ddr) for d in there.devices] == before


def test_what_is_reserved_may_be_all_but_no_more():
    batch, model = BatchSize(1, 100, 10), torch.nn.Linear(5, 2)
    needed = DENSE_COPIES * 12 * 4  # without tables there are no tokens
    left, _ = reserve(cpus(1, needed), batch, model)
    assert left.devices[0].storage.ddr == 0
    with pytest.raises(PlannerError, match="dense part needs"):
        reserve(cpus(1, needed - 1), batch, model)


def batch_of(requests: int, events: int, candidates: int) -> RankingBatch:
    """A batch with ``events`` and ``candidates`` per request."""
    generator = torch.Generator().manual_seed(0)
    n, m = requests * events, requests * candidates
    ids = [torch.randint(rows, (k,), generator=generator) for k in (n, m) for rows in (1000, 50)]
    return RankingBatch(
        dense_features=torch.zeros(requests, 0),
        context_features=KeyedJaggedTensor.from_lengths_sync(
            list(CONTEXT), torch.zeros(2 * requests).long(), torch.ones(2 * requests).long()
        ),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            [prefix + name for prefix in ("history_", "candidate_") for name in ITEM],
            torch.cat(ids),
            torch.tensor([events, candidates]).repeat_interleave(2 * requests),
        ),
        candidate_dense=torch.zeros(m, 0),
        history_age=90 * torch.rand(n, generator=generator),
        labels=torch.ones(m, 1),
        exposed=torch.ones(m).bool(),
    )


@pytest.mark.parametrize("interaction", ["ifa", "softmax", "softmax_recent", "mean"])
def test_tokens_reserved_cover_the_peak_of_a_training_step(
    interaction, requests=20, events=1024, candidates=80
):
    """The peak memory of a step with the defaults' proportions, beyond weights and batch but with
    looked-up embeddings, compared with the memory reserved for its tokens."""
    model = model_of(dim=64, interaction=interaction)
    model, optimizer = shard(model, init_process_group(), OptimizerConfig())
    batch = batch_of(requests, events, candidates)
    gc.collect()  # so that leftovers of other tests are not freed during the measurement
    for _ in range(2):  # the first step does one-time work
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(batch)[0].backward()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for allocation in sorted(allocations, key=lambda e: e.start_ns()):
        held += allocation.nbytes()
        peak = max(peak, held)
    reserved = requests * (EVENT_COPIES * events + CANDIDATE_COPIES * candidates) * 64 * 4
    assert peak <= reserved, f"{interaction}: {peak / reserved:.2f}"
    if interaction == "ifa":
        assert 2.5 * peak >= reserved, f"{interaction}: {peak / reserved:.2f}"


@pytest.mark.parametrize(("requests", "events", "candidates"), [(100, 100, 80), (2, 10_000, 80)])
def test_and_that_of_other_proportions(requests, events, candidates):
    test_tokens_reserved_cover_the_peak_of_a_training_step("ifa", requests, events, candidates)


# ------------------------------------------------------------------------- a cluster that is not there


def bytes_a_device(plan, world: int) -> list[int]:
    """The tables' weights and row-wise Adagrad's states."""
    held = [0] * world
    for table in plan.values():
        for part in table.sharding_spec.shards:
            rows, columns = part.shard_sizes
            held[part.placement.rank()] += 4 * rows * (columns + 1)
    return held


def test_two_billion_rows_on_64_gpus_are_planned_without_a_process_group():
    item = {"item": 2 * 10**9, "category": 50_000}
    model, batch = model_of(item, dim=64), BatchSize()
    none = mock.Mock(side_effect=AssertionError("a process group was asked for"))
    start = time.perf_counter()
    with mock.patch("torch.distributed.distributed_c10d._get_default_group", none):
        plan = plan_of(model, gpus(64, 16 * GB), batch=batch)
    assert time.perf_counter() - start < 120
    assert plan.keys() == {"item_table", "category_table", "store_table", "weekday_table"}
    held = bytes_a_device(plan, 64)
    assert sum(held) >= 4 * 65 * 2 * 10**9
    left, _ = reserve(gpus(64, 16 * GB), batch, model)
    assert max(held) <= left.devices[0].storage.hbm


def test_no_plan_is_found_where_the_gpus_together_are_too_small():
    with pytest.raises(PlannerError, match="insufficient storage"):
        plan_of(model_of({"item": 2 * 10**9}, dim=64), gpus(64, 1 * GB))
