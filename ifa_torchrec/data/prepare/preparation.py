"""``prepare``, step by step; each step is a room of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.prepare.ids import write_codes
from ifa_torchrec.data.prepare.negatives import draw_negatives
from ifa_torchrec.data.prepare.report import joins_of, report_of
from ifa_torchrec.data.prepare.requests import cut_splits, group_candidates, write_requests
from ifa_torchrec.data.prepare.schema import ITEM, PrepareSchema
from ifa_torchrec.data.prepare.sources import read_sections
from ifa_torchrec.data.prepare.sql import literal
from ifa_torchrec.data.prepare.tables import write_events, write_items
from ifa_torchrec.data.schema import LogError, LogSchema, check_splits
from ifa_torchrec.data.writing import drafting
from ifa_torchrec.errors import require

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def prepare(
    schema: PrepareSchema, out: str | Path, memory: str = "4GB", max_refused: float = 0.01
) -> EventLog:
    r"""Write the event log of a schema, with its report (report.json) and its ids (codes/).

    Args:
        schema: where the rows are and what they mean.
        out: folder of the log; it does not exist yet.
        memory: what DuckDB may take before it goes on on disk, beside ``out``. Opening the log takes
            8 bytes for each number of a table at a time, once.
        max_refused: greatest share of a table's rows that may be refused.

    Raises:
        LogError: a file or column is missing, too many rows are refused, a join finds nothing, a split
            is empty, or ``memory`` is too little.
        FileExistsError: ``out`` exists.
        ModuleNotFoundError: DuckDB is not installed.

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
        (['cup', 'tea'], [0, 1])
    """
    _log_schema(schema, lambda feature: 1)  # names that cannot work are refused before the long part
    check_splits(schema.splits)
    if not 0 <= max_refused <= 1:
        raise LogError(f"max_refused must be a share from 0 to 1, got {max_refused!r}")
    with drafting(out) as draft:
        with _database(draft / "work", memory) as sql:  # there must be room beside the log anyway
            refused = read_sections(sql, schema, max_refused)
            joins = joins_of(sql, schema)
            codes = write_codes(sql, schema, draft / "codes")
            write_items(sql, schema, codes[ITEM]["rows"], draft / "items.parquet")
            write_events(sql, draft / "events.parquet")
            group_candidates(sql, schema)
            splits, first_cut = cut_splits(sql, schema.splits)
            if schema.requests.negatives:
                draw_negatives(sql, schema.requests, first_cut)
            write_requests(sql, schema, splits, draft / "requests")
            report = report_of(sql, schema, splits, joins, codes, refused)
        (draft / "report.json").write_text(json.dumps(report, indent=2))
        log_schema = _log_schema(schema, lambda feature: codes[feature]["rows"])
        return EventLog.publish(draft, out, log_schema, list(splits))


@contextmanager
def _database(folder: Path, memory: str) -> Generator[DuckDBPyConnection]:
    """A database of DuckDB in a folder that is gone behind it; its errors become LogErrors."""
    require("data", "duckdb")
    import duckdb

    folder.mkdir()
    with duckdb.connect(folder / "tables.duckdb") as connection:
        connection.execute("SET TimeZone = 'UTC'")
        try:
            connection.execute(f"SET memory_limit = {literal(memory)}")
        except duckdb.Error as error:
            raise LogError(f"memory={memory!r} is no size, such as '4GB': {error}") from error
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise LogError(f"memory={memory!r} is too little for this log: {error}") from error
        except duckdb.Error as error:
            raise LogError(f"the schema does not fit its files: {error}") from error
    shutil.rmtree(folder)


def _log_schema(schema: PrepareSchema, rows: Callable[[str], int]) -> LogSchema:
    """The schema of the log; ``rows`` says how many rows a feature's table has."""
    requests = schema.requests
    return LogSchema(
        item_features={feature: rows(feature) for feature in (ITEM, *schema.item_features)},
        context_features={feature: rows(feature) for feature in schema.context},
        dense_features=tuple(requests.dense),
        candidate_dense=tuple(requests.candidate_dense),
        tasks=tuple(requests.labels),
    )
