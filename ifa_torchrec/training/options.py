"""The options of a training, and the file that stores them in a run's folder: ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ifa_torchrec.data.remote import full_name, is_uri
from ifa_torchrec.distributed import OptimizerConfig, ShardingConfig, checkpoint
from ifa_torchrec.distributed.checkpoint_writer import sync, write_synced
from ifa_torchrec.errors import ConfigError, writing
from ifa_torchrec.modules import CandidateSetConfig, CandidateSetLossConfig, IFAConfig
from ifa_torchrec.modules.interactions import INTERACTIONS, InteractionName
from ifa_torchrec.training.precision import Precision

OPTIONS = "config.json"
"""The file with a run's options, in its folder."""
MOST_REQUESTS = 32
"""Default maximum of requests per batch and rank."""

# the command line lists the choices; names that a program adds to INTERACTIONS are valid as well
_ONE_OF_THEM = tyro.conf.arg(constructor=InteractionName, help_behavior_hint="(default: ifa)")


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``ifa train``."""

    data: str | Path
    """Event log to train on (its split `train`): a folder, or a URI
    (s3://, gs://, abfss://, hdfs:// or file://)."""
    out: Path
    """Folder of this run."""
    interaction: Annotated[str, _ONE_OF_THEM] = "ifa"
    """The interaction between candidates and the history."""
    ifa: IFAConfig = field(
        default_factory=lambda: IFAConfig(
            64, num_heads=1, feature_map="hedgehog", readout="softmax", identity_head_dim=0
        )
    )
    """The sequence interaction; the defaults are what measured best. Other interactions use the options
    that apply to them."""
    identity: bool = True
    """Use identity heads on every id feature of the item, unless --ifa.identity-features names some. By
    default --ifa.identity-buckets is the number of items, or of rows in the largest table if more,
    rounded up to a power of two, and --ifa.identity-half-lives are infinity, 30 and 7 days. By default
    the heads give counts without mean values (--ifa.identity-head-dim)."""
    gate: tuple[str, ...] | None = None
    """Event features whose value gates an event's weight in each head; by default those with at most 64
    values."""
    recent_length: int = 50
    """Events that softmax_recent and din (the latest), sim, eta and twin (those found) attend to."""
    search_feature: str | None = None
    """Item feature that sim searches by; by default the last."""
    history_length: int | None = None
    """Use only this many latest events of each history; None for all."""
    candidate_set: CandidateSetConfig = field(default_factory=CandidateSetConfig)
    """Whether and how the candidates of a request see each other."""
    loss: CandidateSetLossConfig = field(default_factory=CandidateSetLossConfig)
    """Weights of the loss's terms."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weights of tasks in the loss, e.g. click 1 watch 0.2; 1 for tasks that are not named."""
    rank_by: dict[str, float] = field(default_factory=dict)
    """Weights of tasks in the ranking score, 0 for tasks that are not named; by default only the first
    task ranks. With several, probabilities and standardised numbers are summed."""
    over_arch_layer_sizes: tuple[int, ...] = (64, 32)
    """Sizes of the hidden layers of the over arch."""
    dropout: float = 0.0
    """Dropout on the inputs of those layers during training."""
    managed_rows: dict[str, int] = field(default_factory=dict)
    """Item tables with fewer rows than ids, e.g. item_table 20000: TorchRec's managed collisions give
    own rows to ids that occur often and recently; the other ids share the last row."""
    unknown_items: float | None = None
    """Share of the items that are made unknown to a request during training, so that the row of new
    items is trained; by default the share of new items among the candidates of the split `valid`, at
    most 0.95."""
    table_init: float = 0.3
    """Table rows that the training uses start uniform in plus or minus this value; the others start at
    0."""
    table_dtype: Literal["fp32", "fp16"] = "fp32"
    """Dtype of the tables' rows; fp16 halves their memory. Looked-up embeddings, gradients and the
    optimiser's state are always float32."""
    optimizers: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimisers and learning rates."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How the tables are sharded, e.g. --sharding.tables item_table row_wise."""
    precision: Precision = "fp32"
    """Precision of the dense part's matrix products during training: fp32; tf32, on NVIDIA GPUs; or
    bf16, by autocast, with event tokens in bfloat16. Weights, sums, layers that see only candidates, the
    loss, tables and all metrics are always float32."""
    compile: bool = False
    """Compile the dense part with torch.compile: one graph that describes candidates and one that scores
    them. The first step waits for the compilation, which can take minutes."""
    warmup_steps: int | None = None
    """Steps in which the dense learning rate rises to its value; it then falls to 5% of it. By default
    8% of all steps."""
    epochs: int = 1
    """Passes over the requests."""
    max_events: int = 32768
    """Budget of history events per batch and rank."""
    max_requests: int | None = None
    """Maximum of requests per batch and rank; by default so few that an epoch has at least 500 steps,
    but at least 4 over all ranks, and at most 32."""
    validate: bool = True
    """Measure the split `valid`, if there is one, after each epoch."""
    validate_every: int | None = None
    """Also validate every so many steps within an epoch."""
    keep_best: str | None = None
    """Metric of the split `valid` by which the best checkpoint is kept and used, e.g. gauc, ne, or with
    several tasks click_ne; last for the last checkpoint. By default gauc, the order within requests, or
    ne if no request can be ranked; last without that split."""
    patience: int | None = None
    """Stop after this many consecutive validations without improvement; by default never."""
    calibrate: bool = True
    """Fit a temperature and a bias for each binary task on the split `valid`, if there is one; all
    predictions of the run use them."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is also one at the end of each epoch and with each validation."""
    resume: bool = False
    """Resume from the last checkpoint in OUT, if there is one."""
    seed: int = 0
    """Seed of the weights and of the order of the requests."""

    def __post_init__(self) -> None:
        # a Path, except for a URI, from which Path would drop a slash
        place = str(self.data) if is_uri(self.data) else Path(self.data)
        object.__setattr__(self, "data", place)
        at_least = dict.fromkeys(("epochs", "max_events", "max_requests", "checkpoint_every"), 1)
        at_least |= {"history_length": 1, "recent_length": 1, "warmup_steps": 0, "seed": 0}
        at_least |= {"validate_every": 1, "patience": 1}
        if self.interaction not in INTERACTIONS:
            names = list(INTERACTIONS)
            raise ConfigError(f"--interaction must be one of {names}, got {self.interaction!r}")
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.table_dtype not in ("fp32", "fp16"):
            raise ConfigError(f"--table-dtype must be fp32 or fp16, got {self.table_dtype!r}")
        if not 0 <= self.table_init < math.inf:
            raise ConfigError(f"--table-init must be a number of at least 0, got {self.table_init}")
        if self.unknown_items is not None and not 0 <= self.unknown_items < 1:
            raise ConfigError(f"--unknown-items must be 0 or more and below 1, got {self.unknown_items}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout must be 0 or more and below 1, got {self.dropout}")
        if self.ifa.gates:
            raise ConfigError(
                "--ifa.gates: name the event features with --gate; their values come from the log"
            )
        sizes = self.over_arch_layer_sizes
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"--over-arch-layer-sizes must be sizes of at least 1, got {sizes}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed must be below 2^63, got {self.seed}")

    @property
    def scored_requests(self) -> int:
        """Maximum of requests per batch when scoring: at least 32, since small batches score slowly."""
        return max(self.max_requests or 0, MOST_REQUESTS)

    def fixed(self) -> dict[str, Any]:
        """The options that must not change when a run is resumed."""
        free = {"data", "out", "resume", "checkpoint_every", "validate", "validate_every", "patience"}
        free |= {"calibrate", "max_events", "max_requests", "sharding", "rank_by"}
        free |= {"precision", "compile"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


def to_json(value: Any) -> Any:
    """JSON types for a config's dict; paths, infinities and NaN become strings."""
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    strange = isinstance(value, float) and not math.isfinite(value)
    return str(value) if strange or isinstance(value, Path) else value


def write_options(config: TrainConfig) -> None:
    """Write a run's options into its folder, atomically.

    Raises:
        WriteError: the folder cannot be written.
    """
    write_whole(config.out / OPTIONS, options_text(config))


def options_text(config: TrainConfig) -> str:
    """The options as JSON that ``read_options`` reads."""
    saved = dataclasses.replace(config, data=full_name(config.data))
    return json.dumps(to_json(dataclasses.asdict(saved)), indent=2, allow_nan=False)


def write_whole(file: Path, text: str) -> None:
    """Write a text into a file atomically: if killed, the file keeps its old content.

    Raises:
        WriteError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.training.options import write_whole
        >>> file = Path(tempfile.mkdtemp()) / "config.json"
        >>> write_whole(file, "{}")
        >>> file.read_text()
        '{}'
    """
    draft = file.with_name(f".{file.name}")
    with writing(file):
        write_synced(draft, text)
        draft.rename(file)
        sync(file.parent)


def read_options(folder: Path) -> TrainConfig:
    """Read the options of the run in a folder.

    Raises:
        CheckpointError: there is no run, or its options cannot be read.
    """
    file = folder / OPTIONS
    try:
        return from_json(TrainConfig, json.loads(file.read_text()), "")
    except FileNotFoundError:
        error = checkpoint.CheckpointError(f"{folder}: no run here; give the --out of a training")
        raise error from None
    except (OSError, ValueError) as error:  # a ConfigError, of an invalid value, is a ValueError
        raise checkpoint.CheckpointError(f"{file}: not a run's options: {error}") from error


def from_json(kind: Any, value: Any, name: str) -> Any:
    """Inverse of ``to_json``: convert a JSON value to a type.

    Args:
        kind: the type.
        value: from ``to_json``.
        name: the option's name, for error messages.

    Raises:
        ConfigError: the value has another type, or an object has other fields; the message names it.
    """
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        prefix = f"{name}." if name else ""
        for field_name in sorted(hints.keys() ^ value.keys()):
            wrong = "is missing" if field_name in hints else "is not an option of this version"
            raise ConfigError(f"{prefix}{field_name} {wrong}")
        return kind(**{k: from_json(hints[k], v, prefix + k) for k, v in value.items()})
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else from_json(arguments[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(from_json(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: from_json(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and (value in ("inf", "-inf", "nan") or type(value) is int):
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{name or 'it'} is {value!r}, expected type {getattr(kind, '__name__', kind)}")
