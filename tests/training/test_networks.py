"""Training networks that are not RepVGG: the user's own, timm's, torchvision's, from the shell."""

import pytest
import timm
import torch

from repvgg import checkpoint
from repvgg.checks import ArgumentError
from repvgg.models.libraries import check_custom
from repvgg.training.compatibility import check_batch_of_one, check_runs
from repvgg.training.criterion import check_loss
from repvgg.training.parts import Part
from tests.support.commands import run, run_process
from tests.support.networks import settle

CODE = """
from torch import nn


class MyNet(nn.Module):
    def __init__(self, num_classes, in_channels=1, width=8):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norms = nn.Sequential(nn.BatchNorm2d(width), nn.BatchNorm2d(width))
        self.drop = nn.Dropout(0.2)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.linear(self.drop(self.norms(self.conv(images)).relu().mean((2, 3))))


class Features(MyNet):
    def forward(self, images):
        return self.conv(images)


class Pair(MyNet):
    def forward(self, images):
        return super().forward(images), images


def broken(num_classes):
    raise ValueError("of my own code")


class FailsLater(MyNet):
    def forward(self, images):
        if self.training:
            raise ValueError("of my own forward")
        return super().forward(images)
"""
CUSTOM = ("model=custom", "model._target_=mynets.MyNet", "+model.width=4")
SHORT = ("trainer.max_epochs=1", "data.batch_size=256", "trainer.enable_progress_bar=false")
RUN = ("hydra.run.dir=runs/own",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the user's code, and a run that trained it with R-Drop."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mynets.py").write_text(CODE)
    done = run("train.py", *CUSTOM, *SHORT, *RUN, "rdrop=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mynets.py").write_text(CODE)
    return tmp_path


@pytest.mark.slow
def test_a_network_in_a_file_of_the_current_folder_trains_with_rdrop(trained):
    folder, printed = trained

    assert "R-Drop 1" in printed
    assert "network=mynets.MyNet" in next(
        line for line in printed.splitlines() if line.startswith("deploy it")
    )
    assert (folder / "runs" / "own" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_its_run_resumes_only_if_its_name_is_passed_again(trained):
    folder, _ = trained
    last = "resume=runs/own/checkpoints/last.ckpt"

    without = run("train.py", last, "trainer.max_epochs=2", cwd=folder)
    with_it = run("train.py", last, "trainer.max_epochs=2", CUSTOM[1], cwd=folder)

    assert without.returncode == 1
    assert "if you trust it, pass model._target_=mynets.MyNet too" in without.stderr
    assert with_it.returncode == 0, with_it.stderr


@pytest.mark.slow
def test_it_deploys_and_verifies_with_the_name_of_its_code(trained):
    folder, _ = trained
    arguments = ("ckpt=runs/own/checkpoints/best.ckpt", "benchmark=false", "out=deployed")

    without = run("deploy.py", *arguments, cwd=folder)
    deployed = run("deploy.py", *arguments, "network=mynets.MyNet", cwd=folder)
    blind = run("verify", "folder=deployed", cwd=folder)
    verified = run("verify", "folder=deployed", "network=mynets.MyNet", cwd=folder)

    assert without.stderr == (
        "deploy.py: 'runs/own/checkpoints/best.ckpt': network is missing: this is the code "
        "mynets.MyNet(width=4), which no file may run; if you trust it, pass network=mynets.MyNet\n"
    )
    assert deployed.returncode == 0, deployed.stderr
    assert "model.safetensors': network is missing" in blind.stderr
    assert verified.returncode == 0, verified.stderr


@pytest.mark.slow
def test_its_checkpoint_opens_with_its_class_alone(trained):
    folder, _ = trained
    path = folder / "runs" / "own" / "checkpoints" / "best.ckpt"

    with pytest.raises(ArgumentError, match="network is missing"):
        checkpoint.load(path)
    with pytest.raises(ArgumentError, match="unexpected keyword argument 'width'"):
        checkpoint.load(path, network=lambda num_classes: torch.nn.Linear(1, num_classes))


@pytest.mark.slow
def test_it_trains_on_from_its_checkpoint_and_inspect_names_its_code(trained):
    folder, _ = trained
    path = "runs/own/checkpoints/best.ckpt"

    again = run("train.py", f"init={path}", *CUSTOM, *SHORT, "hydra.run.dir=runs/b", cwd=folder)
    shown = run("inspect", f"path={path}", cwd=folder)

    assert "initialized from MyNet; new: nothing" in again.stdout
    assert "the code mynets.MyNet(width=4)" in shown.stdout


@pytest.mark.slow
def test_it_trains_on_two_devices_with_frozen_modules(trained):
    folder, _ = trained
    devices = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp")
    frozen = ("freeze=[norms.0]", "optim.layer_decay=0.8", "hydra.run.dir=runs/two")

    done = run_process("train.py", *CUSTOM, *SHORT, *frozen, *devices, cwd=folder, forks=1)

    assert done.returncode == 0, done.stderr
    last = folder / "runs" / "two" / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["state_dict"]
    assert kept["net.norms.0.num_batches_tracked"] == 0
    assert kept["net.norms.1.num_batches_tracked"] > 0
    assert done.stdout.count("frozen norms.0: 8 parameters") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "model._target_ is missing: pass model._target_=mypackage.MyNet"),
        (("model._target_=mynets.MyNett",), "mynets has no MyNett; did you mean MyNet?"),
        (("model._target_=missing.MyNet",), "there is no module missing, neither in "),
        (("model._target_=mynets.MyNet", "+model.widht=3"), "its signature is MyNet(num_classes"),
        (("model._target_=mynets.MyNet", "+model.width={_target_: os.system}"), "a plain value"),
        (("model._target_=mynets.Features",), "it returns (2, 8, 8, 8); the data has 10 classes"),
        (("model._target_=mynets.Pair",), "it returns a tuple; the data has 10 classes"),
    ],
)
def test_a_network_that_cannot_be_trained_is_an_error_in_one_line(code, arguments, words):
    done = run("train.py", "model=custom", *arguments, *SHORT, cwd=code)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert words in done.stderr
    assert not (code / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [("broken", "of my own code"), ("FailsLater", "of my own forward")],
)
def test_an_error_of_the_users_own_code_keeps_its_traceback(code, name, line):
    done = run("train.py", "model=custom", f"model._target_=mynets.{name}", cwd=code)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ValueError: {line}"
    assert f'mynets.py", line {CODE[: CODE.index(line)].count(chr(10)) + 1}, in ' in done.stderr


@pytest.mark.slow
def test_a_network_of_timm_starts_from_published_weights(tmp_path):
    published = settle(timm.create_model("mobilenetv3_small_050"))
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    model = ("model=timm", "model.name=mobilenetv3_small_050", "model.pretrained=true")
    overlay = f"+model.pretrained_cfg_overlay={{file: '{tmp_path}/weights.pth'}}"

    done = run("train.py", *model, overlay, *SHORT, *RUN, "optim.lr=0", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "initialized from timm's mobilenetv3_small_050.lamb_in1k; new: classifier.weight" in (
        done.stdout
    )
    opened = checkpoint.load(tmp_path / "runs" / "own" / "checkpoints" / "last.ckpt")
    stem = published.conv_stem.weight.sum(1, keepdim=True)
    torch.testing.assert_close(opened.model.conv_stem.weight, stem)
    assert opened.config.keys().isdisjoint({"pretrained", "pretrained_cfg_overlay"})


def test_parts_in_eval_mode_stay_in_it_when_a_network_is_tried():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2).eval())
    network.extend([torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()])
    images = torch.rand(2, 1, 8, 8)

    check_runs(network, images, {"name": "own", "num_classes": 2})
    check_batch_of_one(network, images[:1], 1)
    part = Part("loss._target_", "mine.loss", {})
    check_loss(part, torch.nn.functional.cross_entropy, network, images, torch.tensor([0, 1]))

    assert [module.training for module in network] == [True, False, True, True]


@pytest.mark.slow
def test_a_network_that_its_factory_gives_in_eval_mode_trains(code):
    (code / "mynets.py").write_text(
        f"{CODE}\n\ndef loaded(**given):\n    return MyNet(**given).eval()\n"
    )
    arguments = (*SHORT, *RUN, "rdrop=true")  # its dropout is seen in training mode alone

    done = run("train.py", "model=custom", "model._target_=mynets.loaded", *arguments, cwd=code)

    assert done.returncode == 0, done.stderr


def test_a_name_that_a_factory_would_not_get_is_an_error():
    def build(num_classes, name="small"):
        raise AssertionError("it only names the run")

    config = {"_target_": "own.build", "num_classes": 2, "in_channels": 1}
    check_custom(build, **config, name="custom")

    with pytest.raises(ArgumentError, match=r"^name=wide: .* not passed on to own\.build"):
        check_custom(build, **config, name="wide")
    check_custom(lambda num_classes, **rest: None, **config, name="wide")
