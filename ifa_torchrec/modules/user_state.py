"""UserState: a whole history as sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops.jagged import request_of_row


@dataclass(frozen=True, eq=False)
class UserState:
    """The states of B users' histories: additive sums over events, of bounded size.

    The dense heads' part has the same size for every user. The identity heads' tables contain only the
    U buckets into which events of the users fell, as rows ordered by request and key; they have at most
    K R rows per user.

    Args:
        key_value: [B, H, d_phi, d], S of each dense head, float32 or float64.
        key_sum: [B, H, d_phi], z of each dense head.
        count: [B] int64, the number of events summed.
        identity_offsets: [B + 1] int64, request b has the rows
            identity_offsets[b]:identity_offsets[b + 1]. This and the following fields are None without
            identity features.
        identity_key: [U] int64, feature number times R plus bucket; ascending within a request.
        identity_value: [U, L, d], the sums of values of a bucket for each half-life; d is 0 if the
            identity heads have only masses.
        identity_sum: [U, L], the sums of weights.
        identity_key_range: K R, the exclusive bound of identity_key.

    Example:
        >>> import tempfile, torch
        >>> from ifa_torchrec import UserState
        >>> state = UserState(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4), torch.tensor([5, 0, 2]))
        >>> UserState.cat([state[1:], state[[0]]]).count.tolist()
        [0, 2, 5]
        >>> file = tempfile.mkdtemp() + "/state.pt"
        >>> torch.save(state.state_dict(), file)
        >>> UserState(**torch.load(file)).count.tolist()
        [5, 0, 2]
    """

    key_value: Tensor
    key_sum: Tensor
    count: Tensor
    identity_offsets: Tensor | None = None
    identity_key: Tensor | None = None
    identity_value: Tensor | None = None
    identity_sum: Tensor | None = None
    identity_key_range: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The fields that are not None, for torch.save; ``UserState(**saved)`` restores the state."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UserState:
        """The state on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in self.state_dict().items()
        }
        return UserState(**moved)

    def identity_tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """identity_offsets, identity_key, identity_value and identity_sum.

        Raises:
            ValueError: one of them is None.

        Example:
            >>> import torch
            >>> from ifa_torchrec import UserState
            >>> dense = (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), torch.tensor([1]))
            >>> tables = (torch.tensor([0, 1]), torch.tensor([7]), torch.ones(1, 1, 4), torch.ones(1, 1))
            >>> UserState(*dense, *tables, 100).identity_tables()[1].tolist()
            [7]
        """
        if (
            self.identity_offsets is None
            or self.identity_key is None
            or self.identity_value is None
            or self.identity_sum is None
        ):
            raise ValueError("state has no identity tables, or not all four parts of them")
        return self.identity_offsets, self.identity_key, self.identity_value, self.identity_sum

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, requests: slice | Sequence[int] | Tensor) -> UserState:
        """The states of some requests, selected by a slice, a list of numbers, or a tensor of numbers or
        bool. A plain int raises a TypeError, since a state always keeps its first dimension."""
        if not isinstance(requests, slice) and torch.as_tensor(requests).dim() == 0:
            raise TypeError(f"index a UserState with [[{requests}]], not [{requests}]")
        if isinstance(requests, tuple):  # a tensor would take it for a coordinate
            requests = list(requests)
        dense = (self.key_value[requests], self.key_sum[requests], self.count[requests])
        if self.identity_offsets is None:
            return UserState(*dense)
        offsets, key, value, weight = self.identity_tables()
        lengths = offsets.diff()[requests]
        bounds = _offsets(lengths)
        shift = offsets[:-1][requests] - bounds[:-1]
        rows = torch.arange(int(bounds[-1]), device=bounds.device)
        rows = rows + torch.repeat_interleave(shift, lengths)
        return UserState(*dense, bounds, key[rows], value[rows], weight[rows], self.identity_key_range)

    def __add__(self, other: UserState) -> UserState:
        """The states of both histories combined, request by request."""
        mine, theirs = self._shapes(), other._shapes()
        for name in mine:
            if mine[name] != theirs[name]:
                raise ValueError(f"states to be added differ in {name}: {mine[name]} and {theirs[name]}")
        dense = (
            self.key_value + other.key_value,
            self.key_sum + other.key_sum,
            self.count + other.count,
        )
        if self.identity_offsets is None:
            return UserState(*dense)
        offsets, *tables = zip(self.identity_tables(), other.identity_tables(), strict=True)
        keys, values, weights = (torch.cat(pair) for pair in tables)
        request = torch.cat([request_of_row(of_state) for of_state in offsets])
        bounds, key, row = distinct_keys(request, keys, len(self), self.identity_key_range)
        value, weight = (summed_rows(row, rows, len(key)) for rows in (values, weights))
        return UserState(*dense, bounds, key, value, weight, self.identity_key_range)

    @staticmethod
    def cat(states: Sequence[UserState]) -> UserState:
        """Concatenate the states of several batches."""
        if not states:
            raise ValueError("UserState.cat needs at least one state")
        columns = {
            f.name: [getattr(state, f.name) for state in states] for f in dataclasses.fields(UserState)
        }
        key_range, offsets = columns.pop("identity_key_range"), columns.pop("identity_offsets")
        if len(set(key_range)) > 1:
            raise ValueError(f"states have different configurations: identity_key_range is {key_range}")
        joined: dict[str, Any] = {
            name: torch.cat(parts) for name, parts in columns.items() if parts[0] is not None
        }
        if offsets[0] is not None:
            joined["identity_offsets"] = _offsets(torch.cat([of_state.diff() for of_state in offsets]))
        return UserState(**joined, identity_key_range=key_range[0])

    def _shapes(self) -> dict[str, Any]:
        """The shapes that must be equal for two states to be added."""
        tensors = (
            "key_value", "key_sum", "count", "identity_offsets", "identity_value", "identity_sum"
        )  # fmt: skip
        shapes: dict[str, Any] = {}
        for name in tensors:
            tensor = getattr(self, name)
            rows = 1 if name in ("identity_value", "identity_sum") else 0  # which are any number
            shapes[name] = None if tensor is None else tuple(tensor.shape[rows:])
        return {**shapes, "identity_key_range": self.identity_key_range}


def distinct_keys(
    request: Tensor, key: Tensor, requests: int, key_range: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each request's distinct keys, in order.

    Args:
        request: [n] int64, 0..requests - 1; key: [n] int64, 0..key_range - 1.
        requests: B.
        key_range: exclusive bound of the keys.

    Returns:
        offsets [B + 1] and key [U] of the distinct keys, and row [n], the row in ``key`` of each input.

    Example:
        >>> import torch
        >>> from ifa_torchrec.modules.user_state import distinct_keys
        >>> request, key = torch.tensor([0, 0, 0, 2]), torch.tensor([7, 3, 7, 1])
        >>> [t.tolist() for t in distinct_keys(request, key, requests=3, key_range=10)]
        [[0, 2, 2, 3], [3, 7, 1], [1, 0, 1, 2]]
    """
    found, row = torch.unique(request * key_range + key, return_inverse=True)
    bounds = torch.arange(requests + 1, device=key.device) * key_range
    return torch.searchsorted(found, bounds), found % key_range, row


def summed_rows(row: Tensor, values: Tensor, rows: int) -> Tensor:
    """Sums [rows, ...] of the values [n, ...] by target row; ``row`` is [n] int64."""
    return values.new_zeros(rows, *values.shape[1:]).index_add(0, row, values)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
