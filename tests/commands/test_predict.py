"""repvgg predict: which images it labels, and how it prints and writes the labels.

tests/deploy/test_command.py has it with every kind of deployed file.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import repvgg
from repvgg import checkpoint
from repvgg.contract import DataContract, to_float
from repvgg.deploy import predict
from tests.support.commands import run, tree
from tests.support.networks import settle

CLASSES = ["plain", 'quoted "a", b', "tab\tand\nline"]
CONFIG = {"name": "repvgg_tiny", "num_classes": 3, "in_channels": 3}
NAMES = ["a.png", "b c.png", "d,e.png", "sub/f\tg\nh.png"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A checkpoint, and a folder of four images and one that is none."""
    place = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    network = settle(repvgg.create_model(**CONFIG))
    data = DataContract(CLASSES, 3, [16, 16], [0.5] * 3, [0.25] * 3, "bilinear")
    opened = checkpoint.Network(network, CONFIG, data, "")
    checkpoint.save(place / "x.ckpt", checkpoint.with_noise(opened, data))
    noise = np.random.default_rng(0)
    (place / "shots" / "sub").mkdir(parents=True)
    for name in NAMES:
        pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "shots" / name)
    (place / "mixed").mkdir()
    (place / "mixed" / "bad.png").write_text("no image")
    (place / "mixed" / "good.png").write_bytes((place / "shots" / "a.png").read_bytes())
    return place


def expected(home: Path) -> list[list[tuple[str, float]]]:
    """The classes of each image and their probabilities, the best first."""
    opened = checkpoint.load(home / "x.ckpt")
    found = []
    for name in NAMES:
        pixels = torch.from_numpy(np.array(Image.open(home / "shots" / name))).permute(2, 0, 1)
        with torch.no_grad():
            (shares,) = opened.predictor(to_float(pixels[None])).softmax(1).tolist()
        found.append(sorted(zip(CLASSES, shares, strict=True), key=lambda pair: -pair[1]))
    return found


def test_a_checkpoint_prints_a_line_for_each_image(home):
    done = run("predict", "model=x.ckpt", "images=shots", "top=2", "batch_size=3", cwd=home)

    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        *(f"shots/{name}" for name in NAMES[:3]),
        r"shots/sub/f\tg\nh.png",
    ]
    for (_, *cells), classes in zip(lines, expected(home), strict=True):
        assert cells == [
            cell
            for name, share in classes[:2]
            for cell in (name.replace("\t", r"\t").replace("\n", r"\n"), f"{share:.4f}")
        ]


def test_json_holds_every_path_and_its_classes(home, tmp_path):
    out = tmp_path / "labels.json"

    done = run("predict", "model=x.ckpt", "images=shots", "top=9", f"out={out}", cwd=home)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"written to {out}: 4 images\n"
    held = json.loads(out.read_text())
    assert [image["path"] for image in held] == [f"shots/{name}" for name in NAMES]
    for image, classes in zip(held, expected(home), strict=True):
        found = [(one["class"], one["probability"]) for one in image["predictions"]]
        assert [name for name, _ in found] == [name for name, _ in classes]
        assert [share for _, share in found] == pytest.approx([share for _, share in classes])


def test_csv_holds_every_path_and_its_classes(home, tmp_path):
    out = tmp_path / "labels.csv"

    done = run("predict", "model=x.ckpt", "images=shots", "top=2", f"out={out}", cwd=home)

    assert (done.returncode, done.stderr) == (0, "")
    with out.open(newline="") as file:
        columns, *rows = csv.reader(file)
    assert columns == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in rows] == [f"shots/{name}" for name in NAMES]
    assert [row[1::2] for row in rows] == [
        [name for name, _ in classes[:2]] for classes in expected(home)
    ]


@pytest.mark.parametrize(
    ("images", "names"),
    [
        ("shots/a.png", ["a.png"]),
        ("shots/*.png", NAMES[:3]),
        ("shots/**/*.png", NAMES),
        ("[shots/b c.png, shots/a.png]", ["b c.png", "a.png"]),
        ("[shots/a.png,shots/a*]", ["a.png"]),
    ],
)
def test_images_are_a_file_a_pattern_or_a_list(images, names, home, monkeypatch):
    monkeypatch.chdir(home)

    assert predict.find(images) == [Path("shots") / name for name in names]


def test_an_image_whose_name_looks_like_a_pattern_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("[1].png")

    assert predict.find("[1].png") == [Path("[1].png")]


@pytest.mark.parametrize("out", [None, "labels.json"])
def test_unreadable_images_are_reported_and_the_others_labelled(out, home, tmp_path):
    arguments = [f"model={home / 'x.ckpt'}", f"images={home / 'mixed'}"]

    done = run("predict", *arguments, *([f"out={out}"] if out else []), cwd=tmp_path)

    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert "bad.png: cannot be read as an image" in first
    assert last == "repvgg predict: 1 of 2 images could not be labelled"
    labelled = (tmp_path / out).read_text() if out else done.stdout
    assert "good.png" in labelled
    assert "bad.png" not in labelled


def test_a_file_of_labels_is_replaced_only_if_that_was_asked_for(home, tmp_path):
    out = tmp_path / "labels.csv"
    out.write_text("mine")

    kept = run("predict", "model=x.ckpt", "images=shots", f"out={out}", cwd=home)
    before = out.read_text()
    written = run(
        "predict", "model=x.ckpt", "images=shots", f"out={out}", "overwrite=true", cwd=home
    )

    assert (kept.returncode, before) == (1, "mine")
    assert "exists: pass overwrite=true" in kept.stderr
    assert written.returncode == 0
    assert out.read_text().startswith("path,class_1")


def test_a_failure_while_writing_leaves_the_old_file(home, tmp_path, monkeypatch):
    (tmp_path / "labels.json").write_text("mine")

    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="No space left"):
        predict.write([predict.Labelled(Path("a.png"), [])], tmp_path / "labels.json")

    assert tree(tmp_path).keys() == {"labels.json"}
    assert (tmp_path / "labels.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=shots", "top=0"], "top=0: must be an integer of at least 1"),
        (["images=shots", "out=x.txt"], "out=x.txt: its ending must be .json or .csv"),
        (["images=shots", "out=none/x.csv"], "out=none/x.csv: there is no folder none"),
        (["images=none/*.png"], "images=none/*.png: there is no image"),
        (["images=shots", "model=shots"], "model=shots: is a folder; pass for example model=FILE"),
        (["images=shots", "model=none.ckpt"], "'none.ckpt' is no file"),
        (["images=shots", "model=shots/a.png"], "'shots/a.png' cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, home):
    done = run("predict", "model=x.ckpt", *arguments, cwd=home)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
