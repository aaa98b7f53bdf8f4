"""``prepare`` on Spark, for logs too large for one machine: the same DuckDB statements, in Spark tasks.

A task reads one file of the sources (``read_section``), or processes the events and requests of the
users in one part. DuckDB does for each part what it does for all users on one machine, and the figures
of the parts are added (``tallies``). Spark itself only brings the rows of a user together: it joins them
with the users' codes and shuffles them by part. The SQL of the schema is DuckDB's here as well.

The driver numbers users, items and values, writes the items, and cuts the splits by the requests' times.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ifa_torchrec.data.parts import part_in_sql
from ifa_torchrec.data.prepare.files import each_file
from ifa_torchrec.data.prepare.ids import Numbering, hashes_of, ids_of
from ifa_torchrec.data.prepare.report import joins_of, report_of
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema
from ifa_torchrec.data.prepare.sources import check_refused, read_section, sections_of
from ifa_torchrec.data.prepare.spark_tasks import CountPart, GroupPart, Job, ReadFile, Task, WritePart
from ifa_torchrec.data.prepare.splits import Splits, cut_splits
from ifa_torchrec.data.prepare.sql import first_row, literal, quoted, write_parquet
from ifa_torchrec.data.prepare.tables import write_items
from ifa_torchrec.data.prepare.tallies import Refused, added
from ifa_torchrec.data.schema import USER, LogError
from ifa_torchrec.errors import require

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from pyspark.sql import SparkSession

_PATTERN = set("*?[]{}\\")


def check_spark(schema: PrepareSchema, out: str | Path, parts: int) -> None:
    """Refuse what is not supported on Spark.

    Raises:
        LogError: the schema has negatives, there are fewer than two parts, or Spark would treat the
            folder's name as a pattern.
        ModuleNotFoundError: PySpark is not installed.

    Example:
        >>> from ifa_torchrec.data.prepare import Events, PrepareSchema, Requests
        >>> from ifa_torchrec.data.prepare.spark import check_spark
        >>> rows = dict(files="log.csv", user="u", item="i", time="t")
        >>> schema = PrepareSchema(events=Events(**rows), splits={},
        ...                        requests=Requests(**rows, labels={"click": "c"}, negatives=4))
        >>> check_spark(schema, "log", 8)
        Traceback (most recent call last):
        ifa_torchrec.data.schema.LogError: requests.negatives=4: the draws depend on a request's number \
in the whole log, which a part does not know; leave out negatives, or use the engine duckdb
    """
    if schema.requests.negatives:
        raise LogError(
            f"requests.negatives={schema.requests.negatives}: the draws depend on a request's number "
            "in the whole log, which a part does not know; leave out negatives, or use the engine duckdb"
        )
    if parts < 2:
        raise LogError(
            f"parts={parts}: on Spark each task writes one part; set two or more, such as three per core"
        )
    if wrong := sorted(_PATTERN & set(os.path.abspath(out))):
        raise LogError(f"{out}: Spark treats {wrong} as a pattern; choose another folder")
    require("spark", "pyspark")


class OnSpark:
    """The steps of ``prepare`` on Spark.

    Args:
        sql: the driver's database.
        job: the data that all tasks need.
        parts: the number of parts to write.
        max_refused: maximum share of a table's rows that may be refused.
    """

    def __init__(self, sql: DuckDBPyConnection, job: Job, parts: int, max_refused: float) -> None:
        self.sql, self.job, self.schema = sql, job, job.schema
        self.parts, self.max_refused = parts, max_refused
        sections = [section for section in sections_of(self.schema) if section.name != "items"]
        # errors in a file's name, header or types are raised before Spark starts
        self.files = {
            section.name: each_file(section.name, section.files, bool(section.each), sql)
            for section in sections
        }
        self.spark = _session()

    def write(self, numbering: Numbering) -> tuple[dict[str, Any], dict[str, int]]:
        """Write the log's tables; returns its report, and the width of each vector feature."""
        sql, schema, parts = self.sql, self.schema, range(self.parts)
        refused, first = self._read()
        self._users()
        numbering.users()
        self._shuffle()
        rows = self._sum([GroupPart(self.job, part, first) for part in parts])
        for table in ("events", "requests"):
            self._views({f"{table}_rows": f"parts/*/items_of_{table}.parquet"})
        joins = joins_of(sql, schema, rows["joins"])
        splits = self._splits()
        self._run([CountPart(self.job, part, splits) for part in parts])
        names = enumerate(ids_of(schema, splits))
        self._views({f"ids_{name}": f"ids/{n}/*.parquet" for n, name in names})
        numbering.others()
        widths = write_items(sql, schema, self.job.draft / "items.parquet")
        self._write_codes()
        known = numbering.report[ITEM]["rows"]
        tasks = [WritePart(self.job, part, self.parts, splits, known) for part in parts]
        self._folders(splits)
        report = report_of(self._sum(tasks), rows, joins, numbering.report, refused)
        for left in self.job.draft.rglob(".part-*"):  # left by a cancelled task
            left.unlink()
        return report, widths

    def _read(self) -> tuple[dict[str, Refused], str]:
        """Read all sections; returns the refused rows of each, and the first request's time as SQL."""
        refused: dict[str, Refused] = {}
        sections = sections_of(self.schema)
        if sections[0].name == "items":
            refused["items"] = read_section(self.sql, self.schema, sections[0])
            check_refused("items", refused["items"], self.max_refused)
        tasks = [
            ReadFile(self.job, name, n, file, before)
            for name, files in self.files.items()
            for n, (file, before) in enumerate(files.items())
        ]
        results = iter(self._run(tasks))
        first = None
        for name, files in self.files.items():
            figures = reduce(added, [next(results) for _ in files])
            refused[name] = figures["refused"]
            check_refused(name, refused[name], self.max_refused)
            first = first or figures["times"].first
        return refused, "NULL::TIMESTAMP" if first is None else f"TIMESTAMP '{first}'"

    def _users(self) -> None:
        """Make the view `ids_user` with the users of events and requests."""
        users = [self._spark_table(f"read/{name}").select("user") for name in ("events", "requests")]
        both = users[0].union(users[1]).where("`user` IS NOT NULL").distinct()
        both.write.parquet(self._path("ids/user"))
        self.sql.execute(
            f"""CREATE VIEW ids_user AS SELECT "user" AS id, true AS known
            FROM {self._found("ids/user/*.parquet")}"""
        )

    def _shuffle(self) -> None:
        """Bring the rows of each user together, in the part determined by the user's code.

        Users without events and requests have no code; their rows may be in any part.
        """
        codes = self.job.file("codes", "users.parquet")
        part = part_in_sql("code", self.parts)
        write_parquet(
            self.sql, f"SELECT id AS _id, code AS _code, {part} AS _part FROM codes_user", codes
        )
        nobody = first_row(self.sql, f"SELECT {part_in_sql('0', self.parts)}")[0]
        any_part = f"IF(`user` IS NULL, {nobody}, CAST(pmod(hash(`user`), {self.parts}) AS INT))"
        known = self._spark_table("codes/users.parquet")
        for name in self.files:
            rows = self._spark_table(f"read/{name}")
            joined = rows.join(known, rows["user"] == known["_id"], "left").drop("_id")
            joined = joined.selectExpr(
                *(f"`{column}`" for column in rows.columns),
                "_code",
                f"coalesce(_part, {any_part}) AS _part",
            )
            joined.repartition(self.parts, "_part").write.partitionBy("_part").parquet(
                self._path(f"rows/{name}")
            )
            write_parquet(
                self.sql,
                f"SELECT *, NULL::BIGINT AS _code FROM {self._found(f'read/{name}/*.parquet')} LIMIT 0",
                self.job.file("rows", f"{name}.parquet"),
            )

    def _splits(self) -> Splits:
        """Cut the splits by the times of all requests."""
        self.sql.execute(
            f"""CREATE TABLE requests AS SELECT time, row_number() OVER (ORDER BY time) - 1 AS _number
            FROM {self._found("parts/*/requests.parquet")}"""
        )
        return cut_splits(self.sql, self.schema.splits)

    def _write_codes(self) -> None:
        """Write the codes of all names but users, and the items, which the figures need."""
        for n, name in enumerate(hashes_of(self.schema)):
            if name != USER:
                codes = f"FROM {quoted(f'codes_{name}')}"
                write_parquet(self.sql, codes, self.job.file("codes", f"{n}.parquet"))
        write_parquet(self.sql, "FROM items", self.job.file("codes", "items.parquet"))

    def _folders(self, splits: Splits) -> None:
        for table in ("events", *(f"requests/{split}" for split in splits.numbers)):
            (self.job.draft / table).mkdir()

    def _views(self, files: dict[str, str]) -> None:
        for name, pattern in files.items():
            self.sql.execute(f"CREATE VIEW {quoted(name)} AS FROM {self._found(pattern)}")

    def _found(self, pattern: str) -> str:
        """Files of WORK as a DuckDB relation."""
        return f"read_parquet({literal(str(self.job.work / pattern))}, hive_partitioning=false)"

    def _path(self, name: str) -> str:
        """A path of WORK for Spark, whose default file system may be another."""
        return f"file://{self.job.work / name}"

    def _spark_table(self, name: str) -> Any:
        return self.spark.read.parquet(self._path(name))

    def _sum(self, tasks: Sequence[Task]) -> dict[str, Any]:
        return reduce(added, self._run(tasks))

    def _run(self, tasks: Sequence[Task]) -> list[Any]:
        """Run each task on one core of Spark, and return their results."""

        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            from pyspark import TaskContext

            context = TaskContext.get()
            for batch in batches:
                for number in batch.column(0).to_pylist():
                    try:
                        result = tasks[number].run(context.cpus() if context else 1)
                    except LogError as error:  # Spark would wrap it, and retry
                        result = error
                    given = [pa.array([number]), pa.array([pickle.dumps(result)], pa.binary())]
                    yield pa.RecordBatch.from_arrays(given, ["number", "result"])

        numbers = self.spark.range(0, len(tasks), 1, len(tasks))
        rows = numbers.mapInArrow(run, "number LONG, result BINARY").collect()
        results = [pickle.loads(row["result"]) for row in sorted(rows, key=lambda row: row["number"])]
        for result in results:
            if isinstance(result, LogError):
                raise result
        return results


def _session() -> SparkSession:
    """The active session, or a new one configured by the environment and spark-defaults.conf."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    return SparkSession.builder.appName("ifa data prepare").getOrCreate()
