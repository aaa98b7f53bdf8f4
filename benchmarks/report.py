"""Helpers for the pages that benchmarks write under docs/: tables, and how they were measured."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cpu_name() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The current commit; with "-dirty" if files differ from it that no benchmark writes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    written = [f":(exclude){path}" for path in ("docs", "examples/plan_for_cluster/log.json")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def measured_by(command: str | None = None) -> str:
    """A text with the command (by default the one that started this process, with its options), the
    commit and the machine."""
    if command is None:
        script = Path(sys.argv[0]).resolve().relative_to(ROOT)
        command = shlex.join(["python", str(script), *sys.argv[1:]])
    return f"`{command}` at commit {commit()}; {os.cpu_count()} cores ({cpu_name()})"


def over_seeds(seeds: int) -> str:
    """What a page's figures are, to follow the words "figures are"."""
    if seeds == 1:
        return "of one seed"
    return "means over the seeds, with half the distance between the extremes"
