"""No part of the dense part's training step reads a value, which on a GPU would wait for the device.

The meta device has no values: reading one, or a size that depends on values, raises an error.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_dlrm_ifa import make_batch, make_ifa, make_model
from torch.overrides import TorchFunctionMode
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec import DLRM_IFATrain, RankingBatch
from ifa_torchrec.models.archs import Lookups
from ifa_torchrec.models.parts import NumberArch
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig

META = torch.device("meta")
MODELS = {
    "paper": ({}, None),
    "default": ({"ifa": make_ifa(num_heads=1, feature_map="hedgehog", readout="softmax")}, None),
    "no identity": ({"ifa": make_ifa(identity_features=())}, None),
    "sets": (
        {"candidate_set": CandidateSetConfig("linear")},
        CandidateSetLossConfig(consistency=0.1, unexposed=0.5),
    ),
    "generates sets": ({"candidate_set": CandidateSetConfig("linear", generate=True)}, None),
    "generates sets, no attention": ({"candidate_set": CandidateSetConfig(generate=True)}, None),
    **{name: ({"interaction": name}, None) for name in ("mean", "din", "sim")},
}


class Copies(TorchFunctionMode):
    """Counts tensors made from Python numbers: copying them to a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.made += function in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return function(*args, **(kwargs or {}))


def lookups_on(device: torch.device, found: Lookups) -> Lookups:
    """The lookups on another device."""

    def rows(given: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(
            given.values().detach().to(device).requires_grad_(),
            lengths=given.lengths().to(device),
            offsets=given.offsets().to(device),
        )

    context = found.context.detach().to(device).requires_grad_()
    return Lookups(context, None, rows(found.history), rows(found.candidates))


def dense_parts(train: DLRM_IFATrain) -> list[torch.nn.Module]:
    model = train.model
    return [part for part in (model.candidate_arch, model.set_arch, model.taken_arch) if part]


def moved(
    train: DLRM_IFATrain, batch: RankingBatch, device: torch.device
) -> tuple[DLRM_IFATrain, RankingBatch]:
    """The dense part and the batch on a device, with precomputed lookups instead of tables."""
    found = lookups_on(device, train.model.look_up(batch))
    train.model.look_up = lambda features: found
    for part in dense_parts(train):
        part.to(device)
        for module in part.modules():
            if isinstance(module, NumberArch):  # its figures stay off the meta device
                module._figures = module._figures.to(device)
    batch = dataclasses.replace(batch, exposed_rows=batch.exposed.nonzero()[:, 0])
    return train, batch.to(device)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_dense_part_looks_at_no_value(name):
    changes, loss = MODELS[name]
    train, batch = moved(DLRM_IFATrain(make_model(**changes), loss), make_batch(), META)
    with Copies() as copies:
        value, _ = train(batch)
        value.backward()
    assert copies.made == 0
    assert all(p.grad is not None for part in dense_parts(train) for p in part.parameters())


def test_what_would_wait_is_found():
    """The measurement works."""
    train, batch = moved(DLRM_IFATrain(make_model(), None), make_batch(), META)
    candidates = train.model.describe(batch)
    with pytest.raises((RuntimeError, NotImplementedError)):
        candidates.only(batch.exposed)
    with Copies() as copies:
        torch.tensor([1.0], device=META)
    assert copies.made == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_the_same_step_waits_for_nothing(name):
    changes, loss = MODELS[name]
    train, batch = moved(DLRM_IFATrain(make_model(**changes), loss), make_batch(), torch.device("cuda"))
    train(batch)[0].backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(batch)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
