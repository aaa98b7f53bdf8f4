"""Train one of FuxiCTR's LongCTR models on a log in its layout (to_fuxictr.py), and say what it cost.

    FUXICTR_PYTHON fuxictr_worker.py JOB.json

Run by run.py in an environment of FuxiCTR's, so it imports nothing of this package, and FuxiCTR by name:
from that environment, or from a checkout that PYTHONPATH names. JOB.json has the layout's folder, the
model's name and options, the requests to time, and where to write the predictions of `valid` and `test`
(NumPy) and the figures (JSON).
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Clock:
    """Counts a function's calls in processor's seconds, of all threads of this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        start = time.process_time()
        result = self.function(*given, **named)
        self.seconds += time.process_time() - start
        return result


class Rows:
    """What FuxiCTR's loader looks rows up in. It keeps the columns of a candidate in one array; where
    one of them has fractions, the numbers of users and items come as floating point, too."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getitem__(self, rows: np.ndarray) -> Any:
        return self.table[rows.astype(np.int64)]


def feature_map(layout: Path, options: dict[str, Any]) -> Any:
    """FuxiCTR's description of the columns."""
    result = importlib.import_module("fuxictr.features").FeatureMap(layout.name, str(layout))
    result.load(str(layout / "feature_map.json"), options)
    return result


def loader(layout: Path, features: Any, split: str, options: dict[str, Any], shuffle: bool) -> Any:
    """FuxiCTR's loader of a split, in this process, so that its time is counted."""
    module = importlib.import_module("model_zoo.LongCTR.longctr_dataloader")
    result = module.LongCTRDataLoader(
        features,
        str(layout / split),
        user_info=str(layout / "user_info.parquet"),
        item_info=str(layout / "item_info.parquet"),
        batch_size=options["batch_size"],
        shuffle=shuffle,
        num_workers=0,
        max_len=options["max_len"],
    )
    collate = result.collate_fn
    collate.user_info = Rows(collate.user_info)
    collate.item_info = SimpleNamespace(iloc=Rows(collate.item_info.iloc))
    result.collate_fn = Clock(collate)
    return result


@torch.no_grad()
def request_times(model: Any, split: Any, requests: list[int]) -> dict[str, float]:
    """Milliseconds of a request: to load, and to score from the batch in memory; medians."""
    model.eval()
    request = split.dataset.darray[:, split.dataset.column_index["request_index"]]
    times: dict[str, list[float]] = {"load": [], "score": []}
    for number in requests:
        rows = [split.dataset[row] for row in np.flatnonzero(request == number)]
        start = time.process_time()
        batch = split.collate_fn(rows)
        loaded = time.process_time()
        model(batch)
        times["load"].append(1000 * (loaded - start))
        times["score"].append(1000 * (time.process_time() - loaded))
    return {name: float(np.median(values)) for name, values in times.items()}


def peak_memory() -> float:
    """Bytes that this process has had resident at most."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in li)
    return 1024.0 * int(line.split()[1])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train by FuxiCTR's own loop, predict, and measure."""
    torch.set_num_threads(1)
    layout, out, options = Path(job["layout"]), Path(job["out"]), job["options"]
    (out / layout.name).mkdir(parents=True, exist_ok=True)  # where FuxiCTR writes its checkpoint
    importlib.import_module("fuxictr.pytorch.torch_utils").seed_everything(options["seed"])
    features = feature_map(layout, options)
    make = getattr(importlib.import_module("model_zoo.LongCTR"), job["model"])
    model = make(features, model_id=job["model"], model_root=str(out), **options)
    train, valid, test = (
        loader(layout, features, split, options, split == "train")
        for split in ("train", "valid", "test")
    )
    model.evaluate = Clock(model.evaluate)  # its loop validates after each pass
    start = time.process_time()
    model.fit(train, validation_data=valid, epochs=job["passes"])
    seconds = time.process_time() - start - model.evaluate.seconds
    for name, split in (("valid", valid), ("test", test)):
        np.save(out / f"{name}.npy", model.predict(split))
    return {
        "version": importlib.import_module("fuxictr").__version__,
        "rows": len(train.dataset),
        "seconds": seconds,
        "loading": train.collate_fn.seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory": peak_memory(),
        "ms": request_times(model, test, job["timed"]),
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    (Path(given["out"]) / "figures.json").write_text(json.dumps(run(given)))
