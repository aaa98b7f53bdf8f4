"""Whole states as records: what a build writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.ops.jagged import request_of_row
from ifa_torchrec.serving.states.dense import Head, Latest, Sums
from ifa_torchrec.serving.states.layout import key_user, user_key
from ifa_torchrec.serving.states.pages import Rows, page_parts
from ifa_torchrec.serving.states.records import Before, RecordCodec, weight_and_mean


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
    rows, rows_earlier = _rows(codec, whole, late), _rows(codec, earlier, early)
    changed = _rows(codec, last, late)
    heads, heads_earlier = _heads(last, late), _heads(earlier, early)
    bodies: dict[bytes, bytes] = {}
    for b, user in enumerate(users):
        pages = _pages(codec, user, rows[b], bodies)
        head = codec.pack_head(heads_earlier[b], Latest.of(heads[b]), pages)
        bodies[codec.keys.head(user)] = head
        place = rows_earlier[b].find(changed[b].key)
        there = place < len(rows_earlier[b])
        before = Before(rows_earlier[b][place[there]], changed[b].key[~there])
        bodies[codec.keys.before(user)] = codec.pack_before(before, head)
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


def _rows(codec: RecordCodec, state: UserState, times: np.ndarray) -> list[Rows]:
    """Each request's identity rows; the requests are at ``times`` [B]."""
    if state.identity_offsets is None:
        return [Rows.none(codec.layout)] * len(times)
    offsets, key, value, total = state.identity_tables()
    time = times[request_of_row(offsets).numpy()]
    rows = Rows(key.numpy(), time, *weight_and_mean(total, value))
    bounds = offsets.tolist()
    return [rows[begin:end] for begin, end in pairwise(bounds)]


def _pages(codec: RecordCodec, user: int | str, rows: Rows, bodies: dict[bytes, bytes]) -> np.ndarray:
    """Add a user's pages to the bodies; their first keys."""
    bounds = np.array([0, *(part.stop for part in page_parts(0, len(rows)))])
    first = rows.key[bounds[:-1]] if len(rows) else rows.key
    first[:1] = 0
    pages = codec.rows.pack(rows, bounds, first)
    bodies |= dict(zip(codec.keys.pages(user, first), pages, strict=True))
    return first
