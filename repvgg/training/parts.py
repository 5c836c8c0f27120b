"""Parts of a run that are the user's own code, as sections of the configuration name them.

The sections `optimizer`, `scheduler` and `loss` each name one part; `logger` and `callbacks` name
several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from repvgg import targets
from repvgg.checks import wrong_value
from repvgg.cli import Config, habits

TARGET = "_target_"
PARTIAL = "_partial_"  # Hydra's; optimizer, scheduler and loss are partial anyway


@dataclass(frozen=True)
class Part:
    """A class or function by its dotted name, and arguments for it.

    Attributes:
        key: where the configuration names it, such as "optimizer._target_".
        name: such as "torch.optim.RMSprop".
        arguments: those of the configuration; a `_target_` in them is instantiated.
    """

    key: str
    name: str
    arguments: Config

    def function(self) -> Callable[..., object]:
        """The class or function itself."""
        return targets.locate(self.name, self.key)

    def built_arguments(self) -> dict[str, object]:
        """The arguments, with what they name by `_target_`."""
        from hydra.utils import instantiate

        targets.make_importable(self.arguments)
        built = instantiate(dict(self.arguments), _convert_="all") if self.arguments else {}
        return cast(dict[str, object], built)

    def call(self, *positional: object, **filled: object) -> object:
        """Call it, with further arguments from the run.

        Raises:
            ArgumentError: it does not take these arguments. Its own errors pass through.
        """
        arguments = {**filled, **self.built_arguments()}
        return targets.call(self.function(), self.key, self.name, *positional, **arguments)

    def wrong_result(self, made: object, allowed: str) -> ValueError:
        """The error of a part that is of another kind, for the caller to raise."""
        return ValueError(f"{self.key}={self.name}: returns {type(made).__name__}, not {allowed}")


def read_part(key: str, given: object, *, from_run: Config | None = None) -> Part | None:
    """Read a section that names one part; None if its `_target_` is null.

    Args:
        key: of the section.
        from_run: arguments that the run sets, each with what to pass instead.

    Raises:
        ValueError: an argument has no effect.
    """
    if not isinstance(given, dict):
        if short := habits.part(key, given):
            raise ValueError(f"{key}={given}: {short}")
        name = given if isinstance(given, str) and "." in given else "package.Class"
        raise ValueError(f"{key}={given}: pass {key}.{TARGET}={name}")
    target = given.get(TARGET)
    arguments = {name: value for name, value in given.items() if name not in (TARGET, PARTIAL)}
    for name, instead in (from_run or {}).items():
        if name in arguments:
            raise ValueError(f"{key}.{name}={arguments[name]}: {instead}")
    if target is None and arguments:
        name, value = next(iter(arguments.items()))
        raise ValueError(f"{key}.{name}={value}: has no effect without {key}.{TARGET}")
    return None if target is None else Part(f"{key}.{TARGET}", target, arguments)


def read_parts(key: str, given: object) -> dict[str, Part]:
    """Read a section that names several parts; one that is null is left out.

    Raises:
        ValueError: a part has no `_target_`.
    """
    if not isinstance(given, dict | None):
        raise wrong_value(key, given, "must name parts", f"{{mine:{{{TARGET}:package.Class}}}}")
    read = {}
    for name, section in (given or {}).items():
        if section is None:
            continue
        part = read_part(f"{key}.{name}", section)
        if part is None:
            raise ValueError(f"{key}.{name}.{TARGET} is missing: pass the name of a class")
        read[str(name)] = part
    return read


def move_from_trainer(recorded: Config) -> dict[str, object]:
    """A recorded configuration whose `trainer.logger` and `trainer.callbacks` are sections.

    Earlier versions took both from there.
    """
    trainer = recorded.get("trainer")
    if not isinstance(trainer, dict):
        return dict(recorded)
    moved: dict[str, object] = {}
    for key in ("logger", "callbacks"):
        held = trainer.get(key)
        if held is False:
            moved[key] = {}
        elif isinstance(held, dict):
            moved[key] = {"own": held} if TARGET in held else held
        elif isinstance(held, list):
            moved[key] = {f"own{number}": part for number, part in enumerate(held)}
    left = {key: held for key, held in trainer.items() if key not in ("logger", "callbacks")}
    return {**recorded, "trainer": left, **moved}
