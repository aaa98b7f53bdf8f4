"""Steps that both engines share: the database, writing the tables, publishing the log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare.columns import Regression
from ifa_torchrec.data.prepare.ids import Numbering
from ifa_torchrec.data.prepare.negatives import draw_negatives
from ifa_torchrec.data.prepare.report import figures_of_log
from ifa_torchrec.data.prepare.requests import code_candidates, write_requests
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema
from ifa_torchrec.data.prepare.splits import Splits
from ifa_torchrec.data.prepare.sql import Parts, literal
from ifa_torchrec.data.prepare.tables import write_events
from ifa_torchrec.data.schema import LogError, LogSchema
from ifa_torchrec.errors import require

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@contextmanager
def database(folder: Path, memory: str, threads: int | None = None) -> Generator[DuckDBPyConnection]:
    """A DuckDB database in a temporary folder; its errors become LogErrors."""
    require("data", "duckdb")
    import duckdb

    folder.mkdir()
    with duckdb.connect(folder / "tables.duckdb") as connection:
        connection.execute("SET TimeZone = 'UTC'")
        if threads is not None:
            connection.execute(f"SET threads = {threads}")
        try:
            connection.execute(f"SET memory_limit = {literal(memory)}")
        except duckdb.Error as error:
            raise LogError(f"memory must be a size such as '4GB', got {memory!r}: {error}") from error
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise LogError(f"memory={memory!r} is too little for this log; raise it: {error}") from error
        except duckdb.Error as error:
            raise LogError(f"the schema does not match its files: {error}") from error
    shutil.rmtree(folder)


def write_rows(
    sql: DuckDBPyConnection,
    schema: PrepareSchema,
    splits: Splits,
    known: int,
    folder: Path,
    parts: Parts,
) -> dict[str, Any]:
    """Write the events and the requests, of all users or of one part.

    Args:
        sql: contains events_rows, requests, sessions, items and the codes.
        schema: the schema of the log.
        splits: the splits of the requests.
        known: the number of rows of the item table.
        folder: the folder of the log.
        parts: the parts to write.

    Returns:
        Figures of them, which can be added.
    """
    write_events(sql, schema, folder, parts)
    code_candidates(sql, schema)
    if schema.requests.negatives:
        draw_negatives(sql, schema.requests, next(iter(splits.starts.values()), None))
    write_requests(sql, schema, splits.numbers, folder / "requests", parts)
    return figures_of_log(sql, schema, splits, known)


def publish(
    draft: Path,
    out: str | Path,
    report: Mapping[str, Any],
    numbering: Numbering,
    widths: Mapping[str, int],
) -> EventLog:
    """Make the folder with the written tables a log.

    Args:
        draft: the folder.
        out: the final path of the log.
        report: the report of the log.
        numbering: the numbering of its ids.
        widths: the width of each vector feature.
    """
    (draft / "report.json").write_text(json.dumps(report, indent=2))
    numbering.vocabulary().save(draft)
    rows = {name: ids["rows"] for name, ids in numbering.report.items()}
    schema = log_schema(numbering.schema, rows, widths)
    return EventLog.publish(draft, out, schema, list(report["requests"]))


def log_schema(schema: PrepareSchema, rows: Mapping[str, int], widths: Mapping[str, int]) -> LogSchema:
    """The schema of the log, with the rows of its tables and the widths of its vectors; 1 if unknown."""

    def tables(names: Iterable[str]) -> dict[str, int]:
        return {name: rows.get(name, 1) for name in names}

    requests, items = schema.requests, schema.described_items
    return LogSchema(
        item_features=tables([ITEM, *items.features]),
        context_features=tables(schema.context),
        dense_features=tuple(schema.dense),
        candidate_dense=tuple(requests.candidate_dense),
        tasks={
            task: "regression" if isinstance(label, Regression) else "binary"
            for task, label in requests.labels.items()
        },
        item_lists=tables(items.lists),
        item_dense=tuple(items.dense),
        item_vectors={name: widths.get(name, 1) for name in items.vectors},
        event_features=tables(schema.events.features),
        event_dense=tuple(schema.events.dense),
        event_weight=None if schema.events.weight is None else "weight",
        context_lists=tables(schema.context_lists),
        candidate_features=tables(requests.candidate_features),
        log_scaled=tuple(schema.log_scaled),
    )
