"""examples/criteo: both models learn the synthetic rows, and other files than Criteo's are refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "criteo" / "compare.py"
spec = importlib.util.spec_from_file_location("criteo_compare", EXAMPLE)
assert spec and spec.loader
compare = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = compare
spec.loader.exec_module(compare)


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, options), "--table-rows", "500"])
    compare.main()


@pytest.mark.slow
def test_both_models_learn(monkeypatch, capsys, tmp_path: Path) -> None:
    run(monkeypatch, "--out", tmp_path, "--rows", 42_000)
    printed = capsys.readouterr().out
    assert "These rows are synthetic" in printed and "36,000 rows to train on, 6,000 to test" in printed
    aucs = [float(line.split()[-3]) for line in printed.splitlines()[-2:]]
    assert all(0.7 < auc < 0.9 for auc in aucs) and abs(aucs[0] - aucs[1]) < 0.03


def test_rows_are_what_the_file_says(tmp_path: Path) -> None:
    """Numbers become logarithms, missing ones 0; equal ids get equal rows, missing ids as well."""
    file = tmp_path / "train.txt"
    row = ["1", "0", "-2", "", *["5"] * 10, "68fd1e64", "80e26c9b", *["fb936136"] * 23, ""]
    file.write_text("\n".join("\t".join(fields) for fields in (row, ["0", *row[1:]])) + "\n")
    rows = compare.read(file, compare.Options(rows=2, table_rows=1000))
    assert rows.labels.tolist() == [[1.0], [0.0]]
    np.testing.assert_allclose(rows.numbers[0, :4], [np.log(4), np.log(2), 0, np.log(9)], rtol=1e-6)
    assert rows.ids.shape == (2, 26) and (rows.ids[0] == rows.ids[1]).all()
    assert len(set(rows.ids[0].tolist())) == 4 and rows.ids.max() < 1000


def test_what_is_no_criteo_file_is_refused(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    compare.make_up(file, 100)
    with pytest.raises(SystemExit, match=r"has 100 rows, but --rows is 240,000"):
        run(monkeypatch, "--file", file)
    frame = pd.read_csv(file, sep="\t", header=None)
    frame[3] = -7
    frame.to_csv(file, sep="\t", header=False, index=False)
    with pytest.raises(SystemExit, match=r"int_2 has -7; Criteo's numbers are at least -3"):
        run(monkeypatch, "--file", file, "--rows", 100)
    file.write_text("1,2,3\n")
    with pytest.raises(
        SystemExit, match=r"train.txt does not have Criteo's layout: .*Expected 40 columns"
    ):
        run(monkeypatch, "--file", file, "--rows", 1)
