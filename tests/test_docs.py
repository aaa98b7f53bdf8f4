"""Runs the pages' code: Python blocks, and the lines that call the package's commands.

The pages run in the order of PAGES and in one folder: later ones use the log and the run that
docs/index.md makes.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch.distributed as dist
import tyro

from ifa_torchrec.__main__ import main
from ifa_torchrec.commands.build_states import BuildStatesConfig
from ifa_torchrec.commands.compare import CompareConfig
from ifa_torchrec.commands.data import AnySource
from ifa_torchrec.commands.evaluate import EvaluateConfig
from ifa_torchrec.commands.explain import ExplainConfig
from ifa_torchrec.commands.export import ExportConfig
from ifa_torchrec.commands.serve import ServeConfig
from ifa_torchrec.commands.states import StatesConfig
from ifa_torchrec.commands.train import TrainCommand
from ifa_torchrec.commands.tune import TuneConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    "docs/index.md",
    "docs/concepts.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "howto").glob("*.md")),
]
EXAMPLES, LAUNCH = (
    sorted(str(page.relative_to(ROOT)) for page in ROOT.glob(pattern))
    for pattern in ("examples/*/README.md", "docs/launch/*.md")
)
OPTIONS = {
    "train": TrainCommand,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "explain": ExplainConfig,
    "build-states": BuildStatesConfig,
    "states": StatesConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "tune": TuneConfig,
    "data": AnySource,
}


def blocks(page: str) -> list[tuple[str, int, str]]:
    """Language, line and text of each code block of a page."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(block[1], text[: block.start(2)].count("\n"), block[2]) for block in found]


def commands(text: str) -> list[list[str]]:
    """The lines of a block that call a command of the package: its name, then its arguments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (
        re.search(r"(?:^|bin/|\s)ifa(?:_torchrec)? ([a-z][a-z-]*)(?: --(?= ))?(.*)", line)
        for line in lines
    )
    return [[line[1], *shlex.split(line[2].rstrip("& "), comments=True)] for line in found if line]


def run_python(page: str, line: int, text: str, names: dict) -> None:
    """Run a block so that an error shows the page's line."""
    exec(compile("\n" * line + text, ROOT / page, "exec"), names)


def run_command(name: str, arguments: list[str], monkeypatch) -> None:
    """Run a command of the package in this process."""
    monkeypatch.setattr("sys.argv", ["ifa", name, *arguments])
    main()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("docs")


def is_run(name: str, arguments: list[str]) -> bool:
    """Whether a printed command is run here: not servers, which do not end, commands that need files not
    available here, or those that compile for a minute, which tests/serving covers."""
    return name in OPTIONS.keys() - {"serve", "data", "tune"} and "--package" not in arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names: dict = {}
    for language, line, text in blocks(page):
        if language == "python":
            run_python(page, line, text, names)
        # tests/distributed covers ranks, tests/commands a bucket
        elif language == "sh" and not re.search("torchrun|s3://", text):
            for name, *arguments in commands(text):
                if is_run(name, arguments):
                    run_command(name, arguments, monkeypatch)
    if dist.is_initialized():
        dist.destroy_process_group()
    if page == "docs/index.md":
        printed = capsys.readouterr().out
        assert "['taken', 'duplicate']" in printed
        gauc = re.search(r'"gauc": ([\d.]+)', printed)
        assert gauc is not None and float(gauc[1]) == pytest.approx(0.88, abs=0.03)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_has_no_placeholder_of_its_template(page):
    assert not re.findall(r"\b(?:TABLE_[A-Z_]+|MEASURED|SEEDS|COSTED|JOURNEY)\b", page.read_text())


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    python = [block for block in blocks("README.md") if block[0] == "python"]
    assert python
    for _, line, text in python:
        run_python("README.md", line, text, names)


def printed(page: str) -> list[list[str]]:
    """The commands on a page whose options can be checked; shell variables are replaced by 0."""
    text = "".join(text for language, _, text in blocks(page) if language != "python")
    text = re.sub(r"\$\w+", "0", text)
    return [command for command in commands(text) if command[0] in OPTIONS]


@pytest.mark.parametrize(
    "page", filter(printed, ["README.md", "CONTRIBUTING.md", *EXAMPLES, *LAUNCH, *PAGES])
)
def test_a_printed_command_has_options_that_there_are(page):
    for name, *arguments in printed(page):
        tyro.cli(OPTIONS[name], args=arguments)
