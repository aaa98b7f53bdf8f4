"""Convert any log to an event log: CSV, Parquet or Feather files, described by a short schema.

DuckDB (extra `data`) reads, sorts and writes; it spills to disk when memory is full. The rules:

- Ids of any type are mapped to rows of tables; row 0 is "unknown". The ids of the training split (events
  before its last request, and its candidates) are numbered from 1, in sorted order. Items first seen
  later come after them: they have numbers and features, but no row in the item table. Other values first
  seen later have row 0. LOG/vocabulary.json and LOG/vocabulary/ record the row of each id.
  A growing id space may be hashed to a fixed number of rows instead.
- Each row of the requests' file is a candidate; if rows have lists of candidates (`each`), each element
  is one. Rows of one user with the same `request` form a request; or, without such a column, rows at
  most `gap_seconds` apart. Its time is that of its first row, so none of the request is in its own
  history. If rows disagree on a context or dense column, the smallest value is taken.
- A row that cannot be used is refused: LOG/report.json has the reason, the count and examples. An empty
  number is missing.
- A time without a zone is UTC.
- A join without any match is an error: no user of the requests has an event, no candidate gets a label,
  or no described user has a request.

The report's `positives_in_last_second` is the share of positives whose item is in the user's history
within the second before the request. It should be close to 0: otherwise the events are the positives
themselves, recorded just before the request, and the log leaks its labels. If the clock of the events is
behind or in another time zone, or they only have dates, `positives_in_last_day` shows the leak. Repeated
purchases are not a leak: they are as frequent in `positives_in_next_day`, counted from the request on.
`warnings` describes in words what to look at.

Each step is a module: `schema`, `columns`, `values` and `loading` (the description of the log), `files`
and `csv_rows` (its files), `sections` (the SQL for its columns), `sources` (reading and refusing rows),
`vectors`, `histories`, `labels`, `ids`, `tables` (items and events), `requests`, `splits`, `negatives`,
`new_ids` and `report`, with figures that can be added (`tallies`). `preparation` runs the steps on one
machine, `spark` and `spark_tasks` on many; `steps` contains what both share.
"""

from ifa_torchrec.data.prepare.columns import Hashed, Listed, Npy, Regression
from ifa_torchrec.data.prepare.loading import load_schema
from ifa_torchrec.data.prepare.preparation import prepare
from ifa_torchrec.data.prepare.schema import (
    Events,
    Items,
    JoinedLabel,
    PrepareSchema,
    Requests,
    Users,
)

__all__ = [
    "Events",
    "Hashed",
    "Items",
    "JoinedLabel",
    "Listed",
    "Npy",
    "PrepareSchema",
    "Regression",
    "Requests",
    "Users",
    "load_schema",
    "prepare",
]
