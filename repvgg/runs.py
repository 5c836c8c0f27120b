"""The folders of runs: which one is gone on from, and which process may write into it."""

import os
import shlex
from pathlib import Path

RUNS = Path("runs")
LAST = Path("checkpoints", "last.ckpt")  # in the folder of a run

# Keys that do what they say beside `resume`; the others are part of what is resumed.
RESUMABLE = (
    "trainer.max_epochs",
    "trainer.accelerator",
    "trainer.check_val_every_n_epoch",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
)


def rank() -> int:
    """Number of this process among those that torchrun, SLURM or Lightning started; 0 alone."""
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if key in os.environ:
            return int(os.environ[key])
    return 0


def started_together() -> bool:
    """Whether torchrun or srun started this process, and others beside it."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return torchrun or ("SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1)


def continue_run(arguments: list[str]) -> list[str]:
    """For `resume=PATH`: repeat that run's own arguments first, and run in its folder.

    `resume=auto` takes the run in `hydra.run.dir`, or starts it where it was never saved: what a
    job types that a cluster may start again. Without that key it takes the newest run in runs/.

    Raises:
        ValueError: there is nothing to go on from, or an argument would change what is resumed.
    """
    from omegaconf import OmegaConf

    typed = {argument.partition("=")[0]: argument for argument in arguments}
    given = _value(typed.get("resume", "resume=null"))
    if given == "null":
        return arguments
    if given == "auto":
        path = _newest(typed)
        if path is None:
            return [argument for key, argument in typed.items() if key != "resume"]
        typed["resume"] = f"resume={path}"
    else:
        path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"resume={path}: there is no such file; give a run's last.ckpt")
    folder = path.absolute().parent.parent
    source = folder / ".hydra" / "overrides.yaml"
    if not source.is_file():
        raise ValueError(f"resume={path}: not in the folder of a run, which holds {source}")
    entries = [str(entry) for entry in OmegaConf.load(source)]
    recorded = {entry.partition("=")[0]: entry for entry in entries}
    for key, argument in typed.items():
        free = key in ("resume", *RESUMABLE) or key.startswith("hydra.")
        if not free and recorded.get(key) != argument:
            raise ValueError(
                f"{argument}: a resumed run keeps what it was started with; allowed beside "
                f"resume are {', '.join(RESUMABLE)}"
            )
    return [*(recorded | typed | {"hydra.run.dir": f"hydra.run.dir={folder}"}).values()]


def check_folder(folder: Path, *, resumed: bool, chosen: bool) -> None:
    """Refuse to write into another run's folder, or into one for each of several processes.

    Args:
        folder: of this run.
        resumed: it goes on from a checkpoint there.
        chosen: the user typed it.

    Raises:
        ValueError: likewise.
    """
    if started_together() and not (chosen or resumed):
        raise ValueError(
            "hydra.run.dir is missing: processes that are started together need one folder; type "
            "hydra.run.dir=runs/NAME"
        )
    last = folder / LAST
    if rank() == 0 and not resumed and last.exists():
        raise ValueError(
            f"{relative(folder)} belongs to another run: type resume={shlex.quote(relative(last))} "
            "to go on from it, or give another hydra.run.dir"
        )


def discard_if_empty(folder: Path) -> None:
    """Remove the folder Hydra made for a run that was refused, and empty ones above it in runs/."""
    runs = RUNS.absolute()
    if rank() != 0:
        return
    for path in (folder, *(above for above in folder.parents if above.is_relative_to(runs))):
        if path == Path.cwd() or not path.is_dir() or any(path.iterdir()):
            return
        path.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is old or new, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def relative(path: Path) -> str:
    """A path as the user would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _newest(typed: dict[str, str]) -> Path | None:
    """The checkpoint that `resume=auto` means; None where a chosen folder has none yet."""
    if "hydra.run.dir" in typed:
        path = Path(_value(typed["hydra.run.dir"])).expanduser() / LAST
        return path if path.exists() else None
    found = RUNS.rglob(str(LAST))
    if newest := max(found, key=lambda path: path.stat().st_mtime, default=None):
        return newest
    raise ValueError(
        "resume=auto: there is no checkpoints/last.ckpt in runs/; start a run without resume, or "
        "name the folder with hydra.run.dir=runs/NAME"
    )


def _value(argument: str) -> str:
    return argument.partition("=")[2].strip("'\"")
