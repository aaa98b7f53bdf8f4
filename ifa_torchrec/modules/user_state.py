"""UserState: a whole history as sums of fixed size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UserState:
    """What is kept of B users' histories: additive over events, of a size that no event changes.

    Args:
        key_value: [B, H, d_phi, d], S of each dense head, float32 or float64.
        key_sum: [B, H, d_phi], z of each dense head.
        count: [B] int64, the events summed.
        identity_value: [B, K, L, R, d], the identity heads' sums of values by bucket; None
            without identity features.
        identity_sum: [B, K, L, R], the identity heads' sums of weights by bucket; or None.

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
    identity_value: Tensor | None = None
    identity_sum: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, for torch.save; ``UserState(**saved)`` brings the state back."""
        return {name: tensor for name, tensor in self._tensors().items() if tensor is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UserState:
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, requests: slice | Sequence[int] | Tensor) -> UserState:
        """The states of some requests: a slice, a list of numbers, or a tensor of numbers or
        of bool. A plain int is refused, since a state always has its first dimension."""
        if not isinstance(requests, slice) and torch.as_tensor(requests).dim() == 0:
            raise TypeError(f"index a UserState with [[{requests}]], not [{requests}]")
        return self._map(lambda tensor: tensor[requests])

    def __add__(self, other: UserState) -> UserState:
        """The state of both histories together, request by request."""
        mine, theirs = self._tensors(), other._tensors()
        for name in mine:
            shapes = [None if t[name] is None else tuple(t[name].shape) for t in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"states of histories in parts differ in {name}: {shapes[0]} and {shapes[1]}"
                )
        return UserState(**{k: v + theirs[k] for k, v in mine.items() if v is not None})

    @staticmethod
    def cat(states: Sequence[UserState]) -> UserState:
        """The states of several batches, one after the other."""
        if not states:
            raise ValueError("UserState.cat needs at least one state")
        columns = [state.state_dict() for state in states]
        return UserState(**{k: torch.cat([c[k] for c in columns]) for k in columns[0]})

    def _tensors(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _map(self, function) -> UserState:
        return UserState(**{name: function(tensor) for name, tensor in self.state_dict().items()})
