"""What serving raises for its user."""

from __future__ import annotations

from ifa_torchrec.errors import UserError


class StateError(UserError, RuntimeError):
    """A store of states cannot do what was asked; the message says what would be right."""


class StoreError(StateError):
    """The store itself fails: no room, no connection, a damaged file. Trying again may help."""


class UnreachableError(StoreError):
    """The store does not respond: it is out of reach for whatever is asked next, too."""


class UnknownUserError(StateError):
    """There is no state of a user."""


class StreamError(UserError, RuntimeError):
    """A stream of events cannot be read on; the message says where it stopped and why."""


class WorkerError(UserError, RuntimeError):
    """A process of the service does not come up."""


class RequestError(UserError, ValueError):
    """A ranking request or an event is not what the model takes; the message names the field."""
