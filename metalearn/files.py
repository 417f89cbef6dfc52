"""Files that are whole at any moment, whenever the process is killed, and folders that one process at a time works in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a partial one is put in its place when it is complete. Text is UTF-8."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # a file that was renamed before it reached the disk is empty after a power failure
    partial.replace(path)


@contextmanager
def locked(folder: str | Path, refusal: str, *, wait: bool = False) -> Iterator[None]:
    """Hold ``<folder>/.lock``; the system lets go of it when the process ends, however it ends.

    Args:
        folder: made where it is missing.
        refusal: says what another process that holds the lock is doing.
        wait: for that process to end.

    Raises:
        ValueError: with ``refusal``, if another process holds it and ``wait`` is false.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield
