"""Nothing on the way of a training step of the dense part looks at a value, which on a GPU would wait.

On the meta device there are no values: what asks for one, or for a size that depends on them, raises.
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
}


class Copies(TorchFunctionMode):
    """Counts the tensors that are made of Python numbers: to a GPU they are copied, which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.made += function in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return function(*args, **(kwargs or {}))


class Looked(torch.nn.Module):
    """In the place of the tables: what they would give, without values."""

    def __init__(self, model, batch: RankingBatch) -> None:
        super().__init__()
        lookups = model.look_up(batch)
        sequences = [lookups.history, lookups.candidates]
        self.found = Lookups(
            lookups.context.detach().to(META).requires_grad_(),
            None,
            *(
                JaggedTensor(
                    rows.values().detach().to(META).requires_grad_(),
                    lengths=rows.lengths().to(META),
                    offsets=rows.offsets().to(META),
                )
                for rows in sequences
            ),
        )


def on_meta(train: DLRM_IFATrain, batch: RankingBatch) -> tuple[DLRM_IFATrain, RankingBatch]:
    """Both without values, the tables' answers kept."""
    found = Looked(train.model, batch).found
    train.model.look_up = lambda features: found
    for part in (train.model.candidate_arch, train.model.set_arch):
        part.to(META)
        for module in part.modules():
            if isinstance(
                module, NumberArch
            ):  # its figures stay on the CPU until the parameters have memory
                module._figures = module._figures.to(META)
    batch = dataclasses.replace(batch, exposed_rows=batch.exposed.nonzero()[:, 0])
    return train, batch.to(META)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_dense_part_looks_at_no_value(name):
    changes, loss = MODELS[name]
    train, batch = on_meta(DLRM_IFATrain(make_model(**changes), loss), make_batch())
    with Copies() as copies:
        value, _ = train(batch)
        value.backward()
    assert copies.made == 0
    dense = [p for part in (train.model.candidate_arch, train.model.set_arch) for p in part.parameters()]
    assert all(p.grad is not None for p in dense)


def test_what_would_wait_is_found():
    """The measurement itself."""
    train, batch = on_meta(DLRM_IFATrain(make_model(), None), make_batch())
    candidates = train.model.describe(batch)
    with pytest.raises((RuntimeError, NotImplementedError)):
        candidates.only(batch.exposed)
    with Copies() as copies:
        torch.tensor([1.0], device=META)
    assert copies.made == 1
