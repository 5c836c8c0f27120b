"""Evaluate a network from any file on all images of a part of a data set."""

import csv
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repvgg import cli, metrics, terminal
from repvgg import data as data_sets
from repvgg.checks import check_integer, escape
from repvgg.cli import Config
from repvgg.contract import to_float
from repvgg.data.batches import Batch, Batches, Source
from repvgg.deploy.evaluate_settings import PREDICTIONS, EvaluateSettings, check_replaceable
from repvgg.deploy.evaluation import Evaluation, write
from repvgg.deploy.folder import digest, new_folder
from repvgg.deploy.matching import Match, check_images, fit_preprocessing, is_ours, match_classes
from repvgg.deploy.measure import environment
from repvgg.deploy.opening import Opened, open_any
from repvgg.deploy.tables import cells, header, most_likely, open_text

if TYPE_CHECKING:
    from _csv import Writer  # csv has no public name for it

    from repvgg.data.module import ImageData

MOST_PREDICTED = 5  # classes in a row of the predictions
Say = Callable[[str], object]
See = Callable[[Tensor, Tensor], None]  # gets the logits and the outputs of a batch


def run(settings: EvaluateSettings, say: Say) -> None:
    """Evaluate, and write the results into a folder that appears when all is done.

    Args:
        say: gets the lines for the reader.

    Raises:
        ValueError: the file, the data or the folder is wrong.
    """
    opened = open_any(
        settings.ckpt, "ckpt", settings.device, network=settings.network, trust=settings.trust
    )
    config = fit_preprocessing(settings.data, opened.data, settings.passed)
    data, batch_size = open_data(config, settings.batch_size)
    try:
        notes = check_images(data.contract, opened.data, config, settings.passed)
        match = match_classes(data.contract.classes, opened.data.classes, assumed=opened.assumed)
        sources = choose(data, settings.split)
        notes += [*match.notes, *about_split(data, settings.split), *data.notes]
        images = sum(len(source.labels) for source in sources)
        if settings.predictions:
            check_rows(sources)
        with ExitStack() as stack:
            folder = stack.enter_context(
                new_folder(settings.out, overwrite=settings.overwrite, check=check_replaceable)
            )
            say(f"model     {escape(settings.ckpt)} ({escape(opened.title)}), on {opened.device}")
            name = config.get("name") or str(config["_target_"]).rpartition(".")[2]
            say(f"data      {name}, {settings.split}: {images:,} images")
            for note in notes:
                say(escape(note))
            see: list[See] = []
            if settings.predictions:
                file = stack.enter_context(open_text(folder / PREDICTIONS))
                see = [recorder(csv.writer(file, lineterminator="\n"), sources, match.classes)]
            loaders = [Batches(source, batch_size=batch_size) for source in sources]
            start = time.perf_counter()
            evaluation = evaluate(opened, loaders, match, see)
            seconds = time.perf_counter() - start
            about = {
                "checkpoint": str(settings.ckpt),
                "sha256": digest(settings.ckpt),
                "model": opened.title,
                "device": opened.device,
                "data": config,
                "split": settings.split,
                "notes": notes,
                "environment": environment(),
                "command": cli.command_line(),
            }
            lacking = [*write(evaluation, folder, about), *about_unreadable(sources)]
    finally:
        data.teardown("test")
    for line in [*evaluation.summary(), *lacking]:
        say(line)
    say(f"time      {seconds:.2f} s, {images / seconds:,.0f} images/s")
    say(f"written to {shlex.quote(os.path.relpath(settings.out))}")


def open_data(config: Config, batch_size: int | None) -> tuple["ImageData", int]:
    """Open a data set; its batch size, or the given one.

    A batch may be larger than the training images here, if the data set is ours.
    """
    if "batch_size" not in config or not is_ours(config):
        data = data_sets.open_data(config)
        return data, batch_size or data.batch_size
    own = check_integer("data.batch_size", config["batch_size"], minimum=1, example=64)
    return data_sets.open_data({**config, "batch_size": 1}), batch_size or own


def choose(data: "ImageData", split: str) -> list[Source]:
    """The sources of a split; "all" has every image once.

    Raises:
        ValueError: it holds no images.
    """
    tested = [data.test] if data.has_test else []
    parts = {"train": [data.train], "val": [data.val], "test": [data.test]}
    parts["all"] = [data.train, data.val, *tested]
    chosen = [source for source in parts[split] if len(source.labels)]
    if not chosen:
        raise ValueError(f"split={split}: the data has no images there")
    return chosen


def about_split(data: "ImageData", split: str) -> list[str]:
    """Lines on where the images come from."""
    if split == "test" and not data.has_test:
        return ["no test images: these are the validation images, which chose the checkpoint"]
    return [f"images    {data.origins[split]}"] if split in data.origins else []


def about_unreadable(sources: Sequence[Source]) -> list[str]:
    """A line on images that could not be read, where the data skips them."""
    skipped = sum(len(getattr(source, "unreadable", ())) for source in sources)
    return [f"unreadable images, each replaced by another: {skipped:,}"] if skipped else []


def evaluate(
    opened: Opened, loaders: Sequence[Batches], match: Match, see: Sequence[See]
) -> Evaluation:
    """Run a network on every image, in batches; a bar on a terminal.

    Args:
        see: get every batch.

    Raises:
        ValueError: logits are NaN or infinite.
    """
    count = len(match.classes)
    scores, table = metrics.classification(count), metrics.confusion(count)
    measured = metrics.named(scores)
    batches: Iterator[Batch] = chain.from_iterable(loaders)
    total = sum(map(len, loaders))
    with torch.inference_mode(), terminal.bar("evaluating", total, sys.stderr) as advance:
        for images, labels in batches:
            logits, outputs = opened.predict(to_float(images)).float(), match.outputs[labels]
            if not logits.isfinite().all():
                raise ValueError("ckpt: its logits are NaN or infinite on these images")
            metrics.update(measured, logits, outputs)
            table.update(logits, outputs)
            for callback in see:
                callback(logits, outputs)
            advance(1)
        return Evaluation(
            {name: metric.compute().item() for name, metric in measured.items()},
            table.compute(),
            match.classes,
            match.outputs.tolist(),
        )


def recorder(rows: "Writer", sources: Sequence[Source], classes: Sequence[str]) -> See:
    """Writes a row for each image: its path or number, its class, the most likely classes."""
    rows.writerow(header(["image", "label"], min(MOST_PREDICTED, len(classes))))
    images = chain.from_iterable(
        getattr(source, "paths", ()) or range(len(source.labels)) for source in sources
    )

    def record(logits: Tensor, outputs: Tensor) -> None:
        found = most_likely(logits.softmax(1), classes, MOST_PREDICTED)
        for row, output in zip(found, outputs.tolist(), strict=True):
            rows.writerow([next(images), classes[output], *cells(row)])

    return record


def check_rows(sources: Sequence[Source]) -> None:
    """Check that the image that is read for a row is that of the row.

    Raises:
        ValueError: another one may take its place.
    """
    if any(getattr(source, "skip_unreadable", False) for source in sources):
        raise ValueError(
            "predictions=true: with data.skip_unreadable=true another image takes the place of an "
            "unreadable one; pass data.skip_unreadable=false"
        )
