"""Compares TorchRec's DLRM with DLRM_IFA without a history, on Criteo's click logs: is anything lost?

    python examples/criteo/compare.py                                     # synthetic rows
    python examples/criteo/compare.py --file train.txt --rows 10000000    # Criteo's display challenge

A row has 13 numbers and 26 ids but no user, so there is no history. DLRM takes the ids as they are. For
DLRM_IFA a row is a request with one candidate: one of the 26 ids is the candidate's, the others are the
request's context. Both have the same tables, layers, optimisers and batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import torch
import tyro
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, DEFAULT_COLUMN_NAMES, DEFAULT_INT_NAMES
from torchrec.models.dlrm import DLRM
from tqdm import tqdm

from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.commands.command_line import as_command
from ifa_torchrec.distributed import OptimizerConfig, init_process_group, shard
from ifa_torchrec.errors import UserError

CANDIDATE, *CONTEXT = DEFAULT_CAT_NAMES
"""Criteo does not publish what its columns mean; any of them may be the candidate's."""
META = torch.device("meta")


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    file: Path | None = None
    """Criteo's train.txt, plain or gzipped; by default a synthetic file of that layout."""
    out: Path = Path("runs/criteo")
    """Folder of the synthetic file."""
    rows: int = 240_000
    """Number of rows to read; the last seventh (the last of Criteo's seven days) is the test set."""
    table_rows: int = 100_000
    """Rows of each table; the ids are hashed."""
    dim: int = 16
    """D, width of the embeddings."""
    batch: int = 512
    """Rows per step."""
    table_init: float = 0.25
    """Tables start uniform in plus or minus this value."""
    optimizers: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(table_lr=0.1))
    """Row-wise Adagrad for the tables, AdamW for the rest."""
    seed: int = 0
    """Seed of the weights and of the order of the rows."""


@dataclass(frozen=True)
class Rows:
    """Rows of the log: numbers [R, 13] float32, ids [R, 26] int64, labels [R, 1] float32."""

    numbers: Tensor
    ids: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> Rows:
        return Rows(self.numbers[chosen], self.ids[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def features(self, names: list[str]) -> KeyedJaggedTensor:
        """One id per row and feature."""
        columns = [DEFAULT_CAT_NAMES.index(name) for name in names]
        values = self.ids[:, columns].T.flatten()
        return KeyedJaggedTensor(names, values, lengths=torch.ones_like(values))


def read(file: Path, options: Options) -> Rows:
    """Read the file's first rows. A number x becomes log(4 + x), since Criteo's minimum is -3; a missing
    number becomes 0.

    Raises:
        UserError: the file does not have Criteo's layout, or is too short.
    """
    kinds = {"label": pa.int8()}
    kinds |= dict.fromkeys(DEFAULT_INT_NAMES, pa.float32())
    kinds |= dict.fromkeys(DEFAULT_CAT_NAMES, pa.string())
    parts: list[pd.DataFrame] = []
    try:
        for part in pa.csv.open_csv(
            file,
            pa.csv.ReadOptions(column_names=DEFAULT_COLUMN_NAMES),
            pa.csv.ParseOptions(delimiter="\t"),
            pa.csv.ConvertOptions(column_types=kinds),
        ):
            parts.append(part.to_pandas())
            if sum(map(len, parts)) >= options.rows:
                break
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} does not have Criteo's layout: {error}") from error
    frame = pd.concat(parts).iloc[: options.rows]
    if len(frame) < options.rows:
        raise UserError(f"{file} has {len(frame):,} rows, but --rows is {options.rows:,}")
    numbers = frame[DEFAULT_INT_NAMES].to_numpy(np.float32)
    for name, least in frame[DEFAULT_INT_NAMES].min().items():
        if least < -3:
            raise UserError(f"{file}: {name} has {least:g}; Criteo's numbers are at least -3")
    ids = [pd.util.hash_array(frame[name].to_numpy(object)) for name in DEFAULT_CAT_NAMES]
    return Rows(
        torch.from_numpy(np.nan_to_num(np.log(4 + numbers), nan=0.0)),
        torch.from_numpy((np.stack(ids, axis=1) % options.table_rows).astype(np.int64)),
        torch.from_numpy(frame[["label"]].to_numpy(np.float32, copy=True)),
    )


def make_up(file: Path, rows: int) -> None:
    """Write rows whose clicks depend on the numbers, on eight ids and on six pairs of ids."""
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, (rows, len(DEFAULT_CAT_NAMES))), 200) - 1
    numbers = rng.lognormal(1, 1, (rows, len(DEFAULT_INT_NAMES))).astype(int)
    odds = np.log1p(numbers) @ rng.normal(0, 0.3, len(DEFAULT_INT_NAMES))
    for column in range(8):
        odds += rng.normal(0, 0.3, 200)[ids[:, column]]
    for _ in range(6):
        a, b = rng.choice(len(DEFAULT_CAT_NAMES), 2, replace=False)
        of_a, of_b = rng.normal(0, 0.7, (2, 200, 4))
        odds += (of_a[ids[:, a]] * of_b[ids[:, b]]).sum(1)
    clicks = rng.random(rows) < 1 / (1 + np.exp(0.5 + odds.mean() - odds))
    empty = rng.random(numbers.shape) < 0.05
    columns = [pd.Series(clicks.astype(int)), pd.DataFrame(numbers).astype("Int64").mask(empty)]
    pd.concat([*columns, pd.DataFrame(ids)], axis=1).to_csv(file, sep="\t", header=False, index=False)


def table(name: str, options: Options) -> dict[str, Any]:
    """The configuration of a feature's table, which `shard` allocates."""
    return {
        "name": name,
        "embedding_dim": options.dim,
        "num_embeddings": options.table_rows,
        "init_fn": partial(nn.init.uniform_, a=-options.table_init, b=options.table_init),
    }


def bags(names: list[str], options: Options) -> EmbeddingBagCollection:
    """One table per feature."""
    tables = [EmbeddingBagConfig(feature_names=[name], **table(name, options)) for name in names]
    return EmbeddingBagCollection(tables=tables, device=META)


class ClassicDLRM(nn.Module):
    """torchrec.models.dlrm.DLRM; logits [R, 1]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        tables = bags(DEFAULT_CAT_NAMES, options)
        self.dlrm = DLRM(tables, len(DEFAULT_INT_NAMES), [64, options.dim], [64, 32, 1])

    def forward(self, rows: Rows) -> Tensor:
        """Every id is a sparse feature."""
        return self.dlrm(rows.numbers, rows.features(DEFAULT_CAT_NAMES))


class WithoutHistory(nn.Module):
    """DLRM_IFA with each row as a request with one candidate; logits [R, 1]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        candidate = EmbeddingConfig(
            feature_names=[f"candidate_{CANDIDATE}"], **table(CANDIDATE, options)
        )
        config = DLRM_IFAConfig(
            item_features=(CANDIDATE,),
            dense_in_features=len(DEFAULT_INT_NAMES),
            interaction="none",
            ifa=IFAConfig(options.dim),
            dense_arch_layer_sizes=(64,),
            over_arch_layer_sizes=(64, 32),
        )
        tables = EmbeddingCollection(tables=[candidate], device=META)
        self.dlrm = DLRM_IFA(bags(CONTEXT, options), tables, config)

    def forward(self, rows: Rows) -> Tensor:
        """One id is the candidate's, the others are context; there are no events."""
        candidates = rows.features([CANDIDATE])
        return self.dlrm(
            RankingFeatures(
                dense_features=rows.numbers,
                context_features=rows.features(CONTEXT),
                sequence_features=KeyedJaggedTensor(
                    [f"candidate_{CANDIDATE}"], candidates.values(), lengths=candidates.lengths()
                ),
                candidate_dense=torch.empty(len(rows), 0),
                history_age=torch.empty(0),
            )
        )


def train(kind: type[nn.Module], training: Rows, test: Rows, options: Options) -> dict[str, float]:
    """Train for one pass, in the same order for all models, and measure the test rows."""
    torch.manual_seed(options.seed)
    model, optimizer = shard(kind(options), init_process_group(), options.optimizers)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(options.seed))
    bce = nn.functional.binary_cross_entropy_with_logits
    start = time.perf_counter()
    for chosen in tqdm(order.split(options.batch), desc=kind.__name__, leave=False):
        optimizer.zero_grad()
        bce(model(training[chosen]), training.labels[chosen]).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = torch.cat([model(test[rows]) for rows in torch.arange(len(test)).split(4096)])
    rate = torch.full_like(test.labels, float(test.labels.mean()))
    return {
        "AUC": float(binary_auroc(logits, test.labels.long())),
        "NE": float(bce(logits, test.labels) / nn.functional.binary_cross_entropy(rate, test.labels)),
        "rows/s": len(training) / seconds,
    }


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with as_command():
        file = options.file
        if file is None:
            print("These rows are synthetic; give Criteo's file (--file) for meaningful figures.")
            file = options.out / "made_up.txt"
            options.out.mkdir(parents=True, exist_ok=True)
            make_up(file, options.rows)
        rows = read(file, options)
        cut = len(rows) * 6 // 7
        training, test = rows[:cut], rows[cut:]
        clicked = float(training.labels.mean())
        print(f"{len(training):,} rows to train on, {len(test):,} to test; {clicked:.1%} are clicks")
        kinds = {"DLRM": ClassicDLRM, "DLRM_IFA, no history": WithoutHistory}
        results = {name: train(kind, training, test, options) for name, kind in kinds.items()}
        results = pd.DataFrame(results).T
        print(results.to_string(float_format="{:.4f}".format, formatters={"rows/s": "{:,.0f}".format}))


if __name__ == "__main__":
    main()
