"""Write event logs: of any files that a schema describes, or of a public data set.

python -m ifa_torchrec.data prepare SCHEMA.json --out runs/data/mine
python -m ifa_torchrec.data movielens ml-25m --out runs/data/ml-25m
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from ifa_torchrec.command_line import as_command
from ifa_torchrec.data import EventLog, kuairand, movielens, recbole, recflow, taobao
from ifa_torchrec.data.prepare import prepare
from ifa_torchrec.data.prepare_schema import load_schema

Given = Annotated[Path, tyro.conf.Positional]


def prepare_command(
    schema: Given, out: Path, memory: str = "4GB", max_refused: float = 0.01
) -> EventLog:
    """Write the log that a schema describes.

    Args:
        schema: a JSON file; ifa_torchrec.data.prepare_schema says what it holds.
        out: folder of the log; it must not exist.
        memory: what DuckDB may take before it goes on on disk.
        max_refused: greatest share of a table's rows that may be refused.

    Example:
        >>> from ifa_torchrec.data.__main__ import prepare_command
        >>> log = prepare_command(Path("schema.json"), Path("runs/data/mine"))  # doctest: +SKIP
    """
    return prepare(load_schema(schema), out, memory, max_refused)


def _reader(read: Callable[[Path, Path], EventLog]) -> Callable[..., EventLog]:
    def command(folder: Given, out: Path) -> EventLog:
        return read(folder, out)

    command.__doc__ = (read.__doc__ or "").split("\n    Raises:")[0].removesuffix("\n")
    return command


def main() -> None:
    """The command line; prints the log's report."""
    commands = {"prepare": prepare_command}
    commands |= {
        reader.__name__.rpartition(".")[2]: _reader(reader.prepare)
        for reader in (kuairand, movielens, recbole, recflow, taobao)
    }
    with as_command():
        log = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m ifa_torchrec.data", description=__doc__
        )
        print((log.path / "report.json").read_text())


if __name__ == "__main__":
    main()
