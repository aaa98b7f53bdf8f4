"""The cost of a log ten times as large: proportional for prepare, hardly more for opening it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from log import STAGES, Options, make_tables, measure

EVENTS = 1_000_000
GROWTH = {  # limits (factor, addend) relative to the small log, for seconds and for megabytes
    "prepare": ((15, 0), (6, 0)),
    "open": ((3, 0.2), (1, 5)),
    "first batch": ((10, 0.2), (1, 60)),
    "sample 1,000 steps": ((15, 0.2), (1, 30)),
    "load 100 batches": ((10, 0.5), (1, 60)),
}
"""Two or three times the actual growth. A copy of the log's events (24 MB) or an index of that size
would exceed the megabytes, quadratic time the seconds."""


@pytest.mark.slow
def test_stages_grow_no_more_than_they_may(tmp_path: Path) -> None:
    options = Options(events=EVENTS, items=100_000)
    found = []
    for events in (EVENTS // 10, EVENTS):
        folder = tmp_path / str(events)
        folder.mkdir()
        make_tables(folder, events, options)
        found.append({name: measure(name, folder, parts=1) for name in STAGES})
    tenth, whole = found
    assert whole.keys() == GROWTH.keys()
    for name, bounds in GROWTH.items():
        for figure, (times, more) in zip(("seconds", "megabytes"), bounds, strict=True):
            most = times * tenth[name][figure] + more
            assert 0 <= whole[name][figure] <= most, (name, figure, tenth[name], whole[name])
