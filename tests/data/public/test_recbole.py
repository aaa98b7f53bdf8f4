"""RecBole's atomic files, including the real ml-100k that RecBole ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ifa_torchrec.data import LogError
from ifa_torchrec.data.public import recbole

pytest.importorskip("duckdb", reason="the extra `data` is not installed")


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recbole")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    command += ["--timeout", "5", "--dest", str(folder), "recbole==1.2.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"recbole cannot be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        inside = "recbole/dataset_example/ml-100k/"
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(inside)])
    return folder / inside


def test_ml_100k(ml_100k: Path, tmp_path: Path) -> None:
    log = recbole.prepare(ml_100k, tmp_path / "log")
    ratings = pd.read_csv(ml_100k / "ml-100k.inter", sep="\t")
    ratings.columns = ["user", "item", "rating", "time"]
    ratings = ratings.sort_values(["user", "time"])
    pages = (ratings.groupby("user")["time"].diff().fillna(1e9) > 60).cumsum()
    requests = [log.requests(split) for split in log.splits]
    assert sum(len(r["user"]) for r in requests) == pages.nunique()
    sizes = np.concatenate([np.diff(r["candidate_offsets"]) for r in requests])
    np.testing.assert_array_equal(np.sort(sizes), np.sort(pages.value_counts().to_numpy()))
    assert sum(r["liked"].sum() for r in requests) == (ratings["rating"] >= 4).sum()
    assert len(log.events["item"]) == 100_000
    stars = log.events["rating"]
    assert np.bincount(stars.astype(int)).tolist() == np.bincount(ratings["rating"].astype(int)).tolist()
    action = log.vocabulary["action"].at(log.events["action"])
    assert action == np.where(stars >= 4, "liked", "not").tolist()
    assert log.item_names()[:3] == ["unknown", "Toy Story", "GoldenEye"]
    assert set(log.schema.context_features) == {"age", "gender", "occupation", "zip_code"}
    assert log.schema.item_lists["class"] == 20  # 19 genres
    report = json.loads((log.path / "report.json").read_text())
    assert report["refused"]["requests"]["rows"] == 100_000
    assert all(section["refused"] == 0 for section in report["refused"].values())


def test_labels_in_place_of_ratings(tmp_path: Path) -> None:
    lines = ["user_id:token\titem_id:token\tlabel:float\ttimestamp:float"]
    lines += [f"u{n % 2}\ti{n % 3}\t{n % 2}.0\t{881250000 + 100 * n}.0" for n in range(20)]
    (tmp_path / "clicks.inter").write_text("\n".join(lines) + "\n")
    log = recbole.prepare(tmp_path, tmp_path / "log")
    assert len(log.events["item"]) == 20 and log.users.tolist() == [1, 2]
    assert log.vocabulary["action"].at(log.events["action"]) == ["not"] * 10 + ["liked"] * 10
    assert log.requests("test")["liked"].tolist() == [0, 1]


def test_every_column_that_a_header_types(tmp_path: Path) -> None:
    inter = ["user_id:token\titem_id:token\tlabel:float\ttimestamp:float\tdevice:token\tdwell:float"]
    inter[0] += "\twords:token_seq"
    inter += [
        f"u{n % 2}\ti{n % 3}\t{n % 2}\t{881250000 + 100 * n}\tphone\t{n}.5\ta b" for n in range(20)
    ]
    items = [
        "item_id:token\tbook_title:token_seq\tkind:token\ttags:token_seq\tprice:float\ttext:float_seq",
        "i0\tA Book\tx\tp q\t2.5\t0.5 1.5", "i1\tAnother\ty\t\t\t", "i2\tThird\tx\tq\t4\t3 4",
    ]  # fmt: skip
    users = ["user_id:token\tage:token\tlikes:token_seq\tincome:float\tface:float_seq"]
    users += ["u0\t30\ta b\t1.5\t1 2", "u1\t31\t\t2.5\t3 4"]
    for name, lines in {"inter": inter, "item": items, "user": users}.items():
        (tmp_path / f"few.{name}").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="are left out") as figures:
        log = recbole.prepare(tmp_path, tmp_path / "log")
    left = [re.findall(r"\[.*\]", str(warning.message))[0] for warning in figures]
    assert left == ["['words:token_seq']", "['face:float_seq']"]
    schema = log.schema
    assert schema.event_features == {"device": 2, "action": 3}
    assert schema.event_dense == ("label", "dwell") and schema.dense_features == ("income",)
    assert schema.item_features == {"item": 4, "kind": 3} and schema.item_lists == {"tags": 3}
    assert schema.item_dense == ("price",) and schema.item_vectors == {"text": 2}
    assert schema.context_features == {"age": 3} and schema.context_lists == {"likes": 3}
    assert log.item_names() == ["unknown", "A Book", "Another", "Third"]
    assert log.items["text"].tolist() == [[0, 0], [0.5, 1.5], [0, 0], [3, 4]]
    np.testing.assert_array_equal(log.items["price"], np.float32([np.nan, 2.5, np.nan, 4]))


@pytest.mark.parametrize(
    ("header", "message"),
    [("user_id:token\titem_id:token\ttimestamp:float", "no column rating or label"),
     ("user_id:token\titem_id:token\trating:float", "no column timestamp"),
     ("user_id:token\titem_id:token\trating:int\ttimestamp:float", "'rating:int' must end with a"),
     (None, "expected exactly one .inter file")],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, header: str | None, message: str) -> None:
    if header:
        (tmp_path / "some.inter").write_text(header + "\n")
    with pytest.raises(LogError, match=message):
        recbole.prepare(tmp_path, tmp_path / "log")


def test_a_column_named_action_is_not_replaced(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\taction:token\n"
    (tmp_path / "tiny.inter").write_text(header + "1\t2\t3\t881250000\tbuy\n")
    with pytest.raises(LogError, match="'action:token' must be renamed"):
        recbole.schema_of(tmp_path)
