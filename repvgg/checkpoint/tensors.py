"""Read files of torch, safetensors or numpy without running code from them.

Other objects in a file of torch (paths, times, configs, modules) become inert stand-ins: see
`repvgg.checkpoint.standins`.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from repvgg.checkpoint import standins
from repvgg.checkpoint.standins import StandIn
from repvgg.checks import brief

Content = Mapping[str, object]  # of a file

SAFETENSORS = b"{"  # the ninth byte of such a file
METADATA = "__metadata__"  # the key of its metadata
EXPANSION = 20  # times its size that a file may need in memory
SMALL = 2**24  # bytes that any may need
CHUNK = 2**20  # bytes that are compared with a checksum at a time
STORE = "store its weights alone: torch.save(model.state_dict(), FILE)"


def read(path: Path) -> dict[str, object]:
    """Read the content of a file of torch, safetensors or numpy (.npz), without running its code.

    Raises:
        ValueError: the file is missing, truncated or of another kind, or loading it could run code.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist; pass the path of a best.ckpt or last.ckpt")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder; pass a file in it, e.g. checkpoints/best.ckpt")
    if not path.is_file():
        raise ValueError(f"'{path}' is not a regular file; pass the path of a checkpoint")
    _require_content(path)
    if _is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return {**tensors, METADATA: file.metadata() or {}}
        except SafetensorError as error:
            raise ValueError(f"'{path}' cannot be read: {brief(error)}") from error
    _require_whole(path)
    content = _read_arrays(path) if _is_archive_of_arrays(path) else _read_torch(path)
    if isinstance(content, StandIn):
        raise ValueError(
            f"'{path}' holds a {brief(content.name)}, and loading that could run code from the "
            f"file; if you trust it, {STORE}"
        )
    if isinstance(content, list | tuple):
        content = {str(number): part for number, part in enumerate(content)}
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a checkpoint")
    return content


def _require_content(path: Path) -> None:
    """Raise ValueError if a file would need far more memory than it needs space."""
    status = path.stat()
    held = 512 * status.st_blocks
    if status.st_size > SMALL and 0 < held < status.st_size / EXPANSION:
        raise ValueError(f"'{path}' cannot be read: most of it is holes, without content")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    if size > max(SMALL, EXPANSION * status.st_size):
        raise ValueError(f"'{path}' cannot be read: it would expand to {size:,} bytes")


def _require_whole(path: Path) -> None:
    """Compare the content of an archive with its checksums, which torch writes and does not read.

    A checksum of 0 was not computed: see `torch.serialization.set_crc32_options`.

    Raises:
        ValueError: they differ.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.CRC:
                    with archive.open(member) as file:
                        while file.read(CHUNK):
                            pass
    except Exception as error:  # of many kinds, if the file is damaged
        raise ValueError(f"'{path}' is damaged: {brief(error)}") from error


def _read_torch(path: Path) -> object:
    """Read with torch's weights-only reader; if it rejects the file, again with stand-ins."""
    with path.open("rb") as file:
        for plain in (True, False):
            file.seek(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, on other programs' files
                    content: object = torch.load(
                        file,
                        map_location="cpu",
                        weights_only=plain,
                        pickle_module=None if plain else standins,
                    )
                    return content
            except standins.HostileError as error:
                raise ValueError(
                    f"'{path}' names {brief(error)}, which could run code and does not belong in a "
                    f"checkpoint, so it is not opened; if you trust it, {STORE}"
                ) from error
            except standins.DamagedError as error:
                raise ValueError(f"'{path}' cannot be read: {brief(error)}") from error
            except pickle.UnpicklingError as error:
                if not plain:
                    raise _unreadable(path, error) from error
            except Exception as error:  # of many kinds, if it is not a torch file
                raise _unreadable(path, error) from error
    raise AssertionError  # the second reader returns or raises


def _read_arrays(path: Path) -> dict[str, object]:
    """Read an archive of NumPy; arrays of objects become stand-ins."""
    content: dict[str, object] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                try:
                    content[key] = archive[key]
                except ValueError as error:
                    if "Object arrays" not in str(error):
                        raise
                    content[key] = StandIn("numpy.ndarray")
    except Exception as error:  # of many kinds, if the file is damaged
        raise ValueError(
            f"'{path}' cannot be read: its arrays are damaged ({brief(error)})"
        ) from error
    return content


def _is_archive_of_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _unreadable(path: Path, error: Exception) -> ValueError:
    head = _head(path)
    if not head:
        said = "it is empty"
    elif "pickle_module" in str(error):
        said = (
            "it holds more than plain tensors, and TORCH_FORCE_WEIGHTS_ONLY_LOAD is set: unset it, "
            f"or {STORE}"
        )
    elif "TorchScript" in str(error):
        said = "it is a TorchScript program; store its state_dict() instead"
    elif head.startswith(b"PK"):
        said = "it is a zip archive that is truncated, or that torch did not write"
    elif _is_text(path):
        said = "it is text, not a torch file"
    else:
        said = "it is truncated, or not a torch file"
    return ValueError(f"'{path}' cannot be read: {said}")


def _is_safetensors(path: Path) -> bool:
    return _head(path)[8:9] == SAFETENSORS


def _is_text(path: Path) -> bool:
    head = _head(path)
    return head.isascii() and head.decode("ascii", "replace").replace("\n", "").isprintable()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
