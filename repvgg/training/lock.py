"""One process at a time writes into the folder of a run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock ends with the process.

    A missing folder is created. If nothing else was written, the lock is removed.

    Raises:
        ValueError: another run holds the folder, or it is deleted or moved meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    lock = FileLock(folder / NAME, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another run: wait until that ends, or pass another "
            "hydra.run.dir"
        ) from None
    try:
        yield
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(
            f"{folder} is gone: it was deleted, moved or unmounted while the run wrote into it; "
            "what was written after that is lost"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder is gone; Windows keeps open files
            after = {path.name for path in folder.iterdir()}
            if {NAME} in (after, after - before):
                (folder / NAME).unlink()
        lock.release()
