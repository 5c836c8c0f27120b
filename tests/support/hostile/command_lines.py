"""Command lines of every kind of mistake, and what came of each."""

import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import repvgg
from repvgg import cli
from repvgg.cli.mistakes import known_keys
from repvgg.commands import import_checkpoint, inspect_checkpoint, predict, verify
from repvgg.contract import Description
from repvgg.deploy import certificate
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.report import DeployedFile
from repvgg.export.formats import FORMATS
from tests.support.hostile.checkpoints import CONFIG, DATA, ours
from tests.support.networks import settle
from tests.support.processes import Process
from tests.support.reports import report

LONGEST = 700  # characters of a message
SECONDS = 60  # after which a program is ended

# Programs whose work begins where the last of their checks is done: see `stubbed`.
VALID: dict[str, list[list[str]]] = {
    "train": [
        ["model=repvgg_tiny", "trainer.max_epochs=1"],
        ["data=imagefolder", "data.root=photos", "model=repvgg_tiny", "data.num_workers=0"],
        ["init=x.ckpt", "model=repvgg_tiny"],
        ["experiment=digits", "rdrop=true"],
        ["optimizer._target_=torch.optim.RMSprop", "optim.lr=0.01"],
        ["callbacks=early_stopping", "logger=csv"],
    ],
    "deploy": [
        ["ckpt=x.ckpt"],
        ["ckpt=x.ckpt", "out=new", "formats=[onnx]", "benchmark=false"],
        ["verify=deployed"],
    ],
    "evaluate": [["ckpt=x.ckpt", "data=imagefolder", "data.root=photos", "split=all"]],
    "predict": [["model=deployed/model.safetensors", "images=photos"]],
    "verify": [["folder=deployed"]],
    "inspect": [["path=x.ckpt"]],
    "import": [["path=theirs.pth", "out=new.ckpt"]],
}
CONFIGURED = {"train": "train", "deploy": "deploy", "evaluate": "evaluate"}
SCRIPTS = {
    "predict": predict.DEFAULTS,
    "verify": verify.DEFAULTS,
    "inspect": inspect_checkpoint.DEFAULTS,
    "import": import_checkpoint.DEFAULTS,
}
VALUES = [
    *("", "null", "true", "false", "0", "-1", "1", "3", "0.5", "1e308", "-1e308", "nan", "inf"),
    *("1" * 400, "9" * 5000, "1e400", "0x10", "1_000", "[]", "{}", "[1,2]", "[[1]]", "{a:1}"),
    *("{a:{b:[1]}}", "[null]", "[a,,b]", "x", "a b", "'a", '"', "''", "a=b", "a,b", "range(1,3)"),
    *("choice(1,2)", "interval(0,1)", "glob(*)", "range(1,1000000000)", "${x}", "${oc.env:HOME}"),
    *("${oc.env:NOT_THERE}", "${", "$", "\\", "\\'", "*", "?", "~", "~/x", "../x", "/", "."),
    *("/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "photos", "x.png", "none.ckpt"),
    *("deployed", "\x1b[2J", "\x00"[:0] + "\x07", "a\nb", "a\tb", "é", "漢字", "\u202ex", "\udcff"),
    *("x" * 100_000, "a." * 500 + "b", "[" * 200, "{" * 200, "(" * 50, "!!python/name:os.system"),
    *("torch.nn.Linear", "os.system", "repvgg.data.digits", "no.such.thing", "package.Class"),
]
OPTIONS = [
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "--cfg=job", "--cfg=x", "--cfg=all"),
    *("-c", "--resolve", "--package=x", "-p", "--run", "-r", "-m", "--multirun"),
    *("--shell-completion", "-sc", "--config-path", "--config-path=x", "--config-name=x"),
    *("--config-name", "--config-dir", "--config-dir=none", "--config-dir=.", "--info", "-i"),
    *("--info=plugins", "--info=x", "--experimental-rerun=x", "--experimental-rerun"),
    *("-", "--", "---", "-x", "--x", "--x=1", "=", "==", "", " ", "x", "x.ckpt", "photos", "~"),
    *("+", "++", "~=", "+=1", "a b", "\x1b[2J", "é=1", "a.b.c=1", ".=1", "a..b=1", "@=1", "/=1"),
    *("hydra.run.dir=.", "hydra.run.dir=x.ckpt", "hydra.run.dir=", "hydra.job.chdir=true"),
    *("hydra.output_subdir=null", "hydra.verbose=true", "hydra.verbose=[x]", "hydra.mode=MULTIRUN"),
    *("hydra/job_logging=x", "hydra/launcher=joblib", "hydra/sweeper=optuna", "hydra.x=1"),
    *("+hydra.foo=1", "~hydra", "hydra=null", "hydra.searchpath=[file:///none]", "+experiment=x"),
    *("hydra.sweep.dir=x.ckpt", "hydra.job.name=a/b", "hydra.callbacks.x._target_=os.system"),
]


class Line(NamedTuple):
    """A command, and its arguments."""

    command: str
    arguments: list[str]

    def __str__(self) -> str:
        return " ".join([self.command, *(repr(word)[:80] for word in self.arguments)])


class Outcome(NamedTuple):
    """What came of a command line.

    Attributes:
        fault: what is wrong with that; empty if nothing is.
    """

    line: Line
    status: int
    error: str
    seconds: float
    fault: str


def lines(seed: int = 0) -> Iterator[Line]:
    """Command lines without an end, always the same for a seed."""
    draw = random.Random(seed)
    keys: dict[str, list[str]] = {
        name: known_keys(cli.CONFIGS / f"{config}.yaml") for name, config in CONFIGURED.items()
    }
    keys |= {name: [*defaults] for name, defaults in SCRIPTS.items()}
    commands = [*CONFIGURED, *CONFIGURED, "train", *SCRIPTS]  # more of those with more keys
    while True:
        name = draw.choice(commands)
        arguments = [*draw.choice(VALID[name])]
        for _ in range(draw.choice([1, 1, 1, 2, 2, 3])):
            arguments = _changed(arguments, keys[name], name in CONFIGURED, draw)
        yield Line(name, [word.replace("\0", "") for word in arguments])


def _changed(words: list[str], keys: Sequence[str], configured: bool, draw: random.Random) -> list:
    """Arguments with one more mistake, or one that is allowed."""
    key, value = draw.choice(keys), draw.choice(VALUES)
    at = draw.randrange(len(words) + 1)
    kind = draw.randrange(12)
    if kind < 5:
        return [*words[:at], f"{key}={value}", *words[at:]]
    if kind == 5:
        added = [f"~{key}", f"~{key}={value}", f"+{key}={value}", f"++{key}={value}", f"{key}@x=1"]
        return [*words, draw.choice(added)]
    if kind == 6 and words:
        place = draw.randrange(len(words))
        return [*words[:place], *words[place + 1 :]]
    if kind == 7 and words:  # another value for a key that is there
        place = draw.randrange(len(words))
        return [*words[:place], f"{words[place].partition('=')[0]}={value}", *words[place + 1 :]]
    if kind == 8 and words:  # a typing mistake
        place = draw.randrange(len(words))
        word = list(words[place])
        word[draw.randrange(len(word)) if word else 0 :][:1] = []
        cut = draw.randrange(len(word) + 1)
        word[cut : cut + 1] = draw.choice(["", "=", " ", "x", ",", "'", "[", "}", "$", "\\"])
        return [*words[:place], "".join(word), *words[place + 1 :]]
    if kind == 9:
        return [*words, *words]
    if kind == 10 and draw.random() < 0.1:
        return [*words, *[f"{key}={value[:100]}"] * 1000]
    option = draw.choice(OPTIONS)
    return [*words[:at], option, *words[at:]]


# What a sweep writes whose jobs all failed: the table that says why.
SWEPT = re.compile(r"runs(/[^/]+-sweep(/(multirun\.yaml|results\.csv))?)?")


class Place:
    """A folder with what the command lines name, which a refused one must not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name(f"{folder.name}-temporary")
        self.home = folder.with_name(f"{folder.name}-home")
        for path in (self.temporary, self.home):
            path.mkdir(parents=True)
        self.fill()

    def fill(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in ("train/a", "train/b", "train/c", "val/a", "val/b", "val/c"):
            (self.folder / "photos" / name).mkdir(parents=True)
            for number in range(2):
                path = self.folder / "photos" / name / f"{number}.png"
                Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(path)
        Image.new("RGB", (8, 8)).save(self.folder / "x.png")
        content = ours()
        torch.save(content, self.folder / "x.ckpt")
        weights = content["state_dict"].items()
        theirs = {key.removeprefix("net."): value for key, value in weights}
        torch.save(theirs, self.folder / "theirs.pth")
        deployed = self.folder / "deployed"
        deployed.mkdir()
        model = repvgg.switch_to_deploy(settle(repvgg.create_model(**CONFIG)))
        FORMATS["safetensors"].save(
            model, deployed / "model.safetensors", Description(CONFIG, DATA)
        )
        images = content["repvgg"]["probe"]["images"]
        predict = repvgg.export.open_artifact(deployed / "model.safetensors")
        scores = predict(images / 255)
        files = {"model.safetensors": DeployedFile(1, "0" * 64, {}, "float32")}
        recorded = Recorded(images, scores.argmax(1), scores.double(), scores[:0])
        certificate.write(deployed, report(files=files), recorded)
        self.before = self.state()

    def state(self) -> dict[str, tuple[int, int]]:
        """Every file and folder, with size and time of files."""
        found = {}
        for top in (self.folder, self.temporary):
            for path in top.rglob("*"):
                status = path.lstat()
                held = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
                found[str(path.relative_to(top))] = held
        return found

    def run(self, line: Line) -> Outcome:
        """Run a command line as a program, up to where its work begins."""
        start = time.monotonic()
        environment = os.environ.copy()
        fonts = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        os.environ |= {
            "TMPDIR": str(self.temporary),
            "HOME": str(self.home),
            "XDG_CACHE_HOME": fonts,  # where matplotlib has its fonts
        }
        try:
            program = Process(
                "-m",
                "tests.support.hostile.stubbed",
                line.command,
                *line.arguments,
                cwd=self.folder,
            )
        finally:
            os.environ.clear()
            os.environ.update(environment)
        try:
            status = program.wait(SECONDS)
            error = program.communicate()[1]
        except Exception as failed:  # it did not end, or wrote what is no text
            status, error = -1, repr(failed)
        seconds = time.monotonic() - start
        sweep = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*line.arguments}
        fault = self._fault(status, error, sweep=bool(sweep))
        if self.state() != self.before:
            self.fill()
            shutil.rmtree(self.temporary)
            self.temporary.mkdir()
            self.before = self.state()
        return Outcome(line, status, error, seconds, fault)

    def _fault(self, status: int, error: str, *, sweep: bool = False) -> str:
        if status < 0:
            return f"ended by {-status}: {error[:200]}"
        if "Traceback" in error:
            return "a traceback"
        if status == 0:
            return ""
        said = [
            line
            for line in error.splitlines()
            if "Warning" not in line and "warnings.warn" not in line
        ]
        if sweep:  # a line for each of its jobs
            said = said[-1:]
        if len(said) != 1:
            return f"{len(said)} lines"
        if not re.match(r"(repvgg \w+|train\.py|deploy\.py|usage)?:? ?", said[0]):
            return "another program's line"
        if not said[0].isprintable():
            return "control characters"
        if len(said[0]) > LONGEST:
            return f"{len(said[0])} characters"
        changed = {
            name
            for name in self.before.keys() | self.state().keys()
            if self.before.get(name) != self.state().get(name)
            and not (sweep and SWEPT.fullmatch(name))
        }
        return f"left behind: {', '.join(sorted(changed)[:5])}" if changed else ""
