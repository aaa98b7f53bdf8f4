"""Train, build states, serve, send events, and watch the rankings change.

    python examples/lifelong_serving/serve_and_watch.py        # about 3 minutes on 2 cores

Uses The Complete Journey, as in examples/complete_journey, with fewer requests. States are built from
the purchases before the test weeks. Then the test requests are sent to the service in order of time,
each twice: before and after the household's later purchases are sent as events.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.data import EventLog, RankingDataset
from ifa_torchrec.data.public.complete_journey import CompleteJourneyConfig, prepare
from ifa_torchrec.training.metrics import gauc
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.trainer import train

IFA = IFAConfig(
    embedding_dim=64,
    num_heads=2,
    half_lives=(math.inf, 30.0),
    identity_features=("item", "category"),
    identity_half_lives=(math.inf, 30.0, 7.0),
    identity_buckets=131_072,
)


@dataclass(frozen=True)
class ExampleConfig:
    """Options of the example."""

    out: Path = Path("runs/lifelong_serving")
    """Folder of all results; must not exist yet."""
    train_requests: int = 4000
    """Number of training requests."""
    test_requests: int = 400
    """Number of requests in the split `test`."""
    split: Literal["valid", "test"] = "test"
    """Split whose requests are served."""
    dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the stored states."""
    port: int = 8137
    """Port of the service."""


class Client:
    """A client of the service; the token comes from the environment, as for the service."""

    def __init__(self, port: int, service: subprocess.Popen) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            try:
                self.connection.request("GET", "/readyz")
                if self.connection.getresponse().read() and service.poll() is None:
                    return
            except OSError:
                if service.poll() is not None:
                    raise SystemExit("error: the service ended; its message is above") from None
                self.connection.close()
                time.sleep(0.2)

    def post(self, path: str, body: dict) -> dict:
        """The answer to a call."""
        headers = {
            "Authorization": f"Bearer {os.environ['IFA_TOKEN']}",
            "Content-Type": "application/json",
        }
        self.connection.request("POST", path, json.dumps(body), headers)
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"error: {path}: {response.status} {answer}")
        return answer

    def send(self, events: list[dict]) -> Counter[str]:
        """Send events; returns how many were taken, and how many were duplicates."""
        results = self.post("/events", {"events": events})["results"]
        for result in results:
            if result["status"] == "refused":
                raise SystemExit(f"error: an event was refused: {result['reason']}")
        return Counter(result["status"] for result in results)

    def scores(self, question: dict) -> np.ndarray:
        """The logits in the candidates' order."""
        (ranking,) = self.post("/rank", {"requests": [question]})["rankings"]
        of_item = dict(zip(ranking["items"], ranking["logits"]["bought"], strict=True))
        return np.array([of_item[item] for item in question["candidates"]])


def question_of(dataset: RankingDataset, number: int) -> dict:
    """A test request as JSON."""
    log, columns = dataset.log, dataset.requests
    schema, rows = log.schema, dataset.candidate_rows([number])[0]
    one = slice(number, number + 1)
    return {
        "user": external(log, "user", columns["user"][one])[0],
        "time": utc(columns["time"][number]),
        "candidates": external(log, schema.item, columns["candidates"][rows]),
        "context": {f: external(log, f, columns[f][one])[0] for f in schema.context_features},
        "dense": {f: numbers(columns[f][one])[0] for f in schema.dense_features},
        "candidate_dense": {f: numbers(columns[f][rows]) for f in schema.candidate_dense},
        "new_user": True,
    }


def events_between(log: EventLog, user: int, since: int, until: int) -> list[dict]:
    """A user's events from ``since`` on and before ``until``, as JSON. An event's row in the log is used
    as its position in the stream."""
    starts, ends = log.history_range(np.array([user, user]), np.array([since, until]))
    rows = range(max(int(ends[0]), int(starts[1])), int(ends[1]))
    items = external(log, log.schema.item, log.events[log.schema.item][rows])
    (who,) = external(log, "user", np.array([user]))
    return [
        {"position": row, "user": who, "item": item, "time": utc(log.events["time"][row])}
        for row, item in zip(rows, items, strict=True)
    ]


def external(log: EventLog, name: str, rows: np.ndarray) -> list[int | str]:
    """The external ids of these rows of users, items or a feature; 0 for the unknown row."""
    if name not in log.vocabulary.names:  # users that are numbers
        return rows.tolist()
    return [0 if found is None else found for found in log.vocabulary[name].at(rows)]


def numbers(column: np.ndarray) -> list[float | None]:
    """Numbers for JSON: missing ones are null."""
    return [None if np.isnan(number) else number for number in column.tolist()]


def utc(microseconds: int) -> str:
    """A time in the service's format."""
    return pd.Timestamp(int(microseconds), unit="us").isoformat() + "Z"


def main() -> None:
    """The command line."""
    config = tyro.cli(ExampleConfig, description=__doc__)
    run, store = config.out / "run", str(config.out / "states")
    requests = CompleteJourneyConfig(train=config.train_requests, valid=10, test=config.test_requests)
    log = prepare(config.out / "log", requests)

    print("\n1. Train")
    train(TrainConfig(log.path, run, ifa=IFA, validate=False))
    whole = evaluate(EvaluateConfig(run, config.split))["gauc"]

    print("\n2. Build states from the purchases before the test weeks")
    dataset = RankingDataset(log, config.split)
    first = int(dataset.requests["time"].min())
    until = pd.Timestamp(first, unit="us").to_pydatetime()
    # the stream has only later events and is read from its beginning: position 0
    built = build_states(BuildStatesConfig(run, store, until=until, position=0, dtype=config.dtype))
    print(
        f"{built['users']:,} households, {built['events_per_user']:.0f} events and "
        f"{built['bytes_per_user'] / 1000:.0f} kB each, {built['users_per_second']:.0f} a second"
    )

    print("\n3. Serve")
    os.environ["IFA_TOKEN"] = secrets.token_hex()
    command = [sys.executable, "-m", "ifa_torchrec", "serve", "--run", str(run), "--store", store]
    service = subprocess.Popen([*command, "--port", str(config.port), "--drain", "0.1"])
    try:
        client = Client(config.port, service)
        watch(client, dataset, first, whole)
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait()
    print(f"The service ended with status {service.returncode}.")


def watch(client: Client, dataset: RankingDataset, first: int, whole: float) -> None:
    """Rank, send the purchases since, and rank again."""
    print("\n4. Rank, send events, rank again")
    log, columns = dataset.log, dataset.requests
    names = log.item_names()
    before, after = (np.empty(len(columns["bought"])) for _ in range(2))
    sent, last_sent, events = 0, {}, []
    most = (0.0, "")
    for number in np.argsort(columns["time"], kind="stable").tolist():
        question = question_of(dataset, number)
        rows = dataset.candidate_rows([number])[0]
        before[rows] = client.scores(question)
        now = int(columns["time"][number])
        user = int(columns["user"][number])
        new = events_between(log, user, last_sent.get(user, first), now)
        last_sent[user] = now
        if new:
            events = new
            sent += client.send(new)["taken"]
        after[rows] = client.scores(question)
        change = np.abs(after[rows] - before[rows])
        if change.max() > most[0]:
            row = rows[change.argmax()]
            name = names[columns["candidates"][row]].strip()
            most = (
                change.max(),
                f"household {question['user']} bought {len(new)} items since, and {name!r} went from "
                f"logit {before[row]:.2f} to {after[row]:.2f}",
            )
    request = np.repeat(np.arange(len(dataset)), np.diff(columns["candidate_offsets"]))
    label = np.asarray(columns["bought"])
    print(f"{len(dataset)} requests, {sent:,} events sent between them")
    print(f"The largest change: {most[1]}")
    print(f"GAUC before each household's events: {gauc(request, before, label):.4f}")
    print(f"GAUC after them:                     {gauc(request, after, label):.4f}")
    print(f"GAUC of the model on raw histories:  {whole:.4f}")

    print("\n5. Send the last events again")
    again = client.send(events)
    print(f"{again['taken']} taken, {again['duplicate']} duplicates: nothing counts twice")


if __name__ == "__main__":
    main()
