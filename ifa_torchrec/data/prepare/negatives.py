"""Draw negative candidates, for logs that record only what users did; see ``Requests``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifa_torchrec.data.prepare.ids import hash_in_sql
from ifa_torchrec.data.prepare.schema import Requests
from ifa_torchrec.data.prepare.sql import number, quoted
from ifa_torchrec.data.schema import EXPOSED, LogError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def draw_negatives(sql: DuckDBPyConnection, requests: Requests, first_cut: str | None) -> None:
    """Add `requests.negatives` candidates for each positive to `candidates`, and list them in `drawn`.

    Args:
        sql: contains `events` and `candidates`.
        requests: the requests of the schema.
        first_cut: draw candidates from the events before this time (SQL); None for all events.

    Raises:
        LogError: there are no such events.
    """
    before = f"time < {first_cut}" if first_cut else "true"
    # items laid out on a line, each as wide as its number of events; _end is where the next item begins
    sql.execute(
        f"""CREATE TABLE drawable AS
        SELECT item, CAST(sum(events) OVER (ORDER BY item) AS BIGINT) AS _end
        FROM (SELECT item, count(*) AS events FROM events WHERE {before} GROUP BY item)"""
    )
    events = number(sql, "SELECT max(_end) FROM drawable")
    if not events:
        raise LogError(
            "requests: negatives are drawn from the events before the first split, but there are none; "
            "start the split later, or leave out negatives"
        )
    event = hash_in_sql("_number || ' ' || _draw", events + 1) + " - 1"
    zeros = "".join(f", {quoted(task)} := 0::FLOAT" for task in requests.labels)
    sql.execute(
        f"""CREATE TABLE drawn AS SELECT DISTINCT d._number, item
        FROM (SELECT _number, {event} AS _event
              FROM (SELECT _number, unnest(range(count(*) * {requests.negatives})) AS _draw
                    FROM candidates WHERE _positive GROUP BY _number)) d
        ASOF JOIN drawable ON _event < _end
        ANTI JOIN candidates c ON c._number = d._number AND c._row.item = item;

        INSERT INTO candidates
        SELECT _number, false, struct_pack(item := item, {EXPOSED} := true {zeros})
        FROM drawn ORDER BY _number"""
    )
