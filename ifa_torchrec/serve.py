"""Rank candidates and take events over HTTP.

    python -m ifa_torchrec.serve --run runs/mine --store runs/states
    curl -s localhost:8000/rank -H 'Content-Type: application/json' \\
        -d '{"requests": [{"user": 7, "candidates": [4, 9, 23], "k": 2}]}'

The store is one that ifa_torchrec.build_states filled from the same run. /docs describes the calls.
SIGHUP loads the run anew while the old weights serve; where --run is a link, it may by then lead to
another run, whose states were built into the same store. SIGTERM finishes what was taken. Without a
bearer token (--token-file) it listens on loopback only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch.distributed as dist
import tyro
import uvicorn

from ifa_torchrec.command_line import as_command
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.serving import Scorer, StateStore, open_key_value_store, quantize_tables
from ifa_torchrec.serving.live import Limits, LiveScorer
from ifa_torchrec.serving.service import create_app
from ifa_torchrec.train import load_run


@dataclass(frozen=True)
class ServeConfig:
    """Options of ``python -m ifa_torchrec.serve``."""

    run: Path
    """Folder of a training run (its --out), or a link to one."""
    store: str
    """Where its states are: a folder, or redis://HOST:PORT/NUMBER."""
    data: Path | None = None
    """Event log; by default the one the run was trained on."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of them."""
    port: int = 8000
    """Port to listen on."""
    token_file: Path | None = None
    """File with the bearer token of /rank and /events; by default it is in the variable IFA_TOKEN."""
    int8: bool = False
    """Round the tables to 8 bits: a third of their memory (docs/serving.md has what it changes)."""
    drain: float = 2
    """Seconds after SIGTERM in which calls are still taken, for /readyz (503 then) to be noticed."""
    limits: Limits = field(default_factory=Limits)
    """What clients may ask for."""


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CheckpointError, LogError: the run or its log is not there.
        StateError: the store cannot be opened, or has no states of the run's weights.
        ConfigError: the token is empty, or there is none and the address is not loopback.
    """
    token = _token(config)
    if token is None and not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} can be reached from elsewhere: give a token, by --token-file or the "
            "environment variable IFA_TOKEN, or listen on 127.0.0.1"
        )
    key_values = open_key_value_store(config.store, create=False)

    def load() -> Scorer:
        # a link is followed once, lest half of the files are another run's
        run = load_run(config.run.resolve(), config.data, sharded=False)
        states = StateStore(key_values, run.version)
        model = quantize_tables(run.dlrm) if config.int8 else run.dlrm
        return Scorer(model, run.log.schema, run.log.items, states)

    with LiveScorer(load, config.limits) as live:
        signal.signal(signal.SIGHUP, lambda *_: live.reload())
        _Server(config, live, token).run()


class _Server(uvicorn.Server):
    """uvicorn that drains before it closes, and for which a signal is no failure."""

    def __init__(self, config: ServeConfig, live: LiveScorer, token: str | None) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(live, token),
                host=config.host,
                port=config.port,
                access_log=False,
                # for clients that stop in the middle of a body; no call waits longer than its timeout
                timeout_graceful_shutdown=math.ceil(config.limits.timeout) + 5,
            )
        )
        self._live, self._drain = live, config.drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True  # uvicorn's own would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._live.draining = True
        await asyncio.sleep(self._drain)
        await super().shutdown(sockets)


def _token(config: ServeConfig) -> str | None:
    if config.token_file is not None:
        try:
            token, source = config.token_file.read_text().strip(), str(config.token_file)
        except OSError as error:
            raise ConfigError(f"--token-file: {error}") from error
    elif "IFA_TOKEN" in os.environ:
        token, source = os.environ["IFA_TOKEN"].strip(), "IFA_TOKEN"
    else:
        return None
    if not token:
        raise ConfigError(f"{source}: the token is empty")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", force=True)
    with as_command():
        serve(tyro.cli(ServeConfig, prog="python -m ifa_torchrec.serve", description=__doc__))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
