"""Tensors that took long to compute, kept on disk until what they were computed from changes.

A cache is one safetensors file beside the data, or in the user's cache folder where the data's
cannot be written. Its metadata holds a key. A file with another key, a truncated or a foreign one
is ignored and replaced. It is written under another name and renamed, so no reader sees a part of
it. Loading maps it into memory and runs no code.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import PIL
from filelock import FileLock
from PIL import features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repvgg.data.scan import CACHE

VERSION = 1  # of the content; another one makes all files stale
LEAST = 2_000  # images; fewer are decoded at each start
READ = 2**20  # bytes of a file in the key
Tensors = dict[str, Tensor]


def fingerprint(
    root: Path, files: Mapping[str, tuple[Sequence[Path], Tensor]], **settings: object
) -> str:
    """A key that changes with each file, label and setting, and with the decoder.

    A file is its path, its size and the time of its last change. Of each folder the first file is
    read too, or classes whose folders exchange their names could look the same.

    Args:
        root: paths in the key start here, so a folder can be moved.
        files: paths and labels by part.
    """
    decoder = (VERSION, PIL.__version__, features.version("jpg"))
    digest = hashlib.sha256(repr((decoder, sorted(settings.items()))).encode())
    start = f"{root}{os.sep}"
    folders: set[str] = set()
    for part, (paths, labels) in files.items():
        digest.update(repr((part, labels.tolist())).encode())
        for path in map(str, paths):
            status = os.stat(path)
            key = (path.removeprefix(start), status.st_size, status.st_mtime_ns)
            digest.update(repr(key).encode())
            if (folder := os.path.dirname(path)) not in folders:
                folders.add(folder)
                digest.update(_beginning(path))
    return digest.hexdigest()


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(READ)
    except OSError:  # reported where it is decoded
        return b""


def cached(root: Path, name: str, key: str, make: Callable[[], Tensors]) -> tuple[Tensors, str]:
    """Load tensors, or make and save them; several processes at once make them once.

    Args:
        root: the folder of the data.
        name: of the tensors, for the name of the file.
        key: of what they are made from.

    Returns:
        the tensors, and a line for the reader if they were made and saved.
    """
    places = _places(root, name)
    for path in places:
        if (found := _load(path, key)) is not None:
            return found, ""
    for path in places:
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path.with_suffix(".lock")))
            except OSError:  # cannot be written to
                continue
            if (found := _load(path, key)) is not None:  # another process was faster
                return found, ""
            made = make()
            if _save(path, key, made):
                return made, f"the decoded images are kept in {path}; data.cache=false keeps none"
            return made, f"the decoded images cannot be kept in {path.parent}: no space is left"
    return make(), ""


def _places(root: Path, name: str) -> list[Path]:
    """Where the file can be: beside the data, else in the user's cache folder."""
    whole = root.absolute()
    place = hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    user = Path(base).expanduser() / "repvgg"
    return [
        whole / f"{CACHE}-{name}.safetensors",
        user / f"{place}-{name}.safetensors",
    ]


def _load(path: Path, key: str) -> Tensors | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # none, or none of ours
        return None


def _save(path: Path, key: str, tensors: Tensors) -> bool:
    temporary = path.with_suffix(".tmp")  # the lock is held: one that exists was left by a crash
    try:
        save_file(tensors, temporary, metadata={"key": key})
        # safetensors makes files that only their owner can read; the lock has the usual rights.
        temporary.chmod(path.with_suffix(".lock").stat().st_mode)
        temporary.replace(path)
    except (OSError, SafetensorError):
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True
