"""The work of `repvgg inspect`: print what a checkpoint holds and which command takes it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from repvgg import checkpoint, cli
from repvgg.checkpoint import recognize
from repvgg.checkpoint.layouts import holds_folded
from repvgg.checkpoint.standins import StandIn
from repvgg.checkpoint.tensors import read
from repvgg.checks import ArgumentError
from repvgg.contract import Description

LONGEST_LIST = 6


def inspect(path: Path, strides: Sequence[int] | None) -> None:
    """Print what a file holds.

    Raises:
        ValueError: no network in it would load.
    """
    content = read(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"holds {shorten([describe_entry(key, value) for key, value in content.items()])}")
    if checkpoint.is_ours(content):
        try:
            print_ours(path, strides)
        except ArgumentError as error:  # the code of a custom network is missing
            print(f"a checkpoint of ours: {error}")
        return
    found = recognize.find(content)
    for network in found:
        print_network(network, checkpoint.description(content), strides)
    places = [network.place for network in found] if len(found) > 1 else [None]
    errors = [try_to_load(path, place, strides) for place in places]
    if all(errors):
        raise ValueError(f"{errors[0]}")


def print_ours(path: Path, strides: Sequence[int] | None) -> None:
    opened = checkpoint.load(path, strides=strides)
    folded = holds_folded(opened.model.state_dict())
    data = opened.data
    print(f"a checkpoint of ours, {'folded' if folded else 'multi-branch'}: {opened.config}")
    print(f"{len(data.classes)} classes: {shorten([*data.classes])}")
    print(f"images of {data.image_size[0]} pixels, mean {data.mean}, std {data.std}")
    print(f"would load: {cli.command('deploy')} ckpt={shlex.quote(str(path))}")


def try_to_load(path: Path, weights: str | None, strides: Sequence[int] | None) -> str:
    """Open one network as the other commands do; print the command, or return the error."""
    keys = [] if weights is None else [f"weights={weights}"]
    keys += [] if strides is None else [f"strides={str([*strides]).replace(' ', '')}"]
    file, train = shlex.quote(str(path)), cli.command("train")
    try:
        opened = checkpoint.open_network(path, weights=weights, strides=strides)
        if opened.config["num_classes"] == 0:
            if keys:
                print(f"\nwould load: repvgg.checkpoint.open_network({str(path)!r}, ...) as passed")
            else:
                print(f"\nwould load: {train} init={file} ... (deploying needs a classifier)")
            return ""
        if opened.in_channels != 3 and opened.data is None:
            keys += [f"{key}=[{','.join(['0.5'] * opened.in_channels)}]" for key in ("mean", "std")]
        else:
            checkpoint.with_noise(opened, opened.data or checkpoint.imagenet(opened.config))
    except ValueError as error:
        return str(error)
    if keys:
        print(f"\nwould load: {cli.command('import')} path={file} {shlex.join(keys)}")
    else:
        print(f"\nwould load: {cli.command('deploy')} ckpt={file}, or {train} init={file} ...")
    return ""


def print_network(
    found: recognize.Found, described: Description | None, strides: Sequence[int] | None
) -> None:
    """Print what a network is and what does not fit."""
    tensors = found.weights.values()
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    print(f"\nat '{found.place}': {found.layout.name} layout, {found.form}")
    count = sum(tensor.numel() for tensor in tensors)
    print(f"  {len(tensors)} tensors, {count:,} numbers, {', '.join(sorted(dtypes))}")
    if found.outside:
        print(f"  beside it, not part of it: {shorten(found.outside)}")
    try:
        sizes = recognize.sizes(found)
        config = (
            {**sizes, **described.config} if described else recognize.plan(found, strides=strides)
        )
        _, misfit = recognize.build(found, config)
    except ValueError as error:
        print(f"  {error}")
        return
    print(
        f"  looks like {recognize.describe_variant(config)}, {recognize.describe_classes(config)}"
    )
    for kind, keys in zip(recognize.MISFITS, misfit, strict=True):
        if keys:
            print(f"  {kind}: {shorten(keys)}")
    if recognize.is_about_identities(misfit, found):
        print(f"  {recognize.OTHER_STRIDES}")
    if not any(misfit):
        shown = config.get("strides", [2, 2, 2, 2, 2])
        source = "from the file" if described else "assumed, because weights do not tell"
        print(f"  complete: nothing missing, nothing unknown; strides {shown}, {source}")


def describe_entry(key: object, value: object) -> str:
    """An entry of a file: its key and its shape, length or type."""
    if isinstance(value, StandIn):
        return f"{key} ({value.name}, not opened)"
    if isinstance(value, Tensor | np.ndarray):
        return f"{key} {tuple(value.shape)}"
    inside = f" of {len(value)}" if isinstance(value, Mapping | list | tuple) else ""
    return f"{key} ({type(value).__name__}{inside})"


def shorten(items: Sequence[str]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > LONGEST_LIST else ""
    return ", ".join(items[:LONGEST_LIST]) + more
