"""Whole states as records: what a build writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.states.layout import BLOCK, key_user, user_key, user_keys
from ifa_torchrec.serving.states.records import Head, RecordCodec, Sums, weight_and_mean


def whole_records(
    codec: RecordCodec,
    users: Sequence[int | str],
    earlier: UserState,
    earlier_times: Sequence[int],
    last: UserState,
    last_times: Sequence[int],
) -> dict[bytes, bytes]:
    """The records of B users' states, by their keys; arguments as in ``StateStore.write``."""
    early, late = np.asarray(earlier_times, np.int64), np.asarray(last_times, np.int64)
    days = torch.from_numpy((late - early) / MICROSECONDS_PER_DAY * (earlier.count.numpy() > 0))
    whole = _aged(codec, earlier, days) + _aged(codec, last, 0 * days)
    bodies: dict[bytes, bytes] = {}
    blocks = [codec.no_blocks] * len(users)
    before = [b""] * len(users)
    if whole.identity_offsets is not None:
        user = user_keys(users)
        bodies = _row_bodies(codec, user, whole, late)
        members, blocks = _member_bodies(codec, user, whole)
        bodies |= members
        before = _rows_before(codec, earlier, early, last)
    for b, head in enumerate(_heads(whole, late)):
        bodies[codec.keys.head(users[b])] = codec.pack_head(head) + blocks[b]
    for b, head in enumerate(_heads(earlier, early)):
        bodies[codec.keys.before(users[b])] = codec.pack_head(head) + before[b]
    return {key: codec.seal(key, body) for key, body in bodies.items()}


def records_of(records: Mapping[bytes, bytes], user: int | str) -> list[bytes]:
    """Of records by their keys, the keys of a user's."""
    mine = user_key(user)
    return [key for key in records if key_user(key) == mine]


def _aged(codec: RecordCodec, state: UserState, days: torch.Tensor) -> UserState:
    """A state some days [B] later, in float64."""
    factor = torch.exp(-days[:, None] * torch.from_numpy(codec.decay))[..., None]
    aged = dataclasses.replace(
        state,
        key_sum=state.key_sum.double() * factor,
        key_value=state.key_value.double() * factor[..., None],
    )
    if state.identity_offsets is None:
        return aged
    offsets, _, value, total = state.identity_tables()
    days = days[request_of_row(offsets)]
    factor = torch.exp(-days[:, None] * torch.from_numpy(codec.identity_decay))
    return dataclasses.replace(
        aged,
        identity_sum=total.double() * factor,
        identity_value=value.double() * factor[..., None],
    )


def _heads(state: UserState, times: np.ndarray) -> list[Head]:
    weight, mean = weight_and_mean(state.key_sum, state.key_value)
    sums = [Sums(*of_user) for of_user in zip(times.tolist(), weight, mean, strict=True)]
    return [Head(*of_user) for of_user in zip(sums, state.count.tolist(), strict=True)]


def _request_and_key(state: UserState) -> tuple[np.ndarray, np.ndarray]:
    """Of each identity row, [U] both."""
    offsets, key, *_ = state.identity_tables()
    return request_of_row(offsets).numpy(), key.numpy()


def _packed_rows(
    codec: RecordCodec, state: UserState, times: np.ndarray, chosen: np.ndarray | slice
) -> list[bytes]:
    """Some of a state's identity rows; its requests are at ``times`` [B]."""
    _, _, value, total = state.identity_tables()
    weight, mean = weight_and_mean(total[chosen], value[chosen])
    return codec.pack_rows(times[_request_and_key(state)[0][chosen]], weight, mean)


def _row_bodies(
    codec: RecordCodec, user: np.ndarray, state: UserState, times: np.ndarray
) -> dict[bytes, bytes]:
    request, key = _request_and_key(state)
    rows = _packed_rows(codec, state, times, slice(None))
    return dict(zip(codec.keys.rows(user[request], key), rows, strict=True))


def _member_bodies(
    codec: RecordCodec, user: np.ndarray, state: UserState
) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Records of which keys have a row; and which blocks each user has [B]."""
    request, key = _request_and_key(state)
    places, place = np.unique(np.stack([request, key // BLOCK]), axis=1, return_inverse=True)
    members = _bits(place, key % BLOCK, (places.shape[1], BLOCK // 8))
    bodies = [codec.pack_members(bits.tobytes()) for bits in members]
    keys = codec.keys.members_of(user[places[0]], places[1])
    blocks = _bits(places[0], places[1], (len(user), len(codec.no_blocks)))
    return dict(zip(keys, bodies, strict=True)), [bits.tobytes() for bits in blocks]


def _bits(row: np.ndarray, number: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Rows of bits as bytes, in which these are set."""
    bits = np.zeros(shape, np.uint8)
    np.bitwise_or.at(bits, (row, number // 8), (1 << number % 8).astype(np.uint8))
    return bits


def _rows_before(
    codec: RecordCodec, earlier: UserState, times: np.ndarray, last: UserState
) -> list[bytes]:
    """For each request, the rows that its last events changed, as they were."""
    key_range = codec.layout.identity_key_range
    request, key = _request_and_key(last)
    request_earlier, key_earlier = _request_and_key(earlier)
    place = request_earlier * key_range + key_earlier
    chosen = np.flatnonzero(np.isin(place, request * key_range + key))
    packed = dict(zip(place[chosen], _packed_rows(codec, earlier, times, chosen), strict=True))
    rows: list[dict[int, bytes]] = [{} for _ in times]
    for b, k in zip(request.tolist(), key.tolist(), strict=True):
        rows[b][k] = packed.get(b * key_range + k, b"")
    return [codec.pack_row_list(of_request) for of_request in rows]
