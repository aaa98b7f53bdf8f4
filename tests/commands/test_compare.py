"""Curves of several runs, side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from ifa_torchrec.commands.compare import CompareConfig, compare
from ifa_torchrec.distributed import CheckpointError
from ifa_torchrec.errors import ConfigError, WriteError
from ifa_torchrec.training.curves import Curves
from ifa_torchrec.training.validations import Validations


def made(folder: Path, losses: list[float], valid: dict[int, float] | None = None) -> Path:
    """A training run with these losses, ten steps apart."""
    curves = Curves(folder / "tensorboard", 0)
    for number, loss in enumerate(losses, 1):
        curves.show({"train/loss": loss}, 10 * number)
    curves.close()
    if valid:
        Validations(folder, "gauc", {step: {"gauc": value} for step, value in valid.items()}).write()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return (
        made(folder / "a$b$", [1.0, 0.5], {10: 0.7, 20: 0.6}),
        made(folder / "no valid", [0.25] * 7),
    )


def test_a_row_a_run_and_one_picture(runs, tmp_path) -> None:
    table = compare(CompareConfig(runs, picture=tmp_path / "curves.svg"))
    assert table.index.tolist() == ["a$b$", "no valid"]
    assert table["steps"].tolist() == [20, 70]
    assert table["loss"].tolist() == pytest.approx([0.75, 0.25])
    assert table.loc["a$b$", ["best step", "valid gauc"]].tolist() == [10, 0.7]
    assert table.loc["no valid"].isna().tolist() == [False, False, True, True]
    picture = (tmp_path / "curves.svg").read_text()
    assert all(f"<!-- {name} -->" in picture for name in ("a$b$", "no valid", "gauc of the split valid"))


def test_two_runs_of_one_name_are_told_apart(runs, tmp_path) -> None:
    again = made(tmp_path / "a$b$", [1.0])
    assert compare(CompareConfig((runs[0], again))).index.tolist() == [str(runs[0]), str(again)]


def test_what_is_wrong_is_named(runs, tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing is not a training run"):
        compare(CompareConfig((tmp_path / "nothing",)))
    with pytest.raises(ConfigError, match=r"--metric ne: .* the metrics are \['gauc'\]"):
        compare(CompareConfig(runs, metric="ne"))
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        CompareConfig(runs, picture=tmp_path / "curves.jpg")
    with pytest.raises(ConfigError, match="one or more runs"):
        CompareConfig(())
    with pytest.raises(WriteError, match=r"curves\.png"):
        compare(CompareConfig(runs, picture=tmp_path / "no folder" / "curves.png"))
    (tmp_path / "validations.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"validations\.json: not what a training writes"):
        compare(CompareConfig((tmp_path,)))
