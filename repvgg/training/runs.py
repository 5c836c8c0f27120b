"""The folders of runs: what is recorded in one, and which process may write into it."""

import os
import shlex
from pathlib import Path

from repvgg import cli, whole
from repvgg.checks import brief
from repvgg.cli import Config
from repvgg.training import processes

LAST = Path("checkpoints", "last.ckpt")  # in the folder of a run
LARGEST = 2**20  # bytes of a file of a record
RESULTS = Path("results.json")  # same; `cli.sweeps` reads it
CONFIG, OVERRIDES, CHOICES = (
    Path(".hydra", name) for name in ("config.yaml", "overrides.yaml", "hydra.yaml")
)


def record(config: Config, folder: Path) -> None:
    """Write the configuration of a run into its folder, for `resume` and for the reader."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    (folder / CONFIG).parent.mkdir(exist_ok=True)
    files: dict[Path, str] = {}
    if config["resume"] is None:  # a resumed run keeps the files of its first start
        hydra = HydraConfig.get()
        choices = {"hydra": {"runtime": {"choices": hydra.runtime.choices}}}
        files[OVERRIDES] = OmegaConf.to_yaml(hydra.overrides.task)
        files[CHOICES] = OmegaConf.to_yaml(OmegaConf.create(choices))
    files[CONFIG] = OmegaConf.to_yaml(OmegaConf.create({**config, "resume": None}))
    for name, text in files.items():
        whole.write(folder / name, text.encode())


def read_record(path: Path) -> object:
    """Read a file of a record: plain values, without what could expand, nest or be code.

    Raises:
        ValueError: it is not such a file.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tokens = (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken, yaml.DirectiveToken)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("is too large for a configuration")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, tokens) for token in yaml.scan(text)):
            raise ValueError("holds anchors, tags or directives, which no run writes")
        return OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeError, RecursionError) as error:
        raise ValueError(f"'{relative(path)}' is damaged: {brief(error)}") from error
    except AssertionError as error:  # of OmegaConf, on a number
        raise ValueError(f"'{relative(path)}' is damaged: it holds one value") from error
    except ValueError as error:
        raise ValueError(f"'{relative(path)}' {brief(error)}") from error


def check_folder(folder: Path, *, resumed: bool, chosen: bool) -> None:
    """Check that a run may write into a folder.

    Args:
        folder: of this run.
        resumed: the run resumes a checkpoint there.
        chosen: the user passed the folder on the command line.

    Raises:
        ValueError: it belongs to another run, or each of several processes would make its own.
    """
    if processes.started_together() and not (chosen or resumed):
        raise ValueError(
            "hydra.run.dir is missing: processes that are started together need one folder; pass "
            "hydra.run.dir=runs/NAME"
        )
    last = folder / LAST
    if processes.rank() == 0 and not resumed and last.exists():
        raise ValueError(
            f"{relative(folder)} belongs to another run: pass resume={shlex.quote(relative(last))} "
            "to resume that, or pass another hydra.run.dir"
        )


def relative(path: Path) -> str:
    """A path as seen from the folder in which the user started the command."""
    start = cli.start_folder()
    path = start / path
    return os.path.relpath(path, start) if path.is_relative_to(start) else str(path)
