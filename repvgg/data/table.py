"""Which images CSV files list: a path and the name of a class in each row."""

import csv
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from repvgg.checks import ArgumentError, did_you_mean
from repvgg.data.images import printable
from repvgg.data.scan import check_name
from repvgg.data.split import Parts, complete


class Row(NamedTuple):
    """An image, its class, and the line of the table."""

    path: Path
    label: str
    line: int


def read_tables(
    folder: Path,
    holdout: float,
    *,
    tables: Mapping[str, str],
    path_column: str = "path",
    label_column: str = "label",
    skip_unreadable: bool = False,
) -> Parts:
    """List the images of CSV files: UTF-8, with or without BOM, commas, a header.

    Classes are the labels of the training images, sorted; by value if all are whole numbers.

    Args:
        folder: where paths start, those of the tables too.
        tables: by part: train and, if they exist, val and test.
        skip_unreadable: leaves out images that are missing.

    Raises:
        ValueError: a table cannot be read, lacks a column or lists a missing file; or the others
            hold classes that the training images lack.
    """
    check_name(folder)
    if not folder.is_dir():
        raise ArgumentError(f"root={folder}: there is no such folder", "root")
    rows: dict[str, list[Row]] = {}
    notes: list[str] = []
    for part, table in tables.items():
        listed = _read(part, folder / table, folder, path_column, label_column)
        rows[part] = _existing(part, table, listed, notes, skip_unreadable=skip_unreadable)
    classes = _sorted({row.label for row in rows["train"]})
    if len(classes) < 2:
        raise ArgumentError(
            f"train={tables['train']}: lists one class alone, {classes[0]}; it needs two", "train"
        )
    numbers = {name: label for label, name in enumerate(classes)}
    for part, listed in rows.items():
        if unknown := [row for row in listed if row.label not in numbers]:
            row = unknown[0]
            raise ArgumentError(
                f"{part}={tables[part]}: line {row.line} has the class {row.label}, which the "
                f"training images lack; {did_you_mean(row.label, classes)}{len(unknown):,} of "
                f"{len(listed):,} rows are like that",
                part,
            )
    files = {
        part: (
            [row.path for row in listed],
            torch.tensor([numbers[row.label] for row in listed]),
        )
        for part, listed in rows.items()
    }
    notes += _shared({tables[part]: files[part][0] for part in files})
    return complete(Parts(files, classes, dict(tables), notes), holdout)


def _read(part: str, table: Path, folder: Path, path_column: str, label_column: str) -> list[Row]:
    """The rows of a table; empty lines are left out."""
    where = f"{part}={printable(table)}"
    rows: list[Row] = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            header: list[str] | None = None
            columns = 0, 0
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    columns = (
                        _column(where, header, "path_column", path_column),
                        _column(where, header, "label_column", label_column),
                    )
                    continue
                path, label = (
                    cells[column].strip() if column < len(cells) else "" for column in columns
                )
                if not path or not label:
                    lacking = label_column if path else path_column
                    raise ArgumentError(
                        f"{where}: line {reader.line_num} has no {lacking}: "
                        f"{printable(','.join(cells))[:80]}",
                        part,
                    )
                name = unicodedata.normalize("NFC", label)
                rows.append(Row(folder / path, name, reader.line_num))
    except OSError as error:
        raise ArgumentError(f"{where}: cannot be read: {error.strerror}", part) from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{where}: is not in UTF-8 ({error.reason}); convert it", part
        ) from error
    except csv.Error as error:
        raise ArgumentError(f"{where}: line {reader.line_num}: {error}", part) from error
    if not rows:
        raise ArgumentError(f"{where}: lists no images", part)
    return rows


def _column(where: str, header: Sequence[str], key: str, name: str) -> int:
    """The place of a column."""
    if name not in header:
        shown = printable(", ".join(header))[:80]
        hint = did_you_mean(name, header)
        raise ArgumentError(
            f"{key}={name}: {where} has no such column; {hint}its first line, the header, is "
            f"{shown}, separated by commas",
            key,
        )
    return header.index(name)


def _existing(
    part: str, table: str, rows: list[Row], notes: list[str], *, skip_unreadable: bool
) -> list[Row]:
    """The rows whose file exists."""
    found = [row for row in rows if row.path.is_file()]
    if len(found) < len(rows):
        missing = next(row for row in rows if not row.path.is_file())
        what = f"{len(rows) - len(found):,} of {len(rows):,} images are missing"
        if not skip_unreadable or not found:
            raise ArgumentError(
                f"{part}={table}: {what}, the first: {printable(missing.path)} (line "
                f"{missing.line}); paths start at root",
                part,
            )
        notes.append(f"left out of {table}: {what}")
    if twice := len(found) - len({row.path for row in found}):
        notes.append(f"listed more than once in {table}: {twice:,} {_rows(twice)}, which are kept")
    return found


def _shared(paths: Mapping[str, Sequence[Path]]) -> list[str]:
    """Lines on images that train and are also evaluated."""
    train, *others = paths
    known = set(paths[train])
    counts = {table: len(known.intersection(paths[table])) for table in others}
    return [
        f"in {train} and in {table} too: {count:,} {_rows(count)}"
        for table, count in counts.items()
        if count
    ]


def _sorted(names: set[str]) -> list[str]:
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names)


def _rows(count: int) -> str:
    return "image" if count == 1 else "images"
