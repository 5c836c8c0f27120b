"""Images in shards by `scripts/write_shards.py`, on a disk or in an object store, as a source."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack, cast

import torch
from PIL import Image
from torch import Tensor

from repvgg.checks import ArgumentError
from repvgg.data.files import Files, Reading
from repvgg.data.images import open_image

CONTENTS = "contents.json"  # beside the shards: classes, labels of each part, images in a shard


class Contents(TypedDict):
    """What `scripts/write_shards.py` wrote beside its shards."""

    classes: list[str]
    labels: dict[str, list[int]]  # by part: train, val, test
    shard_size: int


class Shards(Files):
    """A source that reads its images from shards, fetched when they are needed.

    Read with litdata (the extra `shards`). The order of the shards is shuffled, then the images
    within a few shards at a time, so each shard is fetched once an epoch.

    Args:
        url: of the part's folder: a path, or s3://, gs://, ...
        labels: (N,), int64.
        shard_size: images in a shard.
        cache_size: disk space for fetched shards, as in "100GB".
        options: evaluate, num_workers, skip_unreadable, max_pixels, channels, of `Files`.
    """

    TOGETHER = 8  # shards whose images are mixed

    def __init__(
        self,
        url: str,
        labels: Tensor,
        *,
        shard_size: int,
        cache_size: str,
        **options: Unpack[Reading],
    ) -> None:
        super().__init__([], labels, **options)
        self.url = url
        self.shard_size = shard_size
        self.cache_size = cache_size
        self._shards: Any = None  # opened by the process that reads

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_shards": None}

    def open(self, row: int) -> Image.Image:
        if self._shards is None:
            self._shards = _litdata().StreamingDataset(self.url, max_cache_size=self.cache_size)
        content = io.BytesIO(self._shards[row]["image"])
        return open_image(content, self.channels, name=f"{self.url}, image {row}")

    def order(self, generator: torch.Generator) -> Tensor:
        shards = torch.split(torch.arange(len(self.labels)), self.shard_size)
        shuffled = torch.randperm(len(shards), generator=generator).tolist()
        windows = []
        for start in range(0, len(shuffled), self.TOGETHER):
            rows = torch.cat([shards[i] for i in shuffled[start : start + self.TOGETHER]])
            windows.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(windows)


def has_shards(root: str) -> bool:
    return "://" in root or (Path(root) / CONTENTS).is_file()


def read_contents(root: str) -> Contents:
    """Read the contents of a folder of shards.

    Raises:
        ValueError: they cannot be read.
    """
    import fsspec

    try:
        with fsspec.open(f"{root}/{CONTENTS}", "rt") as file:
            return cast(Contents, json.load(file))
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(
            f"root={root}: its {CONTENTS} cannot be read ({error}); pass a folder of shards that "
            "scripts/write_shards.py wrote",
            "root",
        ) from error


def write_shards(paths: Sequence[Path], labels: Tensor, folder: Path, *, shard_size: int) -> None:
    """Copy image files into shards, in order, unchanged."""
    _litdata().optimize(
        _read_bytes,
        list(zip(map(str, paths), labels.tolist(), strict=True)),
        output_dir=str(folder),
        chunk_size=shard_size,
        num_workers=1,  # several would write separate shards, in another order
        verbose=False,
    )


def _read_bytes(item: tuple[str, int]) -> dict[str, bytes | int]:
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}


def _litdata() -> ModuleType:
    try:
        import litdata
    except ImportError as error:
        raise ValueError("shards need litdata: pip install litdata") from error
    return cast(ModuleType, litdata)
