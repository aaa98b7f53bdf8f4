"""UserState: a batch of states that is cut, joined, added, moved and saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ifa_torchrec import UserState


def new_state(requests: int, seed: int = 0, identity: bool = True) -> UserState:
    g = torch.Generator().manual_seed(seed)
    return UserState(
        torch.randn(requests, 2, 4, 3, generator=g),
        torch.rand(requests, 2, 4, generator=g),
        torch.randint(0, 100, (requests,), generator=g),
        torch.randn(requests, 1, 2, 5, 3, generator=g) if identity else None,
        torch.rand(requests, 1, 2, 5, generator=g) if identity else None,
    )


def assert_equal(actual: UserState, expected: UserState) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


identity_or_not = pytest.mark.parametrize("identity", [True, False], ids=["identity", "dense"])


@identity_or_not
def test_len_is_the_number_of_requests(identity):
    assert len(new_state(3, identity=identity)) == 3
    assert len(new_state(0, identity=identity)) == 0


@identity_or_not
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0, 2], [2, 0, 2]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.zeros(4, dtype=torch.bool), []),
        (slice(0, 0), []),
    ],
    ids=str,
)
def test_index_takes_these_requests_of_every_tensor(index, rows, identity):
    state = new_state(4, identity=identity)
    taken = state[index]
    assert len(taken) == len(rows)
    for name, tensor in taken.state_dict().items():
        expected = [state.state_dict()[name][row] for row in rows]
        assert torch.equal(tensor, torch.stack(expected) if rows else tensor[:0]), name


@pytest.mark.parametrize("index", [0, -1])
def test_index_by_an_int_is_refused(index):
    with pytest.raises(TypeError, match=rf"\[\[{index}\]\]"):
        new_state(2)[index]


@identity_or_not
def test_cat_undoes_slices(identity):
    state = new_state(5, identity=identity)
    assert_equal(UserState.cat([state[:2], state[2:2], state[2:]]), state)


def test_cat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        UserState.cat([])


@identity_or_not
def test_add_adds_every_tensor(identity):
    one, other = new_state(3, seed=1, identity=identity), new_state(3, seed=2, identity=identity)
    total = (one + other).state_dict()
    assert len(total) == (5 if identity else 3)
    for name, tensor in total.items():
        assert torch.equal(tensor, getattr(one, name) + getattr(other, name)), name
    assert_equal(one, new_state(3, seed=1, identity=identity))  # not in place


@pytest.mark.parametrize(
    "other",
    [new_state(1), new_state(3, identity=False)],
    ids=["of one request, which would be broadcast", "without identity tables"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_add_of_unlike_states_is_refused(other, swapped):
    one, other = (other, new_state(3)) if swapped else (new_state(3), other)
    with pytest.raises(ValueError):
        one + other


@identity_or_not
def test_to_moves_every_tensor(identity):
    state = new_state(2, identity=identity)
    moved = state.to("meta").state_dict()
    assert len(moved) == (5 if identity else 3)
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert_equal(state.to(torch.device("cpu")), state)


@identity_or_not
def test_save_and_load(identity, tmp_path):
    state = new_state(3, identity=identity)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    assert_equal(UserState(**torch.load(tmp_path / "state.pt")), state)


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        new_state(1).count = torch.zeros(1)
