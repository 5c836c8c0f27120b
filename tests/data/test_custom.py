"""The user's own data sets: what they may return, and what is said of anything else."""

import os
import random
import sys

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from torchvision.transforms import v2

from repvgg import targets
from repvgg.data import custom
from repvgg.data.custom import from_dataset
from repvgg.data.module import ImageData
from repvgg.data.opening import open_data
from repvgg.targets import is_from_user_code

PIXELS = torch.randint(
    256, (20, 3, 12, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


class Items(Dataset):
    """Two classes; an item can be replaced."""

    def __init__(self, images=PIXELS, count=20, **changed):
        self.images, self.count = images, count
        self.changed = {int(row.removeprefix("row")): item for row, item in changed.items()}

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return self.changed.get(row, (self.images[row], row % 2))


class Named(Items):
    classes = ("cat", "dog")


def opened(dataset, **options) -> ImageData:
    return from_dataset(dataset, **{"batch_size": 2, "num_workers": 0, "holdout": 0.2, **options})


def rows(data: ImageData, part: str) -> torch.Tensor:
    source = getattr(data, part)
    return data.read(source, torch.arange(len(source.labels)))[0]


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image,
        lambda image: image.permute(1, 2, 0).numpy(),
        lambda image: Image.fromarray(image.permute(1, 2, 0).numpy()),
        lambda image: image.float() / 255,
        lambda image: v2.functional.to_dtype(image, torch.float32, scale=True),
        lambda image: image.permute(1, 2, 0).numpy() / 255,
    ],
    ids=["tensor", "array", "PIL", "floats", "v2", "float64"],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_kind_of_image_keeps_its_pixels(convert, in_memory):
    data = opened((Items([convert(image) for image in PIXELS]), Items()), in_memory=in_memory)

    assert torch.equal(rows(data, "train"), PIXELS)
    assert torch.equal(rows(data, "val"), PIXELS)
    assert data.contract.image_size == (12, 10)
    assert data.train.labels.tolist() == [0, 1] * 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("in_memory", [True, False])
def test_training_images_are_augmented_in_one_and_three_channels(in_memory, channels):
    data = opened(
        Items(PIXELS[:, :channels]), augment=[v2.RandAugment()], in_memory=in_memory, batch_size=4
    )

    batches = list(data.train_dataloader())

    assert [images.shape for images, _ in batches] == [(4, channels, 12, 10)] * 4
    assert data.contract.in_channels == channels


def test_greyscale_images_have_no_axis_or_one():
    grey = PIXELS[:, 0]
    kinds = [grey, PIXELS[:, :1], [Image.fromarray(image.numpy()) for image in grey]]

    for images in [*kinds, grey.numpy(), grey.numpy()[..., None]]:
        assert torch.equal(rows(opened((Items(images), Items(images))), "val"), PIXELS[:, :1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_one_data_set_is_split_the_same_way_each_time(workers, in_memory):
    data = opened(Items(), num_workers=workers, in_memory=in_memory)

    assert data.summary().startswith(
        "2 classes, images: 16 training, 4 validation (held out of the training images, the same"
    )
    assert data.val.labels.tolist().count(1) == 2
    both = torch.cat([rows(data, "train"), rows(data, "val")]).flatten(1).tolist()
    assert sorted(both) == sorted(PIXELS.flatten(1).tolist())
    data.teardown("fit")


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((Items(), Items(count=4)), (20, 4, None)),
        ([Items(), Items(count=4), Items(count=2)], (20, 4, 2)),
        ({"train": Items(), "test": Items(count=4)}, (16, 4, 4)),
        ({"train": Items(), "val": Items(count=3), "test": None}, (20, 3, None)),
        (Subset(Named(), range(10)), (8, 2, None)),
        ([(image, row % 2) for row, image in enumerate(PIXELS)], (16, 4, None)),
        ([(PIXELS[0], 0), (PIXELS[1], 1), (PIXELS[2], 1)], (2, 1, None)),
        (TensorDataset(PIXELS, torch.arange(20) % 2), (16, 4, None)),
    ],
    ids=["pair", "triple", "test", "dictionary", "subset", "list", "list of three", "tensors"],
)
def test_one_two_or_three_parts_are_taken(given, sizes):
    data = opened(given)

    assert (len(data.train.labels), len(data.val.labels)) == sizes[:2]
    assert data.has_test == (sizes[2] is not None)


@pytest.mark.parametrize(
    ("dataset", "options", "names"),
    [
        (Named(), {}, ["cat", "dog"]),
        (Subset(Named(), range(10)), {}, ["cat", "dog"]),
        (ConcatDataset([Named(), Subset(Named(), range(10))]), {}, ["cat", "dog"]),
        (Named(), {"classes": ["no", "yes", "other"]}, ["no", "yes", "other"]),
        (Items(), {}, ["0", "1"]),
    ],
)
def test_classes_are_passed_or_of_the_data_set_or_numbers(dataset, options, names):
    assert opened(dataset, **options).contract.classes == names


def test_mean_and_deviation_are_those_of_the_training_images():
    data = opened((Items(), Items()), in_memory=False)

    images, _ = data.on_after_batch_transfer((PIXELS, 0), 0)

    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    assert opened(Items(), mean=[0.5] * 3, std=[0.2] * 3).contract.std == (0.2, 0.2, 0.2)


def test_many_pixels_are_measured_without_a_copy_as_floats(monkeypatch):
    exact = custom.measure(opened((Items(), Items())).train)
    monkeypatch.setattr("repvgg.data.memory.MOST_AS_FLOATS", 1)

    counted = custom.measure(opened((Items(), Items())).train)

    assert counted.mean == pytest.approx(exact.mean, rel=1e-6)
    assert counted.std == pytest.approx(exact.std, rel=1e-6)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_any_size_and_colour_are_converted_on_request(in_memory):
    mixed = Items(
        row3=(torch.zeros(1, 30, 40, dtype=torch.uint8), 1), row4=(Image.new("P", (9, 9)), 0)
    )

    data = opened(mixed, image_size=16, in_channels=3, in_memory=in_memory)

    assert rows(data, "train").shape == (16, 3, 16, 16)


def test_more_than_fits_into_memory_is_read_from_the_data_set(monkeypatch):
    monkeypatch.setattr(custom, "MOST_IN_MEMORY", 20 * 3 * 12 * 10 - 1)

    assert type(opened(Items()).train).__name__ == "Items"


def test_flips_can_be_turned_off():
    images = torch.zeros_like(PIXELS)
    images[..., :5] = 200
    for in_memory in (True, False):
        data = opened(Items(images), flip=False, in_memory=in_memory)
        seen = torch.cat([batch for batch, _ in data.train_dataloader()]).float()
        assert (seen[..., :2].mean((1, 2, 3)) >= seen[..., 8:].mean((1, 2, 3))).all()


class Stating(Items):
    """States labels, and counts how often it is read."""

    reads = 0

    def __init__(self, targets, **options):
        super().__init__(**options)
        self.targets = targets

    def __getitem__(self, row):
        Stating.reads += 1
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("targets", "read"), [([0, 1] * 10, False), ([1, 0] * 10, True), ([0, 1], True), ("01", True)]
)
def test_stated_labels_save_a_pass_if_they_are_those_of_the_items(targets, read):
    Stating.reads = 0

    data = opened(Stating(targets), in_memory=False, mean=[0.5] * 3, std=[0.5] * 3)

    assert (Stating.reads >= 2 * custom.READ_TWICE + 20) == read
    assert sorted(data.train.labels.tolist()) == [0] * 8 + [1] * 8


def test_a_stated_label_that_differs_later_is_an_error():
    targets = [0, 1] * 10
    targets[15] = 0
    data = opened((Stating(targets), Items()), in_memory=False, mean=[0.5] * 3, std=[0.5] * 3)

    with pytest.raises(ValueError, match="row 15 of the training data: its label is 1, and was 0"):
        rows(data, "train")


class Random(Items):
    def __getitem__(self, row):
        return self.images[random.randrange(20)], row % 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Unsized(Dataset):
    pass


class Module(L.LightningDataModule):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Items(count=0), "dataset: Items is empty, its length is 0"),
        ((Items(), Items(count=0)), "dataset: val: Items is empty"),
        (Stream(), "returns a Stream, a kind of IterableDataset; .*return a map-style Dataset"),
        (DataLoader(Items()), "returns a DataLoader; return its dataset"),
        (Module(), "returns a Module, a kind of LightningDataModule; return its Dataset"),
        (Unsized(), "returns a Unsized, not a data set; return a map-style"),
        (5, "returns a int, not a data set"),
        ("text", "returns a str, not a data set"),
        (None, "returns a NoneType, not a data set"),
        ({"train": Items(), "dev": Items()}, "returns a dict with the keys train, dev; they must"),
        ((Items(), 3), "dataset: val: returns a int, not a data set"),
        ((Named(), Stating([0] * 20)), None),
        (
            Items(row1=PIXELS[0]),
            r"row 1 of the training data: is a uint8 tensor .*return \(image, ",
        ),
        (Items(row9=(PIXELS[0], 1, 2)), r"row 9 of the training data: is 3 values"),
        (
            Items(row9=(PIXELS[0], "dog")),
            "row 9 of the training data: its label is 'dog'; return an",
        ),
        (Items(row9=(PIXELS[0], 1.0)), r"row 9 .*its label is 1\.0"),
        (Items(row9=(PIXELS[0], True)), "row 9 .*its label is True"),
        (Items(row9=(PIXELS[0], -1)), "row 9 .*its label is -1; must be at least 0"),
        (
            Items(row9=(PIXELS[0], torch.eye(2)[0])),
            "row 9 .*its label is a float32 tensor of shape",
        ),
        (
            Named(row9=(PIXELS[0], 2)),
            "row 9 .*its label is 2; must be from 0 to 1, for the 2 classes",
        ),
        (
            (Items(), Items(row3=(PIXELS[0], 2))),
            "row 3 of the validation data: its label is 2; must",
        ),
        (Items(row9=("cat.jpg", 1)), "row 9 .*the image is 'cat.jpg'; return a PIL image"),
        (
            Items(row9=(PIXELS[0, :, :9], 1)),
            r"row 9 .*the image has 9x10 pixels, .*12x10; pass data.im",
        ),
        (
            Items(row9=(PIXELS[0, :1], 1)),
            "row 9 .*the image has 1 channels, the first has 3; pass data",
        ),
        (
            Items(row9=(PIXELS[0, :2], 1)),
            r"row 9 .*shape \(2, 12, 10\); must be \(C, H, W\) with 1 or",
        ),
        (Items(row9=(PIXELS[0].numpy(), 1)), r"row 9 .*shape \(3, 12, 10\); must be \(H, W, C\)"),
        (Items(row9=(PIXELS[0].int(), 1)), "row 9 .*the image is a int32 tensor of shape"),
        (
            Items(row9=(PIXELS[0].float(), 1)),
            "row 9 .*float32 tensor .*not uint8 values divided by",
        ),
        (Items(row9=(PIXELS[0] / 255 - 0.5, 1)), "row 9 .*not normalized: training does that"),
        (Items(row9=(PIXELS[0] * torch.nan, 1)), "row 9 .*float32 tensor"),
        (Items(row9=(Image.new("RGBA", (10, 12)), 1)), "row 9 .*is transparent"),
        (Items(row9=(Image.new("F", (10, 12)), 1), images=PIXELS[:, :1]), "row 9 .*no known scale"),
        (Random(), "row 0 of the training data: differs when it is read again.*data.augment="),
        ((Items(), Random()), "row 0 of the validation data: differs when it is read again"),
        (
            Items(images=PIXELS[..., :4]),
            "the images have 12x4 pixels, fewer than 8; pass image_size",
        ),
        (Items(images=[PIXELS[0]] * 20, count=1), "all labels are 0; it needs two classes"),
        (Items(images=PIXELS * 0), "std: the training images are of one colour"),
    ],
)
def test_anything_else_is_one_error_that_says_where_and_what_is_allowed(given, message):
    if message is None:
        opened(given)
        return
    with pytest.raises(ValueError, match=message) as caught:
        opened(given)
    assert "\n" not in str(caught.value)


def test_parts_of_other_classes_are_an_error():
    other = Named()
    other.classes = ["dog", "cat"]

    with pytest.raises(ValueError, match="the classes of val are dog, cat, those of train are cat"):
        opened((Named(), other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size=4: must be an integer of at least 8"),
        ({"in_channels": 4}, "in_channels=4: must be 3, or 1 for greyscale"),
        ({"in_memory": "yes"}, "in_memory='yes': must be true or false"),
        ({"flip": 1}, "flip=1: must be true or false"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"holdout": 0}, "holdout=0: no image would be left to validate"),
        ({"classes": "cat"}, "classes='cat': must be at least two names"),
        ({"batch_size": 17}, "batch_size=17: exceeds the 16 training images"),
        ({"augment": [v2.CenterCrop(4)]}, r"CenterCrop must return uint8 of shape \(3, 12, 10\)"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_argument(options, message):
    with pytest.raises(ValueError, match=message):
        opened(Items(), **options)


class OwnError(Exception):
    def __init__(self, row, reason):
        super().__init__(f"{reason} in {row}")


class Failing(Items):
    def __getitem__(self, row):
        if row == 13:
            raise OwnError(row, "broken")
        return super().__getitem__(row)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_error_of_the_users_own_code_passes_through_with_its_row(
    in_memory, workers, monkeypatch
):
    monkeypatch.setattr(targets, "NOT_THE_USERS", [targets.CLONE / "repvgg"])
    expected = RuntimeError if workers else OwnError

    with pytest.raises(expected, match="broken in 13") as caught:
        opened(Failing(), in_memory=in_memory, num_workers=workers)

    notes = "\n".join(caught.value.__notes__)
    assert "while reading row 13 of the training data" in notes
    assert is_from_user_code(caught.value)
    if workers:
        assert 'raise OwnError(row, "broken")' in notes


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Factories in a file beside the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_data.py").write_text(
        "from repvgg.data import digits, from_dataset\n"
        "from tests.data.test_custom import Items, Named\n"
        "def simple(count=20): return Items(count=count)\n"
        "def pair(count, holdout): return Items(count=count), Items(count=int(holdout * 10))\n"
        "def whole(**options): return digits(**options)\n"
        "def strict(count=20, seed=0): return digits(seed=seed)\n"
        "def failing(): raise KeyError('of the user')\n"
        "class Own(Named):\n    pass\n"
    )
    yield
    sys.modules.pop("own_data", None)


def configured(target, **arguments):
    given = {"batch_size": 4, "augment": [], "num_workers": 0, "image_size": None, **arguments}
    return open_data({"_target_": target, **given}, mixup=0.0, cutmix=0.0, seed=3)


@pytest.mark.parametrize(
    ("target", "arguments", "sizes"),
    [
        ("own_data.simple", {}, (18, 2)),
        ("own_data.simple", {"count": 10, "holdout": 0.4}, (6, 4)),
        ("own_data.Own", {"count": 10, "holdout": 0.4}, (6, 4)),
        ("own_data.pair", {"count": 10, "holdout": 0.4}, (10, 4)),
    ],
)
def test_a_factory_takes_its_own_arguments_and_we_take_the_rest(own, target, arguments, sizes):
    data = configured(target, **arguments)

    assert (len(data.train.labels), len(data.val.labels)) == sizes
    assert (data.batch_size, data.seed) == (4, 3)


def test_a_factory_of_an_image_data_gets_every_argument(own):
    data = open_data({"_target_": "own_data.whole", "batch_size": 8}, mixup=0.1, cutmix=0.0, seed=3)

    assert (data.batch_size, data.seed, data.mix is not None) == (8, 3, True)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (None, {}, "data._target_ is missing: pass data._target_=mypackage.make_data"),
        ("nowhere.make", {}, "data._target_=nowhere.make: there is no module nowhere"),
        ("own_data.simpel", {}, r"own_data has no simpel; did you mean simple\?"),
        (
            "own_data.simple",
            {"cuont": 3},
            r"did you mean count\? its signature is simple\(count=20\)",
        ),
        (
            "own_data.strict",
            {"image_size": 32},
            "image_size=32: own_data.strict returns an ImageData ",
        ),
        ("own_data.strict", {"mixup": 0.2}, "mixup=0.2: own_data.strict returns an ImageData "),
    ],
)
def test_a_wrong_factory_or_argument_is_one_error(own, target, arguments, message):
    config = {"_target_": target, "batch_size": 64, "augment": [], **arguments}

    with pytest.raises(ValueError, match=message):
        open_data(config, seed=0)


def test_an_error_of_the_factory_passes_through(own):
    with pytest.raises(KeyError, match="of the user"):
        open_data({"_target_": "own_data.failing"})


def test_numpy_integers_are_labels():
    data = opened([(image, np.int64(row % 2)) for row, image in enumerate(PIXELS)])

    assert data.train.labels.dtype == torch.int64


@pytest.mark.slow
def test_many_images_in_memory_keep_no_files_open():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    grey = torch.zeros(20_000, 1, 8, 8, dtype=torch.uint8)
    grey[::2] = 9
    few = len(os.listdir("/proc/self/fd")) + 40  # of 79 chunks
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        data = opened(Items(grey, count=len(grey)), num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert len(data.train.images) + len(data.val.images) == len(grey)


@pytest.mark.parametrize("classes", [["dog", "cat"], []])
def test_concatenated_data_sets_with_other_classes_are_an_error(classes):
    other = Named()
    other.classes = classes

    with pytest.raises(ValueError, match=r"classes (cat, dog|unknown) and (dog, cat|cat, dog)"):
        opened(ConcatDataset([other, Named()] if not classes else [Named(), other]))


def test_a_class_that_is_named_twice_is_an_error():
    with pytest.raises(ValueError, match=r"^classes=\['cat', 'cat'\]: names cat twice"):
        opened(Items(), classes=["cat", "cat"])
