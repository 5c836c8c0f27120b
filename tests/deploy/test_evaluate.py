"""repvgg evaluate: what it measures, on which images, what it writes, and mistakes."""

import csv
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import repvgg
from repvgg import checkpoint
from repvgg.contract import DataContract, Description
from repvgg.data.sets import digits
from repvgg.deploy.evaluate_settings import EvaluateSettings, default_folder
from repvgg.deploy.evaluation import Evaluation
from repvgg.deploy.folder import write_sums
from repvgg.deploy.matching import check_images, fit_preprocessing, match_classes
from repvgg.export.formats import FORMATS
from tests.support.commands import compose, make, run, tree
from tests.support.foreign import authors, renamed
from tests.support.networks import settle

SYNSETS = [f"n{10000000 + number}" for number in range(1000)]
ANIMALS = DataContract(["bird", "cat", "dog"], 3, [16, 16], [0.5] * 3, [0.25] * 3, "bilinear", 18)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def config_of(num_classes: int, in_channels: int = 3) -> dict:
    return {"name": "repvgg_tiny", "num_classes": num_classes, "in_channels": in_channels}


def network_of(num_classes: int, in_channels: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return settle(repvgg.create_model(**config_of(num_classes, in_channels)))


def save(path: Path, data: DataContract) -> Path:
    """A checkpoint of ours that was never trained."""
    count, channels = len(data.classes), data.in_channels
    network = checkpoint.Network(network_of(count, channels), config_of(count, channels), data, "")
    checkpoint.save(path, checkpoint.with_noise(network, data))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint for three animals, and a folder of images of two of them."""
    home = tmp_path_factory.mktemp("animals")
    save(home / "animals.ckpt", ANIMALS)
    for part, count in (("train", 8), ("val", 5)):
        make(home / "images" / part, count=count)
    return home


@pytest.fixture(scope="module")
def evaluated(once, folder) -> tuple[Path, str]:
    """The best checkpoint of the short run on the test images, as train.py tested it."""
    arguments = [f"ckpt={folder / 'checkpoints' / 'best.ckpt'}", "data=digits", "out=out"]
    home, done = once(
        "evaluated",
        lambda home: run(
            "evaluate", *arguments, "data.batch_size=128", "predictions=true", cwd=home
        ),
    )
    assert done.stderr == ""
    return home / "out", done.stdout


def test_the_numbers_are_those_that_training_printed(evaluated, trained):
    (line,) = (line for line in trained.stdout.splitlines() if line.startswith("test accuracy"))
    accuracy, top5, loss = (part.split()[-1] for part in line.split(", "))

    lines = dict(line.split(maxsplit=1) for line in evaluated[1].splitlines())

    assert lines["top-1"].split()[0] == accuracy
    assert (lines["top-5"], lines["loss"]) == (top5, loss)


def test_the_numbers_are_those_that_training_logged_to_the_last_bit(evaluated, folder):
    logged = {}
    for path in folder.glob("events*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("test/"):
                logged[tag.removeprefix("test/")] = events.Scalars(tag)[-1].value

    written = json.loads((evaluated[0] / "metrics.json").read_text())

    assert set(logged) == {"accuracy", "accuracy_top5", "loss", "calibration_error"}
    assert {key: written[key] for key in logged} == logged


def test_the_folder_says_what_was_evaluated(evaluated, folder):
    written = json.loads((evaluated[0] / "metrics.json").read_text())

    assert sorted(path.name for path in evaluated[0].iterdir()) == [
        "confusion.csv",
        "confusion.png",
        "metrics.json",
        "per_class.csv",
        "predictions.csv",
    ]
    assert written["checkpoint"] == str(folder / "checkpoints" / "best.ckpt")
    assert (written["split"], written["images"]) == ("test", 257)
    assert written["data"]["_target_"] == "repvgg.data.digits"
    assert written["environment"]["torch"] == version("torch")
    assert "evaluate" in written["command"]


def test_each_class_and_the_matrix_are_as_sklearn_counts_them(evaluated):
    predictions = read(evaluated[0] / "predictions.csv")
    truth = [int(row["label"]) for row in predictions]
    guess = [int(row["class_1"]) for row in predictions]
    precision, recall, f1, images = precision_recall_fscore_support(truth, guess)

    rows = read(evaluated[0] / "per_class.csv")
    matrix = [
        list(map(int, list(row.values())[1:])) for row in read(evaluated[0] / "confusion.csv")
    ]

    assert truth == digits().test.labels.tolist()
    assert matrix == confusion_matrix(truth, guess).tolist()
    for key, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [float(row[key]) for row in rows] == pytest.approx(expected.tolist())
    assert [int(row["images"]) for row in rows] == images.tolist()


def test_predictions_are_sorted_and_probabilities(evaluated):
    for row in read(evaluated[0] / "predictions.csv"):
        shares = [float(row[f"probability_{rank}"]) for rank in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < sum(shares) <= 1.00001


@pytest.mark.slow
def test_two_evaluations_write_the_same_bytes(place, tmp_path):
    arguments = [f"ckpt={place / 'animals.ckpt'}", "data=imagefolder", "split=all"]
    arguments += [f"data.root={place / 'images'}", "out=out", "predictions=true", "overwrite=true"]

    seen = []
    for workers in (0, 2):
        done = run("evaluate", *arguments, f"data.num_workers={workers}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        seen.append({name: held for name, held in files.items() if name != "metrics.json"})

    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("split", "count", "says"),
    [
        ("train", 16, "images    train/"),
        ("val", 10, "images    val/"),
        ("test", 10, "no test images: these are the validation images"),
        ("all", 26, "26 images"),
    ],
)
def test_all_images_of_a_split_are_read(split, count, says, place, tmp_path):
    """Fewer than a batch, in a data set with two of the network's three classes."""
    arguments = [f"ckpt={place / 'animals.ckpt'}", "data=imagefolder", f"split={split}"]

    done = run(
        "evaluate",
        *arguments,
        f"data.root={place / 'images'}",
        "predictions=true",
        "out=out",
        "data.num_workers=0",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "classes: 2 of the network's 3, by name" in done.stdout
    rows = read(tmp_path / "out" / "predictions.csv")
    assert len({row["image"] for row in rows}) == len(rows) == count
    assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
    assert [row["name"] for row in read(tmp_path / "out" / "per_class.csv")] == ["cat", "dog"]


def test_images_are_read_as_the_checkpoint_was_trained(place, tmp_path):
    """16 pixels from a shorter side of 18, though the data's own default is 224 from 256."""
    done = run(
        "evaluate",
        f"ckpt={place / 'animals.ckpt'}",
        "data=imagefolder",
        "split=val",
        "out=out",
        f"data.root={place / 'images'}",
        "data.num_workers=0",
        "predictions=true",
        cwd=tmp_path,
    )
    labelled = run(
        "predict",
        f"model={place / 'animals.ckpt'}",
        f"images={place / 'images' / 'val'}",
        "top=3",
        "out=labels.csv",
        cwd=tmp_path,
    )

    assert (done.returncode, labelled.returncode) == (0, 0), done.stderr + labelled.stderr
    ours = [list(row.values())[2:] for row in read(tmp_path / "out" / "predictions.csv")]
    assert ours == [list(row.values())[1:] for row in read(tmp_path / "labels.csv")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("safetensors", "logits"),
        ("safetensors", "probabilities"),
        ("onnx", "probabilities"),
        ("pt2", "logits"),
        ("openvino", "logits"),
    ],
)
def test_a_deployed_file_gives_the_numbers_of_its_checkpoint(name, output, tmp_path):
    contract = digits().contract
    save(tmp_path / "own.ckpt", contract)
    network = repvgg.switch_to_deploy(network_of(10, 1))
    known = FORMATS[name]
    description = Description(config_of(10, 1), contract, "uint8", output)
    known.save(network, tmp_path / known.filename, description)

    found = []
    for file in ("own.ckpt", known.filename):
        done = run(
            "evaluate",
            f"ckpt={file}",
            "data=digits",
            f"out={file}-out",
            f"trust={str(file.endswith('pt2')).lower()}",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        written = json.loads((tmp_path / f"{file}-out" / "metrics.json").read_text())
        found.append([written["accuracy"], written["loss"], written["calibration_error"]])

    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_third_party_weights_without_names_take_the_classes_in_order(place, tmp_path):
    torch.save(renamed(network_of(2), authors), tmp_path / "theirs.pth")

    done = run(
        "evaluate",
        "ckpt=theirs.pth",
        "data=imagefolder",
        f"data.root={place / 'images'}",
        "split=val",
        "data.num_workers=0",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "the file names no classes: the 2 of the data are taken in order" in done.stdout
    rows = read(tmp_path / "evaluate-val-theirs.pth" / "per_class.csv")
    assert [row["name"] for row in rows] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("data", "network", "assumed", "outputs", "note"),
    [
        (["a", "b"], ["a", "b"], False, [0, 1], ""),
        (["a", "b"], ["b", "a"], False, [1, 0], "in another order"),
        (["c", "a"], ["a", "b", "c"], False, [2, 0], "2 of the network's 3"),
        (["a", "b"], ["0", "1"], True, [0, 1], "taken in order"),
        (["1", "0"], ["0", "1"], False, [1, 0], "in another order"),
        (SYNSETS, [str(n) for n in range(1000)], False, list(range(1000)), "ImageNet's folders"),
        (SYNSETS, SYNSETS[::-1], False, list(range(999, -1, -1)), "in another order"),
    ],
)
def test_classes_are_found_by_name_or_in_order(data, network, assumed, outputs, note):
    match = match_classes(data, network, assumed=assumed)

    assert match.outputs.tolist() == outputs
    assert note in "".join(match.notes)


@pytest.mark.parametrize(
    ("data", "network", "assumed", "message"),
    [
        (["a", "x"], ["a", "b"], False, "1 of its 2 classes are none of the network's 2: x"),
        (["a", "b"], ["0", "1", "2"], True, "2 of its 2 classes are none"),
        (["a", "b"], ["a", "a", "b"], False, "1 of its 2 classes are none .*: a;"),
        (SYNSETS[:10], ["tench"] * 1000, False, "10 of its 10 classes"),
    ],
)
def test_a_class_that_the_network_lacks_is_an_error(data, network, assumed, message):
    with pytest.raises(ValueError, match=message):
        match_classes(data, network, assumed=assumed)


FOLDER = {"_target_": "repvgg.data.imagefolder", "image_size": 224, "eval_size": None}
FOLDER |= {"resize_size": 256, "interpolation": "bilinear", "in_channels": 1}


@pytest.mark.parametrize(
    ("config", "passed", "expected"),
    [
        (FOLDER, (), {"image_size": 16, "eval_size": None, "resize_size": 18}),
        (FOLDER, ("eval_size",), {"image_size": 224, "resize_size": 256}),
        (FOLDER, ("root",), {"image_size": 16, "interpolation": "bilinear", "in_channels": 3}),
        (FOLDER | {"_target_": "my.data"}, (), FOLDER | {"_target_": "my.data"}),
        ({"_target_": "repvgg.data.digits"}, (), {"_target_": "repvgg.data.digits"}),
    ],
)
def test_the_preprocessing_is_that_of_the_network_unless_it_is_passed(config, passed, expected):
    fitted = fit_preprocessing(config, ANIMALS, passed)

    assert expected.items() <= fitted.items()


def test_another_size_is_evaluated_only_if_it_was_passed():
    data = digits().contract
    network = DataContract(data.classes, 1, [32, 32], [0.5], [0.5], "bilinear")

    with pytest.raises(ValueError, match="its images have 8x8 pixels, the network takes 32x32"):
        check_images(data, network, {}, ())
    with pytest.raises(ValueError, match=r"takes 32x32; pass data\.image_size=32"):
        check_images(data, network, {"image_size": None}, ())
    assert "image_size is 8x8" in check_images(data, network, {}, ("image_size",))[0]


def test_the_interval_of_the_accuracy_is_wilsons():
    confusion = torch.tensor([[95, 5], [7, 93]])
    evaluation = Evaluation({"accuracy": 188 / 200}, confusion, ["a", "b"], [0, 1])

    expected = binomtest(188, 200).proportion_ci(0.95, method="wilson")

    assert evaluation.interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_class_that_is_never_predicted_has_no_precision():
    evaluation = Evaluation({"accuracy": 0.5}, torch.tensor([[2, 0], [2, 0]]), ["a", "b"], [0, 1])

    first, second = evaluation.per_class()

    assert (first.recall, first.precision, first.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (second.recall, second.precision, second.f1) == (0.0, None, 0.0)


def test_without_matplotlib_the_rest_is_written(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    done = run(
        "evaluate",
        f"ckpt={place / 'animals.ckpt'}",
        "data=imagefolder",
        "split=val",
        "out=out",
        f"data.root={place / 'images'}",
        "data.num_workers=0",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "confusion.png was not drawn: matplotlib is missing: run pip install" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json", "per_class.csv", "confusion.csv",
    }  # fmt: skip


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return save(tmp_path / "digits.ckpt", digits().contract)


@pytest.mark.slow
def test_an_evaluation_is_replaced_only_if_that_was_asked_for(ckpt, tmp_path):
    arguments = [f"ckpt={ckpt}", "data=digits", "out=out"]
    first = run("evaluate", *arguments, "predictions=true", cwd=tmp_path)
    before = tree(tmp_path)

    rejected = run("evaluate", *arguments, cwd=tmp_path)
    unchanged = tree(tmp_path) == before
    replaced = run("evaluate", *arguments, "overwrite=true", cwd=tmp_path)
    (tmp_path / "out" / "thesis.tex").touch()
    foreign = run("evaluate", *arguments, "overwrite=true", cwd=tmp_path)

    assert (first.returncode, replaced.returncode) == (0, 0), first.stderr + replaced.stderr
    assert rejected.returncode == 1
    assert "pass overwrite=true" in rejected.stderr
    assert unchanged
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert "is not an evaluation, so it is not replaced" in foreign.stderr
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.slow
def test_a_damaged_image_leaves_nothing_behind(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "val" / "cat" / "bad.jpg").write_text("no image")
    arguments = [f"ckpt={place / 'animals.ckpt'}", "data=imagefolder", "data.root=images"]
    arguments += ["split=val", "data.num_workers=0", "predictions=true", "out=out"]

    done = run("evaluate", *arguments, cwd=tmp_path)
    skipped = run("evaluate", *arguments, "data.skip_unreadable=true", cwd=tmp_path)
    replaced = run(
        "evaluate", *arguments, "data.skip_unreadable=true", "predictions=false", cwd=tmp_path
    )

    assert done.returncode == skipped.returncode == 1
    assert "bad.jpg: cannot be read" in done.stderr
    assert "predictions=true: with data.skip_unreadable=true" in skipped.stderr
    assert {len(failed.stderr.splitlines()) for failed in (done, skipped)} == {1}
    assert "unreadable images, each replaced by another: 1" in replaced.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


def test_a_network_without_finite_logits_is_an_error(tmp_path):
    data = digits().contract
    save(tmp_path / "x.ckpt", data)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["state_dict"]["net.linear.weight"][3] = 3e38  # finite, with infinite logits
    torch.save(content, tmp_path / "x.ckpt")

    done = run("evaluate", "ckpt=x.ckpt", "data=digits", "out=out", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr == "repvgg evaluate: ckpt: its logits are NaN or infinite on these images\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ckpt=null"], "ckpt is missing: run .* ckpt=PATH data=digits"),
        (["ckpt=none.ckpt"], "ckpt: 'none.ckpt' is no file"),
        (["~data"], "data is missing: pass for example data=digits"),
        (["split=tset"], "split='tset': must be one of train, val, test, all"),
        (["device=tpu"], "device='tpu': must be one of auto, cpu, cuda"),
        (["batch_size=0"], "batch_size=0: must be an integer of at least 1"),
        (["predictions=5"], "predictions=5: must be true or false"),
        (["+top=5"], "top: there is no such key"),
    ],
)
def test_a_wrong_setting_is_an_error(overrides, message, ckpt):
    config = compose("evaluate", "data=digits", f"ckpt={ckpt}", *overrides)

    with pytest.raises(ValueError, match=message):
        EvaluateSettings.read(config)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["checkpoints/best.ckpt"], "is the folder of a run; pass ckpt=.*/checkpoints/best.ckpt"),
        (["model.onnx", "model.bin"], "it holds model.onnx; pass for example ckpt=.*/model.onnx"),
        (["best.ckpt", "last.ckpt"], "pass for example ckpt=.*/best.ckpt"),
        (["notes.txt"], "is a folder; pass for example ckpt=FILE"),
    ],
)
def test_a_folder_is_answered_with_the_file_to_pass(files, message, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    with pytest.raises(ValueError, match=message):
        EvaluateSettings.read(compose("evaluate", "data=digits", f"ckpt={tmp_path}"))


def test_the_results_lie_beside_a_run_and_never_in_a_deployed_folder(tmp_path):
    run_folder = tmp_path / "run"
    for name in ("checkpoints", "deploy"):
        (run_folder / name).mkdir(parents=True)
    (run_folder / "deploy" / "model.onnx").touch()
    write_sums(run_folder / "deploy")

    assert default_folder(run_folder / "checkpoints" / "best.ckpt", "val") == (
        run_folder / "evaluate-val"
    )
    assert default_folder(run_folder / "checkpoints" / "last.ckpt", "val") == (
        run_folder / "evaluate-val-last.ckpt"
    )
    assert default_folder(run_folder / "deploy" / "model.onnx", "test") == (
        run_folder / "evaluate-test-model.onnx"
    )
    assert default_folder(tmp_path / "x.pth", "test") == tmp_path / "evaluate-test-x.pth"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m"], "-m: one checkpoint at a time"),
        (["optim.lr=1"], "optim.lr: there is no such key"),
        (["device=cuda"], "device=cuda: "),
        (["data=cifar10"], "ckpt: 'none' is no file"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, ckpt, tmp_path):
    path = "none" if arguments == ["data=cifar10"] else ckpt

    done = run("evaluate", f"ckpt={path}", "data=digits", "out=out", *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


CODE = """
from torch import nn


class MyNet(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.linear(images.flatten(1))
"""


DATA = """
import torch


class Shapes(torch.utils.data.Dataset):
    classes = ["cat", "dog"]

    def __len__(self):
        return 12

    def __getitem__(self, row):
        pixels = torch.full((3, 20, 20), row * 20, dtype=torch.uint8)
        return pixels, row % 2
"""


def test_data_of_the_users_own_is_evaluated_as_it_is_configured(place, tmp_path):
    (tmp_path / "owndata.py").write_text(DATA)
    arguments = [f"ckpt={place / 'animals.ckpt'}", "data=custom", "data._target_=owndata.Shapes"]
    arguments += ["split=all", "out=out", "data.batch_size=4"]

    other = run("evaluate", *arguments, cwd=tmp_path)
    done = run("evaluate", *arguments, "data.image_size=16", "predictions=true", cwd=tmp_path)

    assert other.stderr == (
        "repvgg evaluate: data: its images have 20x20 pixels, the network takes 16x16; pass "
        "data.image_size=16\n"
    )
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "out" / "predictions.csv")) == 12


@pytest.mark.slow
def test_a_network_of_the_users_own_is_built_by_the_code_that_was_passed(tmp_path):
    (tmp_path / "ownnets.py").write_text(CODE)
    config = {"library": "custom", "name": "custom", "_target_": "ownnets.MyNet", "width": 64}
    config |= {"num_classes": 10, "in_channels": 1}
    names: dict[str, type[torch.nn.Module]] = {}
    exec(CODE, names)
    own = checkpoint.Network(names["MyNet"](10, 64), config, digits().contract, "")
    checkpoint.save(tmp_path / "x.ckpt", checkpoint.with_noise(own, digits().contract))
    Image.new("L", (8, 8)).save(tmp_path / "x.png")

    blind = run("evaluate", "ckpt=x.ckpt", "data=digits", "out=out", cwd=tmp_path)
    done = run(
        "evaluate", "ckpt=x.ckpt", "data=digits", "out=out", "network=ownnets.MyNet", cwd=tmp_path
    )
    labelled = run("predict", "model=x.ckpt", "images=x.png", "network=ownnets.MyNet", cwd=tmp_path)

    assert "if you trust it, pass network=ownnets.MyNet" in blind.stderr
    assert (done.returncode, labelled.returncode) == (0, 0), done.stderr + labelled.stderr


@pytest.mark.slow
def test_the_script_of_a_clone_evaluates_without_a_warning(ckpt, tmp_path):
    done = run("scripts/evaluate.py", f"ckpt={ckpt}", "data=digits", "out=out", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "written to out"
