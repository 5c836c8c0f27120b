"""What a folder of images holds: one rule, and nothing is dropped without a word."""

import os
import shutil
import unicodedata
import zlib

import pytest
import torch
from PIL import features

from repvgg.data.folders import imagefolder
from repvgg.data.images import extensions
from repvgg.data.scan import find, read_parts
from repvgg.data.sets import cifar10
from repvgg.data.split import hold_out
from tests.support.commands import make

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "data" / "train")
    return tmp_path / "data"


def put(path, content: bytes = b"nothing"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def summary(root, **options) -> list[str]:
    data = imagefolder(root=str(root), batch_size=2, num_workers=0, **options)
    return data.summary().splitlines()


def without_train(root) -> None:
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("._0.jpg", "1 hidden file"),
        (".DS_Store", "1 hidden file"),
        ("Thumbs.db", "1 hidden file"),
        (".ipynb_checkpoints/0-checkpoint.jpg", "1 hidden folder"),
        ("__MACOSX/0.jpg", "1 hidden folder"),
        ("features.h5", "1 .h5"),
        ("paper.PDF", "1 .pdf"),
        ("README", "1 file without extension"),
        ("holiday.jpg/notes.txt", "1 .txt"),
    ],
)
def test_what_is_no_image_is_left_out_and_counted(name, left_out, root):
    jpeg = (root / "train" / "cat" / "0.jpg").read_bytes()
    put(root / "train" / "cat" / name, jpeg if name.endswith(".jpg") else b"nothing")

    parts = read_parts(root, 0.2)

    assert len(find(root / "train")[0]) == 12
    assert parts.notes == [f"left out: {left_out}"]


def test_images_in_folders_below_and_in_linked_folders_count_to_the_class(root):
    jpeg = (root / "train" / "cat" / "0.jpg").read_bytes()
    put(root / "train" / "cat" / "holiday.jpg" / "a.jpg", jpeg)
    put(root / "elsewhere" / "b.jpg", jpeg)
    os.symlink(root / "elsewhere", root / "train" / "cat" / "linked")
    os.symlink(root / "elsewhere", root / "train" / "owl")

    paths, labels, classes = find(root / "train")

    assert classes == ["cat", "dog", "owl"]
    assert labels.tolist() == [0] * 8 + [1] * 6 + [2]
    assert [path.name for path in paths[6:8]] == ["a.jpg", "b.jpg"]
    assert read_parts(root, 0.2).notes[-1] == "followed: 2 linked folders"


@pytest.mark.parametrize("target", [".", "..", "../../..", "../dog"])
def test_links_back_to_a_folder_above_are_not_followed(target, root):
    os.symlink(target, root / "train" / "cat" / "again")
    os.symlink("../cat", root / "train" / "dog" / "again")  # with ../dog, a circle of two

    notes = read_parts(root, 0.2).notes

    assert any("link to a folder above" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["a.heic", "b.CR2", "c.svg", "without_extension", "d.jpg_large", "broken.png"]
)
def test_a_file_that_looks_like_an_image_but_cannot_be_read_is_named(name, root):
    path = root / "train" / "cat" / name
    if name == "broken.png":
        path.symlink_to("nowhere")
    else:
        shutil.copy(root / "train" / "cat" / "0.jpg", path)

    with pytest.raises(ValueError, match=rf"cannot be read here: 1, the first: .*{name}; convert"):
        summary(root)

    left_out = name.partition(".")[2].lower()
    said = summary(root, skip_unreadable=True)[-1]
    assert said == f"left out: 1 {'.' * bool(left_out)}{left_out or 'file without extension'}"


@pytest.mark.parametrize("feature", ["avif", "webp", "jpg_2000"])
def test_formats_that_this_pillow_lacks_are_images_that_cannot_be_read(feature, monkeypatch):
    extension = {"avif": ".avif", "webp": ".webp", "jpg_2000": ".jp2"}[feature]
    monkeypatch.setattr(features, "check", lambda given: given != feature)

    readable, unreadable = extensions()

    assert (extension in readable, extension in unreadable) == (False, True)
    assert readable.isdisjoint(unreadable)
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".ppm"} <= readable


def test_a_class_without_images_is_an_error_that_lists_its_files(root):
    put(root / "train" / "owl" / "notes.txt")
    put(root / "train" / "owl" / "a.heic")

    with pytest.raises(
        ValueError, match=r"owl holds no images .* \(left out: 1 .heic, 1 .txt\); add some"
    ):
        summary(root)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("valid", "val"),
        ("Validation", "val"),
        ("VAL", "val"),
        ("Test", "test"),
        ("testing", "test"),
    ],
)
def test_the_usual_names_of_the_parts_are_found(name, part, root):
    (root / "train").rename(root / "TRAIN")
    make(root / name, count=2)

    data = imagefolder(root=str(root), batch_size=2, num_workers=0)

    assert len(data.val.labels) == {"val": 4, "test": 2}[part]
    assert f"4 {'validation' if part == 'val' else 'test'} ({name}/)" in data.summary()
    assert data.has_test is (part == "test")


def test_two_folders_for_one_part_are_an_error(root):
    make(root / "val", count=2)
    make(root / "valid", count=2)

    with pytest.raises(ValueError, match="holds val/ and valid/, which mean the same"):
        summary(root)


def test_classes_without_train_are_training_images(root):
    without_train(root)

    assert summary(root, holdout=0.3) == [
        "2 classes, images: 8 training (data/), 4 validation (held out of data/)",
        "no test images: the test uses the validation images, which choose the checkpoint",
    ]


def test_folders_without_images_in_each_are_listed_in_the_error(root):
    without_train(root)
    put(root / "annotations" / "a.xml")

    with pytest.raises(
        ValueError,
        match=r"no folder train/; found annotations/ \(0 images\), cat/ \(6 images\), dog/",
    ):
        summary(root)


def test_the_folder_that_is_meant_is_named(root):
    with pytest.raises(ValueError, match=rf"no folder train/; .*; pass root={root}$"):
        summary(root.parent)


def test_a_folder_beside_the_parts_is_not_read_and_named(root):
    make(root / "valdiation", count=2)

    assert summary(root)[-1] == "left out: 1 folder valdiation/"


@pytest.mark.parametrize("forms", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_class_is_the_same_however_its_letters_are_composed(forms, root):
    make(root / "val", count=2)
    for part, form in zip(("train", "val"), forms, strict=True):
        (root / part / "cat").rename(root / part / form)

    data = imagefolder(root=str(root), batch_size=2, num_workers=0)

    assert data.contract.classes == [COMPOSED, "dog"]
    assert data.val.labels.tolist() == [0, 0, 1, 1]


def test_two_classes_that_look_equal_are_an_error(root):
    (root / "train" / "cat").rename(root / "train" / COMPOSED)
    (root / "train" / "dog").rename(root / "train" / DECOMPOSED)

    with pytest.raises(ValueError, match=f"two folders named {COMPOSED}, with composed"):
        summary(root)


def test_a_class_in_other_capitals_is_an_error_with_its_name(root):
    make(root / "val", count=2)
    (root / "val" / "cat").rename(root / "val" / "Cat")

    with pytest.raises(ValueError, match="training images lack: Cat; rename Cat to cat, or"):
        summary(root)


def test_classes_that_nobody_validates_are_named(root):
    make(root / "val", count=2)
    shutil.rmtree(root / "val" / "cat")

    assert summary(root)[-1] == "without images in val/: cat"


@pytest.mark.parametrize("part", ["", "train/cat"])
def test_a_name_that_is_not_utf8_is_an_error(part, root):
    path = os.fsencode(root / part)
    os.rename(path, path + b"\xff")

    with pytest.raises(ValueError, match=r"\\udcff is not UTF-8; rename the folder"):
        summary(os.fsdecode(os.fsencode(root) + b"\xff") if not part else root)


def test_a_class_of_one_image_trains(root):
    put(root / "train" / "owl" / "0.jpg", (root / "train" / "cat" / "0.jpg").read_bytes())

    data = imagefolder(root=str(root), batch_size=2, num_workers=0, holdout=0.3)

    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2]
    assert data.val.labels.tolist() == [0, 0, 1, 1]
    assert data.summary().splitlines()[-1] == "trains on its one image, without validation: owl"


def test_every_class_keeps_a_training_image_whatever_the_share():
    kept, held = hold_out(torch.tensor([0, 0, 1, 1, 1, 2]), 0.99)

    assert kept.numel() == 3
    assert held.numel() == 3


@pytest.mark.parametrize(
    ("labels", "share", "checksum"),
    [
        (torch.arange(50000) % 10, 0.02, 39554118),
        (torch.arange(50000) // 5000, 0.02, 2993835716),  # a folder of CIFAR-10
    ],
)
def test_the_split_is_that_of_earlier_runs(labels, share, checksum):
    _, held = hold_out(labels, share)

    assert (len(held), held[0]) == (1000, 11)
    assert zlib.crc32(held.numpy().tobytes()) == checksum


@pytest.mark.parametrize(("share", "message"), [(0, "holdout=0: no image"), (1, "below 1")])
def test_a_share_that_leaves_a_part_empty_is_an_error(share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(torch.zeros(8, dtype=torch.long), share)


def test_single_images_alone_cannot_be_divided():
    with pytest.raises(ValueError, match="only one image; add a folder val/"):
        hold_out(torch.arange(4), 0.1)


def test_a_folder_of_cifar_follows_the_same_rules(root):
    make(root / "Valid", count=2)
    put(root / "train" / "cat" / "._0.jpg")

    data = cifar10(root=str(root), batch_size=2, num_workers=0)

    assert data.summary().splitlines() == [
        "2 classes, images: 12 training (train/), 4 validation (Valid/)",
        "no test images: the test uses the validation images, which choose the checkpoint",
        "left out: 1 hidden file",
    ]
