"""Files of tensors, by torch or safetensors, opened without running what they say."""

import argparse
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

SAFETENSORS = b"{"  # ninth byte of a file of that format
METADATA = "__metadata__"  # where such a file says more


def read(path: Path) -> dict[str, Any]:
    """What a file of torch or safetensors holds; nothing that it says is run.

    Raises:
        ValueError: the file is missing, truncated, of another kind or needs code to load.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist; give the path of a best.ckpt or last.ckpt")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder; give the file in it, e.g. checkpoints/best.ckpt")
    if not path.is_file():
        raise ValueError(f"'{path}' is no file that could be read; give that of a checkpoint")
    if _is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return {**tensors, METADATA: file.metadata() or {}}
        except SafetensorError as error:
            raise ValueError(f"'{path}' cannot be read: {error}") from error
    try:
        with (
            warnings.catch_warnings(),
            # Plain data, in the training files of timm and others.
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")  # of torch's reader, on files that are not its own
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None and _is_text(path):
            raise _unreadable(path, error) from error
        if named is None:
            raise ValueError(
                f"'{path}' is no checkpoint of plain tensors: it is not a torch file, or loading "
                "it could run code of the file, which is refused"
            ) from error
        raise ValueError(
            f"'{path}' holds more than plain tensors, a {named[1]}, whose loading could run code "
            "of the file, which is refused; where it is trusted, store its weights alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch's reader fails in many ways on what is not a torch file
        raise _unreadable(path, error) from error
    if isinstance(content, list | tuple):
        content = {str(number): part for number, part in enumerate(content)}
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a checkpoint")
    return content


def _unreadable(path: Path, error: Exception) -> ValueError:
    head = _head(path)
    if not head:
        said = "it is empty"
    elif "TorchScript" in str(error):
        said = "it is a program of TorchScript; store the weights alone, of its state_dict()"
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
