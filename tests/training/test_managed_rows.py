"""Tables with fewer rows than ids, by TorchRec's managed collisions: --managed-rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.mc_modules import ManagedCollisionCollection
from toy import NUM_CATEGORIES, NUM_ITEMS

from ifa_torchrec import DLRM_IFA, IFAConfig
from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed import CheckpointError, OptimizerConfig, ShardingError
from ifa_torchrec.models.sparse import tables_of
from ifa_torchrec.serving import StateError, export_scorer, quantize_tables
from ifa_torchrec.training import build
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.scoring import predict
from ifa_torchrec.training.trainer import train

ROWS = 12


def configured(log: EventLog, out: Path) -> TrainConfig:
    """Six steps per epoch; a third of the items get rows."""
    return TrainConfig(
        data=log.path,
        out=out,
        ifa=IFAConfig(embedding_dim=8, num_heads=2),
        identity=False,
        managed_rows={"item_table": ROWS},
        optimizers=OptimizerConfig("adagrad"),
        max_requests=8,
        validate=False,
    )


def trained(config: TrainConfig) -> np.ndarray:
    """Train, with rows for new ids in each step, and score the split `test`; run on every rank."""
    with mock.patch.object(build, "EVICTION_INTERVAL", 1):
        train(config)
    return scores(config.out)


def scores(out: Path) -> np.ndarray:
    run = load_run(out)
    return predict(run.model, run.dataset("test"), run.device, 10_000, 8)[0]


@pytest.fixture(scope="module")
def run(log: EventLog, tmp_path_factory) -> tuple[Path, np.ndarray]:
    config = configured(log, tmp_path_factory.mktemp("managed") / "run")
    return config.out, trained(config)


def remapped(dlrm: DLRM_IFA, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The ids after the managed-collision collection has mapped them."""
    manager = next(m for m in dlrm.modules() if isinstance(m, ManagedCollisionCollection))
    order = manager(features)
    return KeyedJaggedTensor.from_jt_dict({key: order[key] for key in features.keys()})  # noqa: SIM118


@torch.no_grad()
def test_rows_are_given_to_the_ids_that_are_met(run) -> None:
    """The scores are those of plain tables with the ids' rows; ids without a row use the last one."""
    loaded = load_run(run[0], sharded=False)
    dlrm = loaded.dlrm.eval()
    assert [table.num_embeddings for table in tables_of(dlrm.sequence_arch.embedding_collection)] == [
        ROWS,
        NUM_CATEGORIES + 2,
    ]
    inner = next(m for m in dlrm.modules() if isinstance(m, EmbeddingCollection))
    plain = DLRM_IFA(dlrm.sparse_arch.embedding_bag_collection, inner, dlrm.config).eval()
    plain.candidate_arch, plain.set_arch = dlrm.candidate_arch, dlrm.set_arch
    batch = loaded.dataset("test")[np.arange(12)]
    ids = batch.sequence_features
    rows = remapped(dlrm, ids)
    got = dlrm(batch)
    torch.testing.assert_close(got, plain(dataclasses.replace(batch, sequence_features=rows)))
    np.testing.assert_allclose(got.numpy(), run[1][: len(got)], atol=1e-5)

    item, row = ids["history_item"].values(), rows["history_item"].values()
    known = row < ROWS - 1
    assert 0 < known.sum() < len(row)
    assert (
        len(set(zip(item[known].tolist(), row[known].tolist(), strict=True)))
        == len(set(item[known].tolist()))
        == len(set(row[known].tolist()))
    )  # one to one
    category = rows["history_category"].values()
    assert len(category.unique()) == len(ids["history_category"].values().unique())


def test_training_goes_on_from_a_checkpoint(run, log: EventLog, tmp_path: Path) -> None:
    config = dataclasses.replace(configured(log, tmp_path / "run"), epochs=2)
    first = trained(config)
    assert np.isfinite(first).all() and not np.allclose(first, run[1])
    again = train(dataclasses.replace(config, resume=True))
    assert again["steps"] == 12
    np.testing.assert_array_equal(scores(config.out), first)


def test_on_two_ranks(log: EventLog, tmp_path: Path) -> None:
    """Each rank has half of the rows and half of the ids."""
    config = configured(log, tmp_path / "run")
    first, second = run_ranks(trained, 2, config)
    np.testing.assert_array_equal(first, second)
    alone = scores(config.out)  # ids without a row share one row, not one per rank
    assert np.isfinite(alone).all() and np.corrcoef(alone[:, 0], first[:, 0])[0, 1] > 0.8


def test_more_ranks_than_trained_it_are_refused(run) -> None:
    for error in run_ranks(scores, 2, run[0], check=False):
        assert isinstance(error, CheckpointError)
        assert "managed-collision tables were trained on a different number of ranks" in str(error)


@pytest.mark.parametrize(
    "rows", [{"thing_table": 4}, {"item_table": 1}, {"item_table": NUM_ITEMS + 1}, {"store_table": 2}]
)
def test_rows_that_cannot_be(rows: dict[str, int], log: EventLog, tmp_path: Path) -> None:
    config = dataclasses.replace(configured(log, tmp_path / "run"), managed_rows=rows)
    with pytest.raises(ValueError, match=r"--managed-rows: .*'item_table': 40"):
        train(config)


def test_rowwise_adagrad_needs_a_gpu(log: EventLog, tmp_path: Path) -> None:
    config = dataclasses.replace(configured(log, tmp_path / "run"), optimizers=OptimizerConfig())
    with pytest.raises(ShardingError, match="'adagrad' or 'sgd'"):
        train(config)


def test_what_serves_plain_tables_alone_says_so(run) -> None:
    loaded = load_run(run[0], sharded=False)
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize_tables(loaded.dlrm)
    with pytest.raises(StateError, match="cannot be exported"):
        export_scorer(loaded.dlrm, loaded.log.schema)
