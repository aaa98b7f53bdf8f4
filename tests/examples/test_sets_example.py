"""examples/complete_journey/sets.py: after a short training on real purchases it draws two sets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "complete_journey" / "sets.py"
spec = importlib.util.spec_from_file_location("complete_journey_sets", EXAMPLE)
assert spec and spec.loader
sets = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = sets
spec.loader.exec_module(sets)


@pytest.mark.slow
def test_draws_both_sets(real_log, tmp_path: Path, capsys) -> None:
    options = sets.Options(
        data=real_log.path, run=tmp_path / "run", picture=tmp_path / "sets.png", size=5
    )
    found = sets.main(options)
    assert list(found) == ["the best by their own scores", "chosen one by one"]
    assert all(numbers["ndcg@5"] > 0 for numbers in found.values())
    assert (tmp_path / "sets.png").read_bytes()[1:4] == b"PNG"
    printed = capsys.readouterr().out
    assert "the best by their own scores" in printed and "chosen one by one" in printed
    dataset, places = sets.chosen(options)
    assert {int(place.max()) for place in places.values()} == {5}
    number = sets.least_in_common(dataset, places)

    def shared(n: int) -> int:
        rows = dataset.candidate_rows([n])[0]
        return int(np.logical_and(*(place[rows] > 0 for place in places.values())).sum())

    assert shared(number) == min(shared(n) for n in range(len(dataset)))
    table = sets.table(dataset, places["chosen one by one"], number)
    assert len(table) == 5 and table["name"].map(len).min() > 3
