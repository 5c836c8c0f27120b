"""The way of a user's own data: train, resume, deploy, predict, as docs/data.md shows it."""

import re

import numpy as np
import pytest
from PIL import Image

import repvgg
from tests.support.commands import CONFIGS, compose, make, run
from tests.support.pages import page

CODE = page("docs/data.md").files["mydata.py"]
COMMAND = next(one for one in page("docs/data.md").commands if "mydata.Bars" in one.text)


def test_the_example_has_ten_lines():
    assert len([line for line in CODE.splitlines() if line.strip()]) == 10


@pytest.mark.slow
def test_the_example_trains_resumes_deploys_and_predicts(tmp_path):
    (tmp_path / "mydata.py").write_text(CODE)
    own = "data._target_=mydata.Bars"

    trained = run("train.py", *COMMAND.arguments, "data.batch_size=16", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "2 classes, images: 76 training, 4 validation (held out of the" in trained.stdout

    last = "resume=runs/bars/checkpoints/last.ckpt"
    refused = run("train.py", last, "trainer.max_epochs=3", cwd=tmp_path)
    assert refused.returncode == 1
    assert f"if you trust it, pass {own} too" in refused.stderr
    resumed = run("train.py", last, "trainer.max_epochs=3", own, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    facts = resumed.stdout.splitlines()[1]
    assert facts.startswith("data          custom: 2 classes")  # not today's default

    deployed = run(
        *(
            "deploy.py",
            "ckpt=runs/bars/checkpoints/best.ckpt",
            "data=custom",
            own,
            "formats=[onnx]",
        ),
        *("benchmark=false", "int8=false"),
        cwd=tmp_path,
    )
    assert deployed.returncode == 0, deployed.stderr
    assert re.search(r"^model\.onnx +onnxruntime .* 100\.00 % +100\.00 %$", deployed.stdout, re.M)

    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 5] = 255
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    labelled = run("predict", "model=runs/bars/deploy/model.onnx", "images=grey.png", cwd=tmp_path)
    assert labelled.stdout.split()[1] == "down", labelled.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "csv", "greyscale"])
def test_files_without_a_split_train_from_the_command_line(kind, tmp_path):
    make(tmp_path / "photos")
    rows = [f"photos/{name}/{i}.jpg,{name}" for name in ("cat", "dog") for i in range(6)]
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *rows]))
    data = {
        "folder": ["data=imagefolder", "data.root=photos"],
        "csv": ["data=csv", "data.root=.", "data.train=train.csv"],
        "greyscale": ["data=imagefolder", "data.root=photos", "data.in_channels=1"],
    }[kind]
    size = ["data.image_size=32", "data.resize_size=32", "data.batch_size=4", "data.num_workers=0"]

    done = run("train.py", *data, *size, "model=repvgg_tiny", "trainer.max_epochs=1", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    place = "train.csv" if kind == "csv" else "photos/"
    counts = f"2 classes, images: 10 training ({place}), 2 validation (held out of {place})"
    assert counts in done.stdout.splitlines()[1]


def test_a_user_types_a_missing_target(tmp_path):
    done = run("train.py", "data=custom", "model=repvgg_tiny", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stdout == f"repvgg {repvgg.__version__}: training repvgg_tiny on custom ...\n"
    assert done.stderr == (
        "train.py: data._target_ is missing: pass data._target_=mypackage.make_data\n"
    )


@pytest.mark.parametrize("name", ["custom", "torchvision"])
def test_the_keys_of_the_configuration_are_the_arguments(name):
    from repvgg.data import from_dataset, torchvision
    from repvgg.data.custom import ItemOptions
    from repvgg.targets import signature_of

    config = compose("train", f"data={name}")["data"]
    known = {*ItemOptions.__annotations__} - {"mixup", "cutmix", "seed"}
    own = {*signature_of(torchvision).parameters} - {"options"} if name == "torchvision" else set()

    assert config.keys() - {"_target_"} == known | own
    defaults = signature_of(from_dataset).parameters
    for key in known - {"augment"}:
        assert config[key] == defaults[key].default, key


def test_the_keys_of_files_are_the_arguments():
    from repvgg.data.folders import FileOptions, _image_files
    from repvgg.targets import signature_of

    defaults = signature_of(_image_files).parameters
    for name, own in (
        ("imagefolder", {"root", "cache_size"}),
        ("csv", {"root", "train", "val", "test", "path_column", "label_column"}),
    ):
        config = compose("train", f"data={name}")["data"]
        known = {*FileOptions.__annotations__} - {"mixup", "cutmix", "seed"}
        assert config.keys() - {"_target_"} == known | own
        for key in known - {"augment", "batch_size"}:
            assert config[key] == defaults[key].default, key
    assert (CONFIGS / "experiment" / "default" / "csv.yaml").exists()
