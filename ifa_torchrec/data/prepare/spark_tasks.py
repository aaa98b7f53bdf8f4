"""The Spark tasks: they run DuckDB statements on one file of the sources, or on the users of one part.

Tasks write their tables to a folder that all machines share:

    WORK/read/SECTION/file-N.parquet           the rows of a file
    WORK/rows/SECTION/_part=P/                 the rows of the users of a part, with their codes (_code)
    WORK/parts/P/TABLE.parquet                 tables of a part
    WORK/ids/N/part-P.parquet, WORK/codes/N.parquet   ids of a part, and codes, by number of the name

Files appear atomically, so a task may run again, or twice at the same time.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.prepare.ids import hashes_of, ids_of
from ifa_torchrec.data.prepare.report import figures_of_rows
from ifa_torchrec.data.prepare.requests import group_requests
from ifa_torchrec.data.prepare.schema import PrepareSchema
from ifa_torchrec.data.prepare.sources import complete_rows, read_section, sections_of
from ifa_torchrec.data.prepare.splits import Splits
from ifa_torchrec.data.prepare.sql import Parts, first_row, literal, quoted, write_parquet
from ifa_torchrec.data.prepare.steps import database, write_rows
from ifa_torchrec.data.prepare.tallies import Span
from ifa_torchrec.data.schema import USER

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_TABLES = ("codes_user", "events_rows", "requests", "sessions")


@dataclass(frozen=True)
class Job:
    """The data that all tasks of a log need.

    Args:
        schema: the schema of the log.
        draft: the folder in which the log is written; it contains WORK.
        memory: the memory that DuckDB may use in a task.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare.spark_tasks import Job
        >>> Job(schema=None, draft=Path("draft"), memory="4GB").work.name
        'work'
    """

    schema: PrepareSchema
    draft: Path
    memory: str

    @property
    def work(self) -> Path:
        """The folder WORK."""
        return self.draft / "work"

    def file(self, *names: Any) -> Path:
        """The path of a file of WORK; its parent folders are created."""
        file = self.work.joinpath(*map(str, names))
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


class Task(ABC):
    """A task for one core; it is pickled and sent there."""

    @abstractmethod
    def run(self, threads: int) -> Any:
        """Run the task.

        Args:
            threads: the number of DuckDB threads.
        """


@dataclass(frozen=True)
class ReadFile(Task):
    """Read a file of a section; returns its refused rows, and the span of its times.

    Args:
        job: the job of the log.
        section: the name of the section.
        number: the number of the file.
        file: the path of the file.
        before: the number of rows in the section's files before it, if they are counted.

    Example:
        >>> from ifa_torchrec.data.prepare.spark_tasks import ReadFile
        >>> ReadFile(job=None, section="events", number=0, file="log.csv", before=0).number
        0
    """

    job: Job
    section: str
    number: int
    file: str
    before: int

    def run(self, threads: int) -> dict[str, Any]:
        """See Task."""
        schema, name = self.job.schema, self.section
        section = next(section for section in sections_of(schema) if section.name == name)
        section = replace(section, files=replace(section.files, files=[self.file]))
        with _scratch(self.job, threads) as sql:
            refused = read_section(sql, schema, section, self.before)
            times = Span(None, None)
            if name == "requests":
                times = Span(*first_row(sql, "SELECT min(time), max(time) FROM requests_rows"))
            file = self.job.file("read", name, f"file-{self.number:06}.parquet")
            write_parquet(sql, f"FROM {name}_rows", file)
        return {"refused": refused, "times": times}


@dataclass(frozen=True)
class GroupPart(Task):
    """Group the requests of a part's users; returns figures of their rows.

    Args:
        job: the job of the log.
        part: the number of the part.
        first: the earliest time of all requests, as SQL.

    Example:
        >>> from ifa_torchrec.data.prepare.spark_tasks import GroupPart
        >>> GroupPart(job=None, part=3, first="make_timestamp(0)").part
        3
    """

    job: Job
    part: int
    first: str

    def run(self, threads: int) -> dict[str, Any]:
        """See Task."""
        job, schema = self.job, self.job.schema
        with _scratch(job, threads) as sql:
            codes: list[str] = []
            for section in sections_of(schema):
                name = section.name
                if name == "items":
                    continue
                files = [job.file("rows", f"{name}.parquet")]  # without rows
                files += sorted(job.file("rows", name, f"_part={self.part}").glob("*.parquet"))
                listed = ", ".join(literal(str(file)) for file in files)
                rows = f"read_parquet([{listed}], hive_partitioning=false)"
                sql.execute(f"CREATE TABLE {name}_read AS SELECT * EXCLUDE (_code) FROM {rows}")
                sql.execute(f"CREATE VIEW {name}_rows AS FROM {name}_read WHERE _refused IS NULL")
                codes.append(f'SELECT "user" AS id, _code AS code FROM {rows} WHERE _code IS NOT NULL')
            sql.execute(f"CREATE TABLE codes_user AS {' UNION '.join(codes)}")
            sql.execute(f"CREATE VIEW first_request AS SELECT {self.first} AS time")
            complete_rows(sql, schema)
            figures = figures_of_rows(sql, schema)
            for table in ("events", "requests"):
                items = f"SELECT DISTINCT item FROM {table}_rows"
                write_parquet(sql, items, job.file("parts", self.part, f"items_of_{table}.parquet"))
            group_requests(sql, schema)
            for table in _TABLES:
                write_parquet(sql, f"FROM {table}", job.file("parts", self.part, f"{table}.parquet"))
        return figures


@dataclass(frozen=True)
class CountPart(Task):
    """Write the ids of a part.

    Args:
        job: the job of the log.
        part: the number of the part.
        splits: the splits of the log.

    Example:
        >>> from ifa_torchrec.data.prepare.spark_tasks import CountPart
        >>> CountPart(job=None, part=3, splits=None).part
        3
    """

    job: Job
    part: int
    splits: Splits

    def run(self, threads: int) -> None:
        """See Task."""
        with _part(self.job, self.part, threads) as sql:
            queries = ids_of(self.job.schema, self.splits.of_part(sql))
            for n, query in enumerate(queries.values()):
                file = self.job.file("ids", n, f"part-{self.part}.parquet")
                write_parquet(sql, f"SELECT DISTINCT * FROM ({query})", file)


@dataclass(frozen=True)
class WritePart(Task):
    """Write the events and requests of a part; returns figures of them.

    Args:
        job: the job of the log.
        part: the number of the part.
        parts: the number of parts.
        splits: the splits of the log.
        known: the number of rows of the item table.

    Example:
        >>> from ifa_torchrec.data.prepare.spark_tasks import WritePart
        >>> WritePart(job=None, part=3, parts=4, splits=None, known=9).known
        9
    """

    job: Job
    part: int
    parts: int
    splits: Splits
    known: int

    def run(self, threads: int) -> dict[str, Any]:
        """See Task."""
        job = self.job
        with _part(job, self.part, threads) as sql:
            _view(sql, "items", job.file("codes", "items.parquet"))
            for n, name in enumerate(hashes_of(job.schema)):
                if name != USER:
                    _view(sql, f"codes_{name}", job.file("codes", f"{n}.parquet"))
            splits, parts = self.splits.of_part(sql), Parts(self.parts, self.part)
            return write_rows(sql, job.schema, splits, self.known, job.draft, parts)


@contextmanager
def _scratch(job: Job, threads: int) -> Generator[DuckDBPyConnection]:
    """A database on the local disk of the machine that runs the task."""
    with (
        tempfile.TemporaryDirectory() as folder,
        database(Path(folder) / "tables", job.memory, threads) as sql,
    ):
        yield sql


@contextmanager
def _part(job: Job, part: int, threads: int) -> Generator[DuckDBPyConnection]:
    """A database with the tables of a part."""
    with _scratch(job, threads) as sql:
        for table in _TABLES:
            _view(sql, table, job.file("parts", part, f"{table}.parquet"))
        yield sql


def _view(sql: DuckDBPyConnection, name: str, file: Path) -> None:
    sql.execute(f"CREATE VIEW {quoted(name)} AS FROM read_parquet({literal(str(file))})")
