"""Score candidates from user states, with the same code that scores them from histories."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.data.log_items import LogItems
from ifa_torchrec.errors import UserError
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import UserState, generate_set, ranking_score
from ifa_torchrec.serving.catalogue import Catalogue, EncodedRequests
from ifa_torchrec.serving.compiled import CompiledDense
from ifa_torchrec.serving.errors import RequestError, StateError, StoreError
from ifa_torchrec.serving.requests import (
    EventResult,
    Ranking,
    RankingRequest,
    Strategy,
    checked_event,
    checked_request,
)
from ifa_torchrec.serving.states.forgetting import Forgotten, forget
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.layout import StateLayout
from ifa_torchrec.serving.states.store import StateStore


class Scorer:
    """Scores candidates from user states, and adds events to the states.

    It runs the trained model itself: ``DLRM_IFA.attend`` is the model's forward with a state in place of
    the history.

    Users, items and feature values are external ids, integers or strings. An id that the log's
    vocabulary does not know is "unknown"; unknown users have states like any others.

    Args:
        model: DLRM_IFA with interaction "ifa" and unsharded tables.
        log: provides the schema, items and vocabulary; an EventLog, or the part of one in a bundle.
        store: states built with this model's weights, from a log with this vocabulary.
        strict: refuse a request that can only be ranked as of a later time.
        compiled: the model's compiled dense part, which computes all logits except those of sets that
            are chosen one by one; None uses the model's own.

    Raises:
        StateError: the store's states have another layout or another vocabulary.

    Attributes:
        observe: called after each stage of a batch with its name and its seconds: "store" (reading
            states), "model" (logits), "append" (encoding and writing events).

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
        >>> from ifa_torchrec.serving import Event, RankingRequest, Scorer, StateStore
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.run import load_run
        >>> from ifa_torchrec.training.trainer import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> days = pd.date_range("2024-01-01", periods=4)
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 4}),
        ...     events=pd.DataFrame({"user": 1, "item": [1, 2, 1, 2], "time": days}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": days[3:], "candidates": [[1, 3]],
        ...                                      "exposed": [[True, True]], "label": [[1, 0]]})})
        >>> _ = train(TrainConfig(folder / "log", folder / "run", ifa=IFAConfig(8, num_heads=2)))
        >>> _ = build_states(BuildStatesConfig(folder / "run", str(folder / "states"), 4))
        >>> run = load_run(folder / "run", sharded=False)
        >>> store = StateStore(open_key_value_store(str(folder / "states")), run.version)
        >>> scorer = Scorer(run.dlrm, run.log, store)
        >>> now = days[3].value // 1000 + 1
        >>> request = RankingRequest(user=1, candidates=[1, 3, "new"], time=now)
        >>> ranking = scorer.rank([request], k=2)[0]
        >>> len(ranking.items), ranking.unknown_candidates
        (2, 1)
        >>> event = Event(position=4, user=1, item=2, time=now)
        >>> [scorer.append([event])[0].status for _ in range(2)]  # the same event again
        ['taken', 'duplicate']
    """

    def __init__(
        self,
        model: DLRM_IFA,
        log: LogItems,
        store: StateStore,
        strict: bool = False,
        compiled: CompiledDense | None = None,
    ) -> None:
        ifa = model.candidate_arch.ifa
        states = f"states of weights {store.version!r}"
        wanted = StateLayout.of(ifa, store.layout.dtype)
        if store.layout != wanted:
            raise StateError(
                f"{states} have the layout {store.layout}, but this model expects {wanted}; build them "
                "with this model (ifa build-states)"
            )
        self._catalogue = Catalogue(log)
        if store.vocabulary != self._catalogue.digest:
            raise StateError(
                f"{states} were built with the vocabulary {store.vocabulary!r}, but {log.place} has "
                f"{self._catalogue.digest!r}, whose rows may stand for other ids. Give the log that the "
                f"states were built from, or drop them (ifa states --drop {store.version}) and rebuild "
                "them (ifa build-states)"
            )
        self.model, self.schema, self.store = model.eval(), log.schema, store
        self.strict, self._compiled = strict, compiled
        self._identity = ifa.identity
        self.observe: Callable[[str, float], object] = lambda *_: None

    def score(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """Compute every candidate's logits. If a state cannot go back to its request's time, they are as
        of a later time, which ``rank`` reports.

        Args:
            requests: B requests.

        Returns:
            B arrays [m, T] float32, in the candidates' order.

        Raises:
            RequestError: a field is missing, unknown or out of range.
            UnknownUserError: a user has no state, and the request does not set ``new_user``.
            StateError: ``strict`` is set, and a state cannot go back to its request's time.
            StoreError: states are lost or damaged, or the store fails.
        """
        requests = [checked_request(self.schema, request) for request in requests]
        if not requests:
            return []
        encoded = self._catalogue.encode_requests(requests)
        logits = self._logits(encoded, self._state(requests, encoded)[0]).numpy()
        return _of_requests(logits, encoded.lengths)

    def rank(
        self, requests: Sequence[RankingRequest], k: int | None = None, strategy: Strategy = "topk"
    ) -> list[Ranking]:
        """Choose each request's k best candidates by ``ranking_score``, or the k that are best together.

        Args:
            requests: B requests.
            k: how many; None for all. A request with fewer candidates returns all of them.
            strategy: see ``generate_set``. "greedy" repeatedly takes the candidate that adds most to the
                set; it needs k, and a model that was trained to generate sets. Each item's logits are
                then those given the other items of its set.

        Raises:
            RequestError, UnknownUserError, StateError, StoreError: as ``score``; or "greedy" has no k,
                or the model was not trained for it.
            ValueError: k is negative, or the strategy is unknown.
        """
        if not requests:
            return []
        if k is not None and k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        if strategy not in ("topk", "greedy"):
            raise ValueError(f"strategy must be 'topk' or 'greedy', got {strategy!r}")
        if strategy == "greedy":
            self._check_greedy(k)
        requests = [checked_request(self.schema, request) for request in requests]
        encoded = self._catalogue.encode_requests(requests)
        state, as_of = self._state(requests, encoded)
        if strategy == "greedy":
            with self._timed("model"):
                chosen, logits = self._best_together(encoded, state, k or 0)
        else:
            chosen, logits = self._best(encoded, state, k)
        ends, times = np.cumsum([0, *encoded.lengths]).tolist(), as_of.tolist()
        unknown = zip(encoded.unknown_items.tolist(), encoded.unknown_values.tolist(), strict=True)
        rankings: list[Ranking] = []
        for b, (request, of_request) in enumerate(zip(requests, unknown, strict=True)):
            moved = None if request.time in (None, times[b]) else times[b]
            rows = chosen[b]
            items = [request.candidates[row] for row in (rows - ends[b]).tolist()]
            rankings.append(Ranking(items, logits[rows], moved, *of_request))
        return rankings

    def _check_greedy(self, k: int | None) -> None:
        if not self.model.config.candidate_set.generate:
            raise RequestError(
                "strategy 'greedy': this model was not trained to generate sets (ifa train "
                "--candidate-set.generate); use 'topk'"
            )
        if k is None:
            raise RequestError("strategy 'greedy' chooses the k best one by one; give k")

    @torch.no_grad()
    def _logits(self, encoded: EncodedRequests, state: UserState) -> Tensor:
        """Each candidate's logits given its candidate set, [M, T] float32."""
        with self._timed("model"):
            if self._compiled is not None:
                return _finite(self._compiled.logits(encoded, state))
            features = self._catalogue.features(encoded)
            return _finite(self.model.logits_given(self.model.describe(features, state)))

    def _best(
        self, encoded: EncodedRequests, state: UserState, k: int | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Each request's rows of the k best, ties in candidate order, and all logits [M, T]."""
        logits = self._logits(encoded, state)
        worst = -ranking_score(logits, self.model.config.tasks).numpy()
        ends = np.cumsum([0, *encoded.lengths]).tolist()
        chosen = [begin + worst[begin:end].argsort(kind="stable")[:k] for begin, end in pairwise(ends)]
        return chosen, logits.numpy()

    @torch.no_grad()
    def _best_together(
        self, encoded: EncodedRequests, state: UserState, k: int
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Each request's rows of the k that are best together, in the order chosen, and logits [M, T],
        those of chosen candidates given their set."""
        described = self.model.describe(self._catalogue.features(encoded), state)
        candidates = self.model.scored(described)
        _finite(self.model.logits_given(candidates))
        whole = JaggedTensor(candidates.tokens, offsets=candidates.offsets)
        chosen = generate_set(self.model.set_gain(candidates), whole, k, "greedy")
        rows = chosen.values()
        taken = torch.zeros(len(encoded.items), dtype=torch.bool).index_fill(0, rows, True)
        logits = _finite(self.model.logits_given(candidates, taken)).numpy()
        return _of_requests(chosen.values().numpy(), chosen.lengths().numpy()), logits

    def append(self, events: Sequence[Event], max_ahead: float = 60) -> list[EventResult]:
        """Add events to their users' states. An event that is given again is not added again.

        A refused event does not affect the others.

        Args:
            events: the events.
            max_ahead: seconds that an event may be ahead of this machine's clock.

        Returns:
            One result per event. An event is refused if it does not fit the model, lies in the future,
            or ``StateStore.append`` raises StateError for it.

        Raises:
            StoreError: as ``StateStore.append``.
        """
        results: dict[int, EventResult] = {}
        checked: dict[int, Event] = {}
        for n, event in enumerate(events):
            try:
                checked[n] = checked_event(self.schema, event, max_ahead)
            except RequestError as error:
                results[n] = EventResult("refused", str(error))
        results |= zip(checked, self.take_over(list(checked.values())), strict=True)
        return [results[n] for n in range(len(events))]

    def take_over(self, events: Sequence[Event]) -> list[EventResult]:
        """Add events that another version's scorer took, or that are in the journal.

        They may follow another version's schema: features that this model needs and an event lacks are
        unknown or missing.

        Raises:
            StoreError: as ``StateStore.append``.
        """
        if not events:
            return []
        with self._timed("append"):
            return self._take_over(events)

    def _take_over(self, events: Sequence[Event]) -> list[EventResult]:
        events = [self._named(event) for event in events]
        try:
            encoded = self._catalogue.encode_events(events)
            state = self._encode(encoded.features)
        except RequestError as error:  # raised for one of the events
            return self._halves(events, error)
        unknown = (encoded.items + encoded.values).tolist()
        results: dict[int, EventResult] = {}
        for mine in self.store.apart([event.user for event in events]):
            added = [events[n] for n in mine]
            of_part = state if len(mine) == len(events) else state[mine]
            try:
                new = self.store.append(added, lambda _, of_part=of_part: of_part)
            except StoreError:
                raise
            except StateError as error:  # raised for one of the events; none was added
                results |= zip(mine, self._halves(added, error), strict=True)
            else:
                for n, is_new in zip(mine, new, strict=True):
                    status = "forgotten" if is_new is None else ("duplicate", "taken")[is_new]
                    results[n] = EventResult(status, unknown=unknown[n])
        return [results[n] for n in range(len(events))]

    def _named(self, event: Event) -> Event:
        """The event, with the user id under which the user's state is stored."""
        user = self._catalogue.user(event.user)
        return event if user is event.user else dataclasses.replace(event, user=user)

    def _halves(self, events: Sequence[Event], error: UserError) -> list[EventResult]:
        """Add each half of the events separately, down to the event that causes the error."""
        if len(events) == 1:
            return [EventResult("refused", str(error))]
        middle = len(events) // 2
        return self._take_over(events[:middle]) + self._take_over(events[middle:])

    def forget(self, user: int | str) -> Forgotten:
        """Remove everything about a user, in all versions; see ``ifa_torchrec.serving.forget``.

        Raises:
            StateError, StoreError: as ``ifa_torchrec.serving.forget``.
        """
        return forget(self.store.key_values, self._catalogue.user(user))

    def catch_up(self) -> int:
        """Add the journal's events that these states lack, and return how many were added.

        Raises:
            StateError: an event of the journal was refused.
            StoreError: as ``StateStore.append``.
        """
        count = 0
        for events in self.store.missed():
            for event, result in zip(events, self.take_over(events), strict=True):
                if result.status == "refused":
                    raise StateError(f"the journal's event at {event.place}: {result.reason}")
                count += result.status == "taken"
        return count

    @torch.no_grad()
    def _encode(self, features: RankingFeatures) -> UserState:
        """The state of each event on its own.

        Raises:
            RequestError: an event's numbers are so large that its state overflows.
        """
        state = self.model.encode(features)
        for sums in (state.key_sum, state.key_value, state.identity_sum, state.identity_value):
            if sums is not None and not _all_finite(sums):
                raise RequestError("the event's state overflows; give smaller numbers")
        return state

    def _state(
        self, requests: Sequence[RankingRequest], encoded: EncodedRequests
    ) -> tuple[UserState, np.ndarray]:
        """Each request's state, with the identity rows of its candidates, and the times it is as of."""
        keys = None
        if self._identity is not None:
            compared = encoded.ids | {self.schema.item: encoded.items}
            ids = [compared[name] for name in self._identity.config.identity_features]
            of_candidate = self._identity.keys(torch.from_numpy(np.stack(ids, axis=1))).numpy()
            keys = _of_requests(of_candidate, encoded.lengths)
        with self._timed("store"):
            return self.store.read(
                [self._catalogue.user(request.user) for request in requests],
                [request.time for request in requests],
                keys,
                [request.new_user for request in requests],
                self.strict,
            )

    @contextmanager
    def _timed(self, stage: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.observe(stage, time.perf_counter() - start)


def _of_requests(rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split rows into the consecutive rows of each request."""
    return [rows[begin:end] for begin, end in pairwise(accumulate(lengths.tolist(), initial=0))]


def _all_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a bool copy: for 64 events that would be megabytes."""
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())


def _finite(logits: Tensor) -> Tensor:
    """Convert logits to float32.

    Raises:
        RequestError: a logit is not finite.
    """
    logits = logits.float()
    if not np.isfinite(logits.numpy()).all():
        raise RequestError("the logits overflow; give smaller numbers in dense and candidate_dense")
    return logits
