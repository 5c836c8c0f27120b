"""The data sets of torchvision by name, from files in their formats."""

import numpy as np
import pytest
import torch
from torchvision import datasets

from repvgg.data import torchvision
from repvgg.data.torchvision_sets import _find, _parameters
from tests.support.mnist import NOISE, PIXELS, write_mnist


@pytest.fixture
def root(tmp_path):
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        write_mnist(tmp_path, name)
    return tmp_path


def opened(root, **options):
    return torchvision(
        **{"root": str(root), "batch_size": 4, "num_workers": 0, "download": False, **options}
    )


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_files_of_mnist_train_and_test(name, root):
    data = opened(root, name=name, holdout=0.25)

    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [30, 10, 20]
    assert (data.contract.in_channels, data.contract.image_size) == (1, (28, 28))
    assert data.contract.classes == getattr(datasets, name).classes
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(PIXELS["t10k"]))
    assert next(iter(data.train_dataloader()))[0].shape == (4, 1, 28, 28)


def test_files_of_svhn_train_and_test(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    images = NOISE.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    for part in ("train", "test"):
        content = {"X": images, "y": (np.arange(20) % 10 + 1)[:, None]}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)

    data = opened(tmp_path, name="SVHN")

    assert torch.equal(data.test.images, torch.from_numpy(images).permute(3, 2, 0, 1))
    assert data.test.labels.tolist() == [*range(1, 10), 0] * 2
    assert data.contract.classes == [str(digit) for digit in range(10)]


def test_a_data_set_without_parts_is_split(tmp_path):
    arguments = {"size": 20, "image_size": [3, 16, 16], "num_classes": 2}

    data = opened(tmp_path, name="FakeData", arguments=arguments, holdout=0.2)

    assert len(data.train.labels) + len(data.val.labels) == 20
    assert not data.has_test


@pytest.mark.parametrize(
    ("stated", "parts"),
    [
        (("train", "test"), ["test", "train"]),
        (("train", "val", "trainval", "test"), ["test", "train", "val"]),
        (("trainval", "test"), ["test", "train"]),
        (("train", "valid"), ["train", "val"]),
    ],
)
def test_the_splits_of_a_data_set_are_its_parts(stated, parts, tmp_path, monkeypatch):
    class Split(datasets.VisionDataset):
        def __init__(self, root, split="train"):
            self.split = datasets.utils.verify_str_arg(split, "split", stated)

        def __len__(self):
            return 20

        def __getitem__(self, row):
            return torch.full((1, 8, 8), row, dtype=torch.uint8), row % 2

    monkeypatch.setattr(datasets, "SVHN", Split)

    data = opened(tmp_path, name="SVHN")

    held = "held out" in data.origins.get("val", "")
    assert [data.has_test, not held] == ["test" in parts, "val" in parts]


def test_every_reachable_name_is_a_data_set_of_torchvision():
    for name in (*dir(datasets), "utils.os.system", "VisionDataset", "os", "__doc__"):
        try:
            found = _find(name)
        except ValueError:
            continue
        assert issubclass(found, datasets.VisionDataset)
        assert found.__module__.startswith("torchvision.datasets.")


def test_arguments_are_those_of_the_class_and_the_bases_that_it_passes_them_to():
    assert {"split", "train", "root", "download"} <= _parameters(datasets.EMNIST)
    assert "train" not in _parameters(datasets.SVHN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": None}, "name is missing: pass name=FashionMNIST"),
        ({"name": "fashionmnist"}, r"name=fashionmnist: .*did you mean FashionMNIST\?"),
        ({"name": "utils.os.system"}, "torchvision.datasets has no such data set"),
        ({"name": "QMNIST"}, "the files of QMNIST cannot be read or downloaded .Dataset not found"),
        (
            {"name": "MNIST", "arguments": {"tarin": True}},
            r"MNIST takes no tarin; did you mean train",
        ),
        (
            {"name": "EMNIST"},
            "arguments: EMNIST: .*missing 1 required positional argument: 'split'",
        ),
        ({"name": "MNIST", "download": "yes"}, "download='yes': must be true or false"),
        ({"name": "MNIST", "classes": ["a"]}, "classes="),
    ],
)
def test_a_wrong_name_or_argument_is_one_error(options, message, root):
    with pytest.raises(ValueError, match=message):
        opened(root, **options)


def test_a_download_that_fails_is_one_error(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("Error downloading\ntrain-images")

    monkeypatch.setattr(datasets.MNIST, "download", fail)

    with pytest.raises(
        ValueError, match=r"MNIST cannot be read or downloaded \(Error downloading tr"
    ):
        opened(tmp_path / "new", name="MNIST", download=True)
