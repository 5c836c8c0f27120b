"""A deployed folder: the names of its files, their checksums, and how it is replaced.

`SHA256SUMS` lists every file; `sha256sum -c` reads it too. It detects accidents, not attacks:
whoever can write to the folder can also write matching sums. Nothing here imports torch.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SUMS = "SHA256SUMS"
REPORT = "report.json"
PAGE = "report.md"
HTML = "report.html"
PROBE = "probe.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file."""
    sums = [f"{digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums))


def read_sums(folder: Path) -> dict[str, str]:
    """The files of a deployment and their SHA-256.

    Raises:
        ValueError: this is not a deployed folder.
    """
    path = folder / SUMS
    if not path.is_file():
        kind = "a folder without" if folder.is_dir() else "no folder with"
        raise ValueError(f"{folder}: {kind} {SUMS}; pass a deployed folder")
    sums: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        checksum, _, name = line.partition("  ")
        if name in sums or Path(name).name != name:
            raise ValueError(f"{folder}: {SUMS} was changed since it was deployed")
        sums[name] = checksum
    if not {REPORT, PAGE, PROBE} <= sums.keys():
        raise ValueError(f"{folder}: {SUMS} was changed since it was deployed")
    return sums


def check_sums(folder: Path) -> set[str]:
    """Compare every file with its checksum.

    Returns:
        the names of the files, without SHA256SUMS.

    Raises:
        ValueError: this is not a deployed folder, or a file is missing, changed or new.
    """
    expected = read_sums(folder)
    present = {path.name for path in folder.iterdir()} - {SUMS}
    missing, new = expected.keys() - present, present - expected.keys()
    changed = {
        name
        for name in expected.keys() & present
        if (folder / name).is_symlink()
        or not (folder / name).is_file()
        or digest(folder / name) != expected[name]
    }
    for kind, names in (("missing", missing), ("changed", changed), ("new", new)):
        if names:
            raise ValueError(f"{folder}: {kind} since it was deployed: {sorted(names)}")
    return present


def check_replaceable(out: Path) -> None:
    """Raise ValueError if `out` holds anything that is not part of a deployment."""
    if not out.exists():
        return
    try:
        known = {*read_sums(out), SUMS}
    except (ValueError, OSError):
        raise ValueError(
            f"{out} is not a deployment, so it is not replaced: pass out=OTHER_FOLDER"
        ) from None
    others = sorted(path.name for path in out.iterdir() if path.name not in known)
    if others:
        raise ValueError(
            f"{out} holds files that do not belong to a deployment, so it is not replaced: "
            f"{', '.join(others[:5])}; pass out=OTHER_FOLDER"
        )


@contextmanager
def new_folder(
    out: Path, *, overwrite: bool, check: Callable[[Path], None] = check_replaceable
) -> Iterator[Path]:
    """Open a temporary folder that becomes `out` at the end, unless an error occurs.

    Args:
        check: raises ValueError if `out` may not be replaced.

    Raises:
        ValueError: `out` exists and may not be replaced.
    """
    near = next(folder for folder in out.absolute().parents if folder.exists())
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=near))
    try:
        yield work
        _publish(work, out, overwrite=overwrite, check=check)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, out: Path, *, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Rename the finished folder; an older one is deleted only after that."""
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)  # mkdtemp makes it private
    if out.exists() and not overwrite:
        raise ValueError(f"another process created {out} meanwhile: pass out=OTHER_FOLDER")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        work.rename(out)
        return
    check(out)
    old = work.with_name(work.name + "-old")
    out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)
