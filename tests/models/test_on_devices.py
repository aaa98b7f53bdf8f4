"""A training step of the dense part with the Triton backend, on a GPU if there is one, else in Triton's
interpreter: its loss, logits and gradients equal the reference's on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from helpers import assert_near
from interpreter import DEVICE
from test_dlrm_ifa import make_batch, make_ifa, make_model
from test_no_waits import MODELS, dense_parts, moved

from ifa_torchrec import DLRM_IFATrain

pytest.importorskip("triton")


def same_on_every_device() -> Callable[..., torch.Tensor]:
    """torch.rand for drawing taken candidates: a GPU would draw other numbers."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0))
    return lambda *sizes, device, dtype=None: draw(*sizes, dtype=dtype).to(device)


def step_of(name: str, backend: str, device: str) -> dict[str, torch.Tensor]:
    """Loss, logits and all gradients, on the CPU."""
    changes, loss = MODELS[name]
    ifa = dataclasses.replace(changes.get("ifa", make_ifa()), backend=backend)
    train, batch = moved(
        DLRM_IFATrain(make_model(**(changes | {"ifa": ifa})), loss), make_batch(), torch.device(device)
    )
    with mock.patch("torch.rand", same_on_every_device()):
        value, (_, logits, *_) = train(batch)
    value.backward()
    found = train.model.look_up(batch)
    rows = {"history": found.history.values(), "candidates": found.candidates.values()}
    weights = {
        f"{i} {key}": p
        for i, part in enumerate(dense_parts(train))
        for key, p in part.named_parameters()
    }
    gradients = {key: tensor.grad for key, tensor in (rows | weights).items() if tensor.grad is not None}
    assert rows.keys() <= gradients.keys() and len(gradients) > len(rows)
    return {key: x.detach().cpu() for key, x in ({"loss": value, "logits": logits} | gradients).items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_references(name):
    expected, actual = step_of(name, "reference", "cpu"), step_of(name, "triton", DEVICE)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_near(actual[key], tensor, 1e-4, key)
