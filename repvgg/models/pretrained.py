"""Published weights of other libraries, from which a run starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from repvgg.checks import check_boolean, wrong_value
from repvgg.contract import DataContract, Plain
from repvgg.models.libraries import (
    NOT_REBUILT,
    check_torchvision,
    expanded,
    first_convolution,
    given_of,
    make_timm,
    make_torchvision,
    replace_stem,
)
from repvgg.models.registry import imagenet_classes

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


@dataclass(frozen=True)
class Pretrained:
    """A network with published weights.

    Attributes:
        network: with its own classifier, over-parameterized if the config says so.
        data: what it was trained on.
        origin: its name, for the reader.
        arguments: that the weights need beside those of the config.
    """

    network: nn.Module
    data: DataContract
    origin: str
    arguments: dict[str, Plain]


def split_weights(config: Mapping[str, Plain]) -> tuple[dict[str, Plain], Plain]:
    """The arguments that rebuild a network, and the published weights that it starts from.

    Raises:
        ArgumentError: the library has no published weights.
    """
    library = config.get("library", "repvgg")
    key = {"torchvision": "weights", "timm": "pretrained"}.get(str(library))
    rest = {name: value for name, value in config.items() if name != key}
    wanted = config.get(key) if key else None
    if library == "timm":
        if not check_boolean("pretrained", wanted or False):
            for name in (name for name in NOT_REBUILT if config.get(name) is not None):
                raise wrong_value(name, config[name], "has no effect without pretrained=true")
        rest = {name: value for name, value in rest.items() if name not in NOT_REBUILT}
    if library == "torchvision" and wanted is not None:
        _torchvision_weights(config)
    return rest, wanted or None


def pretrained(config: Mapping[str, Plain], in_channels: int) -> Pretrained:
    """Build a network with published weights, downloaded if they are not in the cache.

    The weights of a first convolution on three channels are added up for one channel, as timm does.

    Args:
        config: arguments of `build_torchvision` and weights, or of `build_timm` and pretrained.

    Raises:
        ArgumentError: there are no such weights, or they need other channels.
        OSError: they cannot be downloaded.
    """
    build = _pretrained_timm if config["library"] == "timm" else _pretrained_torchvision
    try:
        found = build(config, in_channels)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"model={config['name']}: its published weights cannot be downloaded ({reason})"
        ) from error
    own, drop = config.get("over_parameterize") is True, config.get("branch_drop")
    found.network.eval()
    network = expanded(found.network, own, cast("float | None", drop))
    return Pretrained(network, found.data, found.origin, found.arguments)


def _pretrained_torchvision(config: Mapping[str, Plain], in_channels: int) -> Pretrained:
    name, weights = str(config["name"]), _torchvision_weights(config)
    common = ("name", "library", "weights", "num_classes", "in_channels", "strides", "drop_path")
    ours = (*common, "over_parameterize", "branch_drop")
    given = given_of({key: value for key, value in config.items() if key not in ours})
    network = make_torchvision(name, weights, given)
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
    if in_channels not in (1, 3):
        raise wrong_value("weights", weights.name, f"is for 3 channels, the data has {in_channels}")
    if in_channels == 1:
        _add_up_channels(network)
    recipe = weights.transforms()
    interpolation = recipe.interpolation.value
    data = _described(
        list(weights.meta["categories"]),
        in_channels,
        recipe.crop_size[0],
        recipe.mean,
        recipe.std,
        interpolation,
    )
    needed: dict[str, Plain] = (
        {"transform_input": True} if getattr(network, "transform_input", False) else {}
    )
    return Pretrained(network, data, f"torchvision's {name}, {weights.name}", needed)


def _torchvision_weights(config: Mapping[str, Plain]) -> "WeightsEnum":
    from torchvision import models

    name, wanted = str(config["name"]), str(config["weights"])
    check_torchvision(name)
    known = models.get_model_weights(name)
    # vgg16 has weights of features alone; its classifier is NaN.
    whole = [one for one in known.__members__ if known[one].meta.get("categories")]
    if wanted not in whole:
        allowed = f"must be one of {', '.join(whole)}"
        raise wrong_value("weights", wanted, allowed, "DEFAULT")
    return known[wanted]


def _pretrained_timm(config: Mapping[str, Plain], in_channels: int) -> Pretrained:
    name = str(config["name"])
    common = ("name", "library", "num_classes", "in_channels", "strides", "dropout", "drop_path")
    ours = (*common, "over_parameterize", "branch_drop")
    given = given_of({key: value for key, value in config.items() if key not in ours})
    network = make_timm(name, given | {"in_chans": in_channels})
    about = getattr(network, "pretrained_cfg", {})
    size = about["input_size"][1]
    count = int(about["num_classes"])
    imagenet = imagenet_classes()
    classes = imagenet if count == len(imagenet) else [str(number) for number in range(count)]
    interpolation = "bilinear" if about["interpolation"] == "bilinear" else "bicubic"
    data = _described(classes, in_channels, size, about["mean"], about["std"], interpolation)
    tag = f".{about['tag']}" if about.get("tag") and "." not in name else ""
    return Pretrained(network, data, f"timm's {name}{tag}", {})


def _described(
    classes: list[str],
    in_channels: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> DataContract:
    if len(mean) != in_channels:
        mean, std = ([sum(values) / len(values)] * in_channels for values in (mean, std))
    return DataContract(
        classes=classes or ["0"],
        in_channels=in_channels,
        image_size=(size, size),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        interpolation=interpolation,
    )


def _add_up_channels(network: nn.Module) -> None:
    """Let a network on three channels take one, which stands for three equal ones."""
    _, conv = first_convolution(network)
    weight: Tensor = conv.weight.detach().sum(1, keepdim=True)
    bias = conv.bias
    stem = replace_stem(network, 1)
    stem.weight.data.copy_(weight)
    if bias is not None and stem.bias is not None:
        stem.bias.data.copy_(bias.detach())
