"""Say what a checkpoint is: python scripts/inspect_checkpoint.py path=FILE

The doctor for files that will not load: what is in it, in which layout and form, which variant it
looks like, what would load, what is missing. Changes nothing. The status is 0 if it would load.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from repvgg import checkpoint, cli, layouts
from repvgg.arguments import check_integers

DEFAULTS: dict[str, Any] = {"path": None, "strides": [2, 2, 2, 2, 2]}
MOST = 6  # lines of a list


def main(settings: dict[str, Any]) -> None:
    if settings["path"] is None:
        raise ValueError("path is missing: type path=FILE")
    path = Path(settings["path"])
    strides = check_integers("strides", settings["strides"], length=5, example="[2,2,2,2,2]")
    content = checkpoint.read(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"holds {shorten([name(key, value) for key, value in content.items()])}")
    if checkpoint.KEY in content:
        opened = checkpoint.load(path)
        form = "deployed" if layouts.is_deployed(opened.model.state_dict()) else "training"
        seen = opened.data
        print(f"a checkpoint of ours, {form} form: {opened.config}")
        print(f"{len(seen.classes)} classes: {shorten([*seen.classes])}")
        print(f"images of {seen.image_size[0]} pixels, mean {seen.mean}, std {seen.std}")
        print(f"would load: python deploy.py ckpt={path}")
        return
    strides = checkpoint.description(content).get("model", {}).get("strides", strides)
    found = layouts.find(content)
    whole = [one for one in found if examine(one, strides)]
    if not found:
        layouts.choose(content)  # says why
    if not whole:
        sys.exit(1)
    if len(found) > 1:
        print(f"several: type weights={layouts.place(whole[0])} for scripts/import_checkpoint.py")
        return
    print(f"would load: python deploy.py ckpt={path}, or python train.py init={path}")


def examine(found: layouts.Found, strides: Sequence[int]) -> bool:
    """Tell what a network is and what does not fit; whether it would load."""
    tensors = found.weights.values()
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    print(f"\nat '{layouts.place(found)}': {found.layout.name} layout, {found.form} form")
    count = sum(tensor.numel() for tensor in tensors)
    print(f"  {len(tensors)} tensors, {count:,} numbers, {', '.join(sorted(kinds))}")
    bad = [key for key, tensor in found.weights.items() if not tensor.isfinite().all()]
    if bad:
        print(f"  not finite: {shorten(bad)}")
    if found.outside:
        print(f"  beside it, not its own: {shorten(found.outside)}")
    try:
        config = layouts.plan(found, strides=strides)
    except ValueError as error:
        print(f"  {error}")
        return False
    print(f"  looks like {layouts.describe_variant(config)}, {config['num_classes']} classes")
    _, misfit = layouts.build(found, config)
    for kind, keys in zip(("missing", "unknown", "other shape"), misfit, strict=True):
        if keys:
            print(f"  {kind}: {shorten(keys)}")
    if misfit.is_about_identities(found):
        print(f"  {layouts.OTHER_STRIDES}")
    if any(misfit):
        return False
    print(f"  complete, both ways; what no weights tell: strides {[*strides]}, bn_eps 1e-5")
    return True


def name(key: Any, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{key} {tuple(value.shape)}"
    inside = f" of {len(value)}" if isinstance(value, Mapping | list) else ""
    return f"{key} ({type(value).__name__}{inside})"


def shorten(items: list[str]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > MOST else ""
    return ", ".join(items[:MOST]) + more


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
