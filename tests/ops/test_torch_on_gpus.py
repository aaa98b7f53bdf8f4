"""The torch backend's GPU code, run on a CPU: it reads no values and gives the reference's results."""

from __future__ import annotations

import pytest
import torch
from test_ops import (
    EPS,
    FEATURE_MAPS,
    assert_backend_is_true,
    attend_inputs,
    attend_softmax_inputs,
    encode_inputs,
    match_inputs,
)
from waits import Waits

from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    JoinedArguments,
    MatchArguments,
)
from ifa_torchrec.ops.kernels import joining, tiling
from ifa_torchrec.ops.kernels import torch as kernels

TRUE = dict(tolerance=2e-5, backend="torch")
LENGTHS = [0, 1, 317, 0, 65, 2011, 0]
EDGES = [[], [0, 0], [1], [0, 5000, 1]]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (joining, tiling):
        monkeypatch.setattr(module, "on_cpu", lambda x: False)


@pytest.mark.parametrize("lengths", [LENGTHS, *EDGES], ids=str)
@pytest.mark.parametrize("weighted", [True, "by head", False])
def test_encode(lengths, weighted):
    assert_backend_is_true("encode", encode_inputs(lengths, torch.float32, weighted), "hedgehog", **TRUE)


@pytest.mark.parametrize("lengths", [[0, 1, 150, 0, 9], *EDGES[:-1]], ids=str)
def test_attend(lengths):
    for feature_map in FEATURE_MAPS:
        inputs = attend_inputs(lengths, feature_map, torch.float32)
        assert_backend_is_true("attend", inputs, feature_map, EPS, **TRUE)
    assert_backend_is_true("attend_softmax", attend_softmax_inputs(lengths, torch.float32), **TRUE)


@pytest.mark.parametrize("weighted", [True, "by head", False])
def test_match(weighted):
    inputs = match_inputs([0, 1, 317, 0, 65], [3, 1, 20, 0, 2], torch.float32, weighted)
    assert_backend_is_true("match", inputs, **TRUE)
    for lengths in EDGES[:-1]:
        assert_backend_is_true("match", match_inputs(lengths, lengths, torch.float32), **TRUE)
        assert_backend_is_true("match", match_inputs(lengths, [0] * len(lengths), torch.float32), **TRUE)


@pytest.mark.parametrize("bucket", [-1, 2**62, -(2**63)], ids=str)
def test_match_tells_requests_and_buckets_apart(bucket):
    inputs = match_inputs([5, 3], [4, 4], torch.float32)
    inputs["candidate_buckets"] = torch.tensor([bucket, 3, bucket, 2**63 - 1] * 2)
    inputs["history_buckets"] = torch.tensor([bucket, 3, 7, 2**63 - 1, bucket, 4, 4, bucket])
    assert_backend_is_true("match", inputs, **TRUE)


def test_a_spoilt_row_spoils_its_own_request_alone():
    inputs = encode_inputs([70, 0, 5, 3], torch.float32)
    expected = kernels.encode(EncodeArguments(*inputs.values(), feature_map="elu"))
    inputs["history"][72, 1] = torch.nan
    for actual, clean in zip(
        kernels.encode(EncodeArguments(*inputs.values(), feature_map="elu")), expected, strict=True
    ):
        assert torch.equal(actual[[0, 1, 3]], clean[[0, 1, 3]])
        assert not actual[2].isfinite().any()


def test_nothing_looks_at_a_value_and_wrong_offsets_name_no_foreign_row():
    history = EncodeArguments(*encode_inputs(LENGTHS, torch.float32).values(), feature_map="elu")
    sets = [3, 1, 20, 0, 2, 9, 0]
    asking = AttendArguments(*attend_inputs(sets, "elu", torch.float32).values(), "elu", EPS)
    softmax = AttendSoftmaxArguments(*attend_softmax_inputs(sets, torch.float32).values())
    matching = MatchArguments(*match_inputs(LENGTHS, sets, torch.float32).values())
    for offset in (0, 10_000, -10_000):
        with Waits() as waits:
            kernels.encode_backward(*kernels.encode(history), history)
            kernels.attend_backward(*kernels.attend(asking), asking)
            kernels.attend_softmax_backward(*kernels.attend_softmax(softmax), softmax)
            *sums, first, joined = kernels.match(matching)
            kernels.match_backward(*sums, JoinedArguments(first, joined, *matching[2:3], *matching[5:]))
        assert waits.seen == []
        history = history._replace(offsets=history.offsets + offset)
        asking = asking._replace(offsets=asking.offsets + offset)
        softmax = softmax._replace(offsets=softmax.offsets - offset)
        matching = matching._replace(
            candidate_offsets=matching.candidate_offsets - offset,
            history_offsets=matching.history_offsets + offset,
        )
