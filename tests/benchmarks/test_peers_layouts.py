"""The files that benchmarks/peers writes for other libraries, read back and compared with our inputs."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy

from benchmarks.peers import run as peers
from benchmarks.peers import to_fuxictr as fuxictr
from benchmarks.peers import to_recbole as recbole
from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.data.schema import CANDIDATES, EXPOSED
from ifa_torchrec.errors import ConfigError


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The toy with a missing hour and unexposed candidates in `train`."""
    made = toy.make_toy()
    train = made.requests["train"]
    train.loc[0, "hour"] = np.nan
    train[EXPOSED] = [[*shown[:-1], False] for shown in train[EXPOSED]]
    return made.write(tmp_path_factory.mktemp("peers") / "log")


def batch_of(log: EventLog, split: str):
    dataset = RankingDataset(log, split)
    return dataset, dataset[np.arange(len(dataset))]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_fuxictr_is_given_what_our_models_are(log: EventLog, split: str, tmp_path: Path):
    assert fuxictr.to_fuxictr(log, tmp_path / "layout") == []
    rows, items, users = (
        pd.read_parquet(tmp_path / "layout" / f"{name}.parquet")
        for name in (split, "item_info", "user_info")
    )
    dataset, batch = batch_of(log, split)
    kept = (
        dataset.requests[EXPOSED] if split == "train" else np.ones(len(dataset.requests[EXPOSED]), bool)
    )
    request = np.repeat(np.arange(len(dataset)), np.diff(dataset.requests["candidate_offsets"]))[kept]
    assert rows["request_index"].tolist() == request.tolist()
    assert rows["label"].tolist() == dataset.requests["label"][kept].tolist()
    described = items.iloc[rows["item_index"]]
    sequences = batch.sequence_features
    for name in ("item", "category"):
        assert (
            described[f"x_{name}"].tolist()
            == sequences[f"candidate_{name}"].values()[np.flatnonzero(kept)].tolist()
        )
    histories = users["full_item_seq"].to_numpy()[rows["user_index"]]
    of_request = {
        r: items["x_category"].to_numpy()[h[:n]].tolist()
        for r, h, n in zip(request, histories, rows["seq_len"], strict=True)
    }
    ours = sequences["history_category"]
    offsets = ours.offsets().tolist()
    for r, categories in of_request.items():
        assert categories == ours.values()[offsets[r] : offsets[r + 1]].tolist()
    hour, scale = batch.dense_features[request, 0].numpy(), log.scales["hour"]
    np.testing.assert_allclose(
        rows["x_hour"], np.nan_to_num((hour - scale.mean) / scale.deviation), atol=1e-6
    )
    assert rows["x_store"].tolist() == dataset.requests["store"][request].tolist()
    assert items.iloc[0].tolist() == [0, 0, 0]  # the padding


def test_the_columns_that_fuxictr_is_told_of(log: EventLog, tmp_path: Path):
    fuxictr.to_fuxictr(log, tmp_path / "layout")
    told = json.loads((tmp_path / "layout" / "feature_map.json").read_text())
    features = {name: spec for of in told["features"] for name, spec in of.items()}
    columns = {*pd.read_parquet(tmp_path / "layout" / "train.parquet"), "x_item", "x_category"}
    assert columns - {"request_index", "label"} == features.keys() and told["labels"] == ["label"]
    assert features["x_item"] == {"source": "item", "type": "categorical", "vocab_size": toy.NUM_ITEMS}
    assert features["x_price"]["type"] == "numeric" and features["seq_len"]["type"] == "meta"


def test_users_of_a_log_in_parts(tmp_path: Path):
    made = toy.make_toy()
    whole = made.write(tmp_path / "whole")
    parted = EventLog.from_pandas(
        tmp_path / "parted", made.events, made.schema, made.items, made.requests, parts=3
    )
    length = {}
    for log in (whole, parted):
        requests = log.requests("test")
        place = fuxictr.user_index(log, requests)
        found = place < len(log.users)
        assert (log.users[place[found]] == requests["user"][found]).all()
        length[log] = dict(zip(requests["user"].tolist(), found.tolist(), strict=True))
    assert length[whole] == length[parted] and not length[whole][toy.NEW_USER]


def read_atomic(file: Path) -> pd.DataFrame:
    table = pd.read_csv(file, sep="\t", keep_default_na=False)
    names = table.columns.str.split(":")
    for column, (name, kind) in zip(table.columns, names, strict=True):
        assert kind in ("token", "float", "token_seq"), name
        if kind == "token_seq":
            table[column] = [[int(i) for i in text.split()] for text in table[column].astype(str)]
    return table.set_axis([name for name, _ in names], axis=1)


def test_recbole_is_given_the_log(log: EventLog, tmp_path: Path):
    recbole.to_recbole(log, tmp_path / "toy", history_length=5)
    events, items, rows = (
        read_atomic(tmp_path / "toy" / f"toy.{n}") for n in ("inter", "item", "train.inter")
    )
    assert events["item_id"].tolist() == log.events["item"].tolist()
    assert (1e6 * events["timestamp"]).astype(np.int64).tolist() == log.events["time"].tolist()
    assert items["category"].tolist() == log.items["category"].tolist()
    dataset, batch = batch_of(log, "train")
    kept = dataset.requests[EXPOSED]
    assert rows["item_id"].tolist() == dataset.requests[CANDIDATES][kept].tolist()
    assert rows["label"].tolist() == dataset.requests["label"][kept].tolist()
    history = batch.sequence_features["history_item"]
    values, offsets = history.values().tolist(), history.offsets().tolist()
    for r, given in zip(rows["request_id"], rows["item_id_list"], strict=True):
        assert given == values[offsets[r] : offsets[r + 1]][-5:]
    assert set(rows["hour"][rows["request_id"] == 0]) == {""}  # missing


def test_what_cannot_be_converted_is_said(log: EventLog, tmp_path: Path):
    (tmp_path / "there").mkdir()
    for convert in (fuxictr.to_fuxictr, recbole.to_recbole):
        with pytest.raises(FileExistsError, match="there exists; delete it"):
            convert(log, tmp_path / "there")
    made = toy.make_toy()
    schema = replace(made.schema, context_features={"request_id": 3})
    with pytest.raises(LogError, match="column 'request_id': RecBole's files have one of this name"):
        recbole.check_names(schema)
    with pytest.raises(LogError, match="need a binary task"):
        fuxictr.label_of(replace(made.schema, tasks={"watch": "regression"}))
    with pytest.raises(LogError, match="history_length must be at least 1"):
        recbole.to_recbole(log, tmp_path / "short", history_length=0)
    more = replace(
        made.schema, event_features={"kind": 3}, event_dense=("spent",), event_weight="weight"
    )
    assert fuxictr.left_out(more, "label") == ["kind", "spent", "weight"]


@pytest.mark.parametrize("module", [fuxictr, recbole])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("python", "told"), [("/nowhere/python", "no such program"), ("/bin/false", "Is it installed there")]
)
def test_a_fuxictr_that_cannot_be_run_is_said(log: EventLog, tmp_path: Path, python: str, told: str):
    options = peers.Options(Path(python), out=tmp_path)
    job = peers.fuxictr_job("TWIN", "batches of 256", 5, 0)
    with pytest.raises(ConfigError, match=told):
        peers.fuxictr(options, log, job, tmp_path)


def test_requests_that_are_timed_have_the_whole_length(log: EventLog):
    lengths = RankingDataset(log, "test", 5).history_lengths
    assert set(lengths[peers.timed(log, 5)]) == {5}
    longest = RankingDataset(log, "test").history_lengths.max()
    assert set(RankingDataset(log, "test").history_lengths[peers.timed(log, 10**6)]) == {longest}


def made_up(gauc: float, seconds: float) -> dict:
    of_split = {"gauc": gauc, "ndcg@10": gauc, "auc": gauc, "log_loss": 1 - gauc, "ne": 1.0}
    cost = dict(rows=1000, seconds=seconds, memory=1e9, ms=dict(load=1.0, score=2.0))
    return dict(test=of_split, valid=of_split, version="2.3.10", commit="abc", **cost)


def test_the_page_says_where_the_peer_is_better(log: EventLog, tmp_path: Path):
    first, second, _ = peers.SETTINGS
    results = {
        (peers.FUXICTR, "TWIN", 50, first): [made_up(0.7, 10.0)],
        (peers.FUXICTR, "TWIN", 50, second): [made_up(0.71, 10.0)],
        (peers.FUXICTR, "TWIN", 200, second): [made_up(0.75, 9.0)],
        (peers.OURS, "TWIN", 200, ""): [made_up(0.74, 5.0)],
        (peers.OURS, "IFA", 200, ""): [made_up(0.8, 10.0)],
    }
    page = peers.page(peers.Options(Path("python"), out=tmp_path), log, results)
    assert "| TWIN | FuxiCTR | 0.7500 |" in page and "| TWIN | this package | 0.7400 |" in page
    assert "FuxiCTR's TWIN against ours: GAUC 0.7500 against 0.7400" in page
    assert "FuxiCTR's TWIN against IFA: CPU s a pass 9 against 10" in page
    assert f"| {first} | 0.7000 |" in page and f"| {second} (taken) | 0.7100 |" in page
    assert "Not run yet." in page  # with 1,000 events
    assert not any(
        placeholder in page for placeholder in ("MEASURED", "TRAINED", "TABLE", "LEFT_OUT", "SEEDS")
    )


def test_log_loss_is_that_of_the_logits(log: EventLog):
    label = log.requests("test")["label"].astype(float)
    logits = np.random.default_rng(0).normal(size=len(label)).astype(np.float32)
    expected = np.log1p(np.exp(-(2 * label - 1) * logits)).mean()
    assert peers.quality(log, "test", logits)["log_loss"] == pytest.approx(expected, rel=1e-5)
