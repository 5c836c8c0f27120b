import re

import hydra
import pytest
import torch
from hydra.utils import instantiate

import repvgg
from repvgg.data.augment import by_batch
from repvgg.deploy import settings as deploy_settings
from repvgg.export.formats import FORMATS
from repvgg.models.registry import build_model
from tests.support.commands import CONFIGS, compose

OTHERS = {"torchvision", "timm", "custom"}
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml") if path.stem not in OTHERS)
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (CONFIGS / "data" / "augment").glob("*.yaml"))


def test_every_variant_has_its_file_and_every_file_its_variant():
    assert sorted(repvgg.list_models()) == MODELS


def test_a_search_alone_sets_hydras_mode():
    """Which `tests.support.commands.run` relies on."""
    setting = [
        path
        for path in CONFIGS.rglob("*.yaml")
        if re.search(r"\bmode: (RUN|MULTIRUN)", path.read_text())
    ]

    assert {path.parent.name for path in setting} <= {"hparams_search"}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes(model):
    assert compose("train", f"model={model}")["model"]["name"] == model


@pytest.mark.parametrize("data", DATA)
def test_every_data_set_composes(data):
    assert compose("train", f"data={data}")["model"]["name"] == "repvgg_a0"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_model_file_is_its_size_and_its_name(model):
    first, second = (CONFIGS / "model" / f"{model}.yaml").read_text().splitlines()

    with torch.device("meta"):
        network = repvgg.create_model(model)
    sizes = [
        f"{sum(p.numel() for p in form.parameters()) / 1e6:.2f}"
        for form in (network, repvgg.switch_to_deploy(network))
    ]
    assert first.startswith(f"# {sizes[0]} / {sizes[1]} M parameters")
    assert second == f"name: {model}"


@pytest.mark.parametrize("data", DATA)
def test_a_network_of_torchvision_composes_with_every_data_set(data):
    config = compose("train", f"data={data}", "model=torchvision", "model.name=resnet34")["model"]

    assert (config["library"], config["name"]) == ("torchvision", "resnet34")
    assert {config[key] for key in ("strides", "dropout", "branch_drop", "drop_path")} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_opens_with_its_command_and_composes(experiment):
    first, command, *_ = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()

    config = compose("train", *command.removeprefix("# python train.py ").split())

    assert first == "# @package _global_"
    assert f"experiment={experiment}" in command
    with torch.device("meta"):
        build_model(config["model"] | {"num_classes": 10})
    assert set(config) == set(compose("train"))


@pytest.mark.parametrize("data", DATA)
def test_a_data_config_sets_data_alone(data):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert set(hydra.compose(f"data/{data}")) == {"data"}


def test_every_data_set_has_a_default_recipe():
    recipes = sorted(path.stem for path in (CONFIGS / "experiment" / "default").glob("*.yaml"))

    assert recipes == DATA


def test_an_experiment_takes_the_default_recipe_of_its_data():
    config = compose("train", "experiment=imagenet_120", "data=cifar10")

    assert config["model"]["strides"] == [1, 1, 2, 2, 2]
    assert config["trainer"]["max_epochs"] == 120


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagefolder"])
def test_a_preset_of_transforms_augments(preset, data):
    config = compose("train", f"data={data}", f"data/augment={preset}")["data"]

    transforms = instantiate(config, _convert_="all", _target_="builtins.dict")["augment"]
    augment = by_batch(transforms, padding=4, size=32)

    assert (augment is None) == (preset == "none")
    assert augment is None or augment(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.Generator()
    ).shape == (2, 3, 32, 32)


def test_the_command_line_wins_over_the_transforms_of_an_experiment():
    config = compose("train", "experiment=imagenet_200", "data/augment=basic")

    assert config["data"]["augment"] == []


def test_a_data_set_of_the_user_needs_no_recipe(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: mine.open\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"

    assert compose("train", search, "data=mine")["data"] == {"_target_": "mine.open"}


def test_the_command_line_wins_over_an_experiment():
    config = compose("train", "experiment=imagenet_200", "model=repvgg_b2g4", "mixup=0.4")

    assert (config["model"]["name"], config["mixup"]) == ("repvgg_b2g4", 0.4)
    assert config["trainer"]["max_epochs"] == 200


@pytest.mark.parametrize(
    ("typed", "weight"), [("false", False), ("true", True), ("0.3", 0.3), ("2", 2)]
)
def test_rdrop_is_one_scalar(typed, weight):
    assert compose("train", f"rdrop={typed}")["rdrop"] == weight


def test_the_command_line_wins_over_the_data_config():
    config = compose("train", "model.strides=[2,2,2,2,2]", "trainer.max_epochs=3", "optim.lr=0.5")

    assert config["model"]["strides"] == [2, 2, 2, 2, 2]
    assert (config["trainer"]["max_epochs"], config["optim"]["lr"]) == (3, 0.5)


def test_the_deployment_composes():
    assert compose("deploy")["formats"] == ["safetensors", "onnx"]


@pytest.mark.parametrize("data", DATA)
def test_the_deployment_composes_with_every_data_set(data):
    target = compose("deploy", f"data={data}")["data"]["_target_"]

    assert target is None if data == "custom" else target.startswith("repvgg.data.")


def test_the_formats_that_the_command_line_knows_are_those_of_the_package():
    assert list(deploy_settings.CHOICES) == list(FORMATS)
