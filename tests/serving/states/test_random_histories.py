"""Random histories, built and appended in random parts, against one encoding of the whole history."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_state_store import CONFIG, DAY, Model, write

from ifa_torchrec.serving import Event, StateLayout, StateStore, open_key_value_store
from ifa_torchrec.serving.states import pages

USERS = [1, 2, 3]


def random_history(rng: random.Random) -> list[Event]:
    """Events of some users, many at the same instant, of few items or of all."""
    count, days, most = rng.choice([60, 250]), rng.choice([5, 90, 700]), rng.choice([4, 20])
    times = sorted(rng.randrange(days) * DAY for _ in range(count))
    return [
        Event(position, rng.choice(USERS), rng.randrange(most), time)
        for position, time in enumerate(times)
    ]


def assert_as_encoded(
    store: StateStore, model: Model, events: Sequence[Event], now: int, rng: random.Random
) -> None:
    """Candidates with known, unknown and new ids see the whole history's rows, row for row."""
    keys = [
        np.array([*rng.choices(model.every_key, k=rng.choice([1, 9, 60])), *[-1] * rng.choice([0, 2])])
        for _ in USERS
    ]
    state, as_of = store.read(USERS, [now] * len(USERS), keys, [True] * len(USERS))
    mine = [[e for e in events if e.user == u] for u in USERS]
    before = [[e for e in of if e.time < t] for of, t in zip(mine, as_of, strict=True)]
    whole = model.encode(before, as_of.tolist())
    for name in ("count", "key_sum", "key_value"):
        near(getattr(state, name), getattr(whole, name))
    for b in range(len(USERS)):
        of_user, expected = state[[b]], whole[[b]]
        asked = torch.isin(expected.identity_key, torch.from_numpy(keys[b]))
        assert of_user.identity_key.tolist() == expected.identity_key[asked].tolist()
        near(of_user.identity_sum, expected.identity_sum[asked])
        near(of_user.identity_value, expected.identity_value[asked])


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("seed", range(12))
def test_a_state_built_in_parts_equals_the_whole_historys(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(pages, "PAGE_ROWS", rng.choice([2, 5, 256]))  # so that pages are split
    config = dataclasses.replace(
        CONFIG,
        half_lives=rng.choice([(math.inf, 30.0), (7.0,) * 2]),
        identity_half_lives=rng.choice([(math.inf, 30.0, 7.0), (30.0,)]),
        identity_buckets=rng.choice([7, 64]),
        identity_head_dim=rng.choice([None, 0]),
    )
    model, events = Model(config), random_history(rng)
    built = rng.choice([0, len(events) // 2, len(events) - 9])
    store = StateStore.begin(
        open_key_value_store(str(tmp_path)), "v1", StateLayout.of(model.ifa), position=0
    )
    if built:
        write(store, model, events[:built])
    store.finish()
    seen, left = events[:built], events[built:]
    if rng.random() < 0.5:
        rng.shuffle(left)
    while left:
        part = rng.choice([1, 2, 7, 64])
        store.append(left[:part], model.encode_each)
        seen, left = seen + left[:part], left[part:]
        last = max(event.time for event in seen)
        for now in (last, last + 1, last + 40 * DAY):
            assert_as_encoded(store, model, seen, now, rng)
    store.key_values.close()
