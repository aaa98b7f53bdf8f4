"""Estimates what a log needs on a cluster: disk, network, cores of the loader, preparation.

    python examples/plan_for_cluster/log_size.py                      # 10^12 events, 512 GPUs
    python examples/plan_for_cluster/log_size.py --events 1_000_000_000 --hosts 2

Computes from log.json, which benchmarks/log.py measured on one machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.errors import ConfigError

FILE = Path(__file__).parent / "log.json"


@dataclass(frozen=True)
class Rates:
    """The measured cost per event.

    Args:
        measured: command, commit and machine of the measurement.
        parquet_bytes: bytes per event in the log's Parquet files.
        column_bytes: bytes per event in the memory-mapped columns.
        prepared_a_core_second: events, with as many candidates, prepared per core and second.
        loaded_a_core_second: events put into batches per core and second.
        loaded_history: mean events per request of that measurement; longer histories cost less per
        event.

    Example:
        >>> from log_size import Rates
        >>> Rates("by hand", 8.0, 24.0, 50_000, 20_000_000, 12.0).column_bytes
        24.0
    """

    measured: str
    parquet_bytes: float
    column_bytes: float
    prepared_a_core_second: float
    loaded_a_core_second: float
    loaded_history: float


@dataclass(frozen=True)
class Options:
    """The log and the cluster."""

    events: float = 1e12
    """Number of events in the log."""
    hosts: int = 64
    """Number of hosts."""
    gpus: int = 8
    """GPUs per host, with one rank each."""
    cores: int = 96
    """Cores per host."""
    storage_gb_per_s: float = 3.0
    """A host's read bandwidth from the log's storage, in 10^9 bytes per second."""
    step_events: int = 256_000
    """Events in a rank's batch; plan.py assumes 64 requests of 4,000."""
    step_ms: float = 25.0
    """Milliseconds per training step. An assumption, not measured: twice the estimate of plan.py's
    planner for only the tables."""


def read_rates(file: Path = FILE) -> Rates:
    """Read the rates from a file that benchmarks/log.py wrote.

    Raises:
        ConfigError: the file does not exist, or is not such a file.
    """
    names = {field.name for field in fields(Rates)}
    try:
        content = json.loads(file.read_text())
        rates = Rates(**{name: content[name] for name in names})
        if min(getattr(rates, name) for name in names - {"measured"}) <= 0:
            raise ValueError("a figure is not above 0")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} must have {', '.join(sorted(names))} ({error!r}); run benchmarks/log.py"
        ) from error
    return rates


def report(options: Options, rates: Rates) -> str:
    """The text that this script prints.

    Raises:
        ConfigError: an option is not above 0.

    Example:
        >>> from log_size import Options, Rates, report
        >>> text = report(Options(), Rates("by hand", 8.0, 24.0, 50_000, 20_000_000, 12.0))
        >>> text.splitlines()[2]
        'disk: 8.0 TB of Parquet, 24.0 TB of columns'
    """
    for field in fields(options):
        if getattr(options, field.name) <= 0:
            raise ConfigError(f"{field.name} must be above 0, got {getattr(options, field.name)}")
    parquet, columns = options.events * rates.parquet_bytes, options.events * rates.column_bytes
    speed = options.storage_gb_per_s * 1e9
    cores = options.hosts * options.cores
    of_gpu = 1000 * options.step_events / options.step_ms  # events per second
    of_host = options.gpus * of_gpu
    loaders = of_gpu / rates.loaded_a_core_second
    prepare = options.events / rates.prepared_a_core_second
    return "\n".join(
        [
            f"{options.events:,.0f} events; {options.hosts} hosts of {options.gpus} GPUs and "
            f"{options.cores} cores",
            f"from: {rates.measured}",
            f"disk: {parquet / 1e12:,.1f} TB of Parquet, {columns / 1e12:,.1f} TB of columns",
            "  on a host, whose ranks open only their own parts: "
            f"{columns / options.hosts / 1e12:,.2f} TB of columns",
            "network, to copy a host's parts to it, as Parquet: "
            f"{parquet / options.hosts / speed / 60:,.1f} minutes",
            f"a step of {options.step_events:,} events in {options.step_ms:g} ms: "
            f"{of_gpu / 1e6:,.1f} million events per second and GPU, "
            f"{of_host / 1e6:,.0f} million per host",
            f"  loader: {loaders:,.2f} cores per GPU, {options.gpus * loaders:,.1f} of a host's "
            f"{options.cores}; measured on histories of {rates.loaded_history:,.0f} events, longer ones "
            "cost less per event",
            f"  read from columns: {of_host * rates.column_bytes / 1e9:,.1f} GB per second and host, "
            "from the page cache, or from disk if the columns do not fit into it",
            f"preparation: {prepare / 3600:,.0f} core-hours; {prepare / cores / 3600:,.1f} hours on all "
            f"{cores:,} cores at DuckDB's rate",
        ]
    )


def main() -> None:
    """The command line."""
    with as_command():
        print(report(tyro.cli(Options, description=__doc__), read_rates()))


if __name__ == "__main__":
    main()
