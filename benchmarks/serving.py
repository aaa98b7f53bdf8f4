"""The time of a ranking request by length of the history, for stored states and for raw histories.

    python benchmarks/serving.py            # about 7 minutes on 2 cores; needs a C++ compiler

Writes docs/serving.md and docs/serving.png. Users have 10^2 to 10^6 synthetic events. The models have
the demo's sizes and are not trained, since only time is measured. Before the timing, each user's scores
from the state are compared with the same model's scores from the raw history.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from report import ROOT, markdown, measured_by
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path.insert(0, str(ROOT))  # the examples are not an installed package
from examples.complete_journey.demo import MODELS
from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.export import ExportConfig, export
from ifa_torchrec.data import EventLog, LogSchema
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.serving import (
    Event,
    KeyValueStore,
    RankingRequest,
    Scorer,
    StateStore,
    open_key_value_store,
)
from ifa_torchrec.serving.compiled import DENSE_FILE, CompiledDense
from ifa_torchrec.serving.states.layout import Keys
from ifa_torchrec.training.build import build_model
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.run import Run, load_run
from ifa_torchrec.training.trainer import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ITEMS, CATEGORIES = 200_000, 1000
DAY = 86_400_000_000
NOW = int(np.datetime64("2025-01-01", "us").astype(np.int64))
IFA, COMPILED = "IFA, state", "IFA, state, compiled"
SERVICES: dict[str, tuple[str, ...]] = {
    "ifa serve": (),
    "--compiled": ("--compiled",),
    "--compiled --workers 2": ("--compiled", "--workers", "2"),
}
"""The services whose requests per second are measured, and their options."""
HOST, PORT = "127.0.0.1", 8765
"""Address of the first service; the next ones use the following ports."""
SEARCHED = 50
"""Events of a candidate's category that SIM attends to."""
_TURN = 20
"""Requests to a cell before the next cell's turn."""
_ROUNDS = 5
"""Rounds in which each service in turn is saturated with requests of each size; medians are used."""
_APPENDED = (1, 64)
"""Numbers of events per append."""
Cell = tuple[int, int]
"""The events of the user's history, and the candidates of a request or the events of an append."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    histories: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    """Numbers of events per user."""
    candidates: tuple[int, ...] = (50, 200, 1000, 5000)
    """Numbers of candidates per request."""
    requests: int = 200
    """Timed requests per system and cell; fewer if they take longer than --seconds."""
    seconds: float = 1.0
    """Seconds per system and cell."""


class System(Protocol):
    """A system that scores requests."""

    def score(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """As Scorer.score."""
        ...


class RawHistories:
    """A Scorer that fetches and encodes the raw history at every request.

    A user's events are stored as one value, so that they are fetched at the speed of memory. For SIM
    (``by_category``) they are stored by category, the latest SEARCHED of each, as in its index: only the
    events of the candidates' categories are fetched.
    """

    def __init__(self, model: DLRM_IFA, log: EventLog, store: KeyValueStore, by_category: bool) -> None:
        self.model, self.log, self.store, self.by_category = model.eval(), log, store, by_category
        self.category = np.asarray(log.items["category"])
        for u, user in enumerate(log.users.tolist()):
            rows = slice(log.user_offsets[u], log.user_offsets[u + 1])
            events = np.stack([log.events["time"][rows], log.events["item"][rows]], axis=1)
            if by_category:
                of = self.category[events[:, 1]]
                values = {self.key(user, int(c)): events[of == c][-SEARCHED:].tobytes() for c in set(of)}
            else:
                values = {self.key(user): events.tobytes()}
            store.update([], lambda _, values=values: values)

    @staticmethod
    def key(user: int, category: int = -1) -> bytes:
        """The key of a user's events."""
        return b"%d/%d" % (user, category)

    def fetch(self, request: RankingRequest) -> np.ndarray:
        """Time and item of the events, [n, 2], oldest first."""
        if not self.by_category:
            (value,) = self.store.read([self.key(request.user)])
            return np.frombuffer(value or b"", np.int64).reshape(-1, 2)
        categories = np.unique(self.category[np.asarray(request.candidates)])
        found = self.store.read([self.key(request.user, int(c)) for c in categories])
        events = np.frombuffer(b"".join(value for value in found if value), np.int64).reshape(-1, 2)
        return events[np.argsort(events[:, 0], kind="stable")]

    @torch.no_grad()
    def score(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """As Scorer.score, for one request."""
        (request,) = requests
        events, asked = self.fetch(request), np.asarray(request.candidates)
        items = self.log.items
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=[f"{side}_{f}" for side in ("history", "candidate") for f in ("item", "category")],
            values=torch.from_numpy(
                np.concatenate(
                    [items[f][of] for of in (events[:, 1], asked) for f in ("item", "category")]
                )
            ),
            lengths=torch.tensor([len(events)] * 2 + [len(asked)] * 2),
        )
        given = RankingFeatures(
            dense_features=torch.zeros(1, 0),
            context_features=KeyedJaggedTensor.from_lengths_sync(
                [], torch.empty(0), torch.empty(0).long()
            ),
            sequence_features=features,
            candidate_dense=torch.zeros(len(asked), 0),
            history_age=torch.from_numpy((request.time - events[:, 0]) / DAY).float(),
        )
        return [self.model(given).numpy()]


def make_log(path: Path, histories: Sequence[int]) -> EventLog:
    """A log with one user per history length, whose id is that length; items are drawn by popularity."""
    rng = np.random.default_rng(0)
    user = np.repeat(histories, histories)
    times = NOW - 1 - rng.integers(0, 730 * DAY, len(user))
    day = pd.to_datetime([NOW], unit="us")
    requests = {"user": [int(histories[0])], "time": day, "candidates": [[1, 2]]}
    item = np.arange(ITEMS)
    category = np.where(item > 0, item % CATEGORIES + 1, 0)  # item 0 is the unknown item
    return EventLog.from_pandas(
        path,
        events=pd.DataFrame(
            {"user": user, "item": draw(rng, len(user)), "time": pd.to_datetime(times, unit="us")}
        ),
        items=pd.DataFrame({"item": item, "category": category}),
        schema=LogSchema(item_features={"item": ITEMS, "category": CATEGORIES + 1}),
        requests={"train": pd.DataFrame({**requests, "exposed": [[True, True]], "label": [[1, 0]]})},
    )


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random items whose popularity is inversely proportional to their number."""
    return (ITEMS ** rng.random(count)).astype(np.int64)


def untrained(run: Run, interaction: str) -> DLRM_IFA:
    """The run's model with another interaction, in the peers' plain configuration."""
    config = replace(run.config, interaction=interaction, ifa=MODELS["softmax"][1])
    model = build_model(
        run.log.schema, replace(config, recent_length=SEARCHED, search_feature="category")
    )
    torch.manual_seed(0)
    collection = model.sequence_arch.embedding_collection.to_empty(device="cpu")
    for table in collection.parameters():
        torch.nn.init.uniform_(table, -0.3, 0.3)
    return model


def check(scorer: System, raw: RawHistories, requests: Sequence[RankingRequest]) -> float:
    """The largest difference between scores from a state and from the raw history.

    Raises:
        AssertionError: the difference is larger than rounding errors.
    """
    worst = 0.0
    for request in requests:
        from_state, from_history = scorer.score([request])[0], raw.score([request])[0]
        worst = max(worst, float(np.abs(from_state - from_history).max()))
    assert worst < 1e-4, f"scores from states differ from those of the raw histories by {worst}"
    return worst


def timed(
    cells: dict[Cell, dict[str, Callable[[int], object]]], options: Options
) -> dict[tuple[Cell, str], list[float]]:
    """Milliseconds of each system in each cell; slow ones are called less often.

    The systems of a cell take turns, and so do the cells, a few requests at a time, so that a slow
    minute of the machine does not count against one cell.
    """
    times: dict[tuple[Cell, str], list[float]] = {
        (cell, name): [] for cell, calls in cells.items() for name in calls
    }
    for first in range(0, options.requests, _TURN):
        for cell, calls in cells.items():
            for n in range(first, min(first + _TURN, options.requests)):
                for name, call in calls.items():
                    mine = times[cell, name]
                    if sum(mine) > 1000 * options.seconds:
                        continue
                    start = time.perf_counter()
                    call(n)
                    mine.append(1000 * (time.perf_counter() - start))
    return times


def p50_p99(milliseconds: Sequence[float]) -> str:
    """The median and the 99th percentile; for few requests only the median."""
    median = np.median(milliseconds)
    if len(milliseconds) < 50:
        return f"{median:,.3g} / -"
    return f"{median:,.3g} / {np.percentile(milliseconds, 99):,.3g}"


class Server:
    """``ifa serve`` in its own process, and a client for it."""

    def __init__(self, run: Path, store: Path, log: Path, port: int, further: Sequence[str]) -> None:
        self.port = port
        options = {"--run": run, "--store": store, "--port": port, "--limits.timeout": 30}
        command = [sys.executable, "-m", "ifa_torchrec", "serve", *further]
        command += [str(word) for option in options.items() for word in option]
        with log.open("w") as output:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=one_thread)
        while True:
            time.sleep(0.2)
            if self.process.poll() is not None:
                raise SystemExit(f"error: the service ended: {log.read_text()[-2000:]}")
            try:
                self.send("GET", "/readyz", None, self.connection())
                return
            except OSError:
                continue

    def connection(self) -> http.client.HTTPConnection:
        """A connection that stays open."""
        return http.client.HTTPConnection(HOST, self.port)

    @staticmethod
    def send(method: str, path: str, body: dict | None, connection: http.client.HTTPConnection) -> bytes:
        """An answer's body.

        Raises:
            OSError: the status is not 200.
        """
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise OSError(f"{path}: {response.status} {answer[:300]!r}")
        return answer

    def saturation(self, bodies: Sequence[dict], connections: int = 16, seconds: float = 3.0) -> float:
        """Requests per second over many connections, each with one request in flight at any time.

        The client shares the cores with the service, so it does little: its requests are prepared as
        bytes, and one thread sends the next request as soon as a connection's answer has arrived.
        """
        asked = []
        for body in bodies:
            text = json.dumps(body).encode()
            head = f"POST /rank HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            asked.append(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        answered, end = 0, time.perf_counter() + seconds
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            for number in range(connections):
                client = stack.enter_context(socket.create_connection((HOST, self.port)))
                client.sendall(asked[number % len(asked)])
                selector.register(client, selectors.EVENT_READ, client.makefile("rb"))
            while time.perf_counter() < end:
                for key, _ in selector.select(1):
                    answer = key.data
                    if not answer.readline().startswith(b"HTTP/1.1 200"):
                        raise OSError(f"/rank: {answer.read1()[:300]!r}")
                    (length,) = (
                        int(line[15:])
                        for line in iter(answer.readline, b"\r\n")
                        if line.lower().startswith(b"content-length:")
                    )
                    answer.read(length)
                    answered += 1
                    key.fileobj.sendall(asked[answered % len(asked)])
        return answered / seconds

    def close(self) -> None:
        """Stop the service, as a scheduler would."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0


def body_of(request: RankingRequest) -> dict:
    """A request as JSON; without a time, the service uses now, which is after all events."""
    return {"requests": [{"user": request.user, "candidates": list(request.candidates), "k": 10}]}


def requests_of(n: int, m: int, count: int = 20) -> list[RankingRequest]:
    """Requests of the user with n events, with m candidates each."""
    rng = np.random.default_rng([n, m])
    return [RankingRequest(n, draw(rng, m).tolist(), NOW) for _ in range(count)]


def measure_systems(systems: dict[str, System], options: Options) -> pd.DataFrame:
    """Milliseconds of each system by history length and number of candidates."""
    cells: dict[Cell, dict[str, Callable[[int], object]]] = {}
    for cell in itertools.product(options.histories, options.candidates):
        asked = requests_of(*cell)
        systems[IFA].score(asked[:1])  # brings the state's pages into memory
        cells[cell] = {
            name: lambda i, system=system, asked=asked: system.score([asked[i % len(asked)]])
            for name, system in systems.items()
        }
    rows = []
    for ((n, m), name), times in timed(cells, options).items():
        rows.append({"n": n, "m": m, "system": name, "times": times})
        print(f"{n:,} events, {m:,} candidates, {name}: {p50_p99(times)} ms", flush=True)
    return pd.DataFrame(rows)


def state_bytes(store: StateStore, user: int) -> int:
    """The size of a user's state: keys and values of all its records."""
    keys, key_values = Keys(store.version), store.key_values
    mine = [keys.head(user), keys.before(user), *key_values.scan(keys.all_pages(user))]
    return sum(
        len(key) + len(value or b"") for key, value in zip(mine, key_values.read(mine), strict=True)
    )


def measure_appends(scorer: Scorer, options: Options) -> pd.DataFrame:
    """The time of an append to a state, by history length, and the state's size before it."""
    rng, position, rows = np.random.default_rng(2), scorer.store.positions[0], []
    every_key = np.arange(scorer.store.layout.identity_key_range)
    cells: dict[Cell, dict[str, Callable[[int], object]]] = {}
    for n in options.histories:
        row = {"events": f"{n:,}"}
        state, _ = scorer.store.read([n], [NOW], [every_key])
        row["identity rows"] = f"{len(state.identity_key):,}"
        row["bytes an event"] = f"{state_bytes(scorer.store, n) / n:,.1f}"
        rows.append(row)
        for batch in _APPENDED:
            items = draw(rng, options.requests * batch).reshape(-1, batch).tolist()

            def append(i: int, n=n, items=items) -> None:
                nonlocal position
                events = [Event(position + j, n, item, NOW) for j, item in enumerate(items[i])]
                position += len(events)
                assert {result.status for result in scorer.append(events)} == {"taken"}

            cells[n, batch] = {"": append}
    times = timed(cells, options)
    for n, row in zip(options.histories, rows, strict=True):
        row |= {f"append {batch}, ms": p50_p99(times[(n, batch), ""]) for batch in _APPENDED}
    return pd.DataFrame(rows)


def measure_latency(server: Server, options: Options) -> dict[Cell, list[float]]:
    """Milliseconds of POST /rank over one connection, by history length and number of candidates."""
    connection = server.connection()
    cells: dict[Cell, dict[str, Callable[[int], object]]] = {}
    for cell in itertools.product(options.histories, options.candidates):
        bodies = [body_of(request) for request in requests_of(*cell)]

        def rank(i: int, bodies=bodies) -> bytes:
            return server.send("POST", "/rank", bodies[i % len(bodies)], connection)

        cells[cell] = {"": rank}
    return {cell: times for (cell, _), times in timed(cells, options).items()}


def measure_saturation(servers: dict[str, Server], options: Options) -> pd.DataFrame:
    """Requests per second over many connections, by number of candidates; the services take turns."""
    n = options.histories[len(options.histories) // 2]
    rates: dict[tuple[int, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for m, (name, server) in itertools.product(options.candidates, servers.items()):
            bodies = [body_of(request) for request in requests_of(n, m)]
            rates.setdefault((m, name), []).append(server.saturation(bodies))
    rows = [
        {"candidates": f"{m:,}", **{name: f"{np.median(rates[m, name]):,.0f}" for name in servers}}
        for m in options.candidates
    ]
    return pd.DataFrame(rows)


def picture(rows: pd.DataFrame, file: Path) -> None:
    """Plot median latency against history length; one panel for every second number of candidates."""
    shown = sorted(rows["m"].unique())[::2]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(4.5 * len(shown), 3.6), sharey=True, squeeze=False
    )
    for panel, m in zip(panels[0], shown, strict=True):
        for system, of_system in rows[rows["m"] == m].groupby("system", sort=False):
            panel.loglog(of_system["n"], of_system["p50"], marker="o", label=system)
        panel.set_title(f"{m:,} candidates")
        panel.set_xlabel("events in the history")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms a request, median")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    source = measured_by()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log = make_log(folder / "log", options.histories)
        train(TrainConfig(log.path, folder / "run", ifa=MODELS["ifa"][1], validate=False))
        build_states(BuildStatesConfig(folder / "run", str(folder / "states"), position=0))
        export(ExportConfig(folder / "run"))
        run = load_run(folder / "run", sharded=False)
        states, raw, index = (
            open_key_value_store(str(folder / name)) for name in ("states", "raw", "by_category")
        )
        store = StateStore(states, run.version)
        scorer = Scorer(run.dlrm, log, store)
        dense = CompiledDense(run.dlrm, log.schema, log.items, folder / "run" / DENSE_FILE)
        compiled = Scorer(run.dlrm, log, store, compiled=dense)
        histories = RawHistories(run.dlrm, log, raw, by_category=False)
        asked = [requests_of(n, 50, 1)[0] for n in options.histories]
        difference = max(check(system, histories, asked) for system in (scorer, compiled))
        rows = measure_systems(
            {
                IFA: scorer,
                COMPILED: compiled,
                "softmax, raw history": RawHistories(untrained(run, "softmax"), log, raw, False),
                "SIM, index by category": RawHistories(untrained(run, "sim"), log, index, True),
            },
            options,
        )
        appends = measure_appends(scorer, options)
        states.close()  # so that the service can open them
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            for port, (name, further) in enumerate(SERVICES.items(), PORT):
                server = Server(folder / "run", folder / "states", folder / f"{port}.log", port, further)
                servers[name] = server
                stack.callback(server.close)
            over_http = measure_latency(servers["--compiled"], options)
            saturated = measure_saturation(servers, options)
    rows["p50"] = rows["times"].map(np.median)
    picture(rows, ROOT / "docs" / "serving.png")
    rows["cell"] = rows["times"].map(p50_p99)
    table = rows.pivot(index=["m", "n"], columns="system", values="cell")[[*rows["system"].unique()]]
    table = table.reset_index()
    cells = zip(table["n"], table["m"], strict=True)
    table["POST /rank"] = [p50_p99(over_http[cell]) for cell in cells]
    for column in ("m", "n"):
        table[column] = table[column].map("{:,}".format)
    template = (ROOT / "benchmarks" / "serving_page.md").read_text()
    (ROOT / "docs" / "serving.md").write_text(
        template.format(
            measured_by=source,
            torch=torch.__version__,
            requests=options.requests,
            seconds=f"{options.seconds:g}",
            difference=f"{difference:.0e}",
            latency=markdown(table),
            appends=markdown(appends),
            saturated=markdown(saturated),
        )
    )
    print("Wrote docs/serving.md and docs/serving.png")


if __name__ == "__main__":
    main()
