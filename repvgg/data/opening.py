"""Open the data that a configuration names: one of ours, or the user's own factory."""

from collections.abc import Callable, Mapping

from torch.utils.data import Dataset

from repvgg import targets
from repvgg.checks import ArgumentError
from repvgg.data.custom import ItemOptions, from_dataset
from repvgg.data.map_style import KEY
from repvgg.data.module import ImageData

OURS = "repvgg.data."


def open_data(config: Mapping[str, object], **options: object) -> ImageData:
    """Open the data that a configuration names under `_target_`, with the arguments beside it.

    Args:
        options: further arguments, such as those of `ImageData`.

    Raises:
        ValueError: there is no such function, it does not take the arguments, or it returns
            something else. Errors of the user's own code pass through.
    """
    from hydra.utils import instantiate

    target = config.get("_target_")
    if target is None:
        raise ArgumentError(f"{KEY} is missing: pass {KEY}=mypackage.make_data", KEY)
    targets.make_importable(config)
    if str(target).startswith(OURS):
        data = instantiate(config, **options, _convert_="all")
        if not isinstance(data, ImageData):
            raise ArgumentError(f"{KEY}={target}: returns a {type(data).__name__}, no data", KEY)
        return data
    nested = {key: value for key, value in config.items() if key != "_target_"}
    arguments = instantiate(nested, _convert_="all")  # such as transforms
    return call_factory(str(target), {**arguments, **options})


def call_factory(target: str, arguments: Mapping[str, object]) -> ImageData:
    """Call the user's factory and describe what it returns.

    The arguments of `from_dataset` go to the factory if it takes them by name, or if it is a
    function with **arguments. The others describe the data sets that it returns.

    Raises:
        ArgumentError: there is no such factory, it does not take the arguments, or it returns
            something else. Errors of the factory itself pass through.
    """
    factory = targets.locate(target, KEY)
    ours = ItemOptions.__annotations__
    catches_all = not isinstance(factory, type) or not issubclass(factory, Dataset)
    passed = {
        name: value
        for name, value in arguments.items()
        if name not in ours or _takes(factory, name, value, catches_all=catches_all)
    }
    made = targets.call(factory, KEY, target, **passed)
    rest = {name: value for name, value in arguments.items() if name not in passed}
    if isinstance(made, ImageData):
        _check_unused(target, rest)
        return made
    settings = {name: value for name, value in arguments.items() if name in ours}
    return from_dataset(made, origin=target, **settings)  # type: ignore[arg-type]  # checked there


def _takes(factory: Callable[..., object], name: str, value: object, *, catches_all: bool) -> bool:
    signature = targets.signature_of(factory)
    if signature is not None and name in signature.parameters:
        return targets.accepts(factory, name)
    return catches_all and value is not None and targets.accepts(factory, name)


def _check_unused(target: str, rest: Mapping[str, object]) -> None:
    """Reject arguments of `from_dataset` that an `ImageData` cannot take any more.

    Raises:
        ArgumentError: one differs from its default.
    """
    signature = targets.signature_of(from_dataset)
    assert signature is not None
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    for name, value in rest.items():
        if value not in (defaults.get(name, 0), []):  # mixup, cutmix and seed are 0
            raise ArgumentError(
                f"{name}={value}: {target} returns an ImageData and takes no argument {name}; let "
                "it take **options and pass them on",
                name,
            )
