"""Score candidates from a user's state, by the same code that scores them from a history."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.data import LogSchema
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import UserState, generate_set, ranking_score
from ifa_torchrec.serving.errors import RequestError, StateError
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.layout import StateLayout
from ifa_torchrec.serving.states.store import StateStore
from ifa_torchrec.serving.times import utc

_LARGEST = 2**63 - 1
_YEAR = 365 * 86400.0  # seconds


@dataclass(frozen=True)
class RankingRequest:
    """A candidate set to be ranked for a user.

    Args:
        user: id.
        candidates: m item ids, at least one.
        time: microseconds since 1970, UTC; the events before it count. None is now, or just after
            the user's last event where the clock that stamped it is ahead.
        context: an id for each of the schema's context features.
        dense: a number for each of its dense features.
        candidate_dense: m numbers for each of its candidate_dense features.
        new_user: whether the user may have no state, and then has had no event.

    Example:
        >>> from ifa_torchrec.serving import RankingRequest
        >>> RankingRequest(user=7, candidates=[4, 9]).new_user
        False
    """

    user: int
    candidates: Sequence[int]
    time: int | None = None
    context: Mapping[str, int] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    candidate_dense: Mapping[str, Sequence[float]] = field(default_factory=dict)
    new_user: bool = False


@dataclass(frozen=True)
class Ranking:
    """The best of a candidate set, best first.

    Args:
        items: ids.
        logits: [len(items), T] float32, one column a task.
        as_of: None, or the time it is of where that is not the request's, since the state could not
            go back to it: microseconds. ``StateStore.read`` says how far it can.
    """

    items: list[int]
    logits: np.ndarray
    as_of: int | None


class Scorer:
    """Scores from states, and adds events to them.

    The model is the one that was trained: ``DLRM_IFA.attend``, its forward from a state in place of
    the history.

    Args:
        model: DLRM_IFA of interaction "ifa", its tables on this process.
        schema: the event log's, which names the features.
        items: the event log's items, a column [I] an item feature.
        store: the states that this model's weights made.
        strict: refuse a request that can only be ranked as of a later time.

    Raises:
        StateError: the store's states are of another configuration.

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
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 3}),
        ...     events=pd.DataFrame({"user": 1, "item": [0, 1, 0, 1], "time": days}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": days[3:], "candidates": [[0, 2]],
        ...                                      "exposed": [[True, True]], "label": [[1, 0]]})})
        >>> _ = train(TrainConfig(folder / "log", folder / "run", ifa=IFAConfig(8, num_heads=2)))
        >>> _ = build_states(BuildStatesConfig(folder / "run", str(folder / "states"), 4))
        >>> run = load_run(folder / "run", sharded=False)
        >>> store = StateStore(open_key_value_store(str(folder / "states")), run.version)
        >>> scorer = Scorer(run.dlrm, run.log.schema, run.log.items, store)
        >>> now = days[3].value // 1000 + 1
        >>> request = RankingRequest(user=1, candidates=[0, 2, 1], time=now)
        >>> before = scorer.rank([request], k=2)[0]
        >>> len(before.items)
        2
        >>> scorer.append([Event(position=4, user=1, item=2, time=now)])
        [True]
        >>> scorer.append([Event(position=4, user=1, item=2, time=now)])  # the same event again
        [False]
    """

    def __init__(
        self,
        model: DLRM_IFA,
        schema: LogSchema,
        items: Mapping[str, np.ndarray],
        store: StateStore,
        strict: bool = False,
    ) -> None:
        ifa = model.candidate_arch.ifa
        wanted = StateLayout.of(ifa, store.layout.dtype)
        if store.layout != wanted:
            raise StateError(
                f"states of weights {store.version!r} are {store.layout}, this model's are {wanted}; "
                "build them with this model"
            )
        self.model, self.schema, self.items, self.store = model.eval(), schema, items, store
        self.strict = strict
        self._identity = ifa.identity
        self._num_items = len(items[schema.item])

    def score(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """The logits of every candidate. Where the state cannot go back to a request's time they are as
        of a later one; ``rank`` says which.

        Args:
            requests: B of them.

        Returns:
            B arrays [m, T] float32, in the candidates' order.

        Raises:
            RequestError: a field is missing, unknown or out of range.
            UnknownUserError: a user has no state, and is not said to be new.
            StateError: ``strict``, and the state cannot go back to the request's time.
            StoreError: states are lost or damaged, or the store fails.
        """
        return self._score(requests)[0]

    @torch.no_grad()
    def _score(self, requests: Sequence[RankingRequest]) -> tuple[list[np.ndarray], list[int]]:
        """The logits of every candidate, and the times that they are as of."""
        if not requests:
            return [], []
        for request in requests:
            self._check(request)
        features = self._features(requests)
        state, as_of = self._state(requests, features)
        logits = self.model.attend(features, state).float().numpy()
        if not np.isfinite(logits).all():
            raise RequestError("the logits overflow; give smaller numbers in dense, candidate_dense")
        ends = np.cumsum([len(request.candidates) for request in requests])
        return np.split(logits, ends[:-1]), as_of.tolist()

    def rank(self, requests: Sequence[RankingRequest], k: int | None = None) -> list[Ranking]:
        """The k best candidates of each request by ``ranking_score``; None for all.

        Raises:
            RequestError, UnknownUserError, StateError: as ``score``.
            ValueError: k is negative.
        """
        rankings: list[Ranking] = []
        for request, logits, as_of in zip(requests, *self._score(requests), strict=True):
            m = len(request.candidates)
            whole = JaggedTensor(torch.empty(m), lengths=torch.tensor([m]))
            score = ranking_score(torch.from_numpy(logits), self.model.config.tasks)
            chosen = generate_set(score, whole, m if k is None else k).values().numpy()
            moved = None if request.time in (None, as_of) else as_of
            items = [int(request.candidates[row]) for row in chosen]
            rankings.append(Ranking(items, logits[chosen], moved))
        return rankings

    def append(self, events: Sequence[Event], max_ahead: float = 60) -> list[bool]:
        """Add events to their users' states, each once however often it is given.

        Args:
            events: the events.
            max_ahead: seconds that an event may be ahead of the clock here.

        Returns:
            Whether each event was new.

        Raises:
            RequestError: an item is unknown, a number out of range, or an event in the future.
            StateError, StoreError: as ``StateStore.append``.
        """
        for event in events:
            if not 0 <= event.item < self._num_items:
                raise RequestError(
                    f"event {event.position}: item {event.item} is unknown; there are 0 to "
                    f"{self._num_items - 1}"
                )
            if not (0 <= event.position <= _LARGEST and 0 <= event.time <= _LARGEST):
                raise RequestError(
                    f"event {event.position}: position and time must be in 0..2**63 - 1, got "
                    f"{event.position} and {event.time}"
                )
            _check_clock(f"event {event.position}: its time", event.time, max_ahead)
            self._check_user(event.user)
        return self.store.append(events, self._encode)

    def catch_up(self) -> int:
        """Add what the store's journal has and these states have not; how many events it was."""
        # whatever clock accepted them
        return sum(sum(self.append(events, max_ahead=math.inf)) for events in self.store.missed())

    @torch.no_grad()
    def _encode(self, events: Sequence[Event]) -> UserState:
        items = np.array([event.item for event in events], np.int64)
        features = self._sequence_features(items, np.ones(len(events), np.int64), "history_")
        return self.model.encode(features, torch.zeros(len(events)))

    def _state(
        self, requests: Sequence[RankingRequest], features: RankingFeatures
    ) -> tuple[UserState, np.ndarray]:
        keys = None
        ids = self.model.candidate_arch.ids(features.sequence_features, "candidate_")
        if ids is not None and self._identity is not None:
            of_candidate = self._identity.keys(ids).numpy()
            ends = np.cumsum([len(request.candidates) for request in requests])
            keys = np.split(of_candidate, ends[:-1])
        return self.store.read(
            [request.user for request in requests],
            [request.time for request in requests],
            keys,
            [request.new_user for request in requests],
            self.strict,
        )

    def _features(self, requests: Sequence[RankingRequest]) -> RankingFeatures:
        schema = self.schema
        lengths = np.array([len(request.candidates) for request in requests], np.int64)
        items = np.concatenate([np.asarray(request.candidates, np.int64) for request in requests])
        context = [request.context[f] for f in schema.context_features for request in requests]
        dense = [[request.dense[f] for f in schema.dense_features] for request in requests]
        candidate_dense = [
            np.concatenate([np.asarray(r.candidate_dense[f], np.float32) for r in requests])
            for f in schema.candidate_dense
        ]
        m = len(items)
        return RankingFeatures(
            dense_features=torch.tensor(dense, dtype=torch.float32).reshape(len(requests), -1),
            context_features=KeyedJaggedTensor.from_lengths_sync(
                keys=list(schema.context_features),
                values=torch.tensor(context, dtype=torch.int64),
                lengths=torch.ones(len(context), dtype=torch.int64),
            ),
            sequence_features=self._sequence_features(items, lengths, "candidate_"),
            candidate_dense=torch.from_numpy(
                np.stack(candidate_dense, 1) if candidate_dense else np.empty((m, 0), np.float32)
            ),
            history_age=torch.empty(0),
        )

    def _sequence_features(
        self, items: np.ndarray, lengths: np.ndarray, prefix: str
    ) -> KeyedJaggedTensor:
        """The items' features under ``prefix``, and nothing under the other prefix."""
        columns = [self.items[feature][items] for feature in self.schema.item_features]
        per_prefix = {p: lengths if p == prefix else 0 * lengths for p in ("history_", "candidate_")}
        return KeyedJaggedTensor.from_lengths_sync(
            keys=[p + feature for p in per_prefix for feature in self.schema.item_features],
            values=torch.from_numpy(np.concatenate(columns)),
            lengths=torch.from_numpy(np.concatenate([n for n in per_prefix.values() for _ in columns])),
        )

    def _check(self, request: RankingRequest) -> None:
        schema, m = self.schema, len(request.candidates)
        self._check_user(request.user)
        if request.time is not None and not 0 <= request.time <= _LARGEST:
            raise RequestError(f"time must be in 0..2**63 - 1 microseconds, got {request.time}")
        if request.time is not None:
            _check_clock("time", request.time, _YEAR)
        if m == 0:
            raise RequestError("candidates is empty; give at least one item")
        items = np.asarray(request.candidates)
        if items.ndim != 1 or items.dtype.kind != "i":  # of larger numbers it makes another kind
            raise RequestError(f"candidates must be a list of int64, got {items.dtype}")
        unknown = np.flatnonzero((items < 0) | (items >= self._num_items))
        if len(unknown):
            raise RequestError(
                f"candidates[{unknown[0]}]: item {items[unknown[0]]} is unknown; there are 0 to "
                f"{self._num_items - 1}"
            )
        for name, given, wanted in (
            ("context", request.context, schema.context_features),
            ("dense", request.dense, schema.dense_features),
            ("candidate_dense", request.candidate_dense, schema.candidate_dense),
        ):
            if set(given) != set(wanted):
                missing, unknown = set(wanted) - set(given), set(given) - set(wanted)
                what = [f"{sorted(missing)} missing"] * bool(missing)
                what += [f"{sorted(unknown)} unknown"] * bool(unknown)
                raise RequestError(f"{name}: {', '.join(what)}; the model takes {sorted(wanted)}")
        for feature, value in request.context.items():
            if not 0 <= value < schema.context_features[feature]:
                raise RequestError(
                    f"context.{feature}: id {value} is outside its table of "
                    f"{schema.context_features[feature]} rows"
                )
        for feature, value in request.dense.items():
            _check_finite(f"dense.{feature}", [value])
        for feature, values in request.candidate_dense.items():
            if len(values) != m:
                raise RequestError(
                    f"candidate_dense.{feature}: {len(values)} numbers for {m} candidates"
                )
            _check_finite(f"candidate_dense.{feature}", values)

    @staticmethod
    def _check_user(user: int) -> None:
        if not -_LARGEST - 1 <= user <= _LARGEST:
            raise RequestError(f"user {user} is not an int64")


def _check_clock(name: str, given: int, max_ahead: float) -> None:
    """Refuse what is far ahead: a state at such a time has forgotten everything, for good."""
    latest = time.time_ns() // 1000 + max_ahead * 1e6
    if given > latest:
        cause = "; it is microseconds since 1970, were these nanoseconds?" * (given > 2 * latest)
        raise RequestError(
            f"{name} {given} is {utc(given)}, more than {max_ahead:g} seconds ahead of the clock "
            f"here{cause}"
        )


def _check_finite(name: str, values: Sequence[float]) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(values, np.float32))
    if not finite.all():
        raise RequestError(f"{name}: not finite numbers of float32")
