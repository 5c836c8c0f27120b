"""Say what a checkpoint is: python scripts/inspect_checkpoint.py path=FILE

The doctor for files that will not load: what is in it, in which layout and form, which variant it
looks like, what would load, what is missing. Changes nothing. The status is 0 if it would load.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from repvgg import checkpoint, cli
from repvgg.checkpoint import recognize
from repvgg.checkpoint.standins import StandIn
from repvgg.checkpoint.tensors import read
from repvgg.checks import check_integers
from repvgg.contract import Description

DEFAULTS: dict[str, Any] = {"path": None, "strides": cli.Unset(list, "[2,2,2,2,2]")}
MOST = 6  # lines of a list


def main(settings: dict[str, Any]) -> None:
    if settings["path"] is None:
        raise ValueError("path is missing: type path=FILE")
    path = Path(settings["path"])
    strides = settings["strides"]
    if strides is not None:
        check_integers("strides", strides, length=5, example="[2,2,2,2,2]")
    content = read(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"holds {shorten([name(key, value) for key, value in content.items()])}")
    if checkpoint.is_ours(content):
        opened = checkpoint.load(path, strides=strides)
        form = "deployed" if recognize.holds_deployed(opened.model.state_dict()) else "training"
        seen = opened.data
        print(f"a checkpoint of ours, {form} form: {opened.config}")
        print(f"{len(seen.classes)} classes: {shorten([*seen.classes])}")
        print(f"images of {seen.image_size[0]} pixels, mean {seen.mean}, std {seen.std}")
        print(f"would load: python deploy.py ckpt={shlex.quote(str(path))}")
        return
    found = recognize.find(content)
    for one in found:
        examine(one, checkpoint.description(content), strides)
    places = [recognize.place(one) for one in found] if len(found) > 1 else [None]
    refused = [try_to_load(path, place, strides) for place in places]
    if all(refused):
        raise ValueError(f"{refused[0]}")


def try_to_load(path: Path, weights: str | None, strides: Sequence[int] | None) -> str:
    """Open one network of a file as the other programs do, and say how; or why it does not load."""
    keys = [] if weights is None else [f"weights={weights}"]
    keys += [] if strides is None else [f"strides={str([*strides]).replace(' ', '')}"]
    try:
        opened = checkpoint.open_network(path, weights=weights, strides=strides)
        channels = opened.config["in_channels"]
        if opened.config["num_classes"] == 0:
            file = shlex.quote(str(path))
            if keys:
                print(f"\nwould load: repvgg.checkpoint.open_network({str(path)!r}, ...) as typed")
            else:
                print(
                    f"\nwould load: python train.py init={file} ... (deploy.py needs a classifier)"
                )
            return ""
        if channels != 3 and opened.data is None:
            keys += [f"{key}=[{','.join(['0.5'] * channels)}]" for key in ("mean", "std")]
        else:
            checkpoint.with_noise(opened, opened.data or checkpoint.imagenet(opened.config))
    except ValueError as error:
        return str(error)
    file, keys = shlex.quote(str(path)), [shlex.quote(key) for key in keys]
    print()
    if keys:
        print(f"would load: python scripts/import_checkpoint.py path={file} {' '.join(keys)}")
    else:
        print(f"would load: python deploy.py ckpt={file}, or python train.py init={file} ...")
    return ""


def examine(
    found: recognize.Found, said: Description | None, strides: Sequence[int] | None
) -> None:
    """Tell what a network is and what does not fit."""
    tensors = found.weights.values()
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    print(f"\nat '{recognize.place(found)}': {found.layout.name} layout, {found.form} form")
    count = sum(tensor.numel() for tensor in tensors)
    print(f"  {len(tensors)} tensors, {count:,} numbers, {', '.join(sorted(kinds))}")
    if found.outside:
        print(f"  beside it, not its own: {shorten(found.outside)}")
    try:
        sizes = recognize.sizes(found)
        config = {**sizes, **said.config} if said else recognize.plan(found, strides=strides)
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
    if misfit.is_about_identities(found):
        print(f"  {recognize.OTHER_STRIDES}")
    if not any(misfit):
        shown = [*config.get("strides", (2, 2, 2, 2, 2))]
        whose = "as it says itself" if said else "which no weights tell"
        print(f"  complete, both ways; strides {shown}, {whose}")


def name(key: Any, value: Any) -> str:
    if isinstance(value, StandIn):
        return f"{key} ({value.name}, not opened)"
    if isinstance(value, Tensor | np.ndarray):
        return f"{key} {tuple(value.shape)}"
    inside = f" of {len(value)}" if isinstance(value, Mapping | list | tuple) else ""
    return f"{key} ({type(value).__name__}{inside})"


def shorten(items: list[str]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > MOST else ""
    return ", ".join(items[:MOST]) + more


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
