"""Opens the store at an address."""

from __future__ import annotations

from pathlib import Path

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.lmdb_store import LMDBStore
from ifa_torchrec.serving.states.redis_store import open_redis, without_password


def open_key_value_store(address: str, create: bool = True) -> KeyValueStore:
    """Open the store at an address.

    Args:
        address: the folder of an LMDB store, or redis://HOST:PORT/NUMBER (rediss:// with TLS, unix://
            for a socket) of a Redis server or of any server of a Redis Cluster. Put the password into
            the environment variable IFA_REDIS_PASSWORD, since everyone on the machine can see a
            program's arguments.
        create: whether to create an LMDB store that does not exist.

    Raises:
        StateError: no store can be opened there.

    Example:
        >>> import tempfile
        >>> from ifa_torchrec.serving import open_key_value_store
        >>> store = open_key_value_store(tempfile.mkdtemp() + "/states")
        >>> store.update([b"n"], lambda found: {b"n": (found[0] or b"") + b"+"})
        >>> store.read([b"n", b"m"])
        [b'+', None]
        >>> store.close()
    """
    if address.startswith(("redis://", "rediss://", "unix://")):
        return open_redis(address)
    if "://" in address:
        raise StateError(
            f"{without_password(address)}: not a store's address; expected a folder or "
            "redis://HOST:PORT/NUMBER"
        )
    if not create and not (Path(address) / "data.mdb").exists():
        raise StateError(f"{address}: no store of states here; build one with ifa build-states")
    return LMDBStore(Path(address))
