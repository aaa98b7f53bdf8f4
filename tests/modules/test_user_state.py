"""UserState: indexing, concatenating, adding, moving and saving."""

from __future__ import annotations

import dataclasses
import operator
from itertools import accumulate

import pytest
import torch

from ifa_torchrec import UserState


def new_state(requests: int, seed: int = 0, identity: bool = True) -> UserState:
    g = torch.Generator().manual_seed(seed)
    dense = (
        torch.randn(requests, 2, 4, 3, generator=g),
        torch.rand(requests, 2, 4, generator=g),
        torch.randint(0, 100, (requests,), generator=g),
    )
    if not identity:
        return UserState(*dense)
    keys = [torch.randperm(10, generator=g)[: (b * 3 + seed) % 5].sort().values for b in range(requests)]
    offsets = torch.tensor([0, *accumulate(len(key) for key in keys)])
    key = torch.cat([torch.empty(0, dtype=torch.int64), *keys])
    value = torch.randn(len(key), 2, 3, generator=g)
    return UserState(*dense, offsets, key, value, torch.rand(len(key), 2, generator=g), 10)


def dense_tables(state: UserState) -> tuple[torch.Tensor, torch.Tensor]:
    """identity_value [B, keys, L, d] and identity_sum [B, keys, L] with zeros for missing rows."""
    value = torch.zeros(len(state), 10, 2, 3)
    total = torch.zeros(len(state), 10, 2)
    for b in range(len(state)):
        for row in range(state.identity_offsets[b], state.identity_offsets[b + 1]):
            value[b, state.identity_key[row]] = state.identity_value[row]
            total[b, state.identity_key[row]] = state.identity_sum[row]
    return value, total


def assert_equal(actual: UserState, expected: UserState) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        same = torch.equal if isinstance(expected[name], torch.Tensor) else operator.eq
        assert same(actual[name], expected[name]), name


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
    for name in ("key_value", "key_sum", "count"):
        assert torch.equal(getattr(taken, name), getattr(state, name)[rows]), name
    if identity:
        for mine, whole in zip(dense_tables(taken), dense_tables(state), strict=True):
            assert torch.equal(mine, whole[rows])
        assert taken.identity_offsets[-1] == len(taken.identity_key) == len(taken.identity_value)


@pytest.mark.parametrize("index", [0, -1])
def test_index_by_an_int_is_refused(index):
    with pytest.raises(TypeError, match=rf"\[\[{index}\]\]"):
        new_state(2)[index]


@identity_or_not
def test_cat_undoes_slices(identity):
    state = new_state(5, identity=identity)
    assert_equal(UserState.cat([state[:2], state[2:2], state[2:]]), state)


def test_cat_of_unlike_states_is_refused():
    with pytest.raises(ValueError, match="different configurations"):
        UserState.cat([new_state(1), new_state(1, identity=False)])


def test_cat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        UserState.cat([])


@identity_or_not
def test_add_adds_every_tensor(identity):
    one, other = new_state(3, seed=1, identity=identity), new_state(3, seed=2, identity=identity)
    total = one + other
    for name in ("key_value", "key_sum", "count"):
        assert torch.equal(getattr(total, name), getattr(one, name) + getattr(other, name)), name
    if identity:
        parts = zip(dense_tables(total), dense_tables(one), dense_tables(other), strict=True)
        for both, mine, theirs in parts:
            assert torch.equal(both, mine + theirs)
        for b in range(3):
            key = total.identity_key[total.identity_offsets[b] : total.identity_offsets[b + 1]].tolist()
            assert key == sorted(set(key))
    assert_equal(one, new_state(3, seed=1, identity=identity))  # not in place


@pytest.mark.parametrize(
    "other",
    [
        new_state(1),
        new_state(3, identity=False),
        dataclasses.replace(new_state(3), identity_key_range=12),
    ],
    ids=["of one request, which would be broadcast", "without identity tables", "of other buckets"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_add_of_unlike_states_is_refused(other, swapped):
    one, other = (other, new_state(3)) if swapped else (new_state(3), other)
    with pytest.raises(ValueError):
        one + other


@pytest.mark.parametrize("missing", ["identity_offsets", "identity_key", "identity_sum"])
def test_a_state_without_a_part_of_its_tables_is_refused(missing):
    state = dataclasses.replace(new_state(2), **{missing: None})
    with pytest.raises(ValueError, match="no identity tables"):
        state.identity_tables()


@identity_or_not
def test_to_moves_every_tensor(identity):
    state = new_state(2, identity=identity)
    moved = state.to("meta").state_dict()
    tensors = [value for value in moved.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == (7 if identity else 3)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert_equal(state.to(torch.device("cpu")), state)


@identity_or_not
def test_save_and_load(identity, tmp_path):
    state = new_state(3, identity=identity)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    assert_equal(UserState(**torch.load(tmp_path / "state.pt")), state)


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        new_state(1).count = torch.zeros(1)


@identity_or_not
def test_a_tuple_selects_as_a_list_does(identity):
    state = new_state(3, identity=identity)
    assert_equal(state[(0, 2)], state[[0, 2]])
    assert_equal(state[(1,)], state[1:2])


def test_states_and_batches_compare_by_identity():
    state = new_state(1)
    assert state == state and state != new_state(1)
