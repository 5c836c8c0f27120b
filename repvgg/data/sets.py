"""The data sets: what a run trains, validates and tests on, and the contract of its images.

Small ones live in memory as uint8 and are augmented by the batch; large ones are read from files by
worker processes.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from repvgg.checks import check_integer, check_number, refusal
from repvgg.contract import DataContract, to_float
from repvgg.data.augment import by_batch, by_image, random_affine
from repvgg.data.batches import Stored
from repvgg.data.files import Files, Shards, has_shards, read_contents, store
from repvgg.data.images import MOST_PIXELS, fit
from repvgg.data.module import ImageData
from repvgg.data.scan import check_name, has_part, hold_out, read_parts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_data(config: Mapping[str, Any], **options: Any) -> ImageData:
    """Open the data that a configuration names under `_target_`, with the arguments beside it.

    Args:
        options: further arguments, such as those of `ImageData`.

    Raises:
        ValueError: the function it names gives something else, or its own errors.
    """
    from hydra.utils import instantiate

    data = instantiate(config, **options)
    if not isinstance(data, ImageData):
        raise ValueError(
            f"data._target_={config['_target_']}: gives a {type(data).__name__}; must give "
            "a repvgg.data.module.ImageData, which says what the images are. Any other "
            "LightningDataModule trains with training.classifier.Classifier in your own Trainer"
        )
    return data


def digits(*, batch_size: int = 64, augment: float = 1.0, **options: Any) -> ImageData:
    """The 1,797 handwritten digits of the UCI set, 8x8 pixels, one channel; inside the package.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, CC BY 4.0,
    https://doi.org/10.24432/C50P49. Of every seven images in the file's order the first validates,
    the second tests and five train: 257, 257 and 1,283, the same for every seed. Each digit is 7 to
    13 % of each part.

    Args:
        batch_size: images in a batch.
        augment: strength of `random_affine` on the training images; 0 is off.
        options: mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range.
    """
    check_number("data.augment", augment, example=1.0)
    content = load_file(Path(__file__).with_name("digits.safetensors"))
    images = content["images"].float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = content["labels"].long()
    part = torch.arange(len(images)) % 7  # 7 and the period of the labels, 10, are coprime
    train, val, test = (
        Stored(images[rows], labels[rows]) for rows in (part > 1, part == 0, part == 1)
    )
    pixels = to_float(train.images)
    contract = DataContract(
        classes=[str(digit) for digit in range(10)],
        in_channels=1,
        image_size=(8, 8),
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
        interpolation="bilinear",
    )
    return ImageData(
        train,
        val,
        test,
        contract,
        batch_size=batch_size,
        augment=functools.partial(random_affine, strength=augment) if augment > 0 else None,
        **options,
    )


def cifar10(*, root: str, **options: Any) -> ImageData:
    """CIFAR-10: 60,000 photographs of 32x32 pixels in ten classes (A. Krizhevsky, 2009).

    See `cifar100` for the arguments.
    """
    return _cifar("CIFAR10", root, **options)


def cifar100(*, root: str, **options: Any) -> ImageData:
    """CIFAR-100: 60,000 photographs of 32x32 pixels in a hundred classes (A. Krizhevsky, 2009).

    Args:
        root: a folder with train/ and test/, one folder of images for each class in both, and val/
            too if there is one; or one with the files of the authors, which are downloaded there,
            and checked, if they are missing.
        options: augment, padding and erase, of `data.augment.by_batch`; holdout, the share of the
            training images, by class, that validates where there is no val/; num_workers, processes
            that decode a folder of images; batch_size, mixup, cutmix and seed, of
            `ImageData`.

    Raises:
        ValueError: a value is outside its range, or the data cannot be read.
        OSError: it cannot be downloaded.
    """
    return _cifar("CIFAR100", root, **options)


def imagefolder(
    *,
    root: str | None,
    image_size: int = 224,
    eval_size: int | None = None,
    resize_size: int | None = 256,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: str = "basic",
    erase: float = 0.0,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    max_pixels: int | None = None,
    in_memory: bool = False,
    holdout: float = 0.05,
    cache_size: str = "100GB",
    **options: Any,
) -> ImageData:
    """Any folder of images, ImageNet too: train/, val/ and test/, each with one folder a class.

    Without val/ (or valid/, validation/), some training images validate. Without test/, the
    validation images test. A folder of classes without train/ is training images. What is an image
    is decided by its extension; see `repvgg.data.scan`.

    Args:
        root: the folder; or one that `scripts/write_shards.py` made of it, also as s3://... or
            gs://...
        image_size: height and width in pixels that the network is trained on.
        eval_size: those in evaluation; None takes `image_size`.
        resize_size: length of the shorter side before the centre is cut out, in evaluation; None
            scales as little as covers the size.
        interpolation: "bilinear" or "bicubic".
        mean, std: by channel, of images in [0, 1].
        augment, erase: of the training images: see `repvgg.data.augment.by_image`.
        num_workers: processes that decode; None takes as many as there are processors, at most 8.
        skip_unreadable: take another image in the place of one that cannot be read, and leave out
            files of formats that cannot be read here.
        max_pixels: an image of more pixels is an error; None takes 178,956,970, Pillow's limit.
        in_memory: decode all images once, fitted to `image_size`: for small ones. They are varied
            by the batch, as in `repvgg.data.augment.by_batch`.
        holdout: share of the training images, by class, that validates where val/ is missing.
        cache_size: what shards that were fetched may take on the disk.
        options: batch_size, mixup, cutmix and seed, of `ImageData`.

    Raises:
        ValueError: a value is outside its range, or the folders are not as described.
    """
    check_integer("data.image_size", image_size, minimum=8, example=224)
    size = check_integer("data.eval_size", eval_size or image_size, minimum=8, example=224)
    if resize_size is not None:
        check_integer("data.resize_size", resize_size, minimum=size, example=256)
    if interpolation not in ("bilinear", "bicubic"):
        allowed = "must be bilinear or bicubic"
        raise refusal("data.interpolation", interpolation, allowed, "bilinear")
    for key, value in (("skip_unreadable", skip_unreadable), ("in_memory", in_memory)):
        if not isinstance(value, bool):
            raise refusal(f"data.{key}", value, "must be true or false", "true")
    if root is None:
        raise ValueError("data.root is missing: type data.root=FOLDER, with train/ and val/")
    root = root if "://" in root else str(Path(root).expanduser())
    check_name(root)
    if max_pixels is None:
        max_pixels = MOST_PIXELS
    check_integer("data.max_pixels", max_pixels, minimum=1, example=MOST_PIXELS)
    check_number("data.holdout", holdout, below=1, example=0.05)
    reading: dict[str, Any] = {
        "evaluate": functools.partial(
            fit, size=(size, size), interpolation=interpolation, resize=resize_size
        ),
        "num_workers": _count_workers(num_workers),
        "skip_unreadable": skip_unreadable,
        "max_pixels": max_pixels,
    }
    sources: dict[str, Any]
    in_shards = has_shards(root)
    if in_shards:
        sources, classes = _read_shards(root, cache_size, reading)
        said: dict[str, Any] = {"origins": {part: f"shards in {part}/" for part in sources}}
    else:
        parts = read_parts(Path(root), holdout, skip_unreadable=skip_unreadable)
        classes = parts.classes
        sources = {part: Files(*files, **reading) for part, files in parts.files.items()}
        said = {"origins": parts.origins, "notes": parts.notes}
    whole = (image_size, image_size)
    if in_memory:
        if in_shards or size != image_size:
            raise refusal("data.in_memory", True, "is for folders and one size of images", "false")
        sources = {
            part: store(
                files.paths,
                files.labels,
                whole,
                num_workers=reading["num_workers"],
                max_pixels=max_pixels,
            )
            for part, files in sources.items()
        }
        variation: Any = by_batch(augment, padding=image_size // 8, erase=erase, size=image_size)
    else:
        variation = by_image(augment, size=whole, interpolation=interpolation, erase=erase)
    contract = DataContract(
        classes=classes,
        in_channels=3,
        image_size=(size, size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        resize_size=None if in_memory else resize_size,
    )
    return ImageData(
        sources["train"],
        sources["val"],
        sources.get("test"),
        contract,
        augment=variation,
        **said,
        **options,
    )


def _read_shards(
    root: str, cache_size: str, reading: dict[str, Any]
) -> tuple[dict[str, Shards], list[str]]:
    contents = read_contents(root)
    shards = {
        part: Shards(
            f"{root}/{part}",
            torch.tensor(labels),
            shard_size=contents["shard_size"],
            cache_size=cache_size,
            **reading,
        )
        for part, labels in contents["labels"].items()
    }
    return shards, contents["classes"]


def _cifar(
    name: str,
    root: str,
    *,
    augment: str = "basic",
    padding: int = 4,
    erase: float = 0.0,
    holdout: float = 0.02,
    num_workers: int | None = None,
    **options: Any,
) -> ImageData:
    """CIFAR from the authors' files or from a folder of images; `cifar100` says the arguments."""
    check_integer("data.padding", padding, minimum=0, maximum=16, example=4)
    variation = by_batch(augment, padding=padding, erase=erase, size=32)
    folder = Path(root).expanduser()
    check_name(folder)
    sources: dict[str, Stored]
    if has_part(folder, "train"):
        parts = read_parts(folder, holdout)
        classes = parts.classes
        workers = _count_workers(num_workers)
        sources = {
            part: store(*files, (32, 32), num_workers=workers)
            for part, files in parts.files.items()
        }
        said: dict[str, Any] = {"origins": parts.origins, "notes": parts.notes}
    else:
        train, test, classes = _read_cifar(name, folder)
        kept, held = hold_out(train.labels, holdout)
        train, val = (Stored(train.images[rows], train.labels[rows]) for rows in (kept, held))
        sources = {"train": train, "val": val, "test": test}
        said = {"origins": {"val": "held out of the training images"}}
    pixels = to_float(sources["train"].images)
    contract = DataContract(
        classes=classes,
        in_channels=3,
        image_size=(32, 32),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
        interpolation="bilinear",
    )
    return ImageData(
        sources["train"],
        sources["val"],
        sources.get("test"),
        contract,
        augment=variation,
        **said,
        **options,
    )


def _read_cifar(name: str, folder: Path) -> tuple[Stored, Stored, list[str]]:
    """The authors' files, downloaded and checked by torchvision if they are missing."""
    from filelock import FileLock
    from torchvision import datasets

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock"):  # one process of several downloads
            parts = [
                getattr(datasets, name)(str(folder), train=train, download=True)
                for train in (True, False)
            ]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data.root={folder}: holds neither train/ and test/ nor the files of {name}, and they "
            f"cannot be downloaded ({error}); give a folder that has them"
        ) from error
    train, test = (
        Stored(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    )
    return train, test, list(parts[0].classes)


def _count_workers(given: int | None) -> int:
    if given is not None:
        return check_integer("data.num_workers", given, minimum=0, example=4)
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return min(8, count or 1)
