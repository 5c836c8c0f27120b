"""Names of other frameworks: the error says what to pass here."""

import dataclasses
from pathlib import Path

import pytest
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)

from repvgg import __main__, cli
from repvgg.checks import listed
from repvgg.cli import habits
from repvgg.training.settings import Settings

TRAIN = cli.CONFIGS / "train.yaml"
ROOTS = [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("given", "value", "instead"),
    [
        ("epochs", "10", "pass trainer.max_epochs=10"),
        ("lr", "0.1", "pass optim.lr=0.1"),
        ("batch_size", "32", "pass data.batch_size=32"),
        ("imgsz", "64", "pass data.image_size=64"),
        ("ckpt_path", "a.ckpt", "pass resume=a.ckpt"),
        ("weights", "a.ckpt", "pass init=a.ckpt"),
        ("device", "0", "pass trainer.accelerator=gpu"),
        ("patience", "", "pass callbacks=early_stopping callbacks.early_stopping.patience=VALUE"),
        ("model._target_", "a.Net", "pass model=custom model._target_=a.Net"),
        ("name", "x", "pass hydra.run.dir=x"),
        ("topk", "5", None),
        ("colour", "1", None),
    ],
)
def test_a_key_of_another_framework_names_ours(given, value, instead):
    assert habits.key(given, value, ROOTS) == instead


@pytest.mark.parametrize(
    ("given", "known", "instead"),
    [
        ("ckpt_path", ["ckpt", "data"], "pass ckpt=x"),
        ("batch_size", ["ckpt", "data"], "pass data.batch_size=x"),
        ("source", ["model", "images"], "pass images=x"),
        ("weights", ["model", "images"], "pass model=x"),
        ("epochs", ["ckpt", "data"], None),
        ("name", ["ckpt", "data"], None),
    ],
)
def test_a_command_names_only_its_own_keys(given, known, instead):
    assert habits.key(given, "x", known) == instead


def test_every_key_that_is_named_exists_in_a_command():
    commands = [ROOTS, ["ckpt", "data", "batch_size", "out"], ["model", "images", "top", "out"]]

    nowhere = [key for key in habits.KEYS if not any(habits.key(key, "", one) for one in commands)]

    assert nowhere == []


@pytest.mark.parametrize(
    ("group", "given", "instead"),
    [
        ("model", "resnet50", "pass model=torchvision model.name=resnet50, or model=timm "),
        ("model", "mine.Net", "pass model=custom model._target_=mine.Net"),
        ("data", "mine.pictures", "pass data=custom data._target_=mine.pictures"),
        ("data", "/photos", "pass data=imagefolder data.root=/photos"),
        ("data", "a/train.csv", "pass data=csv data.root=a data.train=train.csv"),
        ("data", "MNIST", "pass data=torchvision data.name=MNIST"),
    ],
)
def test_a_choice_of_another_kind_names_the_keys_to_pass(monkeypatch, group, given, instead):
    monkeypatch.setattr("sys.argv", ["train.py", f"{group}={given}"])
    error = MissingConfigException("", f"{group}/{given}", ["custom", "digits"])

    line = cli.explain(error, TRAIN, {})

    assert line is not None
    assert line.startswith(f"{group}={given}: there is no such choice; {instead}")


def test_a_choice_is_compared_without_its_capitals():
    error = MissingConfigException("", "model/RepVGG_A0", ["custom", "repvgg_a0"])

    assert "did you mean repvgg_a0?" in str(cli.explain(error, TRAIN, {}))


@pytest.mark.parametrize(
    ("config", "given", "instead"),
    [
        ("train", "photos", "pass data=imagefolder data.root=photos"),
        ("train", "a.ckpt", "pass init=a.ckpt or resume=a.ckpt"),
        ("deploy", "a.ckpt", "pass ckpt=a.ckpt"),
    ],
)
def test_a_path_without_a_key_gets_its_key(tmp_path, monkeypatch, config, given, instead):
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    error = OverrideParseException(given, "no viable alternative")

    line = cli.explain(error, cli.CONFIGS / f"{config}.yaml", {})

    assert line == f"{given}: is no key=value; {instead}"


def test_a_plus_before_a_key_that_exists_is_named():
    error = ConfigCompositionException(
        "Could not append to config. An item is already at 'optim.lr'.\n"
        "Either remove + prefix: 'optim.lr=1'\n"
        "Or add a second + to add or override 'optim.lr': '++optim.lr=1'"
    )

    line = cli.explain(error, Path("train.yaml"), {})

    assert line == "+optim.lr=1: this key exists; pass optim.lr=1, without a plus"


@pytest.mark.slow  # composes the configuration
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model@experiment.model", "the file that overrides it must begin with # @package _gl"),
        ("callbacks.early_stopping.patience", "pass callbacks=early_stopping too, which sets it"),
        ("callbacks.mine.patience", "there is no such key; allowed beside it are rdrop, "),
        ("data.size", "there is no such key; allowed beside it are data._target_, "),
        ("model.drop_out", "there is no such key; did you mean model.dropout? "),
        ("optimiser._target_", "there is no such key; did you mean optimizer._target_? "),
    ],
)
def test_an_unknown_key_is_compared_with_those_beside_it(given, message):
    error = ConfigCompositionException(
        f"Could not override '{given}'.\nTo append to your config use +{given}=5"
    )

    line = cli.explain(error, TRAIN, {})

    assert line is not None
    assert line.startswith(f"{given}: {message}")
    assert "model.drop_path" not in line or given.startswith("model.")


@pytest.mark.slow  # composes the configuration
@pytest.mark.parametrize("command", ["deploy", "evaluate"])
@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("imgsz", "imgsz: there is no such key; pass data.image_size=64"),
        ("data.image_size", "data.image_size: pass data=NAME too, one of cifar10, cifar100, csv"),
    ],
)
def test_a_key_of_the_data_is_named_where_no_data_is_chosen(command, given, line):
    error = ConfigCompositionException(
        f"Could not override '{given}'.\nTo append to your config use +{given}=64"
    )

    explained = cli.explain(error, cli.CONFIGS / f"{command}.yaml", {})

    assert explained is not None
    assert explained.startswith(line)


def test_a_long_list_is_cut_to_the_closest_and_a_count():
    words = [f"key{number}" for number in range(9)]

    assert listed("x", words) == ", ".join(words)
    assert listed("dropuot", [*words, "dropout", "drop_path"]) == (
        "dropout, drop_path, key0, key1, key2, key3 and 5 more"
    )


@pytest.mark.parametrize(("given", "meant"), [("val", "evaluate"), ("export", "deploy")])
def test_a_command_of_another_framework_names_ours(monkeypatch, capsys, given, meant):
    monkeypatch.setattr("sys.argv", ["repvgg", given])

    with pytest.raises(SystemExit):
        __main__.main()

    assert f"did you mean {meant}?" in capsys.readouterr().err
