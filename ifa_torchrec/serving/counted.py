"""The metric files of a service's processes in one folder: one file per process and metric kind."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import mark_process_dead


@contextmanager
def being_read(folder: Path) -> Generator[None]:
    """Hold off moves between files while the metrics are read, so that each count is read once.

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
    """Merge the counts of a process that has ended into the file of all ended processes, and delete its
    own file: each reload leaves some behind, and every scrape of /metrics reads all files.

    Args:
        folder: folder with the files.
        pid: the process's id.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.counted import keep_counts_of_dead
        >>> keep_counts_of_dead(Path(tempfile.mkdtemp()), 123)  # a process that counted nothing
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
