"""The store at an address."""

from __future__ import annotations

from pathlib import Path

from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.key_value import KeyValueStore
from ifa_torchrec.serving.states.lmdb_store import LMDBStore
from ifa_torchrec.serving.states.redis_store import open_redis, without_password


def open_key_value_store(address: str, create: bool = True) -> KeyValueStore:
    """The store at an address.

    Args:
        address: the folder of an LMDB store, or redis://HOST:PORT/NUMBER (rediss:// with TLS, unix://
            for a socket) of a Redis server or of any server of a Redis Cluster. Its password is best in
            the variable IFA_REDIS_PASSWORD: everyone on the machine sees a program's arguments.
        create: whether to make an LMDB store that is not there.

    Raises:
        StateError: nothing can be opened there.

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
            f"{without_password(address)}: a store is a folder, or redis://HOST:PORT/NUMBER"
        )
    if not create and not (Path(address) / "data.mdb").exists():
        raise StateError(f"{address}: there is no store of states; build one with ifa build-states")
    return LMDBStore(Path(address))
