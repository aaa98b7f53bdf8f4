"""Bundles: serving without the log works as with the run; a damaged bundle is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shop import ITEMS, SHOP_IFA, Shop

from ifa_torchrec.__main__ import main
from ifa_torchrec.commands import export as export_module
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.export import ExportConfig, export
from ifa_torchrec.commands.serve import ServeConfig, _load
from ifa_torchrec.errors import ConfigError, ExistsError
from ifa_torchrec.serving import StateError, open_key_value_store
from ifa_torchrec.training.bundle import BundleError, read_bundle
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train


@pytest.fixture(scope="module")
def run(shop: Shop, tmp_path_factory) -> Path:
    """A run on a copy of the shop's log, which is next to it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(shop.log.path, folder / "log")
    out = folder / "run"
    ifa = dataclasses.replace(SHOP_IFA, gates={})  # ifa train takes them from the log's features
    train(TrainConfig(folder / "log", out, ifa=ifa, seed=3, epochs=2, validate=False))
    return out


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    folder = run.parent / "bundle"
    export(ExportConfig(run, bundle=folder))
    return folder


def test_a_bundle_ranks_and_adds_events_exactly_as_the_run_with_its_log(shop, run, bundle, tmp_path):
    build_states(BuildStatesConfig(run, str(tmp_path / "states"), len(shop.events)))
    shutil.copytree(bundle, tmp_path / "bundle")
    found = []
    for folder in (run, tmp_path / "bundle"):
        shutil.copytree(tmp_path / "states", tmp_path / "copy")
        config = ServeConfig(folder, str(tmp_path / "copy"))
        key_values = open_key_value_store(config.store)
        if folder != run:
            (run.parent / "log").rename(tmp_path / "gone")
        scorer = _load(config).scorer(config, key_values)
        requests = [shop.request(n) for n in range(len(shop.requests))]
        before = scorer.rank(requests)
        event = shop.event(0)
        later = len(shop.events)
        new = [
            type(event)(
                later + n, user, f"item {n + 1}", event.time + 10**13, event.features, event.numbers, 1.0
            )
            for n, user in enumerate(["anna", "bob", "7", "someone"])
        ]
        assert [result.status for result in scorer.append(new)] == ["taken"] * 4
        found.append((scorer.store.version, *before, *scorer.rank(requests)))
        key_values.close()
        shutil.rmtree(tmp_path / "copy")
    (tmp_path / "gone").rename(run.parent / "log")
    (version, *of_run), (same, *of_bundle) = found
    assert version == same
    for wanted, given in zip(of_run, of_bundle, strict=True):
        assert wanted.items == given.items and wanted.as_of == given.as_of
        assert wanted.unknown_candidates == given.unknown_candidates
        np.testing.assert_array_equal(wanted.logits, given.logits)


def test_a_bundle_has_no_events_and_no_users(shop, run, bundle):
    opened, trained = read_bundle(bundle), load_run(run, sharded=False)
    assert opened.dlrm.config == trained.dlrm.config
    assert opened.log.num_items == ITEMS and opened.log.schema == trained.log.schema
    assert opened.log.vocabulary.digest == shop.log.vocabulary.digest
    assert opened.log.vocabulary["user"].rows_of(["anna"]).tolist() == [0]
    for name, weights in trained.dlrm.state_dict().items():
        assert torch.equal(opened.dlrm.state_dict()[name], weights)
    assert (bundle / "vocabulary" / "item.parquet").exists()
    assert not (bundle / "vocabulary" / "user.parquet").exists()


@pytest.mark.parametrize("name", ["weights.pt", "items/price.npy", "vocabulary.json", "bundle.json"])
def test_a_changed_byte_is_refused(name, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"bundle/{name}.*ifa export --run RUN --bundle DIR"):
        read_bundle(folder)


def _longer(folder: Path) -> None:
    with (folder / "weights.pt").open("ab") as file:
        file.write(b"0")


def _of_tomorrow(folder: Path) -> None:
    said = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**said, "format": "ifa-bundle/4"}))


@pytest.mark.parametrize(
    "change, told",
    [
        (_longer, r"weights.pt has \d+ bytes, expected \d+"),
        (lambda folder: (folder / "items" / "text.npy").unlink(), "items/text.npy is missing"),
        (lambda folder: (folder / "dense.pt2").touch(), "dense.pt2 was not in the bundle"),
        (lambda folder: (folder / "bundle.json").unlink(), "no bundle here"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "not a bundle's file"),
        (_of_tomorrow, "format 'ifa-bundle/4', this version reads 'ifa-bundle/3'"),
    ],
)
def test_an_altered_bundle_is_refused(
    change: Callable[[Path], None], told: str, bundle: Path, tmp_path: Path
):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    change(folder)
    with pytest.raises(BundleError, match=told):
        read_bundle(folder)


def test_options_that_do_not_fit_a_bundle_are_refused(run, bundle, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--bundle and --out"):
        ExportConfig(run, out=tmp_path / "a.pt2", bundle=tmp_path / "b")
    with pytest.raises(ConfigError, match="--package and --int8"):
        ExportConfig(run, bundle=tmp_path / "b", int8=True)
    with pytest.raises(ExistsError, match="bundle exists"):
        export(ExportConfig(run, bundle=bundle))
    with pytest.raises(ConfigError, match=r"--data: .* is a bundle"):
        _load(ServeConfig(bundle, "states", data=run.parent / "log"))
    monkeypatch.setattr("sys.argv", ["ifa", "serve", "--bundle", str(bundle), "--store", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*no store of states here"):
        main()


def test_a_bundle_includes_the_compiled_dense_part(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "dense.pt2").write_bytes(b"compiled")
    with pytest.raises(StateError, match=r"dense\.pt2 cannot be loaded.*ifa export --run RUN"):
        export(ExportConfig(tmp_path / "run", bundle=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
    monkeypatch.setattr(export_module, "check_weights", lambda *_: None)
    said = export(ExportConfig(tmp_path / "run", bundle=tmp_path / "bundle"))
    assert said["files"]["dense.pt2"]["bytes"] == 8
    assert (tmp_path / "bundle" / "dense.pt2").read_bytes() == b"compiled"
