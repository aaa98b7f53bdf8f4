"""Write an event log from files that a schema describes, or from a public data set; or report on one.

    ifa data prepare SCHEMA.json --out runs/data/mine
    ifa data prepare SCHEMA.json --out runs/data/june --vocabulary runs/data/may
    ifa data prepare SCHEMA.json --out runs/data/mine --parts 64
    ifa data prepare SCHEMA.json --out runs/data/mine --parts 64 --engine spark
    ifa data movielens ml-25m --out runs/data/ml-25m
    ifa data report runs/data/mine

`ifa data prepare --help`, and so on, lists the options of each command.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from ifa_torchrec.commands.data_report import write_report
from ifa_torchrec.data import EventLog
from ifa_torchrec.data.prepare import load_schema, prepare
from ifa_torchrec.data.public import kuairand, movielens, recbole, recflow, taobao
from ifa_torchrec.data.remote import full_name, is_uri
from ifa_torchrec.errors import ConfigError

Given = Annotated[Path, tyro.conf.Positional]


class Source(ABC):
    """A source from which an event log is written."""

    @abstractmethod
    def write(self) -> EventLog:
        """Write the log."""


@dataclass(frozen=True)
class Prepare(Source):
    """Write the log that a schema describes.

    Example:
        >>> from ifa_torchrec.commands.data import Prepare
        >>> log = Prepare(Path("schema.json"), Path("runs/data/mine")).write()  # doctest: +SKIP
    """

    schema: Given
    """A JSON file; ifa_torchrec.data.prepare.schema describes it."""
    out: Path
    """The folder of the log; it must not exist yet."""
    memory: str = "4GB"
    """Memory that DuckDB may use before it spills to disk; on Spark, in each task and in the driver."""
    max_refused: float = 0.01
    """Maximum share of a table's rows that may be refused."""
    vocabulary: str | Path | None = None
    """A log, or a run, whose vocabulary to extend: the ids that it has keep their rows."""
    parts: int = 1
    """The number of parts into which the events and requests are split, by a hash of the user."""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """Run on this machine (duckdb), or in a Spark session (spark; needs the extra `spark`)."""

    def write(self) -> EventLog:
        """See Source."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return prepare(load_schema(options.pop("schema")), **options)


@dataclass(frozen=True)
class Report:
    """Write an HTML page with figures and plots of a log. Needs the extra `demo`.

    Example:
        >>> from ifa_torchrec.commands.data import Report
        >>> Report(Path("runs/data/mine")).write()  # doctest: +SKIP
    """

    log: Annotated[str | Path, tyro.conf.Positional]
    """The folder of the log, or its URI."""
    out: Path | None = None
    """The page; by default LOG.html, next to the log's folder."""

    def write(self) -> Path:
        """Write the page.

        Returns:
            The path of the page.

        Raises:
            LogError: the log is missing or damaged.
            WriteError: the page cannot be written.
            ConfigError: the log is given by a URI, and ``out`` is missing.
        """
        place = full_name(self.log)  # "." has no name
        if self.out is None and is_uri(place):
            raise ConfigError(f"{place}: the page cannot be written next to a URI; give --out")
        log, file = EventLog(place), self.out or Path(f"{place}.html")
        write_report(log, file)
        return file


def _public(reader: ModuleType) -> Any:
    """The command for a public data set, under the reader's name."""
    name = reader.__name__.rpartition(".")[2]
    about = (reader.prepare.__doc__ or "").split("\n    Args:")[0].strip()
    options = make_dataclass(
        name.title(),
        [("folder", Given), ("out", Path)],
        bases=(Source,),
        frozen=True,
        namespace={"write": lambda self: reader.prepare(self.folder, self.out)},
    )
    return Annotated[options, tyro.conf.subcommand(name, description=about)]


if TYPE_CHECKING:
    AnySource = Source | Report
else:
    AnySource = Union[
        (
            Annotated[Prepare, tyro.conf.subcommand("prepare")],
            Annotated[Report, tyro.conf.subcommand("report")],
            *map(_public, (kuairand, movielens, recbole, recflow, taobao)),
        )
    ]


def main(source: Annotated[AnySource, tyro.conf.arg(name="")]) -> None:
    """Run the command; its help is the docstring of this module."""
    if isinstance(source, Report):
        print(f"Wrote {source.write()}")
        return
    log = source.write()
    print((log.path / "report.json").read_text())


main.__doc__ = __doc__
