"""Any log as an event log: CSV, Parquet or Feather files, described by a short schema.

DuckDB (extra `data`) reads, sorts and writes, on disk where memory runs out. The rules:

- Ids of any type become rows of tables; row 0 is "unknown". What the training split has (events before
  its last request, and its candidates) is numbered from 1 in the order of the ids. Items first seen
  later follow: they are numbered and described, and have no row of the item table. Other values first
  seen later are row 0. LOG/vocabulary.json and LOG/vocabulary/ have which id is which row.
  An id space that grows may be hashed instead, to a fixed number of rows.
- Rows of the requests' file are candidates; where a row has lists of them (`each`), their elements are.
  Those of one user with the same `request` are one request; or, without such a column, those that follow
  each other within `gap_seconds`. It is dated at its first row, so nothing of the request is in its own
  history. Where rows disagree on a context or dense column, the least value is taken.
- A row that cannot be used is refused: counted and shown in LOG/report.json, with the reason. A number
  that is empty is missing.
- A time without a zone is UTC.
- A join that finds nothing is an error: requests of which no user has an event, a label that no
  candidate gets, descriptions of users of whom there is none.

The report's `positives_in_last_second` is the share of positives whose item the user's history holds
within the second before the request. It should be next to nothing: more says that events are the
positives themselves, written a moment before the request, and that the log leaks its labels. Where the
events' clock is behind or in another zone, or they have dates alone, `positives_in_last_day` tells.
Repeated purchases are no leak; they are as frequent in `positives_in_next_day`, from the request on.
`warnings` has in words what somebody should look at.

A step is a file: `schema`, `columns`, `values` and `loading` (what the log looks like), `files` and
`csv_rows` (what stands in it), `sections` (what is wanted of it), `sources` (rows read or refused),
`vectors`, `histories`, `labels`, `ids`, `tables` (items and events), `requests`, `splits`, `negatives`,
`new_ids` and `report`, of figures that add up (`tallies`). `preparation` calls them in turn on one
machine, `spark` and `spark_tasks` on many; `steps` has what is alike.
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
