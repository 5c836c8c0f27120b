import functools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg import targets
from repvgg.data.batches import Batches, Request
from repvgg.data.files import Files, store
from repvgg.data.folders import imagefolder
from repvgg.data.images import TooManyPixels, fit, open_image, to_tensor
from repvgg.data.scan import find
from repvgg.data.sets import cifar10
from repvgg.data.shards import Shards
from tests.support.commands import ROOT, make
from tests.support.processes import Process

SIZE = (16, 16)
SCRIPT = ROOT / "scripts" / "write_shards.py"


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "val", count=2)
    return tmp_path


def files(folder, **options) -> Files:
    paths, labels, _ = find(folder)
    return Files(paths, labels, evaluate=functools.partial(fit, size=SIZE), **options)


KINDS = {
    "grey": lambda: Image.new("L", SIZE, 200),
    "grey and alpha": lambda: Image.new("LA", SIZE, (200, 255)),
    "palette": lambda: Image.new("RGB", SIZE, (200,) * 3).quantize(),
    "colour and alpha": lambda: Image.new("RGBA", SIZE, (200, 200, 200, 255)),
    "one bit": lambda: Image.new("1", SIZE, 1),
    "uint16": lambda: Image.fromarray(np.full(SIZE, 200 * 256, np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_8_bits_of_three_channels(kind, tmp_path):
    KINDS[kind]().save(tmp_path / "image.png")

    pixels = to_tensor(open_image(tmp_path / "image.png"))

    expected = 255 if kind == "one bit" else 200
    assert (pixels.shape, pixels.dtype) == ((3, *SIZE), torch.uint8)
    assert (pixels.int() - expected).abs().max() <= 1


def test_an_image_on_an_unknown_background_is_an_error(tmp_path):
    Image.new("RGBA", SIZE, (145, 145, 145, 128)).save(tmp_path / "image.png")

    with pytest.raises(ValueError, match=r"image.png: it is transparent, on an unknown background"):
        open_image(tmp_path / "image.png")


def test_cmyk_becomes_three_channels(tmp_path):
    Image.new("CMYK", SIZE, (0, 0, 0, 55)).save(tmp_path / "image.jpg")

    pixels = to_tensor(open_image(tmp_path / "image.jpg"))

    assert pixels.shape == (3, *SIZE)
    assert (pixels.int() - 200).abs().max() <= 2


@pytest.mark.parametrize("resize", [None, 24])
def test_fitting_scales_the_shorter_side_and_cuts_out_the_centre(resize):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (28, 0, 36, 32))

    fitted = to_tensor(fit(image, SIZE, resize=resize))

    width = 8 * (resize or 16) / 32  # of the blue bar, in the middle
    assert fitted.shape == (3, *SIZE)
    assert fitted[2, 8].gt(127).sum() == width
    assert fitted[2, 8, 7:9].eq(255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_augmentation_of_an_image_does_not_depend_on_the_worker(workers, root):
    def read(count: int) -> torch.Tensor:
        data = imagefolder(root=str(root), batch_size=4, image_size=16, num_workers=count)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(read(workers), read(0))


def test_a_label_is_that_of_its_folder(root):
    data = imagefolder(root=str(root), batch_size=4, image_size=16, num_workers=0)

    images, labels = data.read(data.train, torch.arange(12))

    assert labels.tolist() == [0] * 6 + [1] * 6
    assert [int(image[:, :4].float().mean() > 127) for image in images] == labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_stops_with_its_name(workers, root):
    truncate(root / "train" / "dog" / "3.jpg")
    source = files(root / "train", num_workers=workers)

    with pytest.raises(ValueError, match=r"dog/3.jpg: cannot be read .* skip_unreadable=true"):
        list(Batches(source, batch_size=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_or_another_takes_its_place_and_it_is_counted(workers, root):
    truncate(root / "train" / "cat" / "5.jpg")
    source = files(root / "train", num_workers=workers, skip_unreadable=True)

    ((images, labels),) = source.read([Request(torch.tensor([4, 5]))], None)

    assert labels.tolist() == [0, 1]  # of cat/4 and dog/0
    assert torch.equal(images[1], to_tensor(fit(open_image(root / "train/dog/0.jpg"), SIZE)))
    assert [message.partition(":")[0] for message in source.unreadable] == [
        str(root / "train" / "cat" / "5.jpg")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_users_own_transform_is_no_fault_of_the_image(workers, root, monkeypatch):
    monkeypatch.setattr(targets, "NOT_THE_USERS", [ROOT / "repvgg"])
    source = files(root / "train", num_workers=workers, skip_unreadable=True)

    with pytest.raises(ValueError, match=r"^of my transform") as caught:
        list(source.read([Request(torch.tensor([4, 5]), 0)], failing))

    assert targets.is_from_user_code(caught.value)
    assert not source.unreadable


def failing(image):
    raise ValueError("of my transform")


def test_what_is_decoded_into_memory_is_what_the_files_give(root):
    paths, labels, _ = find(root / "train")

    stored = store(paths, labels, SIZE)

    (images, same), *_ = files(root / "train").read([Request(torch.arange(12))], None)
    assert torch.equal(stored.images, images)
    assert torch.equal(stored.labels, same)


@pytest.mark.parametrize("broken", [1, 12])
def test_unreadable_images_are_counted_before_anything_trains(broken, root):
    paths, labels, _ = find(root / "train")
    for path in paths[:broken]:
        truncate(path)

    with pytest.raises(ValueError, match=rf"{broken} of 12 images cannot be read, the first: .*0"):
        store(paths, labels, SIZE)


def test_without_val_a_share_of_each_class_validates(root):
    (root / "val").rename(root / "test")

    data = imagefolder(root=str(root), batch_size=4, num_workers=0, holdout=0.3)

    assert data.val.labels.tolist() == [0, 0, 1, 1]
    assert len(data.train.labels) == 8
    assert not set(data.val.paths) & set(data.train.paths)
    assert len(data.test.labels) == 4


def test_without_test_the_validation_images_test(root):
    data = imagefolder(root=str(root), batch_size=4, num_workers=0)

    assert data.test is data.val
    assert data.contract.classes == ["cat", "dog"]
    assert data.contract.resize_size == 256


def test_small_images_can_be_kept_in_memory(root):
    data = imagefolder(root=str(root), batch_size=4, image_size=16, resize_size=16, in_memory=True)

    images, _ = next(iter(data.train_dataloader()))

    assert images.shape == (4, 3, 16, 16)
    assert data.contract.resize_size is None


def remove(root, *parts):
    for part in parts:
        for path in sorted((root / part).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: remove(root, "train"), r"train holds no folders of classes"),
        (lambda root: remove(root, "train/dog"), r"train/dog holds no images"),
        (
            lambda root: [remove(root, "train/dog"), (root / "train" / "dog").rmdir()],
            r"train holds one class alone, cat",
        ),
        (lambda root: (root / "train").rename(root / "else"), r"there is no folder train/; found "),
        (
            lambda root: (root / "val" / "dog").rename(root / "val" / "cow"),
            r"val holds classes that the training images lack: cow",
        ),
        (lambda root: remove(root, "val/dog"), r"val/dog holds no images"),
    ],
)
def test_a_folder_of_another_layout_is_an_error(change, message, root):
    change(root)

    with pytest.raises(ValueError, match=message):
        imagefolder(root=str(root), batch_size=4, num_workers=0)


def test_hidden_folders_are_no_classes(root):
    (root / "train" / ".checkpoints").mkdir()

    assert find(root / "train")[2] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "root is missing"),
        ({"image_size": 4}, "image_size=4"),
        ({"image_size": 300}, "resize_size=256: must be an integer of at least 300"),
        ({"interpolation": "nearest"}, "interpolation='nearest': must be bilinear or bicubic"),
        ({"holdout": 1}, "holdout=1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"max_pixels": 0}, "max_pixels=0: must be an integer of at least 1"),
        ({"skip_unreadable": 1}, "skip_unreadable=1: must be true or false"),
        ({"batch_size": 13}, "batch_size=13: exceeds the 12 training images"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_argument(options, message, root):
    if "holdout" in options:
        (root / "val").rename(root / "test")

    with pytest.raises(ValueError, match=message):
        imagefolder(**{"root": str(root), "batch_size": 4, "num_workers": 0, **options})


@pytest.fixture
def pillow_limit(monkeypatch):
    """Of Pillow itself: it warns above 100 pixels and fails above 200. Images here have 360."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_larger_images_can_be_allowed(workers, root, pillow_limit):
    def read(limit: int) -> torch.Tensor:
        data = imagefolder(
            root=str(root), batch_size=4, image_size=16, num_workers=workers, max_pixels=limit
        )
        batches = torch.cat([images for images, _ in data.train_dataloader()])
        data.teardown("fit")
        return batches

    with pytest.raises(
        ValueError,
        match=r"jpg: has 360 pixels, more than 359; pass max_pixels=360 to allow it",
    ):
        read(359)
    assert read(360).shape == (12, 3, 16, 16)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_data_set_without_this_setting_does_not_name_it(root, pillow_limit, monkeypatch):
    (root / "val").rename(root / "test")
    monkeypatch.setattr("repvgg.data.files.MOST_PIXELS", 200)

    with pytest.raises(ValueError, match="has 360 pixels, more than 200; repair") as caught:
        cifar10(root=str(root), batch_size=2, num_workers=0)

    assert "max_pixels" not in str(caught.value)


def test_greyscale_files_are_read_in_one_channel(root):
    data = imagefolder(
        root=str(root), batch_size=4, image_size=16, num_workers=0, in_channels=1, resize_size=16
    )

    images, _ = next(iter(data.train_dataloader()))

    assert images.shape == (4, 1, 16, 16)
    assert len(data.contract.mean) == 1
    assert "mean and standard deviation of the training images: 0." in data.summary()


def test_larger_images_can_be_allowed_in_memory(root, pillow_limit):
    data = imagefolder(
        root=str(root), batch_size=4, image_size=16, num_workers=0, in_memory=True, max_pixels=360
    )

    assert len(data.train.images) == 12


def test_without_a_setting_pillows_limit_holds(root, pillow_limit):
    with pytest.raises(TooManyPixels, match="has 360 pixels, more than 200"):
        open_image(root / "train" / "cat" / "0.jpg")


def test_where_no_image_can_be_read_one_line_says_so(root):
    for path in (root / "val").rglob("*.jpg"):
        truncate(path)
    source = files(root / "val", skip_unreadable=True)

    with pytest.raises(ValueError, match=r"none of the images can be read: .*0.jpg"):
        list(Batches(source, batch_size=4))


@pytest.mark.slow
@pytest.mark.parametrize("validates", [True, False])
def test_shards_give_the_images_of_the_folder_in_an_order_that_can_be_resumed(
    validates, root, tmp_path
):
    out = tmp_path / "shards"
    (root / "train" / "cat" / "._0.jpg").write_bytes(b"")
    (root / "val").rename(root / "Valid") if validates else shutil.rmtree(root / "val")
    command = (SCRIPT, f"root={root}", f"out={out}", "shard_size=5")
    done = Process(*command, cwd=tmp_path).completed()
    assert done.returncode == 0, done.stderr
    assert "left out: 1 hidden file\n" in done.stdout
    assert f"val: {4 if validates else 2} images" in done.stdout
    settings = {"batch_size": 4, "image_size": 16, "num_workers": 0}
    plain, data = (imagefolder(root=str(where), **settings) for where in (root, out))

    for part in ("train", "val"):
        expected, given = (
            one.read(getattr(one, part), torch.arange(len(getattr(one, part).labels)))
            for one in (plain, data)
        )
        assert all(map(torch.equal, expected, given))
    assert data.contract == plain.contract
    whole = [images for images, _ in data.train_dataloader()]
    again = data.train_dataloader()
    again.load_state_dict({"epoch": 0, "batch": 1})
    assert all(map(torch.equal, [images for images, _ in again], whole[1:]))


def test_shards_are_read_a_few_at_a_time():
    shards = Shards("here", torch.zeros(100), shard_size=5, cache_size="1GB", evaluate=fit)

    order = shards.order(torch.Generator().manual_seed(0))

    assert sorted(order.tolist()) == list(range(100))
    for window in order[:80].split(40):
        assert len(set((window // 5).tolist())) == Shards.TOGETHER
    assert order.tolist() != sorted(order.tolist())


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"its contents.json cannot be read"):
        imagefolder(root=f"file://{tmp_path}", batch_size=4)
