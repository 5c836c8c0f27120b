"""Images in files as a source, decoded by worker processes while one trains.

Either a folder, `root/train/<class>/...` and `root/val/` or `root/test/` likewise, the layout of
ImageNet; or shards that `scripts/write_shards.py` made of one, which can lie in an object store.
"""

import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repvgg.batches import Request, Stored, same_seed
from repvgg.images import fit, open_image, to_tensor

Fit = Callable[[Image.Image], Image.Image]
Transform = Callable[[Image.Image], Tensor]


class Files:
    """A source whose images are read from files when they are asked for.

    Args:
        paths: of the images.
        labels: (N,), int64.
        evaluate: an image as it was decoded -> as it is evaluated, all of one size.
        num_workers: processes that decode; 0 decodes in this one.
        skip_unreadable: takes the next readable image in the place of one that cannot be read.

    Attributes:
        unreadable: files that could not be read so far, of all that were asked for.

    Raises, while it is read:
        ValueError: an image cannot be read; the message names it.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        labels: Tensor,
        *,
        evaluate: Fit,
        num_workers: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        self.paths = [str(path) for path in paths]  # lighter to hand to a process than Path
        self.labels = labels
        self.evaluate = evaluate
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.unreadable: set[str] = set()

    def open(self, row: int) -> Image.Image:
        """Decode one image.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        return open_image(Path(self.paths[row]))

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def read(
        self, requests: Sequence[Request], augment: Transform | None
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        plan = [
            [(row, [same_seed((seed, i)) for seed in seeds]) for i, row in enumerate(rows.tolist())]
            for rows, seeds in requests
        ]
        loader: DataLoader = DataLoader(
            _Images(self, augment),
            batch_sampler=plan,
            num_workers=min(self.num_workers, len(plan)),
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quieten,
        )
        for views, labels, failures in loader:
            for message in failures:
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{message}; mend or delete it, or type data.skip_unreadable=true to take "
                        "another image in its place"
                    )
                self.unreadable.add(message)
            yield views, labels


class Shards(Files):
    """The same, from shards on a disk or in an object store, which are fetched as they are needed.

    Read with litdata (the extra `shards`). Shards are shuffled, and images within a few of them at
    a time, so that each shard is fetched once an epoch.

    Args:
        url: of the part's folder: a path, or s3://, gs://, ...
        labels: (N,), int64.
        shard_size: images in a shard.
        cache_size: what fetched shards may take on the disk, as in "100GB".
        options: evaluate, num_workers, skip_unreadable, of `Files`.
    """

    TOGETHER = 8  # shards whose images are mixed

    def __init__(
        self, url: str, labels: Tensor, *, shard_size: int, cache_size: str, **options: Any
    ) -> None:
        super().__init__([], labels, **options)
        self.url = url
        self.shard_size = shard_size
        self.cache_size = cache_size
        self._shards: Any = None  # opened by the process that reads

    def open(self, row: int) -> Image.Image:
        if self._shards is None:
            self._shards = _litdata().StreamingDataset(self.url, max_cache_size=self.cache_size)
        return open_image(io.BytesIO(self._shards[row]["image"]), name=f"{self.url}, image {row}")

    def order(self, generator: torch.Generator) -> Tensor:
        shards = torch.arange(len(self.labels)).split(self.shard_size)
        shuffled = torch.randperm(len(shards), generator=generator).tolist()
        windows = []
        for start in range(0, len(shuffled), self.TOGETHER):
            rows = torch.cat([shards[i] for i in shuffled[start : start + self.TOGETHER]])
            windows.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(windows)


class _Images(Dataset):
    """What a worker does: (row, seeds) -> views (C, H, W) each, label, failures."""

    def __init__(self, files: Files, augment: Transform | None) -> None:
        self.files = files
        self.augment = augment

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[list[Tensor], int, list[str]]:
        row, seeds = item
        failures: list[str] = []
        count = len(self.files.labels)
        for chosen in ((row + shift) % count for shift in range(count)):
            try:
                image = self.files.open(chosen)
            except ValueError as error:  # raised here, it would be a stack trace of a worker
                failures.append(" ".join(str(error).split()))
                if not self.files.skip_unreadable:
                    return [], 0, failures
                continue
            return self._views(image, seeds), int(self.files.labels[chosen]), failures
        return [], 0, failures

    def _views(self, image: Image.Image, seeds: list[int]) -> list[Tensor]:
        if self.augment is None or not seeds:
            return [to_tensor(self.files.evaluate(image))]
        views = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                views.append(self.augment(image))
        return views


def _collate(
    items: list[tuple[list[Tensor], int, list[str]]],
) -> tuple[list[Tensor], Tensor, list[str]]:
    failures = [message for *_, messages in items for message in messages]
    if not all(views for views, *_ in items):
        return [], torch.empty(0), failures
    views = [torch.stack(same) for same in zip(*(views for views, *_ in items), strict=True)]
    return views, torch.tensor([label for _, label, _ in items]), failures


def _quieten(worker: int) -> None:
    """Ctrl-C reaches every process; the main one finishes its step and ends the others."""
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


CONTENTS = "contents.json"  # beside the shards: classes, labels of each part, images in a shard


def has_shards(root: str) -> bool:
    return "://" in root or (Path(root) / CONTENTS).is_file()


def read_contents(root: str) -> dict[str, Any]:
    """What `scripts/write_shards.py` wrote beside its shards.

    Raises:
        ValueError: it cannot be read.
    """
    import fsspec

    try:
        with fsspec.open(f"{root}/{CONTENTS}", "rt") as file:
            return json.load(file)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"data.root={root}: its {CONTENTS} cannot be read ({error}); give a folder of shards "
            "that scripts/write_shards.py wrote"
        ) from error


def write_shards(paths: Sequence[Path], labels: Tensor, folder: Path, *, shard_size: int) -> None:
    """Copy image files into shards, in order, unchanged."""
    _litdata().optimize(
        _read_bytes,
        list(zip(map(str, paths), labels.tolist(), strict=True)),
        output_dir=str(folder),
        chunk_size=shard_size,
        num_workers=1,  # more would each write shards of their own, in another order
        verbose=False,
    )


def _read_bytes(item: tuple[str, int]) -> dict[str, Any]:
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise ValueError('shards need litdata: type pip install -e ".[shards]"') from error
    return litdata


def find(
    folder: Path, classes: Sequence[str] | None = None
) -> tuple[list[Path], Tensor, list[str]]:
    """List the images of a folder with one folder a class.

    Args:
        classes: those of the training images; None takes the folders that are there.

    Returns:
        paths in order, labels (N,), and the classes in the order of the labels.

    Raises:
        ValueError: the folder is missing, holds no images, fewer than two classes, an empty class,
            or one that `classes` lacks.
    """
    if not folder.is_dir():
        raise ValueError(f"data.root: there is no folder {folder}")
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if classes is None and len(names) < 2:
        held = f"one class alone, {names[0]}" if names else "no folders of classes"
        raise ValueError(f"data.root: {folder} holds {held}; it needs one folder for each class")
    if unknown := [name for name in names if classes is not None and name not in classes]:
        listed = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"data.root: {folder} holds classes that the training images lack: {listed}; remove "
            "these folders, or add images of them to train/"
        )
    classes = list(classes or names)
    known = Image.registered_extensions()
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in known)
        if not found:
            raise ValueError(
                f"data.root: {folder / name} holds no images; known are .jpg, .png ..."
            )
        paths += found
        labels += [classes.index(name)] * len(found)
    if not paths:
        raise ValueError(f"data.root: {folder} holds no images of the classes {', '.join(classes)}")
    return paths, torch.tensor(labels), classes


def store(
    paths: Sequence[Path | str], labels: Tensor, size: tuple[int, int], *, num_workers: int = 0
) -> Stored:
    """Decode all images into memory, fitted to one size.

    Raises:
        ValueError: images cannot be read; the message counts them and names the first.
    """
    files = Files(
        paths,
        labels,
        evaluate=functools.partial(fit, size=size),
        num_workers=num_workers,
        skip_unreadable=True,
    )
    rows = torch.arange(len(labels)).split(256)
    read = files.read([Request(part, []) for part in rows], None)
    parts = [views[0] for views, _ in read if views]
    if files.unreadable:
        raise ValueError(
            f"{len(files.unreadable)} of {len(paths)} images cannot be read, the first: "
            f"{min(files.unreadable)}; mend or delete them"
        )
    return Stored(torch.cat(parts), labels)
