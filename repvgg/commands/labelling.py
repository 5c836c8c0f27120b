"""The work of `repvgg predict`: label images, and print or write the classes."""

import sys
from pathlib import Path

from repvgg import terminal
from repvgg.checks import escape
from repvgg.deploy.opening import open_any
from repvgg.deploy.predict import Labelled, check_out, find, label, write


def run(
    model: Path,
    images: str,
    *,
    network: str | None,
    trust: bool,
    top: int,
    batch_size: int,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Label images. Those that cannot be labelled are reported; the others are labelled.

    Args:
        network: the dotted name of what builds the network, if it is the user's own.
        trust: as in `repvgg.export.open_artifact`.

    Raises:
        ValueError: there is no image, the model cannot be opened, `out` cannot be written, or, at
            the end, images could not be labelled.
    """
    if out is not None:
        check_out(out, overwrite=overwrite)
    paths = find(images)
    opened = open_any(model, "model", network=network, trust=trust)
    found: list[Labelled] = []
    unreadable = 0
    # Lines and a bar on one terminal would overwrite each other.
    hidden = out is None and sys.stdout.isatty()
    with terminal.bar("labelling", len(paths), sys.stderr, hidden=hidden) as advance:
        for image in label(paths, opened, top=top, batch_size=batch_size):
            advance(1)
            if image.error:
                unreadable += 1
                print(escape(image.error), file=sys.stderr)
            elif out is None:
                print(line(image))
            else:
                found.append(image)
    if out is not None:
        write(found, out)
        print(f"written to {out}: {len(found):,} images")
    if unreadable:
        raise ValueError(f"{unreadable:,} of {len(paths):,} images could not be labelled")


def line(image: Labelled) -> str:
    """An image in one line: its path, then each class and its probability, between tabs."""
    classes = (f"{escape(name)}\t{share:.4f}" for name, share in image.predictions)
    return "\t".join([escape(image.path), *classes])
