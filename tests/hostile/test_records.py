"""What the folder of a run records is data: it runs no code, and what is damaged is one line."""

import pytest
import yaml

from repvgg import cli
from repvgg.training import resuming, runs

CONFIG = {
    "resume": None,
    "model": {"name": "repvgg_tiny"},
    "optim": {"lr": 0.1},
    "trainer": {"_target_": "lightning.Trainer", "max_epochs": 3},
    "data": {"_target_": "repvgg.data.digits"},
}
CHOICES = {"hydra": {"runtime": {"choices": {"model": "repvgg_tiny", "data": "digits"}}}}
LOGGING = {"root": {"()": "os.system", "command": "touch marker"}}
CALL = {"_target_": "os.system", "command": "touch marker"}

# What somebody else may have written in place of a configuration.
DAMAGED = {
    "nothing": b"",
    "a list": b"- 1\n- 2",
    "a number": b"3",
    "text": b"resume",
    "bytes": bytes(range(256)),
    "half a line": b"model: {name: rep",
    "a tab": b"model:\n\tname: x",
    "a list as optim": b"optim: [1]",
    "a number as model": b"model: 3",
    "text as trainer": b"trainer: x",
    "a tag of Python": b"data: !!python/object/apply:os.system ['touch marker']",
    "a tag of a name": b"data: !!python/name:os.system",
    "a tag of its own": b"data: !code x",
    "a directive": b"%YAML 1.1\n---\nmodel: {}",
    "laughs": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (i + 1, i + 1, i, i) for i in range(97, 120)),
    "itself": b"model: &a\n  inner: *a",
    "nested lists": b"model: " + b"[" * 5000,
    "nested mappings": b"model: " + b"{a: " * 5000,
    "a megabyte": b"model: {a: " + b"x" * 2**20 + b"}",
    "two documents": b"a: 1\n---\nb: 2",
    "a key twice": b"model: {}\nmodel: {}",
    "a mapping as a key": b"? {a: 1}\n: 2",
    "an interpolation": b"optim: {lr: '${oc.env:HOME}'}",
    "an interpolation of itself": b"optim: ${optim}",
    "a bad interpolation": b"optim: {lr: '${'}",
    "a number as a key": yaml.safe_dump(CONFIG | {3: 4}).encode(),
    "a number as a key of a section": yaml.safe_dump(CONFIG | {"optim": {1: 2}}).encode(),
    "hydra": yaml.safe_dump(CONFIG | {"hydra": {"job_logging": LOGGING}}).encode(),
}
# A configuration that names code of others.
CODE = {
    "data": CONFIG | {"data": CALL},
    "a logger": CONFIG | {"logger": {"mine": CALL}},
    "a callback": CONFIG | {"callbacks": {"mine": CALL}},
    "an argument of a callback": CONFIG
    | {"callbacks": {"a": {"_target_": "lightning.pytorch.callbacks.Timer", "duration": CALL}}},
    "an argument in a list": CONFIG
    | {"data": {"_target_": "repvgg.data.digits", "augment": [[{"x": [CALL]}]]}},
    "positional arguments": CONFIG | {"data": {"_target_": "repvgg.data.digits", "_args_": [CALL]}},
    "a partial": CONFIG | {"scheduler": CALL | {"_partial_": True}},
    "a model": CONFIG | {"model": {"library": "custom", "_target_": "os.system"}},
    "a profiler": CONFIG | {"trainer": CONFIG["trainer"] | {"profiler": CALL}},
    "a plugin": CONFIG | {"trainer": CONFIG["trainer"] | {"plugins": [CALL]}},
    "an unknown section": CONFIG | {"other": CALL},
    "a method": CONFIG | {"data": {"_target_": "hydra.utils.get_method", "path": "os.system"}},
    "a lookup": CONFIG | {"data": {"_target_": "builtins.eval", "_args_": ["1"]}},
    "a name in a list": CONFIG | {"data": {"_target_": ["os.system"]}},
}
ELSEWHERE = {
    "a profile": {
        "trainer": CONFIG["trainer"]
        | {
            "profiler": {
                "_target_": "lightning.pytorch.profilers.SimpleProfiler",
                "dirpath": "/etc",
            }
        }
    },
    "checkpoints": {
        "callbacks": {
            "mine": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "~/x"}
        }
    },
    "a positional argument": {
        "logger": {"mine": {"_target_": "lightning.pytorch.loggers.CSVLogger", "_args_": ["/x"]}}
    },
    "an address of a file": {
        "logger": {
            "mine": {
                "_target_": "lightning.pytorch.loggers.MLFlowLogger",
                "tracking_uri": "file:/x",
            }
        }
    },
    "an address within another": {
        "logger": {
            "mine": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "dir::/x"}
        }
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of a run, in the current one."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "job" / runs.CONFIG, CONFIG)
    write(tmp_path / "job" / runs.CHOICES, CHOICES)
    write(tmp_path / "job" / runs.OVERRIDES, ["model=repvgg_tiny"])
    (tmp_path / "job" / runs.LAST).parent.mkdir()
    (tmp_path / "job" / runs.LAST).touch()
    yield tmp_path / "job"
    assert not (tmp_path / "marker").exists()


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def resume(*typed: str) -> dict:
    plan = resuming.plan(cli.parse_arguments([f"resume=job/{runs.LAST}", *typed]))
    return dict(plan.complete(CONFIG))


def refused(match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        resume()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_record_is_resumed():
    assert resume()["data"] == CONFIG["data"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_configuration_is_refused_in_one_line(kind, folder):
    (folder / runs.CONFIG).write_bytes(DAMAGED[kind])

    refused(r"job/\.hydra/config\.yaml")


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_choices_are_refused_in_one_line(kind, folder):
    (folder / runs.CHOICES).write_bytes(DAMAGED[kind])

    with pytest.raises(ValueError, match=r"job/\.hydra/hydra\.yaml") as caught:
        resume("model=repvgg_tiny")

    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", CODE)
def test_code_of_others_has_to_be_typed_again(kind, folder):
    write(folder / runs.CONFIG, CODE[kind])

    refused("names code that is not this project's; if you trust it, pass .*_target_=")


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_place_outside_of_the_run_has_to_be_typed_again(kind, folder):
    write(folder / runs.CONFIG, CONFIG | ELSEWHERE[kind])

    refused("names a place outside of the run's folder")


def test_a_place_in_a_list_that_is_typed_again_is_resumed(folder):
    config = CONFIG | ELSEWHERE["a positional argument"]
    write(folder / runs.CONFIG, config)

    assert resume("+logger.mine._args_=[/x]")["logger"] == config["logger"]


def test_an_argument_of_a_callback_may_have_numbers_as_keys(folder):
    name = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    config = CONFIG | {"callbacks": {"mine": {"_target_": name, "scheduling": {0: 2}}}}
    write(folder / runs.CONFIG, config)

    assert resume()["callbacks"] == config["callbacks"]
    assert len(resuming.describe_changes(config, folder)) == 1, "nothing differs"


@pytest.mark.parametrize(
    "line", ["data._target_=os.system", "hydra/job_logging=x", "~data", "${x}"]
)
def test_recorded_arguments_run_nothing(line, folder):
    write(folder / runs.OVERRIDES, [line])

    assert resume("model=repvgg_tiny")["data"] == CONFIG["data"]


def test_a_deployed_file_is_not_resumed(folder):
    (folder.parent / "model.safetensors").touch()

    with pytest.raises(ValueError, match="not in the folder of a run"):
        resuming.plan(cli.parse_arguments(["resume=model.safetensors"]))
