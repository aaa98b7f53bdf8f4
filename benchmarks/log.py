"""Time and memory that a large log needs on one machine: to prepare, open, get a first batch, and read.

    python benchmarks/log.py                     # about half an hour on 2 cores, 5 GB of disk
    python benchmarks/log.py --events 2_000_000  # four minutes

Writes docs/log.md, and examples/plan_for_cluster/log.json, the input of that example. Measures a
synthetic log, and one of a tenth of its size to see what grows. Each stage runs in its own process,
whose memory is reported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import duckdb
import pandas as pd
import tyro
from report import ROOT, markdown, measured_by

from ifa_torchrec.data import EventBudgetSampler, EventLog, RankingDataset, make_loader
from ifa_torchrec.data.prepare import load_schema, prepare

STEPS, LOADED = 1000, 100
MAX_EVENTS, MAX_REQUESTS = 32_768, 64
SCHEMA = {
    "events": {"files": "events.parquet", "user": "u", "item": "i", "time": "t"},
    "items": {"files": "items.parquet", "item": "i", "features": {"category": "c"}},
    "requests": {
        "files": "requests.parquet",
        "user": "u",
        "item": "shown",
        "time": "t",
        "request": "r",
        "each": {"shown": "inview"},
        "labels": {"click": {"column": "clicked"}},
    },
    "splits": {"test": 0.95},
}


@dataclass(frozen=True)
class Options:
    """The larger log; the other has a tenth of its events, users and requests."""

    events: int = 20_000_000
    """Number of events, by a twentieth as many users: user u's share falls with the square root of u."""
    candidates: int = 20
    """Candidates per request; there is one request per user on average."""
    items: int = 500_000
    """Number of items of both logs, in 1,000 categories."""
    parts: int = 8
    """Number of parts of the log in the last case."""


def make_tables(folder: Path, events: int, options: Options) -> None:
    """Write the files to prepare."""
    users, sql = events // 20, duckdb.connect()
    sql.execute("SELECT setseed(0.5)")
    day, second = "TIMESTAMP '2024-01-01'", "INTERVAL 1 SECOND"
    tables = {
        "events": f"SELECT floor({users} * random() ** 2)::BIGINT AS u, "
        f"floor({options.items} * random() ** 3)::BIGINT AS i, "
        f"{day} + {second} * floor(31e6 * random())::BIGINT AS t FROM range({events})",
        "items": f"SELECT range AS i, range % 1000 AS c FROM range({options.items})",
        "requests": "SELECT *, [inview[1]] AS clicked FROM (SELECT range AS r, "
        f"floor({users} * random() ** 2)::BIGINT AS u, "
        f"{day} + {second} * floor(15.5e6 + 15.5e6 * random())::BIGINT AS t, "
        f"[floor({options.items} * random() ** 3 + 0 * x)::BIGINT "
        f"FOR x IN range({options.candidates})] AS inview FROM range({users}))",
    }
    for name, select in tables.items():
        sql.execute(f"COPY ({select}) TO '{folder / name}.parquet' (FORMAT parquet)")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))


# ------------------------------------------------------------------ stages, each in its own process


def prepare_log(folder: Path, parts: int) -> dict[str, float]:
    path = folder / f"log-{parts}"
    prepare(load_schema(folder / "schema.json"), path, parts=parts)
    events = int(EventLog(path).user_offsets[-1])
    files = {
        "parquet_bytes": path.glob("events/*" if parts > 1 else "events.parquet"),
        "column_bytes": path.glob(".columns/events-*/*"),
    }
    return {name: sum(file.stat().st_size for file in of) / events for name, of in files.items()}


def open_log(folder: Path, parts: int) -> EventLog:
    log = EventLog(folder / f"log-{parts}")
    assert len(log.events["time"])
    return log


def sampler_of(dataset: RankingDataset) -> EventBudgetSampler:
    return EventBudgetSampler(dataset.histories, MAX_EVENTS, MAX_REQUESTS, seed=0)


def first_batch(folder: Path, parts: int) -> None:
    dataset = RankingDataset(open_log(folder, parts), "train")
    next(iter(make_loader(dataset, sampler_of(dataset))))


def sample(folder: Path, parts: int) -> None:
    dataset = RankingDataset(open_log(folder, parts), "train")
    assert sum(1 for _ in islice(sampler_of(dataset), STEPS))


def load(folder: Path, parts: int) -> dict[str, float]:
    dataset = RankingDataset(open_log(folder, parts), "train")
    sizes, start = [], time.process_time()
    for batch in islice(make_loader(dataset, sampler_of(dataset)), LOADED):
        sizes.append((len(batch.history_age), batch.num_requests))
    events, requests = map(sum, zip(*sizes, strict=True))
    return {
        "events_a_core_second": events / (time.process_time() - start),
        "history": events / requests,
    }


STAGES: dict[str, Callable[[Path, int], object]] = {
    "prepare": prepare_log,
    "open": open_log,
    "first batch": first_batch,
    f"sample {STEPS:,} steps": sample,
    f"load {LOADED} batches": load,
}
"""The stages after "prepare" also open the log; the difference to "open" is their own cost."""


def stage(name: str, folder: str, parts: int) -> dict[str, float]:
    """Run a stage in this process. Returns its seconds and core seconds without imports, the peak rise
    of this process's memory in MB, and the stage's own figures."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak after the imports; see proc(5)
    before, start, core = peak_megabytes(), time.perf_counter(), time.process_time()
    result = STAGES[name](Path(folder), parts)
    return {
        "seconds": time.perf_counter() - start,
        "core_seconds": time.process_time() - core,
        "megabytes": peak_megabytes() - before,
        **(result if isinstance(result, dict) else {}),
    }


def peak_megabytes() -> float:
    """This process's peak resident memory (Linux)."""
    [line] = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name: str, folder: Path, parts: int) -> dict[str, float]:
    """Run ``stage`` in its own process."""
    code = f"import json, log; print(json.dumps(log.stage({name!r}, {str(folder)!r}, {parts})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: {name}, {parts} parts: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}, {parts} parts: {found['seconds']:.3g} s, {found['megabytes']:,.0f} MB", flush=True)
    return found


def rates_of(whole: dict[str, dict[str, float]], events: int) -> dict[str, float]:
    """The cost per event; the fields are those of Rates in examples/plan_for_cluster/log_size.py."""
    prepared, loaded = whole["prepare"], whole[f"load {LOADED} batches"]
    return {
        "parquet_bytes": round(prepared["parquet_bytes"], 2),
        "column_bytes": round(prepared["column_bytes"], 2),
        "prepared_a_core_second": round(events / prepared["core_seconds"]),
        "loaded_a_core_second": round(loaded["events_a_core_second"]),
        "loaded_history": round(loaded["history"], 1),
    }


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    source = measured_by()
    found: dict[str, dict[str, dict[str, float]]] = {}
    cases = {"a tenth": (10, 1), "whole": (1, 1), "in parts": (1, options.parts)}
    with tempfile.TemporaryDirectory() as temporary:
        for case, (share, parts) in cases.items():
            folder = Path(temporary) / str(share)
            if not folder.exists():
                folder.mkdir()
                make_tables(folder, options.events // share, options)
            found[case] = {name: measure(name, folder, parts) for name in STAGES}
    columns = {"a tenth": "a tenth", "whole": "whole", "in parts": f"in {options.parts} parts"}
    rows = []
    for name in STAGES:
        row = {"stage": name}
        for case, title in columns.items():
            row[f"{title}, s"] = f"{found[case][name]['seconds']:.3g}"
            row[f"{title}, MB"] = f"{found[case][name]['megabytes']:,.0f}"
        row["seconds, to a tenth's"] = (
            f"{found['whole'][name]['seconds'] / found['a tenth'][name]['seconds']:.3g}"
        )
        rows.append(row)
    (ROOT / "docs" / "log.md").write_text(
        f"""# A large log on one machine

{source};
{options.events:,} events, {options.events // 20:,} users, as many requests with
{options.candidates} candidates each, {options.items:,} items; *a tenth* has a tenth of the events,
users and requests. Each stage runs in its own process. MB is the increase of its resident memory over
that after the imports, including the pages of the log's columns that it read. *Prepare* is
`ifa data prepare` of Parquet files, with 4 GB for DuckDB, columns included. The stages below *open*
also open the log: *first batch*: until training has its first batch; *sample*: {STEPS:,} steps of
the sampler, shuffled, at most {MAX_EVENTS:,} events and {MAX_REQUESTS} requests each; *load*:
{LOADED} such batches from the loader.

{markdown(pd.DataFrame(rows))}
"""
    )
    rates = ROOT / "examples" / "plan_for_cluster" / "log.json"
    content = {"measured": source, **rates_of(found["whole"], options.events)}
    rates.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Wrote docs/log.md and {rates.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
