"""Exported scoring graphs compute the logits that the model computes from whole histories."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from helpers import randomised
from shop import Shop, shop_model
from torch import Tensor
from torch.export import ExportedProgram
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from ifa_torchrec import (
    DLRM_IFA,
    DLRM_IFAConfig,
    IFAConfig,
    InteractionFidelityAttention,
    generate_set,
)
from ifa_torchrec.__main__ import main
from ifa_torchrec.batch import RankingBatch
from ifa_torchrec.commands.export import ExportConfig, export
from ifa_torchrec.data import EventLog, LogSchema, RankingDataset
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import ScoringGraph, StateError, export_scorer, quantize_tables
from ifa_torchrec.serving.compiled import DENSE_FILE, CompiledDense
from ifa_torchrec.serving.export import describe, package_scorer
from ifa_torchrec.serving.set_graph import GraphTensor, export_set_graph
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(
    embedding_dim=8,
    num_heads=2,
    half_lives=(math.inf, 30.0),
    identity_features=("item", "category"),
    identity_buckets=32,  # fewer than there are items
    identity_half_lives=(math.inf, 7.0),
)


@pytest.fixture(scope="module")
def run(log, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("export") / "run"
    train(TrainConfig(data=log.path, out=out, ifa=IFA, max_requests=8, validate=False))
    return load_run(out, sharded=False)


def inputs(model: DLRM_IFA, schema: LogSchema, batch: RankingBatch) -> dict[str, Tensor]:
    """The graph's inputs for a batch of one request, with its history summed by the model."""
    state, ids = model.encode(batch), batch.sequence_features
    items = batch.candidate_items
    columns = [f"candidate_{f}" for f in (*schema.item_features, *schema.candidate_features)]
    context = [batch.context_features[f].values() for f in schema.context_features]
    known = {
        "candidate_ids": torch.stack([ids[f].values() for f in columns], dim=1),
        "context_ids": torch.cat([torch.empty(0, dtype=torch.int64), *context]),
        "dense": batch.dense_features[0],
        "candidate_dense": batch.candidate_dense,
        "item_dense": None if batch.item_dense is None else batch.item_dense[items],
        "item_vectors": None if batch.item_vectors is None else batch.item_vectors[items],
        "candidate_item_ids": batch.candidate_item_ids,
        **{f"context_list_{f}": batch.context_features[f].values() for f in schema.context_lists},
        **state.state_dict(),
    }
    if known["candidate_item_ids"] is None:
        known["candidate_item_ids"] = ids[columns[0]].values()
    for name in schema.item_lists:
        lists = batch.item_lists[name].to_dense()
        of_candidate = [(m, i) for m, item in enumerate(items.tolist()) for i in lists[item].tolist()]
        known[f"item_list_{name}_candidate"], known[f"item_list_{name}"] = (
            torch.tensor(column, dtype=torch.int64)
            for column in (zip(*of_candidate, strict=True) if of_candidate else ((), ()))
        )
    return {given.name: known[given.name] for given in ScoringGraph(model, schema).inputs}


def first_candidate(given: dict[str, Tensor], graph_inputs: Sequence[GraphTensor]) -> dict[str, Tensor]:
    first = {g.name: given[g.name][:1] if g.shape[0] == "M" else given[g.name] for g in graph_inputs}
    for name in given:
        if name.endswith("_candidate"):
            own = given[name] == 0
            first |= {n: given[n][own] for n in (name, name.removesuffix("_candidate"))}
    return first


@torch.no_grad()
def assert_gives_the_models_logits(
    score: Callable[..., Tensor], model: DLRM_IFA, log: EventLog, splits: Sequence[str]
) -> None:
    candidates, rows = set(), set()
    described = ScoringGraph(model, log.schema).inputs
    for split in splits:
        dataset = RankingDataset(log, split)
        for request in range(len(dataset)):
            batch = dataset[[request]]
            given, logits = inputs(model, log.schema, batch), model(batch)
            torch.testing.assert_close(score(*given.values()), logits, atol=1e-5, rtol=0)
            first = first_candidate(given, described)
            torch.testing.assert_close(score(*first.values()), logits[:1], atol=1e-5, rtol=0)
            candidates.add(len(given["candidate_ids"]))
            rows.add(len(given["identity_key"]))
    assert 0 in rows  # a user without a history
    assert len(candidates) > 2
    assert len(rows) > 4


def test_program(run: Run, tmp_path: Path) -> None:
    torch.export.save(export_scorer(run.dlrm, run.log.schema), tmp_path / "scorer.pt2")
    program = torch.export.load(tmp_path / "scorer.pt2")
    assert_gives_the_models_logits(program.module(), run.dlrm, run.log, ("test",))
    assert_of_aten_alone(program)


@pytest.mark.slow
def test_program_of_float16_tables(log: EventLog, tmp_path: Path) -> None:
    options = {"max_requests": 8, "validate": False, "table_dtype": "fp16"}
    train(TrainConfig(data=log.path, out=tmp_path / "run", ifa=IFA, **options))
    run = load_run(tmp_path / "run", sharded=False)
    assert export(ExportConfig(tmp_path / "run", tmp_path / "scorer.pt2"))["tables"] == "float16"
    program = torch.export.load(tmp_path / "scorer.pt2")
    assert_gives_the_models_logits(program.module(), run.dlrm, run.log, ("test",))
    quantised = quantize_tables(run.dlrm)
    assert_gives_the_models_logits(
        export_scorer(quantised, log.schema).module(), quantised, log, ("test",)
    )


def assert_of_aten_alone(program: ExportedProgram) -> None:
    operators = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {operator.namespace for operator in operators} == {"aten"}
    # no size is read from a tensor
    assert not [operator for operator in operators if "item" in operator.name()]


def load_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """A package that refuses inputs that it was not compiled for."""
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    return torch._inductor.aoti_load_package(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_a_package(run: Run, int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "scorer.pt2"
    about = export(ExportConfig(run.config.out, out, package=True, int8=int8))
    tables = "int8" if int8 else "float32"
    assert (about["runtime"], about["tables"]) == ("AOTInductor", tables)
    assert "contiguous" in about["layout"]
    score, model = load_package(out, monkeypatch), quantize_tables(run.dlrm) if int8 else run.dlrm
    assert_gives_the_models_logits(score, model, run.log, ("test", "train"))
    # without its check the package would read the columns' memory as if they were contiguous
    given = inputs(model, run.log.schema, run.dataset("test")[[4]])
    columns = {**given, "candidate_item_ids": given["candidate_ids"][:, 0]}
    with pytest.raises(RuntimeError, match="unmatched stride"):
        score(*columns.values())
    torch.testing.assert_close(
        score(*(t.contiguous() for t in columns.values())), score(*given.values())
    )


def test_a_model_of_lists_numbers_vectors_and_event_features_by_int8_tables(shop: Shop) -> None:
    model = quantize_tables(shop.model)
    program = export_scorer(model, shop.log.schema)
    assert_gives_the_models_logits(program.module(), model, shop.log, ["train"])
    assert_of_aten_alone(program)


@pytest.mark.slow
def test_a_package_of_lists_numbers_vectors_and_event_features(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_scorer(export_scorer(shop.model, shop.log.schema), tmp_path / "shop.pt2")
    score = load_package(tmp_path / "shop.pt2", monkeypatch)
    assert_gives_the_models_logits(score, shop.model, shop.log, ["train"])


def test_rows_that_no_candidate_uses_may_be_left_out(run: Run) -> None:
    graph, batch = ScoringGraph(run.dlrm, run.log.schema), run.dataset("test")[[5]]
    given = inputs(run.dlrm, run.log.schema, batch)
    ids = run.dlrm.candidate_arch.candidate_ids(batch)
    asked = run.dlrm.candidate_arch.sequence_interaction.identity.keys(ids)
    kept = torch.isin(given["identity_key"], asked)
    assert 0 < kept.sum() < len(kept)
    fewer = {name: t[kept] if name.startswith("identity") else t for name, t in given.items()}
    torch.testing.assert_close(graph(*fewer.values()), graph(*given.values()))


def model_of_one_feature(data_type: DataType = DataType.FP32, **options) -> DLRM_IFA:
    names = ["history_item", "candidate_item"]
    table = EmbeddingConfig(
        name="item", embedding_dim=8, num_embeddings=50, feature_names=names, data_type=data_type
    )
    config = DLRM_IFAConfig(("item",), **{"ifa": IFAConfig(8, num_heads=2)} | options)
    return randomised(DLRM_IFA(None, EmbeddingCollection(tables=[table]), config))


ONE_FEATURE = LogSchema(item_features={"item": 50})


@torch.no_grad()
def test_a_model_of_items_alone_with_two_tasks() -> None:
    model = model_of_one_feature(ifa=IFAConfig(8, num_heads=2, feature_map="hedgehog"), num_tasks=2)
    schema = dataclasses.replace(ONE_FEATURE, tasks=("click", "buy"))
    score = export_scorer(model, schema).module()
    for request in range(3):
        given = items_alone(events=5 * request, candidates=1 + request, seed=request)
        logits = model(given)
        assert logits.shape == (1 + request, 2)
        found = score(*inputs(model, schema, given).values())
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


def model_of_sets(attention: Literal["softmax", "linear"]) -> DLRM_IFA:
    """A model whose candidates see each other and those taken."""
    torch.manual_seed(0)
    return model_of_one_feature(candidate_set=CandidateSetConfig(attention, generate=True)).eval()


@torch.no_grad()
def assert_generates_the_models_sets(
    score: Callable[..., tuple[Tensor, ...]],
    step: Callable[..., tuple[Tensor, Tensor]],
    model: DLRM_IFA,
) -> None:
    def same(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    for candidates in (1, 2, 3, 40):
        batch = items_alone(events=7, candidates=candidates, seed=candidates)
        described, related = model.describe(batch), score(*inputs(model, ONE_FEATURE, batch).values())
        same(related[0], model(batch))
        taken = torch.zeros(candidates, dtype=torch.bool)
        rows = JaggedTensor(described.tokens, offsets=described.offsets)
        for row in generate_set(model.set_gain(described), rows, 5, "greedy").values():
            logits, gain = step(*related, taken.nonzero().flatten())
            same(logits, model.logits_given(described, taken))
            same(gain[~taken], model.set_gain(described)(taken)[~taken])
            # an item may occur twice, and its gains differ by rounding
            assert gain[row] >= gain.masked_fill(taken, -torch.inf).max() - 1e-5
            taken[row] = True
        others = step(*related, (~taken).nonzero().flatten())[0]
        same(others, model.logits_given(described, ~taken))


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_model_whose_candidates_see_each_other(attention: Literal["softmax", "linear"]) -> None:
    model = model_of_sets(attention)
    program, step = export_scorer(model, ONE_FEATURE), export_set_graph(model)
    assert_generates_the_models_sets(program.module(), step.module(), model)
    assert_of_aten_alone(program)
    assert_of_aten_alone(step)


def test_the_command_writes_a_step_of_a_set_too(tmp_path: Path, monkeypatch) -> None:
    model, out = model_of_sets("softmax"), tmp_path / "scorer.pt2"
    log = SimpleNamespace(schema=ONE_FEATURE, vocabulary=SimpleNamespace(digest="0a1b"))
    config = SimpleNamespace(table_dtype="fp32")
    run = SimpleNamespace(dlrm=model, log=log, version="weights-1", config=config)
    monkeypatch.setattr("ifa_torchrec.commands.export.load_run", lambda *_, **__: run)
    export(ExportConfig(tmp_path, out))
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["files"] == ["scorer.pt2", "scorer.set.pt2"]
    score, step = (torch.export.load(tmp_path / name).module() for name in about["files"])
    about_step = about["candidate_set"]
    assert about["outputs"] == about_step["inputs"][:-1]
    given = score(*inputs(model, ONE_FEATURE, items_alone(3, candidates=4, seed=0)).values())
    found = step(*given, torch.tensor([2, 0]))
    sizes = {"M": 4}
    for tensors, described in ((given, about["outputs"]), (found, about_step["outputs"])):
        for tensor, one in zip(tensors, described, strict=True):
            assert list(tensor.shape) == [sizes.get(size, size) for size in one["shape"]]
            assert str(tensor.dtype) == f"torch.{one['dtype']}"


@torch.no_grad()
@pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_a_set_of_items_with_several_features(
    shop: Shop, packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shop_model(shop.log, candidate_set=CandidateSetConfig(generate=True))
    score, program = ScoringGraph(model, shop.log.schema), export_set_graph(model)
    step: Callable[..., tuple[Tensor, Tensor]] = program.module()
    if packaged:
        package_scorer(program, tmp_path / "shop.set.pt2")
        step = load_package(tmp_path / "shop.set.pt2", monkeypatch)
    dataset, most = RankingDataset(shop.log, "train"), 0
    for n in range(4):
        batch = dataset[[n]]
        related = score(*inputs(model, shop.log.schema, batch).values())
        described = model.describe(batch)
        for rows in ([], [0], [1, 0]):
            if len(batch.labels) < 3:
                continue
            taken = torch.zeros(len(batch.labels), dtype=torch.bool)
            taken[rows] = True
            logits, gain = step(*related, torch.tensor(rows, dtype=torch.int64))
            torch.testing.assert_close(logits, model.logits_given(described, taken))
            torch.testing.assert_close(gain[~taken], model.set_gain(described)(taken)[~taken])
            most = max(most, len(rows))
    assert most == 2


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_package_of_a_model_whose_candidates_see_each_other(
    attention: Literal["softmax", "linear"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of_sets(attention)
    package_scorer(export_scorer(model, ONE_FEATURE), tmp_path / "sets.pt2")
    score, step = load_package(tmp_path / "sets.pt2", monkeypatch), export_set_graph(model)
    if attention == "linear":  # the step is the same for both
        return assert_generates_the_models_sets(score, step.module(), model)
    package_scorer(step, tmp_path / "sets.set.pt2")
    step = load_package(tmp_path / "sets.set.pt2", monkeypatch)
    return assert_generates_the_models_sets(score, step, model)


def items_alone(events: int, candidates: int, seed: int) -> RankingBatch:
    generator = torch.Generator().manual_seed(seed)
    return RankingBatch(
        dense_features=torch.empty(1, 0),
        context_features=KeyedJaggedTensor([], torch.empty(0).long(), lengths=torch.empty(0).long()),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            keys=["history_item", "candidate_item"],
            values=torch.randint(50, (events + candidates,), generator=generator),
            lengths=torch.tensor([events, candidates]),
        ),
        candidate_dense=torch.empty(candidates, 0),
        history_age=torch.rand(events, generator=generator),
        labels=torch.empty(candidates, 1),
        exposed=torch.ones(candidates, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: model_of_one_feature(interaction="mean"), "'mean' has no user state"),
        (lambda: model_of_one_feature(data_type=DataType.BF16), "'item' has type BF16, .* exported"),
    ],
)
def test_what_cannot_be_exported_is_refused(model: Callable[[], DLRM_IFA], message: str) -> None:
    with pytest.raises((StateError, ValueError), match=message):
        export_scorer(model(), ONE_FEATURE)


@pytest.mark.slow
def test_without_out_the_dense_part_is_compiled_into_the_run(run: Run) -> None:
    about = export(ExportConfig(run.config.out))
    assert (about["files"], about["runtime"]) == ([DENSE_FILE], "AOTInductor")
    CompiledDense(run.dlrm, run.log.schema, run.log.items, run.config.out / DENSE_FILE)


def test_options_of_the_graph_need_out() -> None:
    for options in ({"int8": True}, {"package": True}):
        with pytest.raises(ConfigError, match="give --out"):
            ExportConfig(Path("run"), **options)


def test_the_name_must_be_a_pt2() -> None:
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        ExportConfig(Path("run"), Path("scorer.onnx"))


def test_without_a_compiler_a_package_is_refused(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        export(ExportConfig(run.config.out, tmp_path / "scorer.pt2", package=True))


def test_the_command_describes_what_it_writes(monkeypatch, capsys, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "scorer.pt2"
    monkeypatch.setattr(sys, "argv", ["ifa", "export", "--run", str(run.config.out), "--out", str(out)])
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)  # others still use it
    main()
    about = json.loads(out.with_suffix(".json").read_text())
    assert json.loads(capsys.readouterr().out) == about
    assert (about["version"], about["tables"]) == (run.version, "float32")
    assert about["vocabulary"] == run.log.vocabulary.digest
    (task,) = about["tasks"]
    (output,) = about["outputs"]
    assert (output["name"], output["columns"]) == ("logits", [task["name"]]) and task["kind"] == "binary"
    assert task["scale"] == {"mean": 0.0, "deviation": 1.0, "log": False}
    given = inputs(run.dlrm, run.log.schema, run.dataset("test")[[5]])
    sizes = {"M": len(given["candidate_ids"]), "U": len(given["identity_key"])}
    for (name, tensor), described in zip(given.items(), about["inputs"], strict=True):
        assert described["name"] == name
        assert list(tensor.shape) == [sizes.get(size, size) for size in described["shape"]]
        assert str(tensor.dtype) == f"torch.{described['dtype']}"
        assert len(described["columns"]) in (0, tensor.shape[-1])
    logits = torch.export.load(out).module()(*given.values())
    assert list(logits.shape) == [sizes["M"], *output["shape"][1:]]


@pytest.mark.parametrize(
    ("identity", "width"), [((), 0), (("item",), 0), (("item",), 8)], ids=["dense", "masses", "values"]
)
def test_the_softmax_read_out_takes_any_number_of_candidates(
    identity: tuple[str, ...], width: int
) -> None:
    """The default of `ifa train`."""
    ifa = TrainConfig(Path("log"), Path("run")).ifa
    given = {"identity_features": identity, "identity_head_dim": width}
    ifa = dataclasses.replace(ifa, embedding_dim=8, **given)
    assert ifa.readout == "softmax"
    model = randomised(model_of_one_feature(ifa=ifa)).eval()
    exported = export_scorer(model, ONE_FEATURE).module()
    for events, m in ((0, 1), (1, 2), (7, 1), (300, 40)):
        batch = items_alone(events, m, seed=m)
        given = inputs(model, ONE_FEATURE, batch)
        torch.testing.assert_close(exported(*given.values()), model(batch), atol=1e-5, rtol=1e-4)


def test_a_graph_uses_the_models_own_interaction() -> None:
    """The module may differ from what the model's configuration names."""
    ifa = IFAConfig(8, num_heads=4, identity_features=("item",), readout="softmax")
    tables = model_of_one_feature().sequence_arch.embedding_collection
    config = DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2))
    model = DLRM_IFA(None, tables, config, InteractionFidelityAttention(ifa))
    exported = export_scorer(randomised(model).eval(), ONE_FEATURE).module()
    batch = items_alone(9, 3, seed=1)
    given = inputs(model, ONE_FEATURE, batch)
    torch.testing.assert_close(exported(*given.values()), model(batch), atol=1e-5, rtol=1e-4)
    described = {one["name"]: one for one in describe(model, ONE_FEATURE, "weights", "0a")["inputs"]}
    for name, tensor in given.items():
        for size, wanted in zip(tensor.shape, described[name]["shape"], strict=True):
            assert isinstance(wanted, str) or size == wanted
