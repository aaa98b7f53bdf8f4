"""The IFA module in another TorchRec model: an EmbeddingCollection and an MLP.

    python examples/plug_into_your_model/train.py        # about a minute, 2 cores

Which of the next ten films that a user rates are liked? Uses MovieLens-100K, with all earlier ratings as
history. The lines that IFA needs are marked with "# IFA".
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor

from ifa_torchrec import IFAConfig, InteractionFidelityAttention  # IFA

sys.path.insert(0, str(Path(__file__).parents[1]))
from ml100k import Requests, load


@dataclass(frozen=True)
class Options:
    """What to train."""

    data: Path = Path("runs/data/recbole")
    """Folder of the files; downloaded if they do not exist."""
    epochs: int = 5
    """Passes over the requests."""
    requests: int | None = None
    """Number of training requests; None for all."""
    dim: int = 32
    """D, width of the embeddings."""
    seed: int = 0
    """Seed of the weights and of the order of the requests."""


class Ranker(nn.Module):
    """Logits of candidates from their embeddings and, with IFA, from the user's history."""

    def __init__(self, items: int, dim: int, with_history: bool) -> None:
        super().__init__()
        table = EmbeddingConfig(
            name="item",
            num_embeddings=items,
            embedding_dim=dim,
            feature_names=["history_item", "candidate_item"],
        )
        self.tables = EmbeddingCollection(tables=[table])
        self.scores = Scores(dim, with_history)

    def forward(self, features: KeyedJaggedTensor, age: Tensor, liked: Tensor) -> Tensor:
        """Logits [M]."""
        tokens = self.tables(features)
        return self.scores(tokens["candidate_item"], tokens["history_item"], age, liked)


class Scores(nn.Module):
    """Everything but the tables; a separate module, so that the pipeline's tracing stops here."""

    def __init__(self, dim: int, with_history: bool) -> None:
        super().__init__()
        self.liked = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim)
        self.ifa = None
        if with_history:
            config = IFAConfig(dim, num_heads=2, half_lives=(math.inf, 30.0))  # IFA; ages are in days
            self.ifa = InteractionFidelityAttention(config)  # IFA
        self.over = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(
        self, candidates: JaggedTensor, history: JaggedTensor, age: Tensor, liked: Tensor
    ) -> Tensor:
        """Logits [M]."""
        interest = torch.zeros_like(candidates.values())
        if self.ifa is not None:
            candidates = with_values(candidates, self.norm(candidates.values()))
            events = self.norm(history.values() + self.liked(liked))
            interest = self.ifa(candidates, with_values(history, events), age).values()  # IFA
        return self.over(torch.cat([candidates.values(), interest], dim=1))[:, 0]


def with_values(rows: JaggedTensor, values: Tensor) -> JaggedTensor:
    """The same rows with other values."""
    return JaggedTensor(values, lengths=rows.lengths(), offsets=rows.offsets())


def evaluate(model: Ranker, requests: Requests) -> float:
    """AUC over all candidates."""
    with torch.no_grad():
        logits = [
            model(*requests[part].history()) for part in np.array_split(np.arange(len(requests)), 20)
        ]
    return float(binary_auroc(torch.cat(logits), torch.from_numpy(requests.label.ravel())))


def train(options: Options, with_history: bool) -> None:
    """Train a model and print its AUC on the test requests."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    training, test, tables, _ = load(options.data)
    training = training[np.arange(len(training))[: options.requests]]
    model = Ranker(tables["item"], options.dim, with_history)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    loss = torch.zeros(())
    for epoch in range(options.epochs):
        for part in np.array_split(rng.permutation(len(training)), len(training) // 32 + 1):
            batch = training[part]
            labels = torch.from_numpy(batch.label.ravel()).float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(*batch.history()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        auc = evaluate(model, test)
        name = "with IFA" if with_history else "without"
        print(f"{name:8}  epoch {epoch + 1}  loss {loss.item():.3f}  test AUC {auc:.4f}")


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    for with_history in (False, True):
        train(options, with_history)


if __name__ == "__main__":
    main()
