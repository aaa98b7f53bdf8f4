"""What the processes of one service count, in files of a folder: a file of each kind a process."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import mark_process_dead


@contextmanager
def being_read(folder: Path) -> Generator[None]:
    """Meanwhile nothing is moved from one file to another, to be read twice or not at all.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.counted import being_read
        >>> with being_read(Path(tempfile.mkdtemp())):
        ...     pass
    """
    with _locked(folder, fcntl.LOCK_SH):
        yield


def keep_counts_of_dead(folder: Path, pid: int) -> None:
    """Add what a process counted that has ended to one file of all such, and remove its own: each reload
    leaves some, and all are read whenever somebody looks.

    Args:
        folder: with the files.
        pid: of the process.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.counted import keep_counts_of_dead
        >>> keep_counts_of_dead(Path(tempfile.mkdtemp()), 123)  # which counted nothing
    """
    with _locked(folder, fcntl.LOCK_EX):
        mark_process_dead(pid, str(folder))
        for kind in ("counter", "histogram"):
            file = folder / f"{kind}_{pid}.db"
            if file.exists():
                kept = MmapedDict(str(folder / f"{kind}_dead.db"))
                for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                    kept.write_value(key, kept.read_value(key)[0] + value, 0.0)
                kept.close()
                file.unlink()


@contextmanager
def _locked(folder: Path, how: int) -> Generator[None]:
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, how)
        yield
