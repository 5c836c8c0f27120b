"""Which images a folder holds: train/, val/ and test/, each with one folder for each class.

A file counts as an image by its extension, see `data.images.extensions`. Hidden files and other
kinds of files are left out and counted. Links to folders are followed. A file that looks like an
image but cannot be read here is an error: nothing is dropped silently. torchvision's `find_classes`
does none of this; it would make a class of .git/.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from repvgg.checks import ArgumentError
from repvgg.data.images import extensions, looks_like_image, printable
from repvgg.data.split import Parts, complete, first_names

NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
Entries = list[os.DirEntry[str]]
CACHE = ".repvgg-cache"  # how the names of our own files begin, see `data.cache`
HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")  # and names with a leading dot


class Tally:
    """Counts what is found beside the images.

    Attributes:
        left_out: number of files and folders by their kind.
        links: to folders, which were followed.
        unreadable: files that look like images but cannot be read here.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.links = 0
        self.unreadable: list[Path] = []
        self._readable, self._foreign = extensions()
        self._no_images: set[str] = set()  # other extensions whose first file was opened

    def check(self, *, skip_unreadable: bool = False) -> None:
        """Check that all files that look like images can be read.

        Args:
            skip_unreadable: leaves them out, like others.

        Raises:
            ValueError: some cannot be read.
        """
        if self.unreadable and not skip_unreadable:
            raise ArgumentError(
                "root: files that look like images but cannot be read here: "
                f"{len(self.unreadable):,}, the first: {printable(self.unreadable[0])}; convert "
                "them to .jpg or .png, move them away, or pass skip_unreadable=true",
                "root",
                "skip_unreadable",
            )

    def lines(self) -> list[str]:
        """At most two lines for the reader."""
        kinds = self.left_out + Counter(_extension(path.name) for path in self.unreadable)
        lines = []
        if kinds:
            counted = (f"{count:,} {_plural(kind, count)}" for kind, count in sorted(kinds.items()))
            lines.append(f"left out: {', '.join(counted)}")
        if self.links:
            lines.append(f"followed: {self.links:,} {_plural('linked folder', self.links)}")
        return lines

    def is_image(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file can be read as an image; any other is counted."""
        extension = _extension(entry.name)
        known = extension in self._readable
        if not entry.is_file():
            if not entry.is_symlink() or not (known or extension in self._foreign):
                self.left_out["broken link" if entry.is_symlink() else "special file"] += 1
                return False
        elif known:
            return True
        elif extension not in self._foreign and (
            extension in self._no_images or not looks_like_image(Path(entry.path))
        ):
            self.left_out[extension] += 1
            if extension.startswith("."):
                self._no_images.add(extension)
            return False
        self.unreadable.append(Path(entry.path))
        return False


def read_parts(folder: Path, holdout: float, *, skip_unreadable: bool = False) -> Parts:
    """List the images of train/, val/ and test/; without train/ the folder holds the classes.

    Args:
        holdout: share of the training images that validates if val/ is missing.
        skip_unreadable: leaves out files that look like images but cannot be read here.

    Raises:
        ValueError: the folder is not as described, or holds images that cannot be read here.
    """
    tally = Tally()
    folders = find_parts(folder, tally)
    paths, labels, classes = find(folders["train"], tally=tally)
    files = {"train": (paths, labels)}
    origins = {"train": _place(folders["train"], folder)}
    for part in ("val", "test"):
        if part in folders:
            files[part] = find(folders[part], classes, tally=tally)[:2]
            origins[part] = _place(folders[part], folder)
    tally.check(skip_unreadable=skip_unreadable)
    return complete(Parts(files, classes, origins, tally.lines()), holdout)


def has_part(folder: Path, part: str) -> bool:
    """Whether a folder has a subfolder for "train", "val" or "test"."""
    names = NAMES[part]
    return folder.is_dir() and any(
        path.name.casefold() in names and path.is_dir() for path in folder.iterdir()
    )


def find_parts(folder: Path, tally: Tally) -> dict[str, Path]:
    """The folders of train, val and test; a folder of classes is itself "train".

    Raises:
        ValueError: it holds neither train/ nor classes, or two folders for one part.
    """
    where = f"root={folder}"
    check_name(folder)
    if not folder.is_dir():
        raise ArgumentError(f"{where}: there is no such folder", "root")
    inside = _folders(folder, Tally())
    found: dict[str, Path] = {}
    for part, names in NAMES.items():
        same = [path for path in inside if path.name.casefold() in names]
        if len(same) > 1:
            listed = " and ".join(f"{path.name}/" for path in same)
            raise ArgumentError(
                f"{where}: holds {listed}, which mean the same; keep one of them", "root"
            )
        if same:
            found[part] = same[0]
    if "train" in found:
        others = [path for path in inside if path not in found.values()]
        tally.left_out.update(f"folder {path.name}/" for path in others[:3])
        tally.left_out.update("other folder" for _ in others[3:])
        return found
    counts = {path: sum(map(Tally().is_image, _entries(path)[1])) for path in inside}
    if len(counts) > 1 and all(counts.values()) and not found:
        return {"train": folder}
    listed = ", ".join(
        f"{printable(path.name)}/ ({count:,} images)" for path, count in list(counts.items())[:5]
    )
    held = (
        f"found {listed}{', ...' if len(counts) > 5 else ''}" if counts else "it holds no folders"
    )
    nested = [path for path in inside if has_part(path, "train")]
    advice = f"pass root={nested[0]}" if nested else "give it one folder for each class"
    raise ArgumentError(f"{where}: there is no folder train/; {held}; {advice}", "root")


def find(
    folder: Path, classes: Sequence[str] | None = None, *, tally: Tally | None = None
) -> tuple[list[Path], Tensor, list[str]]:
    """List the images of a folder with one folder for each class.

    Args:
        classes: those of the training images; None takes the names of the folders.
        tally: counts what else is found. With None, files that look like images but cannot be read
            here are an error.

    Returns:
        paths in order, labels (N,), and the classes in the order of the labels, as Unicode's NFC.

    Raises:
        ValueError: the folder is missing, holds no images, fewer than two classes, an empty class,
            or one that `classes` lacks.
    """
    counted = tally or Tally()
    where = f"root: {printable(folder)}"
    if not folder.is_dir():
        raise ArgumentError(f"root: there is no folder {printable(folder)}", "root")
    named: dict[str, Path] = {}
    for path in _folders(folder, counted):
        check_name(path)
        name = unicodedata.normalize("NFC", path.name)
        if name in named:
            raise ArgumentError(
                f"{where} holds two folders named {name}, with composed and decomposed letters; "
                "put their images into one",
                "root",
            )
        named[name] = path
    names = sorted(named)
    if classes is None and len(names) < 2:
        held = f"one class alone, {names[0]}" if names else "no folders of classes"
        raise ArgumentError(f"{where} holds {held}; it needs one folder for each class", "root")
    if unknown := [name for name in names if classes is not None and name not in classes]:
        cases = {name.casefold(): name for name in classes or ()}
        meant = cases.get(unknown[0].casefold())
        advice = f"rename {unknown[0]} to {meant}, or " if meant else ""
        raise ArgumentError(
            f"{where} holds classes that the training images lack: {first_names(unknown)}; {advice}"
            "remove these folders, or add images of them to train/",
            "root",
        )
    classes = list(classes or names)
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        before, unreadable = counted.left_out.copy(), len(counted.unreadable)
        found = _walk(str(named[name]), (), counted)
        if not found:
            only = Tally()
            only.left_out = counted.left_out - before
            only.unreadable = counted.unreadable[unreadable:]
            beside = "".join(f" ({line})" for line in only.lines())
            raise ArgumentError(
                f"root: {printable(named[name])} holds no images that can be read here"
                f"{beside}; add some, or remove the folder",
                "root",
            )
        paths += found
        labels += [classes.index(name)] * len(found)
    if not paths:
        raise ArgumentError(
            f"{where} holds no images of the classes {first_names(classes)}", "root"
        )
    if tally is None:
        counted.check()
    return paths, torch.tensor(labels), classes


def check_name(path: Path | str) -> None:
    """Check that a name is UTF-8: others cannot be printed or written into a checkpoint.

    Raises:
        ValueError: it is not.
    """
    if printable(path) != str(path):
        raise ArgumentError(
            f"root: the name {printable(path)} is not UTF-8; rename the folder", "root"
        )


def _walk(folder: str, trail: tuple[str, ...], tally: Tally) -> list[Path]:
    """Images in a folder and below, in the order of their names.

    Args:
        trail: real paths of the folders above it: a link to one of them would never end.
    """
    real = os.path.realpath(folder)
    if any(f"{above}{os.sep}".startswith(f"{real}{os.sep}") for above in trail):
        tally.left_out["link to a folder above"] += 1
        return []
    tally.links += os.path.islink(folder)
    folders, files = _entries(Path(folder), tally)
    paths = []
    for entry in sorted(folders + files, key=lambda entry: entry.name):
        if entry.is_dir():
            paths += _walk(entry.path, (*trail, real), tally)
        elif tally.is_image(entry):
            paths.append(Path(entry.path))
    return paths


def _folders(folder: Path, tally: Tally) -> list[Path]:
    """Folders in a folder, sorted by name; its files are counted."""
    folders, files = _entries(folder, tally)
    tally.left_out.update({"image outside the folders": sum(map(tally.is_image, files))})
    tally.left_out = +tally.left_out
    return sorted(Path(entry.path) for entry in folders)


def _entries(folder: Path, tally: Tally | None = None) -> tuple[Entries, Entries]:
    """Folders and files that are not hidden."""
    tally = tally or Tally()
    folders: Entries = []
    files: Entries = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(CACHE):
                    continue
                is_folder = entry.is_dir()
                if entry.name.startswith(".") or entry.name.casefold() in HIDDEN:
                    tally.left_out["hidden folder" if is_folder else "hidden file"] += 1
                elif is_folder:
                    folders.append(entry)
                else:
                    files.append(entry)
    except OSError as error:
        raise ArgumentError(
            f"root: {printable(folder)} cannot be listed: {error.strerror}", "root"
        ) from error
    return folders, files


def _place(path: Path, root: Path) -> str:
    return f"{root.name}/" if path == root else f"{path.name}/"


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "file without extension"


def _plural(kind: str, count: int) -> str:
    countable = kind.endswith(("file", "folder", "link")) or kind.startswith("file ")
    if not countable or count == 1:
        return kind
    return kind.replace("file", "files", 1) if kind.startswith("file ") else f"{kind}s"
