"""The errors that serving raises for its users."""

from __future__ import annotations

from ifa_torchrec.errors import UserError


class StateError(UserError, RuntimeError):
    """A request or setting does not fit the store of states; the message says what would."""


class StoreError(StateError):
    """The store itself fails: it is full, unreachable or damaged. Trying again may help."""


class UnreachableError(StoreError):
    """The store does not respond; further calls would fail too."""


class UnknownUserError(StateError):
    """The store has no state of a user."""


class StreamError(UserError, RuntimeError):
    """Reading a stream of events stopped; the message says where and why."""


class WorkerError(UserError, RuntimeError):
    """A worker process of the service did not start."""


class RequestError(UserError, ValueError):
    """A ranking request or an event does not fit the model; the message names the field."""
