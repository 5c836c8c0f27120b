"""Every command of README.md and docs/ runs, shortened, or stands in a table with the reason.

A command that uses `runs/NAME` of an earlier command of its page runs after it, in one folder.
What else a command names is there: images, weights, a run and its deployment (`Place`).
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from hydra.core.override_parser.overrides_parser import OverridesParser
from torchvision import models

import repvgg
from repvgg import __main__, cli
from repvgg.export import FORMATS
from tests.support.commands import compose, run
from tests.support.pages import PAGES, Command, in_folder, page
from tests.support.place import WEIGHTS, Place

# Other programs than ours: what they are, and why they do not run here.
OTHER_PROGRAMS = {
    r"python3 -m venv \.venv|\. \.venv/bin/activate": "set-up, which .ci/run does",
    r"pip install (-e )?\S+": "set-up, which .ci/run does",
    r"pytest( -m .*)?": "these tests",
    r"tensorboard --logdir \S+": "serves until it is stopped",
}
# Commands of ours that are only composed, because they cannot run here, and why.
COMPOSED = {
    r"trainer\.(devices|num_nodes)=": "several devices: tests/training/test_processes.py has two",
    r"hydra/launcher=": "starts processes or jobs of SLURM: tests/training/test_sweeps.py has two",
    r"(data|experiment)=cifar10": "downloads CIFAR-10",
    r"data\.name=EMNIST": "a download, in a format of its own",
    r"logger=\S*(wandb|mlflow)": "needs a package that the tests do not install",
    r"data\.root=(/data/imagenet|IMAGENET)": "ImageNet is larger than this disk",
    r"int8=true": "half a minute: tests/deploy/test_command.py deploys in int8",
    r"model\.over_parameterize=": "ten seconds: tests/deploy/test_command.py trains and deploys it",
    r"scripts/write_shards\.py": "starts processes: tests/data/test_files.py writes shards",
}
SMALL = ("resnet18", "mobilenet_v2")  # networks that stay; others become those of WEIGHTS
BRIEF = {f"+trainer.limit_{part}_batches": "2" for part in ("train", "val", "test")}
CONFIGURED = ("train", "deploy", "evaluate")  # by Hydra
PATHS = {
    *("ckpt", "init", "resume", "verify", "folder", "path", "classes"),
    *("images", "root", "data.root"),
}
MYPACKAGE = """
from torchvision.datasets import FakeData


def make_data():
    return FakeData(200, image_size=(3, 16, 16), num_classes=4)
"""

COMMANDS = [command for page in PAGES for command in page.commands]
OURS = [
    command
    for command in COMMANDS
    if command.program.endswith(".py") or command.program in cli.COMMANDS
]
STUDIES = [command for command in COMMANDS if command.program.startswith("scripts.")]


def reason(command: Command) -> str | None:
    """Why a command of ours is only composed."""
    return next((why for text, why in COMPOSED.items() if re.search(text, command.text)), None)


def first_value(argument: str) -> str:
    """A sweep is one run for each value: the first stands for all."""
    return re.sub(r"=([^\[{,]+),.*", r"=\1", argument)


def shape(command: Command) -> tuple[str, ...]:
    """What commands have in common that are the same command when they are shortened."""
    other = re.compile(r"(hydra\.run\.dir|out|overwrite|benchmark|trainer\.max_epochs)=")
    arguments = [first_value(one) for one in command.arguments if not other.match(one)]
    for i, (key, _, value) in enumerate(one.partition("=") for one in arguments):
        if key in PATHS or (key == "model" and command.program == "predict"):
            arguments[i] = key + Path(value).suffix
        elif key == "model" and value in repvgg.list_models():
            arguments[i] = "model=" + value[: value.index("_")]
        elif key == "model.name":
            arguments[i] = key
    if command.program == "train.py" and not any(re.match("model=|--", one) for one in arguments):
        arguments.append("model=repvgg")
    return command.program, *sorted(arguments)


def chains() -> Iterator[list[Command]]:
    """The commands that run, those that need each other's runs together, without duplicates."""
    found: list[list[Command]] = []
    for shown in PAGES:
        made: dict[str, list[Command]] = {}  # the chain of each folder of a run
        for command in shown.commands:
            if command not in OURS or not command.is_whole or reason(command):
                continue
            named = [name for name in made if re.search(rf"[=/]{re.escape(name)}\b", command.text)]
            chain = made[named[0]] if named else []
            if not chain:
                found.append(chain)
            chain.append(command)
            names = re.findall(r" (?:hydra\.run\.dir|out)=(\S+)", command.text)
            if command.program == "import":
                names += re.findall(r"path=(\S+)\.\w+", command.text)
            made |= dict.fromkeys(names, chain)
    seen: set[tuple[str, ...]] = set()
    for chain in sorted(found, key=len, reverse=True):
        shapes = {shape(command) for command in chain}
        if not shapes <= seen:
            seen |= shapes
            yield chain


CHAINS = list(chains())


def shorten(command: Command, place: Place, weights: Path) -> list[str]:
    """The arguments of a command, for files that are here and a brief run."""
    given = [argument.partition("=") for argument in command.arguments]
    paths = PATHS | ({"model"} if command.program == "predict" else set())
    passed = {key: place.find(key, value) if key in paths else value for key, _, value in given}
    arguments = [f"{key}{equals}{passed[key]}" for key, equals, _ in given]
    if "--help" in passed:
        return arguments
    if command.program == "train.py":
        return _shorten_training(passed, weights)
    if command.program == "deploy.py" and "verify" not in passed:
        names = re.findall(r"\w+", passed.get("formats", "safetensors"))
        assert {*names} <= {*FORMATS}, f"{command}: allowed are {', '.join(FORMATS)}"
        rest = [one for one in arguments if not one.startswith(("formats=", "benchmark="))]
        return [*rest, f"formats=[{names[0]}]", "benchmark=false"]
    return arguments


def _shorten_training(passed: dict[str, str], weights: Path) -> list[str]:
    """A small network, an epoch of two batches, and of a sweep one run."""
    family, name = passed.get("model"), passed.get("model.name")
    if family in WEIGHTS:
        known = {"timm": timm.list_models, "torchvision": models.list_models}[family]()
        assert name is None or name in known, f"model.name={name}: {family} has no such network"
        if name not in SMALL or "model.weights" in passed:
            passed |= {"model.name": WEIGHTS[family]}
        if "model.pretrained" in passed:
            passed |= {"+model.pretrained_cfg_overlay": f"{{file: '{weights}/timm.pth'}}"}
    elif family in repvgg.list_models():
        passed |= {"model": "qarepvgg_tiny" if family.startswith("qa") else "repvgg_tiny"}
    elif family is None and not passed.keys() & {"resume", "--config-dir"}:
        passed |= {"model": "repvgg_tiny"}
    if "resume" in passed and passed["resume"] != "auto":
        return [f"{key}={value}" for key, value in (passed | {"trainer.max_epochs": "4"}).items()]
    if "debug" not in passed:
        passed |= {"trainer.max_epochs": passed.get("rdrop_warmup", "1"), **BRIEF}
    if not any(re.match(r"\+?logger\b", key) for key in passed):
        passed |= {"logger": "csv"}
    if "experiment" in passed and "--config-dir" not in passed:
        passed |= {"optim.warmup_epochs": "0"}
    if "-m" in passed:  # a sweep of one run: tests/training/test_sweeps.py has more
        passed = {key: first_value(f"={value}")[1:] for key, value in passed.items()}
    data = passed.get("data", "digits")
    if data != "digits" or ("experiment" in passed and "--config-dir" not in passed):
        passed |= {"data.batch_size": "4"}
    if data in ("imagefolder", "csv"):
        passed |= {"data.image_size": "32", "data.resize_size": "32", "data.num_workers": "0"}
    if "hparams_search" in passed:
        passed |= {"hydra.sweeper.n_trials": "1"}
    elif "-m" not in passed and "hydra.run.dir" not in passed:
        passed |= {"hydra.run.dir": "runs/new"}
    return [
        f"{key}={value}" if value or not key.startswith("-") else key
        for key, value in passed.items()
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings(  # of optuna and sqlalchemy
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain[0].page}:{chain[0].line}")
def test_the_commands_of_a_page_run(chain, place, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    in_folder([*PAGES, page(chain[0].page)], place.folder)
    (place.folder / "mypackage.py").write_text(MYPACKAGE)
    for command in chain:
        arguments = shorten(command, place, weights)

        done = run(command.program, *arguments, cwd=place.folder)

        assert done.returncode == 0, (
            f"{command}, run here as {command.program} {' '.join(arguments)}, failed:\n"
            f"{done.stderr[-2000:]}\nCorrect the page. If the command needs a file, make it in "
            "`Place`; if it cannot run here, write into `COMPOSED` why."
        )


@pytest.mark.parametrize("command", [one for one in OURS if reason(one)], ids=str)
def test_a_command_that_cannot_run_here_composes(command):
    program = Path(command.program).stem
    options = [one for one in command.arguments if one.startswith("-")]
    overrides = [cli.quote_path(one) for one in command.arguments if one not in options]
    if program not in CONFIGURED:
        assert {one.partition("=")[0] for one in overrides} <= defaults(program), str(command)
        return

    parsed = OverridesParser.create().parse_overrides(overrides)  # those of Hydra's own too
    first = [one for one in parsed if not one.key_or_group.startswith("hydra")]
    assert compose(program, *(first_value(one.input_line) for one in first)), str(command)


def defaults(program: str) -> set[str]:
    """The keys of a command or script that Hydra does not configure."""
    place = f"repvgg.commands.{program}" if program in cli.COMMANDS else f"scripts.{program}"
    return {*importlib.import_module(__main__.MODULES.get(program, place)).DEFAULTS}


@pytest.mark.parametrize("command", [one for one in OURS if not one.is_whole], ids=str)
def test_an_abbreviated_command_has_keys_that_exist(command):
    program = Path(command.program).stem
    keys = {one.partition("=")[0].lstrip("+") for one in command.arguments} - {"...", "-m"}
    if program in CONFIGURED:
        known = compose(
            program, *(one for one in command.arguments if re.match("data=|model=", one))
        )
        for key in keys:
            at = known
            for part in key.split("."):
                assert part in at, f"{command}: there is no key {key}"
                at = at[part]
    else:
        assert keys <= defaults(program), str(command)


@pytest.mark.parametrize("command", STUDIES, ids=str)
def test_the_arguments_of_a_study_parse(command, monkeypatch, capsys):
    """With --help behind them: the study itself takes minutes to hours."""
    module = importlib.import_module(command.program)
    arguments = [one.replace("...", "FOLDER") for one in command.arguments]
    monkeypatch.setattr("sys.argv", [command.program, *arguments, "--help"])

    cli.script(module.main, module.__doc__, module.DEFAULTS)

    assert "Keys and their values" in capsys.readouterr().out


def test_every_other_program_is_in_the_table():
    others = [one for one in COMMANDS if one not in OURS and one not in STUDIES]
    unknown = [
        str(one)
        for one in others
        if not any(re.fullmatch(text, one.text) for text in OTHER_PROGRAMS)
    ]

    listed = "\n".join(unknown)
    assert not unknown, f"run them in a test, or write into OTHER_PROGRAMS why not:\n{listed}"


@pytest.mark.parametrize(
    "text", [*OTHER_PROGRAMS, *COMPOSED], ids=lambda text: text.replace("\\", "")
)
def test_every_row_of_the_tables_is_of_a_command(text):
    assert any(re.search(text, command.text) for command in COMMANDS), f"{text}: delete this row"
