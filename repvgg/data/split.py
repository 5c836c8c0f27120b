"""The parts of a data set, and the fixed split that holds validation images out of the training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg.checks import ArgumentError, check_number, wrong_value


class Parts(NamedTuple):
    """The images of a data set in files.

    Attributes:
        files: paths and labels (N,) by part: train, val and, if there is one, test.
        classes: in the order of the labels.
        origins: where the images of each part come from, to be printed.
        notes: lines on what else was found, to be printed.
    """

    files: dict[str, tuple[list[Path], Tensor]]
    classes: list[str]
    origins: dict[str, str]
    notes: list[str]


def complete(parts: Parts, holdout: float) -> Parts:
    """Hold validation images out of the training images if there are none.

    The notes also name classes without images in a part, and those of a single image.

    Raises:
        ValueError: the share is not in (0, 1), or no class has two images.
    """
    files, origins, notes = dict(parts.files), dict(parts.origins), []
    for part in sorted(files.keys() - {"train"}, reverse=True):
        held = set(files[part][1].tolist())
        if lacking := [name for label, name in enumerate(parts.classes) if label not in held]:
            notes.append(f"without images in {origins[part]}: {first_names(lacking)}")
    if "val" not in files:
        paths, labels = files["train"]
        files["train"], files["val"] = (
            ([paths[row] for row in rows.tolist()], labels[rows])
            for rows in hold_out(labels, holdout)
        )
        origins["val"] = f"held out of {origins['train']}"
        notes += note_single(labels, parts.classes)
    return Parts(files, parts.classes, origins, notes + parts.notes)


def hold_out(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Split off a share of each class for validation: rows that train, rows that validate.

    The split does not depend on the seed. At least one image of each class trains. At least one
    validates if the class has two.

    Raises:
        ValueError: the share is not in (0, 1), or no class has two images.
    """
    check_number("holdout", share, below=1, example=0.05)
    if share == 0:
        raise wrong_value("holdout", share, "no image would be left to validate", 0.05)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    counts = [count for count in labels.bincount().tolist() if count]
    by_class = torch.split(order[labels[order].argsort(stable=True)], counts)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows in by_class:
        held[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not held.any():
        raise ArgumentError(
            "holdout: each class has only one image; add a folder val/, or other validation data",
            "holdout",
        )
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def note_single(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """A line on classes of one image."""
    counts = labels.bincount(minlength=len(classes)).tolist()
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if not single:
        return []
    return [f"trains on its one image, without validation: {first_names(single)}"]


def first_names(names: Sequence[str]) -> str:
    """At most three names, and how many there are."""
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
