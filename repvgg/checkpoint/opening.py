"""Open any checkpoint, ours or not."""

from pathlib import Path
from typing import Unpack

from repvgg.checkpoint.foreign import Assumptions, imagenet, open_foreign, with_noise
from repvgg.checkpoint.native import Checkpoint, Network, is_ours, open_ours
from repvgg.checkpoint.tensors import read
from repvgg.checks import ArgumentError
from repvgg.models.libraries import Factory


def load(
    path: str | Path, *, network: Factory | None = None, **assumptions: Unpack[Assumptions]
) -> Checkpoint:
    """Open a checkpoint, ours or a RepVGG in any known layout, and rebuild its network.

    A third-party file gets ImageNet's data description (see `imagenet`), unless deploy.py wrote it.

    Args:
        path: of a file of torch, safetensors or numpy (.npz).
        network: the function or class that builds the network, if it is the user's own. The file
            records its name and arguments, but no file decides which code runs.
        assumptions: weights, bn_eps, strides; for third-party files alone. See `Assumptions`.

    Raises:
        ValueError: the file is missing or truncated, or loading it needs code; it holds no RepVGG,
            several, or one without a classifier; its weights do not fit; or `network` is missing or
            has no use. Errors of `network` pass through.
    """
    opened = _open(Path(path), network, assumptions)
    if isinstance(opened, Checkpoint):
        return opened
    try:
        return with_noise(opened, opened.data or imagenet(opened.config))
    except ValueError as error:
        raise _of_file(error, path) from error


def open_network(
    path: str | Path, *, network: Factory | None = None, **assumptions: Unpack[Assumptions]
) -> Network:
    """Open a checkpoint as `load` does, but assume no data description.

    A network without a classifier is opened too. It has num_classes=0 in its config and returns
    pooled features (N, C).

    Raises:
        ValueError: as `load`, apart from the classifier.
    """
    opened = _open(Path(path), network, assumptions)
    return Network(opened.model, opened.config, opened.data, opened.origin)


def _open(path: Path, network: Factory | None, assumptions: Assumptions) -> Checkpoint | Network:
    """Open a file, ours or not."""
    content = read(path)
    if not is_ours(content):
        if network is not None:
            raise ArgumentError(
                f"'{path}' is not a checkpoint of ours; only those have networks of your own, so "
                "leave network out",
                "network",
            )
        try:
            return open_foreign(content, **assumptions)
        except ValueError as error:
            raise _of_file(error, path) from error
    if keys := [key for key, value in assumptions.items() if value is not None]:
        raise ValueError(
            f"'{path}' is a checkpoint of ours, which records this: leave out {', '.join(keys)}"
        )
    return open_ours(content, path, network)


def _of_file(error: ValueError, path: str | Path) -> ValueError:
    message = f"'{path}': {error}"
    return (
        ArgumentError(message, *error.names)
        if isinstance(error, ArgumentError)
        else ValueError(message)
    )
