"""Files that are old or new, and never a part: written under another name, then renamed."""

import contextlib
import glob
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, whenever the process is killed or the disk is full.

    What earlier, killed processes of this machine left beside it is removed.

    Raises:
        OSError: the file, which the error names, cannot be written.
    """
    mine = f".{path.name}.{platform.node()}-"
    temporary = path.with_name(f"{mine}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for left in path.parent.glob(f"{glob.escape(mine)}*"):
            number = left.name.removeprefix(mine).partition("-")[0]
            if number.isdecimal() and not is_alive(int(number)):
                left.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name a file in an error of the system that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    if os.name == "nt":  # signal 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return True
