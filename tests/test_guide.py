"""Every command of docs/guide.md, docs/train.md and docs/network.md runs, shortened."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torchvision import models

from tests.support.commands import ROOT, make, run
from tests.support.mnist import write_mnist

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
GUIDE, TRAIN, NETWORK = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("guide", "train", "network")
)
OF_NETWORK = [text for kind, text in FENCE.findall(NETWORK) if kind == "bash"]
COMMANDS = [
    *re.findall(r"\| `((?:python|repvgg) [^`]+)` \|$", GUIDE, flags=re.MULTILINE),
    *re.findall(r"^\+(python .*)$", GUIDE, flags=re.MULTILINE),
    *(line for kind, text in FENCE.findall(TRAIN) if kind == "bash" for line in text.splitlines()),
]


def code(page: str, kind: str = "python") -> str:
    return "\n".join(text for found, text in FENCE.findall(page) if found == kind)


ADDED = [text for text in FENCE.findall(GUIDE) if text[0] == "diff"][:3]  # a network, a loss, data
FILES = {
    "mine.py": "\n".join(line[1:] for _, text in ADDED for line in text.splitlines()),
    "mylosses.py": code(TRAIN),
    "mynets.py": code(NETWORK),
    "recipes/experiment/mine.yaml": code(GUIDE, "yaml"),
}
TIMM, TORCHVISION = "mobilenetv3_small_050", "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Published weights, as after their download."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm.create_model(TIMM).state_dict(), folder / "timm.pth")
    url = models.get_model_weights(TORCHVISION)["DEFAULT"].url
    cached = folder / "hub" / "checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    torch.save(models.get_model(TORCHVISION).state_dict(), cached)
    return folder


@pytest.fixture
def place(tmp_path):
    """A folder with what the pages name: the user's code, a recipe, images."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    photos = make(tmp_path / "photos")
    rows = [f"{path.relative_to(photos)},{path.parent.name}" for path in photos.rglob("*.jpg")]
    (photos / "train.csv").write_text("\n".join(["path,label", *rows]))
    write_mnist(tmp_path / "data", "FashionMNIST")
    return tmp_path


def shortened(arguments: list[str], weights: Path) -> list[str]:
    """The arguments of train.py, and others that keep the run short."""
    passed = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    searches = bool(passed & {"-m", "hparams_search"})
    data = next((one for one in arguments if one.startswith("data=")), "")
    if "resume" in passed:
        return arguments
    added = ["hydra.sweep.dir=runs/new" if searches else "hydra.run.dir=runs/new"]
    if not passed & {"model", "--config-dir"}:
        added += ["model=repvgg_tiny"]
    if "debug" not in passed:
        added += ["trainer.max_epochs=1", "+trainer.limit_train_batches=2"]
    if data:
        added += ["data.batch_size=4"]
    if data in ("data=imagefolder", "data=csv"):
        added += ["data.image_size=32", "data.resize_size=32"]
    if "model.pretrained" in passed:
        added += [f"+model.pretrained_cfg_overlay={{file: '{weights}/timm.pth'}}"]
    return [*arguments, *added]


@pytest.mark.slow
@pytest.mark.filterwarnings(  # of optuna, mlflow and sqlalchemy
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_pages_runs(command, place, weights, folder, monkeypatch):
    for package in ("wandb", "mlflow"):
        if package in command and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("TORCH_HOME", str(weights))
    if "runs/first" in command:
        shutil.copytree(folder, place / "runs" / "first")
    _, program, *arguments = shlex.split(command)
    if program == "train.py":
        arguments = shortened(arguments, weights)

    done = run(program, *arguments, cwd=place)

    assert done.returncode == 0, done.stderr
    if program == "train.py" and "debug=fdr" not in command:
        assert list((place / "runs").rglob("metrics.csv"))
        assert list((place / "runs").rglob("best.ckpt"))


@pytest.mark.slow
def test_the_commands_of_the_page_on_networks_run_one_after_the_other(place):
    for line in OF_NETWORK[0].splitlines():
        _, program, *arguments = shlex.split(line)
        short = ["trainer.max_epochs=1"] if program == "train.py" else ["benchmark=false"]
        done = run(program, *arguments, *short, cwd=place)
        assert done.returncode == 0, done.stderr


def test_the_guide_has_its_twenty_things():
    rows = [line for line in GUIDE.splitlines() if line.startswith("| ")][1:]

    assert len([row for row in rows if not row.startswith("| |")]) >= 20


def test_three_lines_add_a_network_a_loss_and_a_data_set():
    assert [len(text.splitlines()) for _, text in ADDED] == [3, 3, 3]
