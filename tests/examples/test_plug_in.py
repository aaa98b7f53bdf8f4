"""IFA in other models: the examples run, and a DLRM with history starts equal to the DLRM."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ranks import torchrun
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.models.dlrm import DLRM, DLRM_DCN

from ifa_torchrec import IFAConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import ml100k  # noqa: E402


def module_of(folder: str) -> ModuleType:
    """An example's train.py, by folder; both have that name."""
    spec = importlib.util.spec_from_file_location(f"{folder}_train", EXAMPLES / folder / "train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


your_model, your_dlrm = module_of("plug_into_your_model"), module_of("plug_into_dlrm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ml100k")
    ml100k.fetch(folder)
    return folder


def test_a_history_is_what_was_rated_strictly_before(folder):
    training, test, tables, users = ml100k.load(folder)
    assert tables == {"user": 944, "item": 1683} and len(users) == 943
    assert training.time.max() < test.time.min() and len(training) > 4 * len(test) * 0.9
    ratings = training.ratings
    for b in range(0, len(test), 97):
        one = test[np.array([b])]
        features, age, liked = one.history()
        mine = ratings[(ratings["user"] == one.user[0]) & (ratings["timestamp"] < one.time[0])]
        assert features["history_item"].values().tolist() == mine["item"].tolist()
        assert (age > 0).all() and liked.tolist() == (mine["rating"] >= 4).astype(int).tolist()
        asked = ratings[(ratings["user"] == one.user[0]) & ratings["item"].isin(one.item[0])]
        assert asked.set_index("item").loc[one.item[0], "liked"].tolist() == one.label[0].tolist()


@pytest.mark.parametrize("module", [your_model, your_dlrm], ids=["your model", "dlrm"])
def test_the_example_runs(module, folder, monkeypatch, capsys):
    command = ["train.py", "--data", str(folder), "--epochs", "1", "--requests", "200"]
    monkeypatch.setattr("sys.argv", command)
    module.main()
    aucs = re.findall(r"test AUC (0\.\d{4})", capsys.readouterr().out)
    assert len(aucs) == (2 if module is your_model else 4)
    assert all(0.45 < float(auc) < 0.8 for auc in aucs)


@pytest.mark.slow
def test_the_model_trains_on_two_ranks(folder):
    """With TorchRec's own pipeline; both models score the test the same."""
    script = EXAMPLES / "plug_into_your_model" / "sharded.py"
    done = torchrun(script, "--data", folder, "--epochs", "1", "--requests", "400")
    assert done.returncode == 0, done.stderr[-4000:]
    (auc,) = re.findall(r"^2 ranks  epoch 1  test AUC (0\.\d{4})$", done.stdout, re.M)
    assert 0.5 < float(auc) < 0.8
    assert "'ranker.tables' will be pipelined" in done.stderr


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN])
@torch.no_grad()
def test_a_dlrm_with_a_history_starts_as_itself(kind, folder):
    training, test, tables, users = ml100k.load(folder)
    rows = your_dlrm.Rows(training, users)
    sizes = tables | {name: int(codes.max()) + 1 for name, codes in rows.codes.items()}
    dlrm = your_dlrm.make_dlrm(kind, sizes, 32)
    film = EmbeddingConfig(
        name="film",
        embedding_dim=32,
        num_embeddings=1683,
        feature_names=["history_item", "candidate_item"],
    )
    model = your_dlrm.WithHistory(dlrm, EmbeddingCollection(tables=[film]), IFAConfig(32))
    some = test[np.arange(5)]
    assert torch.equal(model(*rows(some), *some.history()), dlrm(*rows(some)))
    assert {f"dlrm.{name}" for name in dlrm.state_dict()} <= set(model.state_dict())
