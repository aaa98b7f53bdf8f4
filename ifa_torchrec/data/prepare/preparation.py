"""``prepare``: run the steps of the preparation; each step is a module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.parts import check_parts
from ifa_torchrec.data.prepare.ids import USERS, Numbering, OldVocabulary, ids_of
from ifa_torchrec.data.prepare.report import figures_of_rows, joins_of, report_of
from ifa_torchrec.data.prepare.requests import group_requests
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema
from ifa_torchrec.data.prepare.sources import (
    check_refused,
    complete_rows,
    read_section,
    sections_of,
)
from ifa_torchrec.data.prepare.spark import OnSpark, check_spark
from ifa_torchrec.data.prepare.spark_tasks import Job
from ifa_torchrec.data.prepare.splits import cut_splits
from ifa_torchrec.data.prepare.sql import Parts, quoted
from ifa_torchrec.data.prepare.steps import database, log_schema, publish, write_rows
from ifa_torchrec.data.prepare.tables import write_items
from ifa_torchrec.data.prepare.tallies import Refused
from ifa_torchrec.data.schema import LogError, check_splits
from ifa_torchrec.data.writing import drafting

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ENGINES = ("duckdb", "spark")


def prepare(
    schema: PrepareSchema,
    out: str | Path,
    memory: str = "4GB",
    max_refused: float = 0.01,
    vocabulary: str | Path | None = None,
    parts: int = 1,
    engine: str = "duckdb",
) -> EventLog:
    r"""Write the event log of a schema, with its report (report.json) and its vocabulary.

    Args:
        schema: the files of the log and the meaning of their columns.
        out: the folder of the log; it must not exist yet.
        memory: the memory that DuckDB may use before it spills to disk, next to ``out``. Opening the log
            takes 8 bytes for each number of one table at a time, once.
        max_refused: maximum share of a table's rows that may be refused.
        vocabulary: folder of a log, or of a run, whose vocabulary to extend: its ids keep their rows,
            and have them in this log whether it contains them or not.
        parts: the number of parts that the events and the requests are split into, by a hash of the
            user; see data/parts.py.
        engine: "duckdb", on this machine, or "spark", in a Spark session; see ``spark``. ``memory`` then
            applies to each task and to the driver; ``out`` and the files must be on a file system that
            all machines share.

    Raises:
        LogError: a file or column is missing, too many rows are refused, a join has no match, a split
            is empty, or ``memory`` is too little; or Spark does not support the schema.
        FileExistsError: ``out`` exists.
        ModuleNotFoundError: DuckDB, or PySpark, is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.prepare import prepare
        >>> from ifa_torchrec.data.prepare.schema import Events, PrepareSchema, Requests
        >>> folder = Path(tempfile.mkdtemp())
        >>> lines = ["who,what,when,clicked", "ann,tea,2024-05-01 10:00:00,1",
        ...          "ann,cup,2024-05-01 10:00:00,0", "ann,cup,2024-05-02 10:00:00,1"]
        >>> _ = (folder / "log.csv").write_text("\n".join(lines))
        >>> rows = dict(files=str(folder / "log.csv"), user="who", item="what", time="when")
        >>> log = prepare(PrepareSchema(events=Events(**rows, where="clicked = 1"),
        ...                             requests=Requests(**rows, labels={"click": "clicked"}),
        ...                             splits={"test": "2024-05-02"}), folder / "log")
        >>> log.item_names(), log.requests("train")["candidates"].tolist()
        (['unknown', 'cup', 'tea'], [1, 2])
    """
    log_schema(schema, {}, {})  # refuse invalid names before the long part
    check_splits(schema.splits)
    check_parts(parts)
    if not 0 <= max_refused <= 1:
        raise LogError(f"max_refused must be a share from 0 to 1, got {max_refused!r}")
    if engine not in ENGINES:
        raise LogError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
    if engine == "spark":
        check_spark(schema, out, parts)
    old = None if vocabulary is None else OldVocabulary.load(vocabulary)
    with drafting(out) as draft:
        with database(draft / "work", memory) as sql:  # the disk of the log must have space anyway
            numbering = Numbering(sql, schema, old)
            if engine == "spark":
                job = Job(schema, draft.absolute(), memory)
                report, widths = OnSpark(sql, job, parts, max_refused).write(numbering)
            else:
                report, widths = _write(sql, draft, parts, max_refused, numbering)
        return publish(draft, out, report, numbering, widths)


def _write(
    sql: DuckDBPyConnection, draft: Path, parts: int, max_refused: float, numbering: Numbering
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write the log's tables; returns its report, and the width of each vector feature."""
    schema = numbering.schema
    refused = _read(sql, schema, max_refused)
    rows = figures_of_rows(sql, schema)
    joins = joins_of(sql, schema, rows["joins"])
    sql.execute(f"CREATE VIEW ids_user AS {USERS}")
    numbering.users()
    group_requests(sql, schema)
    splits = cut_splits(sql, schema.splits)
    for name, query in ids_of(schema, splits).items():
        sql.execute(f"CREATE VIEW {quoted(f'ids_{name}')} AS {query}")
    numbering.others()
    widths = write_items(sql, schema, draft / "items.parquet")
    figures = write_rows(sql, schema, splits, numbering.report[ITEM]["rows"], draft, Parts(parts))
    return report_of(figures, rows, joins, numbering.report, refused), widths


def _read(sql: DuckDBPyConnection, schema: PrepareSchema, max_refused: float) -> dict[str, Refused]:
    """Read all sections of a schema; returns the counts of rows and refused rows of each."""
    refused: dict[str, Refused] = {}
    for section in sections_of(schema):
        refused[section.name] = read_section(sql, schema, section)
        check_refused(section.name, refused[section.name], max_refused)
    sql.execute("CREATE VIEW first_request AS SELECT min(time) AS time FROM requests_rows")
    complete_rows(sql, schema)
    return refused
