"""How commands end: with a message for the user's errors, with a traceback for the program's."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import torchrun

from ifa_torchrec.__main__ import COMMANDS, main
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.data import LogError
from ifa_torchrec.distributed import CheckpointError, ShardingError
from ifa_torchrec.errors import ConfigError, DivergedError, ExistsError, UserError, WriteError, writing
from ifa_torchrec.serving import RequestError, StateError

OF_USERS = [
    ConfigError,
    CheckpointError,
    DivergedError,
    ExistsError,
    LogError,
    WriteError,
    RequestError,
    ShardingError,
    StateError,
    UserError,
]


@pytest.mark.parametrize("kind", OF_USERS)
def test_what_the_user_did_ends_with_its_message(kind: type[UserError]) -> None:
    with pytest.raises(SystemExit) as end, as_command():
        raise kind("--this is not that")
    assert end.value.code == "error: --this is not that"
    assert isinstance(end.value.__cause__, kind)


@pytest.mark.parametrize(
    "kind",
    [ValueError, FileExistsError, FloatingPointError, MemoryError, OSError, RuntimeError, KeyError],
)
def test_all_else_is_raised_as_it_is(kind: type[Exception]) -> None:
    """numpy's and torch's ValueErrors are the program's errors."""
    with pytest.raises(kind, match="of a library") as error, as_command():
        raise kind("of a library")
    assert type(error.value) is kind


@pytest.mark.parametrize("kind", [ConfigError, KeyError])
def test_torchrun_is_told(kind: type[Exception], tmp_path: Path, monkeypatch) -> None:
    """Through the file from which torchrun makes the job's summary."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises((SystemExit, KeyError)), as_command():
        raise kind("told")
    message = json.loads(file.read_text())["message"]
    assert message["message"].startswith(f"{kind.__name__}: ") and "told" in message["message"]
    assert "in test_torchrun_is_told" in message["extraInfo"]["py_callstack"]


def test_help_is_no_failure(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(sys, "argv", ["ifa", "evaluate", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and not file.exists()


def test_an_option_that_cannot_be(tmp_path: Path, monkeypatch, capsys) -> None:
    """Also if the configuration's class finds it, which tyro calls."""
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--optimizers.dense-lr", "-1"]
    monkeypatch.setattr(sys, "argv", ["ifa", "train", *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "OptimizerConfig: dense_lr must be a number of at least 0, got -1" in said


def test_writing_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    with (
        pytest.raises(WriteError, match=rf"{place} cannot be written: .*Not a directory"),
        writing(place),
    ):
        place.mkdir()
    with pytest.raises(WriteError, match=r"run cannot be written: .*inline_container"), writing(place):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    for other in (RuntimeError("a bug"), ConfigError("an option"), ExistsError("a log")):
        with pytest.raises(type(other)) as error, writing(place):
            raise other
        assert error.value is other


FAILS = """
import os
from ifa_torchrec.__main__ import COMMANDS, main
from ifa_torchrec.training import trainer

set_learning_rate = trainer.set_learning_rate

def fails(optimizer, config, step, progress):
    if step == 2 and os.environ["RANK"] == "1":
        raise KeyError("broken on this rank")
    set_learning_rate(optimizer, config, step, progress)

trainer.set_learning_rate = fails
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_all", "said"),
    [(False, "KeyError: 'broken on this rank'"), (True, "nowhere: no such event log")],
    ids=["a bug on one rank", "the user's fault on all"],
)
def test_under_torchrun(log, tmp_path: Path, of_all: bool, said: str) -> None:
    """The summary at the end shows the first failure."""
    (tmp_path / "fails.py").write_text(FAILS)
    data = tmp_path / "nowhere" if of_all else log.path
    options = [
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--ifa.embedding-dim",
        "8",
        "--max-requests",
        "4",
    ]
    done = torchrun(tmp_path / "fails.py", "train", *options)
    assert done.returncode != 0
    _, _, summary = done.stderr.partition("Failures:")
    _, _, cause = summary.partition("Root Cause")
    assert said in cause, done.stderr[-4000:]
    if not of_all:
        assert "rank      : 1" in cause
    else:
        assert "error: " in done.stderr.partition("Failures:")[0]


def test_a_reader_that_went_away_is_no_error() -> None:
    """`ifa COMMAND | head`."""
    code = "from ifa_torchrec.commands.command_line import as_command as a\nwith a(): print('x' * 10**6)"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == ""
    assert process.returncode == 141


def test_another_pipe_that_breaks_is_an_error() -> None:
    with pytest.raises(BrokenPipeError), as_command():
        raise BrokenPipeError("a client's")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_have_a_line_each(command: str) -> None:
    """The help joins the lines of a paragraph unless they are indented."""
    module = importlib.import_module(f"ifa_torchrec.commands.{command.replace('-', '_')}")
    lines = inspect.cleandoc(module.main.__doc__).splitlines()
    examples = [line for line in lines if line.lstrip().startswith(f"ifa {command}")]
    assert examples
    assert len(examples) == 1 or all(line.startswith("    ") for line in examples)
