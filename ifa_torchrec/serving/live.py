"""A scorer behind a queue, whose weights can be replaced while it serves."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import predictions
from ifa_torchrec.serving.batching import Batcher, Item, QueueFullError, Result
from ifa_torchrec.serving.counted import being_read
from ifa_torchrec.serving.requests import EventResult, Ranking, RankingRequest, checked_event
from ifa_torchrec.serving.scorer import Scorer
from ifa_torchrec.serving.states.forgetting import Forgotten
from ifa_torchrec.serving.states.journal import Event

_log = logging.getLogger(__name__)
STAGES = ("queue", "store", "model", "append")
"""Stages of a call, as /metrics names them: waiting in the queue; reading states; computing logits;
encoding and writing events."""
StreamStatus = Literal["flowing", "waiting", "stopped"]
_FULL = 0.02
"""Seconds until a thread retries to submit to a full queue."""
_STAGE_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class Limits:
    """Limits on the size, number and duration of clients' calls.

    Example:
        >>> from ifa_torchrec.serving.live import Limits
        >>> Limits(max_waiting=0)
        Traceback (most recent call last):
        ifa_torchrec.errors.ConfigError: max_waiting must be above 0, got 0
    """

    max_body_bytes: int = 4 << 20
    """Largest request body in bytes."""
    max_requests: int = 64
    """Most ranking requests per call."""
    max_candidates: int = 5000
    """Most candidates per ranking request, and in requests that are scored together."""
    max_context_ids: int = 1000
    """Most ids in the context lists of a ranking request, and of requests that are scored together."""
    max_set: int = 100
    """Most items that a ranking request may choose one by one ("strategy": "greedy")."""
    max_events: int = 1000
    """Most events per call, and in calls whose events are written together."""
    max_ahead: float = 60
    """Seconds that an event may be ahead of this machine's clock."""
    max_waiting: int = 256
    """Most ranking requests and event calls that wait in the queue."""
    timeout: float = 2
    """Seconds until a call times out."""
    receive: float = 10
    """Seconds for a call's headers to arrive, then its body, and for the client to read the response."""
    max_connections: int = 400
    """Most connections; beyond that, the one that has waited longest for its client is closed."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) <= 0:
                raise ConfigError(f"{limit.name} must be above 0, got {getattr(self, limit.name)}")
        if self.max_waiting < self.max_requests:
            raise ConfigError(
                f"max_waiting {self.max_waiting} is below max_requests {self.max_requests}, so a full "
                "call would never be accepted; raise max_waiting or lower max_requests"
            )

    def of_each(self, processes: int) -> Limits:
        """The limits of each of several processes that share one service's limits.

        Example:
            >>> from ifa_torchrec.serving.live import Limits
            >>> Limits(max_connections=400).of_each(4).max_connections
            100
        """
        return replace(
            self,
            max_connections=max(1, self.max_connections // processes),
            max_waiting=max(self.max_requests, self.max_waiting // processes),
        )


@dataclass(frozen=True)
class LiveRanking(Ranking):
    """A ranking of all candidates or a chosen set, with the weights' version and predictions.

    Args:
        version: version of the weights.
        predictions: [len(items), T]; for a binary task the probability, for a regression task the number
            in the log's unit.
        tasks: task names of the columns.
    """

    version: str
    predictions: np.ndarray
    tasks: tuple[str, ...]


class Metrics:
    """The metrics that /metrics reports.

    Args:
        shared: folder in which the processes of one service sum their metrics. This then holds for all
            Prometheus metrics of the process. None if there is only this process.
    """

    def __init__(self, shared: Path | None = None) -> None:
        if shared is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
            values.ValueClass = values.MultiProcessValue()
        self._shared = shared
        self._registry = registry = CollectorRegistry()
        self.calls = Counter("ifa_calls", "HTTP calls.", ["path", "status"], registry=registry)
        self.seconds = Histogram("ifa_call_seconds", "Time of a call.", ["path"], registry=registry)
        stages = Histogram(
            "ifa_stage_seconds",
            "Time of a stage: queue per request, other stages per batch.",
            ["stage"],
            registry=registry,
            buckets=_STAGE_BUCKETS,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self.waiting = Gauge(
            "ifa_queue_length",
            "Ranking requests and event calls that wait in the queue.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.late = Counter(
            "ifa_late_requests", "Requests ranked as of a later time than theirs.", registry=registry
        )
        self.events = Counter(
            "ifa_events", "Events taken, duplicate, forgotten or refused.", ["status"], registry=registry
        )
        self.unknown = Counter(
            "ifa_unknown",
            "Ids that the vocabulary does not know, in candidates, events taken or context.",
            ["kind"],
            registry=registry,
        )
        self.candidates = Counter("ifa_candidates", "Candidates scored.", registry=registry)
        self.messages = Counter(
            "ifa_stream_messages",
            "Stream messages, accepted or refused.",
            ["result"],
            registry=registry,
        )
        self.lag = Gauge(
            "ifa_stream_lag",
            "Unread messages of a partition that this process reads.",
            ["partition"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.flowing = Gauge(
            "ifa_stream_flowing",
            "1 while the event stream is read, 0 while it waits or is stopped.",
            ["topic"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.reloads = Counter("ifa_reloads", "Reloads, ok or failed.", ["result"], registry=registry)
        self.forgotten = Counter(
            "ifa_forgotten", "Users forgotten, ok or failed.", ["result"], registry=registry
        )
        self.model = Info("ifa_model", "The weights that serve.", registry=registry)

    def stage(self, name: str, seconds: float) -> None:
        """Record the time that one of STAGES took."""
        self._stages[name].observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        if self._shared is None:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, str(self._shared))
        together.register(self.model)  # Info metrics are not shared between processes
        with being_read(self._shared):
            return generate_latest(together)


class LiveScorer:
    """A Scorer for many callers: one thread serves them, batching everything that waits.

    ``create_app`` has an example.

    Args:
        load: returns a Scorer with the newest weights; called now and by every ``reload``. All Scorers
            that it returns must share one KeyValueStore.
        limits: Limits.
        metrics: Metrics to record to; None creates new ones.

    Raises:
        StateError, CheckpointError, LogError: raised by ``load``.

    Attributes:
        metrics: Metrics.
        draining: set to True when no more calls should be sent here; /readyz then responds 503.
        stream: status of the ``Stream`` that feeds this scorer, shown on /readyz; None without one.
    """

    def __init__(
        self, load: Callable[[], Scorer], limits: Limits, metrics: Metrics | None = None
    ) -> None:
        self.limits, self.metrics, self.draining = limits, metrics or Metrics(), False
        self.stream: StreamStatus | None = None
        self._load_scorer = load
        scorer = self._load()
        scorer.catch_up()
        # The first scorer ranks; events go to all of them. Only _reload assigns this.
        self._scorers: tuple[Scorer, ...] = (scorer,)
        on_wait = partial(self.metrics.stage, "queue")
        self._batcher = Batcher(limits.max_waiting, self.metrics.waiting.set, on_wait)
        self._reloader = ThreadPoolExecutor(1, "reload")
        self._forgetter = ThreadPoolExecutor(1, "forget")
        self._may_forget = threading.BoundedSemaphore(limits.max_waiting)
        self._checker = ThreadPoolExecutor(1, "check")
        self._checking: Future[None] | None = None
        self._checked = 0.0
        self.metrics.model.info({"version": self.version})

    def __enter__(self) -> LiveScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def scorer(self) -> Scorer:
        """The scorer that ranks."""
        return self._scorers[0]

    @property
    def version(self) -> str:
        """The version of the weights that rank."""
        return self.scorer.store.version

    def close(self) -> None:
        """Finish the accepted calls, the users to forget and a running reload, then stop."""
        self._batcher.close()
        self._reloader.shutdown(cancel_futures=True)
        self._forgetter.shutdown()
        self._checker.shutdown(wait=False)

    async def check(self) -> None:
        """Check that the store has these weights' states; asks it at most once a second.

        Raises:
            StateError: the store lacks the states, or fails.
            asyncio.TimeoutError: the store did not respond within a second.
        """
        now = time.monotonic()
        if self._checking is None or (self._checking.done() and now > self._checked + 1):
            store, self._checked = self._scorers[0].store, now
            self._checking = self._checker.submit(store.check)
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._checking)), 1)

    async def rank(
        self, requests: Sequence[RankingRequest], sizes: Sequence[int | None] = ()
    ) -> list[LiveRanking | BaseException]:
        """Rank each request; the result of a request that fails is its error.

        Args:
            requests: the requests.
            sizes: for each request, how many candidates to choose one by one, or None to rank all of
                them; () ranks all candidates of every request.

        Raises:
            QueueFullError: the queue is full.
            asyncio.TimeoutError: the requests took longer than ``limits.timeout``.
        """
        shares = [self._share(request) for request in requests]
        wanted = list(zip(requests, sizes or [None] * len(requests), strict=True))
        return await self._results(self._rank, wanted, shares)

    def _share(self, request: RankingRequest) -> float:
        """The share of a batch that a request fills by its candidates or its context ids."""
        lists = [v for v in request.context.values() if isinstance(v, Sized) and not isinstance(v, str)]
        of_context = sum(map(len, lists)) / self.limits.max_context_ids
        return max(len(request.candidates) / self.limits.max_candidates, of_context)

    async def append(self, events: Sequence[Event]) -> list[EventResult] | BaseException:
        """Add events; return their results once the taken ones are stored, or the error of the call.

        Raises:
            QueueFullError: the queue is full.
            asyncio.TimeoutError: it took longer than ``limits.timeout``; the events may still be added.
        """
        shares = [len(events) / self.limits.max_events]
        (result,) = await self._results(self._append, [events], shares)
        return result

    def add(self, events: Sequence[Event]) -> list[EventResult]:
        """Add at most ``limits.max_events`` events, as ``append`` does, but block until they are done.

        Raises:
            StoreError: the store fails; some events may have been added.
            ClosedError: this scorer is closed.
        """
        share = [len(events) / self.limits.max_events]
        while True:
            try:
                (added,) = self._batcher.submit(self._append, [events], share)
            except QueueFullError:
                time.sleep(_FULL)
            else:
                return added.result()

    async def forget(self, user: int | str) -> Forgotten:
        """Remove everything that the store has about a user; rankings continue meanwhile.

        Raises:
            StateError, StoreError: as ``ifa_torchrec.serving.forget``.
            QueueFullError: ``limits.max_waiting`` users already wait to be forgotten.
            asyncio.TimeoutError: it took longer than ``limits.timeout``; it continues in the background.
        """
        if not self._may_forget.acquire(blocking=False):
            raise QueueFullError(f"{self.limits.max_waiting} users already wait to be forgotten")
        forgetting = self._forgetter.submit(self._scorers[0].forget, user)
        forgetting.add_done_callback(self._forgot)
        return await asyncio.wait_for(
            asyncio.shield(asyncio.wrap_future(forgetting)), self.limits.timeout
        )

    def _forgot(self, forgetting: Future[Forgotten]) -> None:
        self._may_forget.release()
        if not forgetting.cancelled():
            failed = forgetting.exception() is not None
            self.metrics.forgotten.labels("failed" if failed else "ok").inc()

    def reload(self) -> None:
        """Load the newest weights next to those that serve, and switch to them once their states have
        all events. If that fails, the error is logged and counted, and the old weights keep serving."""
        self._reloader.submit(self._reload)

    async def _results(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        items: Sequence[Item],
        shares: Sequence[float],
    ) -> list[Result | BaseException]:
        futures = [asyncio.wrap_future(f) for f in self._batcher.submit(work, items, shares)]
        # on a time-out the futures are cancelled, and the batcher skips those that it has not started
        together = asyncio.gather(*futures, return_exceptions=True)
        return await asyncio.wait_for(together, self.limits.timeout)

    def _load(self) -> Scorer:
        scorer = self._load_scorer()
        scorer.observe = self.metrics.stage
        return scorer

    def _rank(self, wanted: list[tuple[RankingRequest, int | None]]) -> list[LiveRanking]:
        scorer = self._scorers[0]
        version, names = scorer.store.version, tuple(scorer.schema.tasks)
        rankings = _rankings(scorer, wanted)
        self.metrics.candidates.inc(sum(len(request.candidates) for request, _ in wanted))
        self.metrics.late.inc(sum(ranking.as_of is not None for ranking in rankings))
        self.metrics.unknown.labels("candidate").inc(sum(r.unknown_candidates for r in rankings))
        self.metrics.unknown.labels("context").inc(sum(r.unknown_context for r in rankings))
        logits = [torch.from_numpy(ranking.logits) for ranking in rankings]
        predicted = predictions(torch.cat(logits), scorer.model.config.tasks)
        each = predicted.split([len(of_ranking) for of_ranking in logits])
        return [
            LiveRanking(**vars(ranking), version=version, predictions=of_ranking.numpy(), tasks=names)
            for ranking, of_ranking in zip(rankings, each, strict=True)
        ]

    def _append(self, calls: list[Sequence[Event]]) -> list[list[EventResult]]:
        events = [event for call in calls for event in call]
        first = self._scorers[0]
        results = first.append(events, self.limits.max_ahead)
        # Read _scorers only now that the journal has the events: a scorer that is added later finds them
        # there. If another scorer refuses an event, the event counts as refused; otherwise that scorer's
        # states would silently lack it.
        for scorer in self._scorers:
            if scorer is not first:
                there = [n for n, result in enumerate(results) if result.status != "refused"]
                # checked as the journal has them: numbers rounded to float32
                checked = [checked_event(first.schema, events[n], math.inf) for n in there]
                for n, result in zip(there, scorer.take_over(checked), strict=True):
                    if result.status == "refused":
                        results[n] = result
        for result in results:
            self.metrics.events.labels(result.status).inc()
            if result.status == "taken":
                self.metrics.unknown.labels("event").inc(result.unknown)
        each = iter(results)
        return [[next(each) for _ in call] for call in calls]

    def _reload(self) -> None:
        serving = self._scorers[0]
        try:
            incoming = self._load()
            self._scorers = (serving, incoming)
            # _append may run meanwhile: an event that one of the two adds is a duplicate to the other
            incoming.catch_up()
        except Exception:
            self._scorers = (serving,)
            _log.exception("the reload failed; weights %s keep serving", self.version)
            self.metrics.reloads.labels("failed").inc()
        else:
            self._scorers = (incoming,)
            _log.info("weights %s are serving now", self.version)
            self.metrics.model.info({"version": self.version})
            self.metrics.reloads.labels("ok").inc()


def _rankings(scorer: Scorer, wanted: list[tuple[RankingRequest, int | None]]) -> list[Ranking]:
    """Each request's ranking or set; requests with the same set size are scored together."""
    found: dict[int, Ranking] = {}
    for size in dict.fromkeys(size for _, size in wanted):
        places = [n for n, (_, other) in enumerate(wanted) if other == size]
        alike = [wanted[n][0] for n in places]
        rankings = scorer.rank(alike) if size is None else scorer.rank(alike, size, "greedy")
        found |= zip(places, rankings, strict=True)
    return [found[n] for n in range(len(wanted))]
