"""A log in parts: its events and requests are split into files by a hash of the user.

    LOG/
      schema.json                          "parts" has the rows and SHA-256 of each file
      events/part-00000.parquet ...        instead of events.parquet
      requests/SPLIT/part-00000.parquet    instead of requests/SPLIT.parquet

All events and requests of a user are in parts with the same number. The tables of a log in parts are its
parts concatenated: events are sorted by part, user and time, requests by part and then in the order of
their table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifa_torchrec.data.schema import LogError

MOST = 1 << 10
"""The maximum number of parts of a log."""
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, which spreads consecutive users evenly


@dataclass(frozen=True)
class Part:
    """One file of a table, as recorded in schema.json.

    Args:
        rows: the number of rows of the file.
        sha256: the SHA-256 of its content.

    Example:
        >>> from ifa_torchrec.data.parts import Part
        >>> Part(rows=3, sha256="").rows
        3
    """

    rows: int
    sha256: str


def part_of(users: np.ndarray, parts: int) -> np.ndarray:
    """The part of each user.

    Args:
        users: [n] int64.
        parts: the number of parts.

    Returns:
        [n] int64, 0 to parts - 1.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.parts import part_of
        >>> part_of(np.arange(1, 9), 4).tolist()
        [1, 2, 0, 1, 3, 0, 2, 3]
    """
    mixed = users.astype(np.uint64) * np.uint64(ODD)  # modulo 2^64
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)


def part_in_sql(user: str, parts: int) -> str:
    """``part_of`` as DuckDB SQL, for users that are not negative.

    Example:
        >>> import duckdb
        >>> from ifa_torchrec.data.parts import part_in_sql
        >>> duckdb.sql(f"SELECT {part_in_sql('u', 4)} FROM range(1, 9) r(u)").fetchall()[:3]
        [(1,), (2,), (0,)]
    """
    low_bits = (1 << 32) - 1
    low, high = f"({user}::UBIGINT & {low_bits})", f"({user}::UBIGINT >> 32)"
    # the product modulo 2^64, computed in halves, since DuckDB raises on overflow
    carried = f"({low} * {ODD & low_bits} >> 32)"
    crossed = f"({low} * {ODD >> 32} & {low_bits}) + ({high} * {ODD & low_bits} & {low_bits})"
    return f"CAST(({carried} + {crossed} & {low_bits}) % {parts} AS INTEGER)"


def own_parts(parts: int, shard: tuple[int, int]) -> range:
    """The parts that a rank opens: an equal share, give or take one; all if there are fewer parts than
    ranks.

    Args:
        parts: the number of parts.
        shard: (rank, world size).

    Example:
        >>> from ifa_torchrec.data.parts import own_parts
        >>> [own_parts(5, (rank, 2)) for rank in (0, 1)], own_parts(5, (0, 8))
        ([range(0, 2), range(2, 5)], range(0, 5))
    """
    rank, world = shard
    if world > parts:
        return range(parts)
    return range(rank * parts // world, (rank + 1) * parts // world)


def file_of(table: str, part: int) -> str:
    """The path of a part's file in the log's folder.

    Example:
        >>> from ifa_torchrec.data.parts import file_of
        >>> file_of("requests/train", 12)
        'requests/train/part-00012.parquet'
    """
    return f"{table}/part-{part:05}.parquet"


def check_parts(parts: Any) -> int:
    """Check and return the number of parts that a log is to have.

    Raises:
        LogError: it is not an integer from 1 to MOST.

    Example:
        >>> from ifa_torchrec.data.parts import check_parts
        >>> check_parts(4)
        4
    """
    if not isinstance(parts, int) or isinstance(parts, bool) or not 1 <= parts <= MOST:
        raise LogError(f"parts must be an integer from 1 to {MOST}, got {parts!r}")
    return parts


def check_users(users: np.ndarray, part: int, parts: int) -> None:
    """Refuse users that belong in another part.

    Args:
        users: [n] int64, the users in a part.
        part: the number of the part.
        parts: the number of parts.

    Raises:
        LogError: a user belongs in another part.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.parts import check_users
        >>> check_users(np.array([1, 4]), part=1, parts=4)
    """
    wrong = np.flatnonzero(part_of(users, parts) != part)
    if len(wrong):
        user = users[wrong[:1]]
        raise LogError(
            f"user {user[0]} belongs in part {part_of(user, parts)[0]} of {parts}, not in part {part}; "
            "write the log again"
        )


def check_open(users: np.ndarray, own: range, parts: int) -> None:
    """Refuse users whose events are in parts that are not open.

    Args:
        users: [n] int64.
        own: the parts that are open.
        parts: the number of parts.

    Raises:
        LogError: a user's part is not open.

    Example:
        >>> import numpy as np
        >>> from ifa_torchrec.data.parts import check_open
        >>> check_open(np.array([1, 4]), own=range(2), parts=4)
    """
    part = part_of(users, parts)
    closed = np.flatnonzero((part < own.start) | (part >= own.stop))
    if len(closed):
        user = users[closed[0]]
        raise LogError(
            f"user {user} is in part {part[closed[0]]}, but only parts {own.start} to {own.stop - 1} of "
            f"the log's {parts} are open here; open the log without a shard"
        )


def found_parts(draft: Path, tables: Iterable[str]) -> dict[str, list[Part]]:
    """The parts of each table in a folder that is to be published; empty if the log is not in parts.

    Raises:
        LogError: a part of a table is missing, or the numbers of parts differ.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.parts import found_parts
        >>> found_parts(Path(tempfile.mkdtemp()), ["events"])
        {}
    """
    count = len(list((draft / "events").glob("part-*.parquet")))
    if not count:
        return {}
    found: dict[str, list[Part]] = {}
    for table in tables:
        files = sorted((draft / table).glob("part-*.parquet"))
        if files != [draft / file_of(table, part) for part in range(count)]:
            raise LogError(
                f"{draft / table}: expected {file_of(table, 0)} to {file_of(table, count - 1)}, as many "
                f"parts as events has; got {[file.name for file in files]}"
            )
        found[table] = [_part(file) for file in files]
    return found


def read_parts(given: Any, rows: Mapping[str, int], file: Path) -> dict[str, list[Part]]:
    """Read the parts in schema.json.

    Args:
        given: the value of "parts".
        rows: the number of rows of each table.
        file: schema.json, for errors.

    Raises:
        LogError: it is not what ``EventLog.publish`` writes: parts of a table are missing, their number
            differs from that of the events, or they do not add up to the table's rows.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.parts import read_parts
        >>> parts = {"events": [{"rows": 1, "sha256": ""}]}
        >>> read_parts(parts, {"events": 1, "items": 3}, Path("schema.json"))["events"][0].rows
        1
    """
    tables = [table for table in rows if table != "items"]
    try:
        read = {table: [_read_part(part) for part in given[table]] for table in tables}
    except (LookupError, TypeError, ValueError) as error:
        raise LogError(
            f"{file}: parts must have rows and sha256 for each part of {tables} ({error!r}); "
            "write the log again"
        ) from error
    for table, parts in read.items():
        if not parts or len(parts) != len(read["events"]):
            raise LogError(
                f"{file}: {len(parts)} parts of {table}, but {len(read['events'])} of events; write the "
                "log again"
            )
        if (total := sum(part.rows for part in parts)) != rows[table]:
            raise LogError(
                f"{file}: the parts of {table} have {total} rows in total, expected {rows[table]}; "
                "write the log again"
            )
    return read


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.data.parts import sha256_of
        >>> file = Path(tempfile.mkdtemp()) / "empty"
        >>> file.touch()
        >>> sha256_of(file)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _part(file: Path) -> Part:
    try:
        rows = pq.read_metadata(file).num_rows
    except pa.ArrowInvalid as error:
        raise LogError(f"{file}: not a Parquet file ({error}); write it again") from error
    return Part(rows, sha256_of(file))


def _read_part(given: Any) -> Part:
    rows = given["rows"]
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"{rows!r} rows")
    return Part(rows, str(given["sha256"]))
