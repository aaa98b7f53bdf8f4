"""Codes: which id has which row of a feature's table, as LOG/codes/FEATURE.parquet has it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pandas.util import hash_pandas_object

from ifa_torchrec.data.schema import LogError

HASHED = "hashed"
"""In the metadata of LOG/codes/FEATURE.parquet: of how many rows is the table that ids are hashed to."""


def codes_digest(file: Path) -> str:
    """Of the ids and their rows, not of the file: other programs may have written the same.

    Raises:
        LogError: the file is not readable, or has no columns id and code.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> from ifa_torchrec.data.codes import codes_digest
        >>> file = Path(tempfile.mkdtemp()) / "item.parquet"
        >>> pd.DataFrame({"id": ["tea", "cup"], "code": [0, 1]}).to_parquet(file)
        >>> len(codes_digest(file))
        16
    """
    try:
        hashed = (pq.read_metadata(file).metadata or {}).get(HASHED.encode())
        if hashed is not None:
            return f"hashed to {hashed.decode()} rows"
        table = pq.read_table(file, columns=["id", "code"])
        table = table.cast(pa.schema({"id": pa.large_string(), "code": pa.int64()}))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise LogError(
            f"{file}: not readable as the columns id and code ({error}); write the log again"
        ) from error
    # pandas-stubs has no type for it
    rows = cast(Any, hash_pandas_object)(table.to_pandas(), index=False)
    return hashlib.sha256(rows.to_numpy()).hexdigest()[:16]
