"""Networks of torchvision, of timm and of the user, and their published weights."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision import models

import repvgg
from repvgg.checks import ArgumentError
from repvgg.models.pretrained import pretrained, split_weights
from repvgg.models.registry import build_model
from tests.support.networks import settle

SHUFFLE = {"library": "torchvision", "name": "shufflenet_v2_x0_5", "weights": "DEFAULT"}
MOBILE = {"library": "timm", "name": "mobilenetv3_small_050"}


class Own(nn.Module):
    def __init__(self, num_classes, in_chans=3, width=8):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.linear(self.bn(self.conv(images)).relu().mean((2, 3)))


def own(**arguments):
    config = {"library": "custom", "_target_": "own_code.Own", "num_classes": 5, "in_channels": 1}
    return config | arguments


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A network of torchvision whose weights lie in the cache, as after a download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights(SHUFFLE["name"])["DEFAULT"]
    network = settle(models.get_model(SHUFFLE["name"])).eval()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / Path(weights.url).name)
    return network


def test_published_weights_of_torchvision_are_opened_with_their_classes(published):
    found = pretrained(SHUFFLE, 3)
    images = torch.rand(2, 3, 64, 64)

    assert torch.equal(found.network(images), published(images))
    assert found.data.classes[0] == "tench"
    assert found.origin == "torchvision's shufflenet_v2_x0_5, IMAGENET1K_V1"


def test_for_one_channel_the_kernels_of_three_are_added_up(published):
    network = pretrained(SHUFFLE, 1).network
    images = torch.rand(2, 1, 64, 64)

    torch.testing.assert_close(network(images), published(images.expand(2, 3, 64, 64)))


def test_published_weights_can_be_over_parameterized(published):
    network = pretrained(SHUFFLE | {"over_parameterize": True}, 3).network.eval()
    images = torch.rand(2, 3, 64, 64)

    torch.testing.assert_close(network(images), published(images), rtol=1e-4, atol=1e-4)
    assert repvgg.switch_to_deploy(network).state_dict().keys() == published.state_dict().keys()


def test_published_weights_need_one_channel_or_three(published):
    with pytest.raises(ArgumentError, match="is for 3 channels, the data has 4"):
        pretrained(SHUFFLE, 4)


def test_published_weights_of_timm_are_opened(tmp_path):
    network = settle(timm.create_model(MOBILE["name"])).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}

    found = pretrained(MOBILE | overlay | {"pretrained": True}, 3)

    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(found.network(images), network(images))
    assert found.data.classes[0] == "tench"
    assert found.origin == "timm's mobilenetv3_small_050.lamb_in1k"


def test_weights_that_cannot_be_downloaded_are_an_error_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network\nand more")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fail)

    with pytest.raises(OSError, match=r"published weights cannot be downloaded \(no network\)$"):
        pretrained(SHUFFLE, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_that_transform_their_input_do_so_in_the_run_too(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    whole = models.get_model(name, transform_input=True, init_weights=False)
    weights = models.get_model_weights(name)["DEFAULT"]
    torch.save(whole.state_dict(), cache / Path(weights.url).name)
    config = {"library": "torchvision", "name": name}

    found = pretrained(config | {"weights": "DEFAULT"}, 3)
    network = build_model(config | found.arguments)

    assert network.transform_input
    assert network.state_dict().keys() == found.network.state_dict().keys()


def test_every_published_weight_of_torchvision_says_what_it_was_trained_on():
    for name in models.list_models(models):
        for weights in models.get_model_weights(name):
            if weights.name == "IMAGENET1K_FEATURES":
                continue
            recipe = weights.transforms()
            assert len(recipe.mean) == len(recipe.std) == 3, name
            assert recipe.crop_size[0] > 0, name
            assert recipe.interpolation.value in ("bilinear", "bicubic"), name
            assert len(weights.meta["categories"]) == 1000, name


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (SHUFFLE, "DEFAULT"),
        (MOBILE | {"pretrained": True, "pretrained_cfg_overlay": {"file": "x"}}, True),
        (MOBILE | {"pretrained": False}, None),
        ({"name": "repvgg_a0"}, None),
    ],
)
def test_the_weights_are_no_argument_of_the_network(config, weights):
    rest, found = split_weights(config)

    assert found == weights
    assert rest.keys() <= {"library", "name"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SHUFFLE | {"weights": "IMAGENET1K_V9"}, "must be one of IMAGENET1K_V1, DEFAULT"),
        (
            SHUFFLE | {"name": "vgg16", "weights": "IMAGENET1K_FEATURES"},
            "must be one of IMAGENET1K_V1, DEFAULT",
        ),
        (SHUFFLE | {"name": "shufflenet"}, "name=shufflenet: there is no such model; did you mean"),
        (MOBILE | {"pretrained": "yes"}, "must be true or false"),
    ],
)
def test_weights_that_do_not_exist_are_an_error(config, words):
    with pytest.raises(ArgumentError, match=words):
        split_weights(config)


def test_timms_networks_take_their_own_arguments():
    network = build_model(MOBILE | {"num_classes": 7, "in_channels": 1, "dropout": 0.3})

    assert network(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert network.drop_rate == 0.3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "mobilnetv3_small_050"}, "did you mean mobilenetv3_small_050"),
        ({"name": "hf-hub:somebody/network"}, "name=hf-hub"),
        ({"foo": 1}, "foo=1, in_chans=3: timm's mobilenetv3_small_050 does not take this"),
        ({"act_layer": "nope"}, r"does not take this \(KeyError\('nope'\)\)"),
        ({"strides": [1, 1, 1, 1, 1]}, "must be None: timm's networks have none"),
        ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path"),
        ({"branch_drop": 0.1}, "needs over_parameterize=true"),
    ],
)
def test_a_wrong_argument_of_timm_is_an_error(config, words):
    with pytest.raises(ValueError, match=words):
        build_model(MOBILE | config)


def test_a_custom_network_gets_classes_and_channels_by_timms_name_too():
    network = build_model(own(width=4), network=Own)

    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    assert network.conv.out_channels == 4


def test_a_custom_network_can_be_over_parameterized():
    network = build_model(own(over_parameterize=True), network=Own)

    assert [name for name, _ in network.named_modules() if "branch_1x1" in name]


def test_a_config_never_imports_the_code_that_it_names(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))

    with pytest.raises(ArgumentError, match=r"own_code.Own\(width=4\), which no file may run"):
        build_model(own(width=4))


@pytest.mark.parametrize("where", ["act", "layers"])
def test_an_argument_of_a_custom_network_cannot_name_code(where):
    value = {"_target_": "os.system"}
    arguments = {where: value if where == "act" else [1, [value]]}

    with pytest.raises(ArgumentError, match="must be a plain value"):
        build_model(own(**arguments), network=Own)


@pytest.mark.parametrize(
    ("config", "factory", "words"),
    [
        (own(widht=4), Own, "did you mean width"),
        (own(), lambda **_: "network", "returns a str, not a torch.nn.Module"),
        ({"library": "torchvision", "name": "resnet18"}, Own, "needs no code of yours"),
        ({"name": "repvgg_tiny"}, Own, "needs no code of yours"),
    ],
)
def test_code_that_does_not_fit_is_an_error(config, factory, words):
    with pytest.raises(ArgumentError, match=words):
        build_model(config, network=factory)
