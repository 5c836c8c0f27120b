import importlib
import re
import shlex
import subprocess
from pathlib import Path

import hydra
import pytest

from repvgg import __main__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [
    line.partition(" #")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
]
OURS = [line for line in SHELL if re.match(r"python (train|deploy)\.py", line)]


def test_the_first_two_commands_do_all_of_their_own_set_up():
    assert SHELL[:2] == [
        "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && "
        "python train.py model=repvgg_a0 rdrop=true",
        'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest',
    ]


def test_ci_runs_the_second_command_as_it_stands():
    (line,) = re.findall(r"^command=\$\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)

    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)

    assert found.stdout.strip() == SHELL[1]


@pytest.mark.slow
@pytest.mark.parametrize("line", [SHELL[0].split(" && ")[-1], *OURS])
def test_every_command_composes(line):
    program, *arguments = shlex.split(line.replace("<time>", "time"))[1:]
    # A sweep is one run for each value: the first stands for all.
    arguments = [re.sub(r"=([^\[,]+),.*", r"=\1", argument) for argument in arguments]

    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        hydra.compose(program.removesuffix(".py"), [a for a in arguments if a[0] != "-"])


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("repvgg ")])
def test_every_key_of_a_command_exists(line):
    name, *arguments = shlex.split(line)[1:]

    known = importlib.import_module(__main__.MODULES[name]).DEFAULTS

    assert {argument.partition("=")[0] for argument in arguments} <= set(known)


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_every_python_example_runs(text):
    exec(compile(text, "README.md", "exec"), {})


def test_every_path_that_is_named_exists():
    named = re.findall(
        r"`((?:scripts|tests|configs|docs)/[\w./]+|\.ci/run|constraints\.txt)`", README
    )

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_study_that_is_named_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        module
        for page in pages
        for module in re.findall(r"python -m (scripts\.studies\.[a-z]\w*)", page.read_text())
    }
    paths = {module: ROOT / f"{module.replace('.', '/')}.py" for module in named}

    assert len(named) >= 8
    assert [module for module, path in paths.items() if not path.exists()] == []


def test_every_variant_is_in_reach_of_the_model_key():
    named = re.findall(r"`(repvgg\w*_\w+)`", README)

    assert [
        name for name in named if not (ROOT / "configs" / "model" / f"{name}.yaml").exists()
    ] == []
