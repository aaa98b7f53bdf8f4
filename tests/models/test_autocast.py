"""DLRM_IFA under autocast, and compiled."""

from __future__ import annotations

import pytest
import torch
from test_dlrm_ifa import every_interaction, make_batch, make_ifa, make_model

from ifa_torchrec import DLRM_IFATrain
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig
from ifa_torchrec.training.precision import autocast, compile_dense

CPU = torch.device("cpu")
DEFAULT = {"ifa": make_ifa(num_heads=1, feature_map="hedgehog", readout="softmax")}
SETS = {"candidate_set": CandidateSetConfig("linear", generate=True)}


def step(model: DLRM_IFATrain, precision="fp32") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with autocast(precision, CPU):
            loss, _ = model(make_batch())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_about_the_same(model: DLRM_IFATrain) -> None:
    loss, gradients = step(model, "bf16")
    expected, in_float32 = step(model)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.02 * expected
    assert gradients.keys() == in_float32.keys()
    same = all(gradient.equal(in_float32[name]) for name, gradient in gradients.items())
    assert same == (model.model.candidate_arch.sequence_interaction is None)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - in_float32[name]).norm() < 0.3 * in_float32[name].norm() + 1e-3, name


@every_interaction
def test_bfloat16_is_about_float32(interaction):
    assert_about_the_same(DLRM_IFATrain(make_model(interaction)))


def test_bfloat16_of_the_softmax_read_out_and_of_sets():
    assert_about_the_same(DLRM_IFATrain(make_model(**DEFAULT)))
    loss = CandidateSetLossConfig(consistency=0.1, unexposed=0.5)
    assert_about_the_same(DLRM_IFATrain(make_model(**SETS), loss))


def test_what_breaks_a_graph_is_refused():
    for model in (make_model("twin"), make_model(candidate_set=CandidateSetConfig("softmax"))):
        with pytest.raises(
            ConfigError, match=r"--compile: interaction .* or with one of \['ifa', 'none', "
        ):
            compile_dense(model)


@pytest.mark.slow
def test_the_dense_part_compiles_without_a_break_for_batches_of_any_size():
    """fullgraph raises an error at a graph break; the traced graphs run uncompiled, which is faster."""
    model = make_model(**DEFAULT)
    # all sizes differ, since equal sizes in the first batch would be treated as one size
    batches = make_batch([5, 0, 8, 1], [3, 4, 2, 6]), make_batch([9, 70, 2], [8, 2, 5])
    expected = [model(batch) for batch in batches]
    torch.compiler.reset()
    compile_dense(model, backend="eager")
    assert torch.equal(model(batches[0]), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model(batches[1]), expected[1])
