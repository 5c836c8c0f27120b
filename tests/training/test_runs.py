import os
import re

import pytest
import yaml
from omegaconf import OmegaConf

from repvgg import cli, whole
from repvgg.training import resuming, runs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


CONFIG = {
    "rdrop": True,
    "seed": 3,
    "init": None,
    "resume": None,
    "model": {"name": "repvgg_tiny", "strides": [1, 1, 2, 2, 1]},
    "optim": {"lr": 0.1},
    "trainer": {"_target_": "lightning.Trainer", "max_epochs": 3, "devices": 1},
    "data": {"_target_": "repvgg.data.digits", "batch_size": 64},
}
CHOICES = {"model": "repvgg_tiny", "data": "digits", "experiment": None}


def make(folder, *, saved: bool = True, seconds: int = 0, **changes):
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(CONFIG | changes), folder / runs.CONFIG)
    choices = {"hydra": {"runtime": {"choices": CHOICES}}}
    OmegaConf.save(OmegaConf.create(choices), folder / runs.CHOICES)
    if saved:
        (folder / runs.LAST).parent.mkdir()
        (folder / runs.LAST).touch()
        os.utime(folder / runs.LAST, (seconds, seconds))
    return folder


def plan(*typed: str) -> cli.Plan:
    return resuming.plan(cli.parse_arguments([*typed]))


def resumed(*typed: str, composed: dict = CONFIG) -> dict:
    return plan(*typed).complete(composed)


def test_a_resumed_run_has_its_recorded_configuration_whatever_today_composes(here):
    folder = make(here / "runs" / "one")
    today = CONFIG | {"rdrop": False, "new": 1, "optim": {"lr": 0.5, "momentum": 0.9}}

    found = resumed(f"resume={folder / runs.LAST}", "trainer.max_epochs=9", composed=today)

    path = str(folder / runs.LAST)
    trainer = CONFIG["trainer"] | {"max_epochs": 9}
    optim = {"lr": 0.1, "momentum": 0.9}  # what was not recorded is today's
    changed = {"resume": path, "trainer": trainer, "optim": optim, "new": 1}
    assert found == CONFIG | changed


def test_hydra_sees_the_folder_alone_and_other_processes_what_was_passed(here):
    folder = make(here / "runs" / "one")

    found = plan("resume=auto", "trainer.max_epochs=9")

    assert found.arguments == ([], [f"hydra.run.dir='{folder}'"])
    assert found.again == [f"resume='runs/one/{runs.LAST}'", "trainer.max_epochs=9"]


@pytest.mark.parametrize(
    "typed",
    [
        *("seed=3", "rdrop=true", "rdrop=1.0", "optim.lr=0.10", "optim.lr=1e-1", "init=null"),
        *("model=repvgg_tiny", "data=digits", "experiment=null", "++seed=3"),
        *("model.strides=[1, 1, 2,2,1]", "hydra/job_logging=none"),
    ],
)
def test_what_was_recorded_may_be_passed_again_in_any_words(typed, here):
    make(here / "job")

    found = resumed(typed, "hydra.run.dir=job", "resume=auto")

    assert {**found, "resume": None, "trainer": CONFIG["trainer"]} == CONFIG


@pytest.mark.parametrize("given", ["/d/a b", "~/d", "d=e"])
def test_a_path_may_be_passed_again(given, here):
    make(here / "job", init=os.path.expanduser(given))

    assert resumed(f"init={given}", "hydra.run.dir=job", "resume=auto")["init"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("seed=4", "seed=4: the run was started with seed=3"),
        ("rdrop=0.5", "rdrop=0.5: the run was started with rdrop=True"),
        ("model=repvgg_a0", "model=repvgg_a0: the run was started with model=repvgg_tiny"),
        ("experiment=cifar10", "the run was started with experiment=None"),
        ("init=a.ckpt", "the run was started with init=None"),
        ("+mixup=0.2", "the run was started with mixup=None"),
        ("~seed", "~seed: beside resume pass key=value"),
        ("seed=3,4", "seed=3,4: beside resume pass key=value, with one value"),
        ("-m", "-m: a sweep starts new runs"),
        ("--cfg=job", "its configuration is in"),
        ("hydra.run.dir=other", "hydra.run.dir=other: a resumed run stays in its own folder"),
    ],
)
def test_what_would_change_the_run_is_rejected(typed, message, here):
    make(here / "job")

    with pytest.raises(ValueError, match=re.escape(message)):
        plan(typed, f"resume=job/{runs.LAST}")


@pytest.mark.parametrize(
    "typed", ["data.root=/elsewhere", "optim.lr=0.01", "trainer.devices=2", "+trainer.profiler=x"]
)
def test_what_may_change_is_listed(typed, here):
    folder = make(here / "job")
    key, _, value = typed.lstrip("+").partition("=")

    found = resumed(typed, f"resume=job/{runs.LAST}")

    before = {"optim.lr": 0.1, "trainer.devices": 1}.get(key, "not set")
    assert resuming.describe_changes(found, folder) == [
        f"resumes job/{runs.LAST}, with the configuration job/{runs.CONFIG}",
        f"{key}={value}, before {before}",
    ]


def test_code_that_only_a_run_folder_names_has_to_be_passed(here):
    make(here / "job", data={"_target_": "os.system", "command": "true"})

    with pytest.raises(ValueError, match=r"not this project's; .* pass data\._target_=os\.system"):
        resumed(f"resume=job/{runs.LAST}")

    assert resumed(f"resume=job/{runs.LAST}", "data._target_=os.system")["data"]["command"]
    today = CONFIG | {"data": {"_target_": "os.system"}}  # of the user's own --config-dir
    assert resumed(f"resume=job/{runs.LAST}", composed=today)["data"]["command"] == "true"


@pytest.mark.parametrize(
    "target",
    [
        *("repvgg.cli.os.system", "repvgg.data.digits.os.system", "repvgg.data.sets.os.system"),
        *("lightning.Trainer.fit", "lightning.pytorch.trainer.trainer.os.system"),
        *("torchvision.transforms.v2.functional.to_image", "torchvision.transforms.v2.warnings"),
        *("torchvision.transforms.v2.Compose.forward", "torchvision.transforms.Lambda"),
    ],
)
@pytest.mark.parametrize("place", ["data", "nested"])
def test_a_name_that_only_starts_as_ours_is_not_ours(target, place, here):
    called = {"_target_": target}
    sections = {
        "data": {"data": called},
        "nested": {"trainer": CONFIG["trainer"] | {"callbacks": [[called]]}},
    }
    make(here / "job", **sections[place])

    with pytest.raises(ValueError, match="names code that is not this project's"):
        resumed(f"resume=job/{runs.LAST}")


@pytest.mark.parametrize(
    ("place", "elsewhere"),
    [
        ("/etc", True),
        ("~/x", True),
        ("logs/../../x", True),
        ("https://logs.example", True),
        ("sqlite:////x/mlflow.db", True),
        ("sqlite:///mlflow.db", False),
        ("logs", False),
    ],
)
def test_a_recorded_place_outside_of_the_run_must_be_passed_again(place, elsewhere, here):
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": place}
    make(here / "job", logger={"mine": logger})

    assert resumed(f"resume=job/{runs.LAST}", f"logger.mine.save_dir='{place}'")
    if elsewhere:
        with pytest.raises(ValueError, match="names a place outside of the run's folder"):
            resumed(f"resume=job/{runs.LAST}")
    else:
        assert resumed(f"resume=job/{runs.LAST}")


def test_a_run_of_version_0_1_is_resumed(here):
    folder = make(here / "job")
    (folder / runs.CHOICES).unlink()
    (folder / runs.OVERRIDES).write_text("- model=repvgg_tiny\n- seed=3\n")

    assert resumed("model=repvgg_tiny", f"resume=job/{runs.LAST}")["seed"] == 3
    with pytest.raises(ValueError, match="was started with data=digits"):
        resumed("data=cifar10", f"resume=job/{runs.LAST}")


@pytest.mark.parametrize(
    ("key", "value"), [("rdrop_views", 1), ("data.repeats", 1), ("data.erase", 0.0)]
)
def test_a_removed_key_that_changed_nothing_is_dropped(key, value, here):
    record_removed(here / "job", key, value)

    assert resumed(f"resume=job/{runs.LAST}") == resumed(
        f"resume=job/{runs.LAST}", f"{key}={value}"
    )
    assert resuming._get(resumed(f"resume=job/{runs.LAST}"), key) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rdrop_views", 2), ("data.repeats", 3)),
        *(("data.erase", 0.25), ("data.augment", "randaugment")),
    ],
)
def test_a_removed_key_that_changed_the_run_names_its_version(key, value, here):
    record_removed(here / "job", key, value)

    with pytest.raises(ValueError, match=f"{key}={value} needs version 0.1"):
        plan(f"resume=job/{runs.LAST}")


@pytest.mark.parametrize(("before", "now"), [("basic", []), ("none", None), (1.0, 1.0)])
def test_the_augmentation_of_version_0_1_is_read(before, now, here):
    record_removed(here / "job", "data.augment", before)

    assert resumed(f"resume=job/{runs.LAST}")["data"]["augment"] == now


def test_the_transforms_of_torchvision_need_not_be_passed_again(here):
    chain = [{"_target_": "torchvision.transforms.v2.RandAugment", "num_ops": 3}]
    make(here / "job", data=CONFIG["data"] | {"augment": chain})

    assert resumed(f"resume=job/{runs.LAST}")["data"]["augment"] == chain


@pytest.mark.parametrize("where", ["padding", "augment", "_target_"])
def test_an_interpolation_in_a_run_folder_is_never_resolved(where, here):
    held = "${oc.create:{_target_:torch.load,f:evil.pt,weights_only:false}}"
    data = CONFIG["data"] | {where: [held] if where == "augment" else held}
    (here / "job" / ".hydra").mkdir(parents=True)
    text = yaml.safe_dump(CONFIG | {"data": data})
    (here / "job" / runs.CONFIG).write_text(text)
    (here / "job" / runs.LAST).parent.mkdir()
    (here / "job" / runs.LAST).touch()

    with pytest.raises(ValueError, match="a recorded configuration holds plain values alone"):
        resumed(f"resume=job/{runs.LAST}")


def test_a_list_that_names_code_may_be_passed_again(here):
    chain = [{"_target_": "mine.Transform"}]
    make(here / "job", data=CONFIG["data"] | {"augment": chain})

    passed = resumed(f"resume=job/{runs.LAST}", "data.augment=[{_target_: mine.Transform}]")

    assert passed["data"]["augment"] == chain
    with pytest.raises(ValueError, match="names code that is not this project's"):
        resumed(f"resume=job/{runs.LAST}")


@pytest.mark.parametrize("key", ["data.augment", "data/augment"])
def test_a_run_of_version_0_1_takes_its_own_words(key, here):
    record_removed(here / "job", "data.augment", "basic")

    found = resumed(f"resume=job/{runs.LAST}", f"{key}=basic")

    assert found["data"]["augment"] == []


def test_the_names_of_torchvision_that_a_run_folder_may_use_are_classes():
    from torchvision.transforms import v2

    named = [n for n in dir(v2) if resuming._OWN_CODE.fullmatch(f"torchvision.transforms.v2.{n}")]

    assert "RandAugment" in named
    assert all(isinstance(getattr(v2, name), type) for name in named)


def record_removed(folder, key: str, value: object) -> None:
    config = OmegaConf.create(CONFIG)
    OmegaConf.update(config, key, value, force_add=True)
    make(folder, **OmegaConf.to_container(config))


def test_auto_without_a_folder_takes_the_newest_run(here):
    make(here / "runs" / "a" / "old", seconds=100)
    newest = make(here / "runs" / "b" / "new", seconds=300)
    make(here / "runs" / "c" / "never saved", saved=False)

    assert plan("resume=auto").arguments.overrides == [f"hydra.run.dir='{newest}'"]


@pytest.mark.parametrize("killed_early", [False, True])
def test_auto_in_a_folder_without_a_checkpoint_starts_the_run(killed_early, here):
    if killed_early:
        make(here / "job", saved=False)

    found = plan("seed=4", "hydra.run.dir=job", "resume=auto")

    assert found.arguments == ([], ["seed=4", "hydra.run.dir='job'"])
    assert found.complete(CONFIG) == CONFIG


def test_auto_with_nothing_to_resume_says_what_to_type():
    with pytest.raises(
        ValueError, match=r"resume=auto: there is no checkpoints/last.ckpt in runs/"
    ):
        plan("resume=auto")


def test_processes_that_were_started_together_need_a_folder(here, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    with pytest.raises(ValueError, match=r"pass hydra\.run\.dir=runs/NAME"):
        runs.check_folder(here / "runs" / "now", resumed=False, chosen=False)
    runs.check_folder(here / "runs" / "chosen", resumed=False, chosen=True)


def test_the_first_process_alone_checks_the_folder(here, monkeypatch):
    folder = make(here / "runs" / "one")
    with pytest.raises(ValueError, match="belongs to another run: pass resume=runs/one/"):
        runs.check_folder(folder, resumed=False, chosen=True)

    monkeypatch.setenv("LOCAL_RANK", "1")

    runs.check_folder(folder, resumed=False, chosen=True)


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(here):
    whole.write(here / "a.yaml", b"old")
    whole.write(here / "a.yaml", b"new")

    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("a.yaml", "new")]
