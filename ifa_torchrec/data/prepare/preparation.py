"""``prepare``, step by step; each step is a room of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ifa_torchrec.data.event_log import EventLog
from ifa_torchrec.data.parts import check_parts
from ifa_torchrec.data.prepare.columns import Regression
from ifa_torchrec.data.prepare.ids import Numbering, OldVocabulary
from ifa_torchrec.data.prepare.negatives import draw_negatives
from ifa_torchrec.data.prepare.report import joins_of, report_of
from ifa_torchrec.data.prepare.requests import (
    code_candidates,
    cut_splits,
    group_requests,
    write_requests,
)
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
    schema: PrepareSchema,
    out: str | Path,
    memory: str = "4GB",
    max_refused: float = 0.01,
    vocabulary: str | Path | None = None,
    parts: int = 1,
) -> EventLog:
    r"""Write the event log of a schema, with its report (report.json) and its vocabulary.

    Args:
        schema: where the rows are and what they mean.
        out: folder of the log; it does not exist yet.
        memory: what DuckDB may take before it goes on on disk, beside ``out``. Opening the log takes
            8 bytes for each number of a table at a time, once.
        max_refused: greatest share of a table's rows that may be refused.
        vocabulary: folder of a log, or of a run, whose vocabulary is extended: what it knows keeps its
            rows, and has them in this log, seen in it or not.
        parts: how many parts the events and the requests are cut into, by a hash of the user; see
            data/parts.py.

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
        (['unknown', 'cup', 'tea'], [1, 2])
    """
    _log_schema(schema, {}, {})  # names that cannot work are refused before the long part
    check_splits(schema.splits)
    check_parts(parts)
    if not 0 <= max_refused <= 1:
        raise LogError(f"max_refused must be a share from 0 to 1, got {max_refused!r}")
    old = None if vocabulary is None else OldVocabulary.load(Path(vocabulary))
    with drafting(out) as draft:
        with _database(draft / "work", memory) as sql:  # there must be room beside the log anyway
            numbering = Numbering(sql, schema, old)
            refused = read_sections(sql, schema, max_refused)
            joins = joins_of(sql, schema)
            numbering.users()
            group_requests(sql, schema)
            splits, first_cut = cut_splits(sql, schema.splits)
            numbering.others(splits["train"])
            widths = write_items(sql, schema, draft / "items.parquet")
            write_events(sql, schema, draft, parts)
            code_candidates(sql, schema)
            if schema.requests.negatives:
                draw_negatives(sql, schema.requests, first_cut)
            write_requests(sql, schema, splits, draft / "requests", parts)
            report = report_of(sql, schema, splits, joins, numbering.told, refused)
        (draft / "report.json").write_text(json.dumps(report, indent=2))
        numbering.vocabulary().save(draft)
        rows = {name: told["rows"] for name, told in numbering.told.items()}
        return EventLog.publish(draft, out, _log_schema(schema, rows, widths), list(splits))


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


def _log_schema(schema: PrepareSchema, rows: Mapping[str, int], widths: Mapping[str, int]) -> LogSchema:
    """The schema of the log, with its tables' rows and its vectors' widths, as far as they are known."""

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
