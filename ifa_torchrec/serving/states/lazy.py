"""States that are served while they are being built: a missing user's state is built on demand."""

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
"""Writes the states of the given users, without users who have no events in the log, into a store."""


class LazyStateStore(StateStore):
    """A StateStore whose build is not complete: a user's state is built before it is read or added to.

    A separate thread builds the missing users of a call together. A full build may write the same states
    at the same time; whichever writes a user first counts. When the full build is complete, this store
    no longer looks for missing users.

    Args:
        key_values, version: see StateStore.
        build: writes the states of some users.
        within: seconds that a read waits for missing states.

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
            StoreError: also if a user's state is not built in time; building it continues.
        """
        self._ensure(users, self._within)
        return super().read(users, times, keys, new_users, strict)

    def append(
        self, events: Sequence[Event], encode: Callable[[Sequence[Event]], UserState]
    ) -> list[bool | None]:
        """See StateStore. It waits until the users are built, without a time limit: otherwise a state
        would begin with the event and lack those before it."""
        self._ensure([event.user for event in events], None)
        return super().append(events, encode)

    def _ensure(self, users: Sequence[int | str], within: float | None) -> None:
        """Build the states of those users who have none."""
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
        # wait only if this call started a build: repeated calls must not hold up others again
        done, late = wait(wanted, within if new or within is None else 0)
        for future in done:
            future.result()
        if late:
            raise StoreError(
                f"the states of {len(lacking)} users, {lacking[0]!r} among them, are still being built "
                "from the log; send the request again"
            )

    def _build_now(self, users: Sequence[int | str]) -> None:
        try:
            self._build(self, users)
        finally:
            with self._lock:
                for user in users:
                    del self._under_way[user]
