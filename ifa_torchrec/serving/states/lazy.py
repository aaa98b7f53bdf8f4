"""States that are served while they are built: a user's that is not there yet, when it is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.errors import StoreError
from ifa_torchrec.serving.states.journal import Event
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.store import StateStore

BuildUsers = Callable[[StateStore, Sequence[int | str]], object]
"""Writes into a store the states of those of some users who have any events in the log."""


class LazyStateStore(StateStore):
    """A StateStore of a version that was begun: whoever is asked for, or has an event, is built first.

    Some users are built at a time, in a thread of their own. The states are those that a build of all
    writes beside it: whichever comes first stays. When that has come to its end nothing more is looked
    for.

    Args:
        key_values, version: as StateStore's.
        build: writes states of some users.
        within: seconds that a read waits for them.

    Raises:
        StateError: no states of this version were begun.

    Example:
        >>> import tempfile
        >>> from torchrec.sparse.jagged_tensor import JaggedTensor
        >>> import torch
        >>> from ifa_torchrec import IFAConfig, InteractionFidelityAttention
        >>> from ifa_torchrec.serving import StateLayout, StateStore, open_key_value_store
        >>> from ifa_torchrec.serving.states.lazy import LazyStateStore
        >>> ifa = InteractionFidelityAttention(IFAConfig(8, num_heads=2))
        >>> lmdb = open_key_value_store(tempfile.mkdtemp())
        >>> _ = StateStore.begin(lmdb, "weights-1", StateLayout.of(ifa), position=0)
        >>> def build(store, users):  # of two events each, at the times 0 and 5
        ...     one_each = torch.ones(len(users), dtype=torch.int64)
        ...     state = ifa.encode(JaggedTensor(torch.randn(len(users), 8), lengths=one_each))
        ...     store.write(users, state, [0] * len(users), state, [5] * len(users))
        >>> LazyStateStore(lmdb, "weights-1", build, within=10).read([70], times=[6])[0].count.tolist()
        [2]
    """

    def __init__(
        self, key_values: KeyValueStore, version: str, build: BuildUsers, within: float
    ) -> None:
        super().__init__(key_values, version, whole=False)
        self._build, self._within = build, within
        self._builder = ThreadPoolExecutor(1, "lazy")
        self._lock = threading.Lock()
        self._under_way: dict[int | str, Future[None]] = {}

    def read(
        self,
        users: Sequence[int | str],
        times: Sequence[int | None],
        keys: Sequence[np.ndarray] | None = None,
        new_users: Sequence[bool] | None = None,
        strict: bool = False,
    ) -> tuple[UserState, np.ndarray]:
        """See StateStore.

        Raises:
            StoreError: also where a user's state is not built in time; it goes on being built.
        """
        self._ensure(users, self._within)
        return super().read(users, times, keys, new_users, strict)

    def append(
        self, events: Sequence[Event], encode: Callable[[Sequence[Event]], UserState]
    ) -> list[bool | None]:
        """See StateStore. It waits until the users are built, however long: else a state would begin
        with the event, beside all those before it."""
        self._ensure([event.user for event in events], None)
        return super().append(events, encode)

    def _ensure(self, users: Sequence[int | str], within: float | None) -> None:
        """Have the states of those of some users built who have none."""
        if self.whole or not users:
            return
        users = list(dict.fromkeys(users))
        lacking = [user for user, known in zip(users, self.known(users), strict=True) if not known]
        if self.whole or not lacking:
            return
        with self._lock:
            new = [user for user in lacking if user not in self._under_way]
            if new:
                future = self._builder.submit(self._build_now, new)
                self._under_way |= dict.fromkeys(new, future)
            wanted = {self._under_way[user] for user in lacking}
        # who has waited once for a user is not to keep others waiting again
        done, late = wait(wanted, within if new or within is None else 0)
        for future in done:
            future.result()
        if late:
            raise StoreError(
                f"the states of {len(lacking)} users, {lacking[0]!r} among them, are being built from "
                "the log; send it again"
            )

    def _build_now(self, users: Sequence[int | str]) -> None:
        try:
            self._build(self, users)
        finally:
            with self._lock:
                for user in users:
                    del self._under_way[user]
