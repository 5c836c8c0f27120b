"""Decoded images on disk: used while nothing changed, and never half written."""

import os
import shutil
import stat

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from repvgg.data import cache, memory
from repvgg.data.folders import imagefolder
from repvgg.data.sets import cifar10
from tests.support.commands import make
from tests.support.processes import Process

NAME = ".repvgg-cache-16x16x3.safetensors"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small data sets are kept too, and the user's cache folder is a new one."""
    monkeypatch.setattr(memory, "LEAST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "data" / "train")
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The number of images of each decode."""
    counts: list[int] = []
    store = memory.store

    def count(paths, *arguments, **options):
        counts.append(len(paths))
        return store(paths, *arguments, **options)

    monkeypatch.setattr(memory, "store", count)
    return counts


def opened(root, **options):
    return imagefolder(
        **{
            **{"root": str(root), "batch_size": 2, "num_workers": 0, "image_size": 16},
            **{"resize_size": 16, "in_memory": True, "holdout": 0.2},
            **options,
        }
    )


def test_the_second_start_decodes_nothing_and_has_the_same_images(root, decoded):
    first, second = opened(root), opened(root)

    assert decoded == [10, 2]
    for part in ("train", "val"):
        assert all(map(torch.equal, getattr(first, part), getattr(second, part)))
    assert [note for note in first.notes if str(root / NAME) in note]
    assert second.notes == []


def test_the_statistics_of_cifar_are_the_same_to_the_last_bit(root, decoded):
    make(root / "test")

    first, second, without = (
        cifar10(root=str(root), batch_size=2, num_workers=0, cache=kept)
        for kept in (True, True, False)
    )

    assert first.contract == second.contract == without.contract
    assert len(decoded) == 6


def touch(root) -> None:
    path = root / "train" / "cat" / "0.jpg"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def same_time(root) -> None:
    path = root / "train" / "cat" / "0.jpg"
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        touch,
        same_time,
        lambda root: (root / "train" / "cat" / "0.jpg").unlink(),
        lambda root: shutil.copy(root / "train/cat/0.jpg", root / "train/cat/9.jpg"),
        lambda root: (root / "train/cat/0.jpg").rename(root / "train/dog/9.jpg"),
        lambda root: (root / "train" / "cat").rename(root / "train" / "cow"),
        lambda root: (root / NAME).write_bytes((root / NAME).read_bytes()[:-100]),
        lambda root: (root / NAME).write_bytes(b"foreign"),
        lambda root: save_file({"train": torch.zeros(1)}, root / NAME),
    ],
    ids=["time", "size", "deleted", "added", "moved", "class", "cut", "foreign", "other"],
)
def test_a_change_is_noticed_and_the_file_written_anew(change, root, decoded):
    opened(root)
    change(root)
    decoded.clear()

    changed, again = opened(root), opened(root)

    assert len(decoded) == 2
    assert torch.equal(changed.train.images, again.train.images)


def test_classes_whose_folders_exchange_their_names_decode_again(tmp_path):
    for value, name in ((0, "cat"), (200, "dog")):
        (tmp_path / name).mkdir()
        for number in range(6):  # files of one size and one time
            path = tmp_path / name / f"{number}.bmp"
            Image.new("RGB", (16, 16), (value,) * 3).save(path)
            os.utime(path, (1e9, 1e9))
    before = opened(tmp_path).train

    for old, new in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
        (tmp_path / old).rename(tmp_path / new)
    after = opened(tmp_path).train

    assert set(before.images[before.labels == 0].unique().tolist()) == {0}
    assert set(after.images[after.labels == 0].unique().tolist()) == {200}


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 24, "resize_size": 24},
        {"in_channels": 1},
        {"interpolation": "bicubic"},
        {"holdout": 0.5},
    ],
)
def test_another_setting_decodes_again(options, root, decoded):
    opened(root)
    decoded.clear()

    images = opened(root, **options).train.images

    assert len(decoded) == 2
    assert torch.equal(images, opened(root, **options, cache=False).train.images)


def test_a_new_decoder_decodes_again(root, decoded, monkeypatch):
    opened(root)
    decoded.clear()
    monkeypatch.setattr(cache.PIL, "__version__", "0.0")

    opened(root)

    assert len(decoded) == 2


def test_nothing_is_written_if_it_is_turned_off_or_the_set_is_small(root, monkeypatch):
    opened(root, cache=False)
    monkeypatch.setattr(memory, "LEAST", 13)
    opened(root)

    assert [path.name for path in root.iterdir()] == ["train"]


def test_a_folder_that_cannot_be_written_uses_the_cache_folder_of_the_user(
    root, decoded, monkeypatch, tmp_path
):
    locked = cache.FileLock

    def refuse(path):
        if root in path.parents:
            raise PermissionError(13, "read-only", str(path))
        return locked(path)

    monkeypatch.setattr(cache, "FileLock", refuse)

    opened(root)
    opened(root)

    assert len(decoded) == 2
    assert [path.name for path in root.iterdir()] == ["train"]
    (kept,) = (tmp_path / "user" / "repvgg").glob("*.safetensors")
    assert load_file(kept)["train"].shape == (10, 3, 16, 16)


def test_where_nothing_can_be_written_the_images_are_decoded_each_time(root, decoded, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(cache, "FileLock", refuse)

    assert opened(root).notes == opened(root).notes == []
    assert len(decoded) == 4


def test_a_full_disk_leaves_no_part_of_a_file(root, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)

    data = opened(root)

    assert "no space is left" in data.notes[-1]
    assert {path.suffix for path in root.iterdir()} == {"", ".lock"}


def test_the_file_has_the_rights_of_other_new_files(root):
    opened(root)
    (root / "other").touch()

    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in (NAME, "other")]

    assert modes[0] == modes[1]


def test_the_file_is_no_image_and_is_not_counted(root):
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()
    opened(root)

    assert opened(root).notes == []


TWO = """
import sys, time
from repvgg.data import memory
from repvgg.data.folders import imagefolder
memory.LEAST = 1
store = memory.store
def slow(*arguments, **options):
    print("decoded", flush=True)
    time.sleep(1)
    return store(*arguments, **options)
memory.store = slow
data = imagefolder(root=sys.argv[1], batch_size=2, num_workers=0, image_size=16, resize_size=16,
                   in_memory=True, holdout=0.2)
print("sum", int(data.train.images.sum()))
"""


@pytest.mark.slow
def test_two_processes_at_once_decode_once(root):
    processes = [Process("-c", TWO, root, cwd=root) for _ in range(2)]

    lines = [line for one in processes for line in one.communicate()[0].splitlines()]

    assert lines.count("decoded") == 2  # train and val, once
    assert len({line for line in lines if line.startswith("sum")}) == 1


def test_a_long_decode_says_how_long_it_took(root, monkeypatch, capsys):
    monkeypatch.setattr(memory.store.__globals__["progress"], "LEAST", 5)

    opened(root)

    assert capsys.readouterr().out == "decoding 10 images ... 0 s\n"
