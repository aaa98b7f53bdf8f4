"""Continual training on one log after the other; each is measured first and then trained once.

DATA/NAME/             one log per part (a day, an hour), taken in the order of their names
OUT/NAME/              the run trained up to and including that part
OUT/parts.csv          the metrics of each part before it was trained
OUT/tensorboard/       the same, as curves
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import LogError
from ifa_torchrec.data.order import InTime
from ifa_torchrec.data.remote import is_uri
from ifa_torchrec.data.schema import CANDIDATES, TIME
from ifa_torchrec.distributed import CheckpointError, checkpoint, init_process_group
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.build import MOST_GATE_VALUES
from ifa_torchrec.training.curves import Curves
from ifa_torchrec.training.decide import MOST_UNKNOWN
from ifa_torchrec.training.options import TrainConfig, read_options, to_json, write_whole
from ifa_torchrec.training.run import check_log
from ifa_torchrec.training.trainer import Trainer
from ifa_torchrec.training.validations import LAST, Fitted, Validations, calibration_of, in_use

TABLE = "parts.csv"
RATE = 0.5
"""Share of the peak dense learning rate that later runs train with; there is no last step towards which
the rate could fall."""
_MAY_DIFFER = {"epochs", "warmup_steps", "keep_best", "unknown_items", "gate", "table_init", "seed"}
"""Options in which a run may differ from the one that it continues."""
_PRINTED = ("ne", "gauc", "mae", "correlation")


def follow(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Train on the remaining logs of a folder, one after the other. Called by all ranks.

    The first is trained as by ``train``. Each later one continues the run before it: its split `train`
    is measured with that run's weights, and then trained once, in order of time, with a constant dense
    learning rate. Tables grow to the log's sizes; a new row starts as row 0.

    Args:
        config: TrainConfig; ``data`` is a folder of logs, each prepared with the vocabulary of the
            previous one, and ``out`` gets one run per log.

    Returns:
        For each log that was trained now, by name, what ``train`` returns; for all but the first log,
        "before_METRIC" (measured before its training) instead of a validation.

    Raises:
        LogError: there are no logs, one is bad, or its ids have other rows than in the logs before.
        ConfigError: an option is not compatible with this training, or with a log.
        CheckpointError: the options differ from those that the runs began with, or another training
            writes to ``out``.
        WriteError, ShardingError, DivergedError: as ``train``.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.training.follow import follow
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> folder, days = Path(tempfile.mkdtemp()), pd.date_range("2024-01-01", periods=4)
        >>> for n in (2, 3):  # each day's log has one more item
        ...     _ = EventLog.from_pandas(
        ...         folder / "days" / str(days[n].date()),
        ...         schema=LogSchema(item_features={"item": n + 1}),
        ...         events=pd.DataFrame({"user": 1, "item": range(n), "time": days[:n]}),
        ...         requests={"train": pd.DataFrame({"user": [1], "time": days[n:n + 1],
        ...             "candidates": [[n - 1, n]], "exposed": [[True, True]], "label": [[0, 1]]})})
        >>> config = TrainConfig(folder / "days", folder / "runs", ifa=IFAConfig(8, num_heads=2))
        >>> trained = follow(config)
        >>> list(trained), trained["2024-01-04"]["before_new_items"]
        (['2024-01-03', '2024-01-04'], 0.5)
        >>> follow(config)
        {}
    """
    _check(config)
    init_process_group()
    trained: dict[str, dict[str, float]] = {}
    with checkpoint.locked(config.out):
        table = Table(config.out)
        names, before = _left(config, table)
        for name in names:
            run = config.out / name
            part = dataclasses.replace(config, data=Path(config.data) / name, out=run, resume=True)
            if before is None:
                part = dataclasses.replace(part, keep_best=LAST)
                trained[name] = Trainer(part).train()
            else:
                part = going_on(part, config.out / before)
                trained[name] = Follower(part, config.out / before).train()
            table.put(name, measured_before(run))
            before = name
    return trained


class Follower(Trainer):
    """A training that continues an earlier run with a later log. ``follow`` has an example.

    Args:
        config: from ``going_on``.
        before: the run that it continues.

    Raises:
        LogError, ShardingError, ConfigError: see ``follow``.
    """

    _nothing_found = "no checkpoint here; continuing from the previous run"

    def __init__(self, config: TrainConfig, before: Path) -> None:
        self.before = before
        super().__init__(config)

    def validate(self) -> tuple[dict[str, float], Fitted]:
        """Measure the log's split `train` with the previous run's weights, and fit a calibration."""
        calibration = calibration_of(in_use(self.before)[1], self._step_before)
        metrics, fitted = self._measured("train", calibration)
        return {"requests": len(self.dataset), "new_items": self._new, **metrics}, fitted

    def state_dict(self) -> dict[str, Any]:
        """As for the Trainer, with the name of the run that it continues."""
        return {**super().state_dict(), "before": self.before.name}

    def _is_due(self) -> bool:
        return self.step == 0

    def _best(self) -> dict[str, float]:
        return {f"before_{name}": v for name, v in measured_before(self.config.out).items()}

    def _tell(self) -> None:
        """Print nothing: all options come from the previous run."""

    def _of_log(self, config: TrainConfig) -> tuple[Mapping[str, Scale], float]:
        was = check_log(self.before / "checkpoints", self.log, grow=True)
        if was is None:
            raise CheckpointError(f"{self.before}: no readable checkpoint here")
        items = self.log.requests("train")[CANDIDATES]
        known = dict(was["config"]["schema"]["item_features"])[self.log.schema.item]
        self._new = float(((items >= known) | (items == 0)).mean())
        share = min(self._new, MOST_UNKNOWN) if config.unknown_items is None else config.unknown_items
        return {name: Scale(**figures) for name, figures in was["scales"].items()}, share

    def _shard(self) -> tuple[int, int]:
        """All parts: in order of time, a step's requests may come from any of them."""
        return 0, 1

    def _order(self) -> InTime:
        return InTime(self.dataset.requests[TIME])

    def _progress(self) -> float:
        return 1 - RATE

    def _initialise(self) -> None:
        """Load the weights and the optimisers' state of the previous run."""
        self._keep_vocabulary()
        options = {k: v for k, v in self.config.fixed().items() if k not in _MAY_DIFFER}
        progress = checkpoint.load(
            self.before / "checkpoints", self.model, self.optimizer, to_json(options), grow=True
        )
        self._step_before = progress["step"]


def going_on(config: TrainConfig, before: Path) -> TrainConfig:
    """The options of a run that continues another; open ones are taken from that run. Called by all
    ranks.

    Args:
        config: the options as given, with the run's log and folder.
        before: the run that it continues.

    Raises:
        CheckpointError: there is no such run, or its options or checkpoints cannot be read.
    """
    was = read_options(before)
    ifa, gate = config.ifa, config.gate
    if config.identity or ifa.identity_features:
        names = ("identity_features", "identity_buckets", "identity_half_lives")
        left_open = {name: getattr(was.ifa, name) for name in names if not getattr(ifa, name)}
        ifa = dataclasses.replace(ifa, **left_open)
    if gate is None:  # the same features gate, even if one has too many values by now
        values = dict(_progress_of(before)["config"]["schema"]["event_features"])
        few = tuple(name for name, count in values.items() if count <= MOST_GATE_VALUES)
        gate = few if was.gate is None else was.gate
    rate = config.optimizers.dense_lr
    rate = was.optimizers.dense_lr if rate is None else rate
    return dataclasses.replace(
        config,
        ifa=ifa,
        gate=gate,
        optimizers=dataclasses.replace(config.optimizers, dense_lr=rate),
        max_requests=config.max_requests or was.max_requests,
        epochs=1,
        warmup_steps=0,
        keep_best=LAST,
        patience=None,
        validate=False,
        validate_every=None,
    )


def measured_before(run: Path) -> dict[str, float]:
    """The metrics of a run's log before it was trained; empty for the first run. Called by all ranks.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: its validations.json is damaged.
    """
    return Validations.read(run, LAST, last=0).by_step.get(0, {})


class Table:
    """The metrics of each part: OUT/parts.csv, and OUT/tensorboard, with one step per part.

    Args:
        folder: OUT.

    Attributes:
        rows: one row per part, in the order of their training; numbers as text.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.distributed import init_process_group
        >>> from ifa_torchrec.training.follow import Table
        >>> _, folder = init_process_group(), Path(tempfile.mkdtemp())
        >>> table = Table(folder)
        >>> table.put("monday", {})
        >>> table.put("tuesday", {"ne": 0.75})
        >>> print((folder / "parts.csv").read_text().strip())
        part,ne
        monday,
        tuesday,0.75
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows = checkpoint.on_rank_0(lambda: _rows(folder / TABLE))

    def put(self, part: str, metrics: Mapping[str, float]) -> None:
        """Add a part, if it is not there yet; rank 0 writes the files and prints the main metrics.
        Called by all ranks.

        Raises:
            WriteError: the folder cannot be written.
        """
        if part in self.rows:
            return
        number = len(self.rows)
        self.rows[part] = {"part": part, **{name: repr(value) for name, value in metrics.items()}}
        checkpoint.on_rank_0(lambda: self._write(part, metrics, number))

    def _write(self, part: str, metrics: Mapping[str, float], number: int) -> None:
        if metrics:
            curves = Curves(self._folder / "tensorboard", number)
            curves.show({f"part/{name}": value for name, value in metrics.items()}, number)
            curves.close()
            found = {n: v for n, v in metrics.items() if n.rpartition("_")[2] in _PRINTED}
            text = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"{part}, before its training: {text}", file=sys.stderr)
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        content = io.StringIO()
        writer = csv.DictWriter(content, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_whole(self._folder / TABLE, content.getvalue())


def _rows(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a parts.csv by part; empty if there is none."""
    try:
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not row.get("part") or None in row or None in row.values():
            raise CheckpointError(
                f"{file}: row {number} is not what a training writes; delete the file to start a new one"
            )
    return {row["part"]: row for row in rows}


def _check(config: TrainConfig) -> None:
    """Refuse options that are not compatible with --follow."""
    if is_uri(config.data):
        raise ConfigError(
            f"--follow: --data {config.data}: give a local folder of logs; a URI cannot be listed"
        )
    if config.managed_rows:
        raise ConfigError("--follow: tables of --managed-rows cannot grow; hash the ids instead")
    if config.keep_best not in (None, LAST) or config.patience is not None:
        raise ConfigError(
            "--follow always uses the last checkpoint; leave out --keep-best and --patience"
        )
    if (config.out / "checkpoints").exists():
        raise ConfigError(f"--out {config.out} is a run; --follow needs a folder to put runs in")
    if (Path(config.data) / "schema.json").exists():
        raise ConfigError(f"--data {config.data} is a log; --follow needs the folder that contains logs")


def _left(config: TrainConfig, table: Table) -> tuple[list[str], str | None]:
    """The remaining logs, and the run that the first of them continues; None for the first run."""

    def look() -> tuple[list[str], str]:
        logs = [path.parent.name for path in Path(config.data).glob("*/schema.json")]
        runs = [path.parent.name for path in config.out.glob("*/checkpoints")]
        runs = [name for name in runs if checkpoint.checkpoints(config.out / name / "checkpoints")]
        logs = sorted(name for name in logs if not name.startswith("."))  # not those still being written
        return logs, max(runs, default="")

    logs, last = checkpoint.on_rank_0(look)
    if not logs:
        raise LogError(f"{config.data}: no logs here; --follow takes a folder with one log per part")
    if not last:
        return logs, None
    late = [name for name in logs if name < last and name not in table.rows]
    if late and dist.get_rank() == 0:
        print(f"skipped, since they came after {last} was trained: {', '.join(late)}", file=sys.stderr)
    progress = _progress_of(config.out / last, whole=True)
    names, before = [name for name in logs if name > last], progress.get("before")
    if progress["epoch"] >= (config.epochs if before is None else 1):
        table.put(last, measured_before(config.out / last))
        return names, last
    if last not in logs:
        raise LogError(f"{config.data} has no {last}, which is half trained; put that log back")
    return [last, *names], before


def _progress_of(run: Path, whole: bool = False) -> dict[str, Any]:
    """The progress of a run's latest readable checkpoint, see ``latest_progress``. Called by all ranks.

    Raises:
        CheckpointError: no checkpoint can be read, or it has another format.
    """
    progress = checkpoint.latest_progress(run / "checkpoints", whole)
    if progress is None:
        raise CheckpointError(f"{run}: no readable checkpoint here")
    return progress
