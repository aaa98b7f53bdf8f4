"""Quantised tables: what they change, and what they leave unchanged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.modules import CandidateSetConfig
from ifa_torchrec.serving import (
    Event,
    RankingRequest,
    Scorer,
    StateStore,
    open_key_value_store,
    quantize_tables,
)
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(embedding_dim=8, num_heads=2, half_lives=(math.inf, 30.0), identity_features=("item",))


@pytest.fixture(scope="module")
def run(log, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("quantize") / "run"
    sets = CandidateSetConfig(generate=True)
    train(
        TrainConfig(data=log.path, out=out, ifa=IFA, candidate_set=sets, max_requests=8, validate=False)
    )
    return load_run(out, sharded=False)


def table_bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for name, t in model.state_dict().items() if "collection" in name)


@torch.no_grad()
def test_logits_are_the_same_up_to_rounding(run: Run) -> None:
    quantised, batch = quantize_tables(run.dlrm), run.dataset("test")[list(range(12))]
    exact, rounded = run.dlrm(batch), quantised(batch)
    # a row's 8 values are rounded to the nearest of 2**8: half a step in a range of about 0.6
    assert 0 < (rounded - exact).abs().max() < 1e-2
    state = quantised.encode(batch)
    torch.testing.assert_close(quantised.attend(batch, state), rounded, atol=1e-5, rtol=0)


def test_the_dense_part_is_the_models_own(run: Run) -> None:
    quantised = quantize_tables(run.dlrm)
    for name in ("candidate_arch", "set_arch", "taken_arch"):
        assert getattr(quantised, name) is getattr(run.dlrm, name) is not None


def test_a_row_of_int8_is_within_half_a_step(run: Run) -> None:
    table = run.dlrm.sequence_arch.embedding_collection.embeddings["item_table"].weight
    candidates = run.dataset("test")[[0]].sequence_features
    _, tokens = quantize_tables(run.dlrm).sequence_arch(candidates)
    _, exact = run.dlrm.sequence_arch(candidates)
    # two tables contribute; fbgemm stores scale and bias in float16
    step = (table.max() - table.min()) / 255
    assert (tokens.values() - exact.values()).abs().max() < 2 * step


def test_the_given_model_keeps_its_tables_and_its_dense_part_is_shared(run: Run) -> None:
    before = {name: value.clone() for name, value in run.dlrm.state_dict().items()}
    quantised = quantize_tables(run.dlrm)
    after = run.dlrm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert quantised.candidate_arch is run.dlrm.candidate_arch
    assert quantised.set_arch is run.dlrm.set_arch
    assert table_bytes(quantised) < table_bytes(run.dlrm)


def test_a_store_of_float_states_serves_int8_tables(run: Run, tmp_path: Path) -> None:
    build_states(BuildStatesConfig(Path(run.config.out), str(tmp_path / "states"), position=0))
    store = StateStore(open_key_value_store(str(tmp_path / "states")), run.version)
    exact = Scorer(run.dlrm, run.log, store)
    rounded = Scorer(quantize_tables(run.dlrm), run.log, store)
    user = int(run.log.users[-1])
    time = int(run.log.events["time"].max()) + 1
    request = RankingRequest(
        user=user,
        time=time,
        candidates=[3, 1, 4, 15, 9, 2],
        context={"store": 1, "weekday": 2},
        dense={"hour": 0.5, "season": 0.0},
        candidate_dense={"price": [0.0] * 6},
    )
    event = Event(position=store.positions[0], user=user, item=4, time=time)
    assert rounded.append([event])[0].status == "taken"
    difference = exact.score([request])[0] - rounded.score([request])[0]
    assert 0 < abs(difference).max() < 1e-2
