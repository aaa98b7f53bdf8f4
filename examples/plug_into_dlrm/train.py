"""Adds a lifelong history to TorchRec's own DLRM and DLRM_DCN, which are not changed.

    python examples/plug_into_dlrm/train.py        # about a minute, 2 cores

Which of the next ten films that a user rates are liked? Uses MovieLens-100K. The DLRM gets one row per
candidate: the user, the film, the user's features, and how often the film was rated. WithHistory is the
only addition; at the start it equals the DLRM bit for bit, since its addend starts at zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
)
from torchrec.models.dlrm import DLRM, DLRM_DCN

from ifa_torchrec import IFAConfig, InteractionFidelityAttention

sys.path.insert(0, str(Path(__file__).parents[1]))
from ml100k import CANDIDATES, Requests, load


@dataclass(frozen=True)
class Options:
    """What to train."""

    data: Path = Path("runs/data/recbole")
    """Folder of the files; downloaded if they do not exist."""
    epochs: int = 2
    """Passes over the requests."""
    requests: int | None = None
    """Number of training requests; None for all."""
    dim: int = 32
    """D, width of the embeddings."""
    seed: int = 0
    """Seed of the weights and of the order of the requests."""


class WithHistory(nn.Module):
    """Any model (dense_features, sparse_features) -> logits [M, 1], with a history added.

    Args:
        dlrm: the unchanged model, sharded or not; its rows are the candidates.
        tables: EmbeddingCollection with history_item and candidate_item.
        config: IFAConfig.
    """

    def __init__(self, dlrm: nn.Module, tables: EmbeddingCollection, config: IFAConfig) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.dlrm, self.tables = dlrm, tables
        self.ifa = InteractionFidelityAttention(config)
        self.liked = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim)
        self.over = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        nn.init.zeros_(self.over[-1].weight)
        nn.init.zeros_(self.over[-1].bias)

    def forward(
        self,
        dense: Tensor,
        sparse: KeyedJaggedTensor,
        history: KeyedJaggedTensor,
        age: Tensor,
        liked: Tensor,
    ) -> Tensor:
        """Logits [M, 1]: the DLRM's plus the history's contribution."""
        tokens = self.tables(history)
        asked, events = tokens["candidate_item"], tokens["history_item"]
        asked = with_values(asked, self.norm(asked.values()))
        events = with_values(events, self.norm(events.values() + self.liked(liked)))
        interest = self.ifa(asked, events, age).values()
        return self.dlrm(dense, sparse) + self.over(torch.cat([asked.values(), interest], dim=1))


def with_values(rows: JaggedTensor, values: Tensor) -> JaggedTensor:
    """The same rows with other values."""
    return JaggedTensor(values, lengths=rows.lengths(), offsets=rows.offsets())


SPARSE = ("user", "item", "age", "gender", "occupation")


class Rows:
    """Makes the DLRM's inputs: one row per candidate."""

    def __init__(self, training: Requests, users: pd.DataFrame) -> None:
        popularity = np.bincount(training.item.ravel(), minlength=10_000)
        self.popularity = np.log1p(popularity).astype(np.float32)
        self.codes = {name: users[name].astype("category").cat.codes for name in SPARSE[2:]}

    def __call__(self, requests: Requests) -> tuple[Tensor, KeyedJaggedTensor]:
        """dense_features [M, 1], and sparse_features with stride M."""
        user = np.repeat(requests.user, CANDIDATES)
        item = requests.item.ravel()
        ids = [user, item, *(codes.loc[user].to_numpy() for codes in self.codes.values())]
        sparse = KeyedJaggedTensor.from_lengths_sync(
            keys=list(SPARSE),
            values=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            lengths=torch.ones(len(SPARSE) * len(item), dtype=torch.int64),
        )
        return torch.from_numpy(self.popularity[item])[:, None], sparse


def make_dlrm(kind: Callable[..., nn.Module], rows: dict[str, int], dim: int) -> nn.Module:
    """TorchRec's DLRM or DLRM_DCN."""
    bags = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, embedding_dim=dim, num_embeddings=rows[name], feature_names=[name]
            )
            for name in SPARSE
        ]
    )
    layers = {"dense_arch_layer_sizes": [32, dim], "over_arch_layer_sizes": [64, 32, 1]}
    if kind is DLRM_DCN:
        layers |= {"dcn_num_layers": 2, "dcn_low_rank_dim": 16}
    return kind(bags, dense_in_features=1, **layers)


def train(options: Options, kind: Callable[..., nn.Module], with_history: bool) -> None:
    """Train a model and print its AUC on the test requests."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    training, test, tables, users = load(options.data)
    training = training[np.arange(len(training))[: options.requests]]
    rows = Rows(training, users)
    sizes = tables | {name: int(codes.max()) + 1 for name, codes in rows.codes.items()}
    model = make_dlrm(kind, sizes, options.dim)
    if with_history:
        table = EmbeddingConfig(
            name="film",
            num_embeddings=tables["item"],
            embedding_dim=options.dim,
            feature_names=["history_item", "candidate_item"],
        )
        config = IFAConfig(options.dim, num_heads=2, half_lives=(math.inf, 30.0))
        model = WithHistory(model, EmbeddingCollection(tables=[table]), config)

    def logits(requests: Requests) -> Tensor:
        history = requests.history() if with_history else ()
        return model(*rows(requests), *history)[:, 0]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    loss, name = torch.zeros(()), f"{kind.__name__}{' + IFA' if with_history else ''}"
    for epoch in range(options.epochs):
        for part in np.array_split(rng.permutation(len(training)), len(training) // 32 + 1):
            labels = torch.from_numpy(training[part].label.ravel()).float()
            loss = nn.functional.binary_cross_entropy_with_logits(logits(training[part]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            parts = np.array_split(np.arange(len(test)), 20)
            scores = torch.cat([logits(test[part]) for part in parts])
        auc = float(binary_auroc(scores, torch.from_numpy(test.label.ravel())))
        print(f"{name:14}  epoch {epoch + 1}  loss {loss.item():.3f}  test AUC {auc:.4f}")


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    for kind in (DLRM, DLRM_DCN):
        for with_history in (False, True):
            train(options, kind, with_history)


if __name__ == "__main__":
    main()
