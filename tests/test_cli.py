import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import repvgg
from repvgg import __main__, cli
from tests.support.commands import ROOT


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("ckpt=runs/a b/best.ckpt", "ckpt='runs/a b/best.ckpt'"),
        ("ckpt=x=y,z(1).ckpt", "ckpt='x=y,z(1).ckpt'"),
        ("ckpt=it's.ckpt", r"ckpt='it\'s.ckpt'"),
        ("ckpt='quoted.ckpt'", "ckpt='quoted.ckpt'"),
        ("+resume=ä.ckpt", "+resume='ä.ckpt'"),
        ("resume=null", "resume=null"),
        ("model=repvgg_a0", "model=repvgg_a0"),
        ("--help", "--help"),
    ],
)
def test_paths_are_quoted_for_hydra_and_nothing_else_is(argument, expected):
    assert cli.quote_path(argument) == expected


@pytest.mark.parametrize(
    "path",
    [
        *(r"C:\new\table", r"\\host\share", "a\\", "a\\\\", r"a\'b", "it's", "a\"b'c"),
        *("/data/${x}/b", "${", r"a\${x}", r"a\\${oc.env:HOME}", "$x", "a b=c,d(e)~"),
    ],
)
def test_a_path_reaches_the_program_as_it_was_typed(path):
    override = OverridesParser.create().parse_override(cli.quote_path(f"ckpt={path}"))

    assert OmegaConf.create({"ckpt": override.value()}).ckpt == path


def test_a_tilde_in_a_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")

    assert cli.quote_path("out=~/models") == "out='/somebody/models'"


@pytest.mark.parametrize(
    ("typed", "options", "overrides"),
    [
        (["a=1", "-m", "b=2,3"], ["-m"], ["a=1", "b=2,3"]),
        (["a=1", "--config-dir", "d", "~b"], ["--config-dir", "d"], ["a=1", "~b"]),
        (["--config-dir=d", "ckpt=a b"], ["--config-dir=d"], ["ckpt='a b'"]),
        (["a=1", "-cn", "a=1", "b=2"], ["-cn", "a=1"], ["a=1", "b=2"]),
        ([], [], []),
    ],
)
def test_options_may_stand_anywhere(typed, options, overrides):
    assert cli.parse_arguments(typed) == (options, overrides)


@pytest.mark.parametrize(
    ("typed", "message"),
    [(["--fast"], "unrecognized arguments: --fast"), (["a=1", "-cn"], "expected one argument")],
)
def test_an_option_that_does_not_exist_is_told_in_one_line(typed, message):
    with pytest.raises(ValueError, match=message):
        cli.parse_arguments(typed)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A job of a configuration with one key and a group, run with the arguments given."""
    (tmp_path / "configs" / "size").mkdir(parents=True)
    (tmp_path / "configs" / "root.yaml").write_text(
        "defaults: [_self_, {size: small}]\nalpha: 1\nout: null\n"
        "hydra: {output_subdir: null, run: {dir: .}}\n"
    )
    for name in ("small", "large"):
        (tmp_path / "configs" / "size" / f"{name}.yaml").write_text(f"width: {len(name)}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cli.FULL_ERROR, "0")

    def run(job, *arguments, started=("train.py",)):
        monkeypatch.setattr(sys, "argv", [*started, *arguments])
        cli.run(job, tmp_path / "configs" / "root.yaml")

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def raising(error):
    def job(config, folder):
        raise error

    return job


def test_a_job_gets_the_composed_configuration_as_plain_types(command):
    seen = []

    command(lambda config, folder: seen.append(config), "alpha=3", "size=large", "out=a b")

    assert seen == [{"alpha": 3, "out": "a b", "size": {"width": 5}}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error", "line"),
    [
        ([], ValueError("rdrop=-1:\n  must be at least 0"), "rdrop=-1: must be at least 0"),
        (
            [],
            OSError(28, "No space left on device"),
            "the disk is full (No space left on device): what was whole before is kept; free some "
            "space, or pass another folder, and run it again",
        ),
        (
            ["size=smal"],
            None,
            "size=smal: there is no such choice; did you mean small? allowed are large, small",
        ),
        (
            ["alpah=2"],
            None,
            "alpah: there is no such key; did you mean alpha? allowed beside it are alpha, out, "
            "size",
        ),
        (
            ["size.widht=2"],
            None,
            "size.widht: there is no such key; did you mean size.width? allowed beside it are "
            "size.width; +size.widht=2 adds a key",
        ),
        (
            ["alpha"],
            None,
            "cannot parse 'alpha'; pass key=value, and quote a value that holds spaces or any of "
            "= , ( ) [ ] { }, as in \"key='a b'\"",
        ),
    ],
)
def test_a_mistake_of_the_user_ends_in_one_line_and_status_1(
    command, capsys, arguments, error, line
):
    with pytest.raises(SystemExit) as stopped:
        command(raising(error), *arguments)

    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"train.py: {line}\n"


def test_a_mistake_of_ours_keeps_its_traceback(command):
    with pytest.raises(KeyError, match="a bug"):
        command(raising(KeyError("a bug")))


def test_a_traceback_begins_in_the_users_own_code(command, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def outer():\n    inner()\ndef inner():\n    raise KeyError(1)\n"
    )
    mine: dict = {}
    source = (tmp_path / "mine.py").read_text()
    exec(compile(source, str(tmp_path / "mine.py"), "exec"), mine)

    with pytest.raises(SystemExit) as stopped:
        command(lambda config, folder: mine["outer"]())

    assert stopped.value.code == 1
    frames = [line for line in capsys.readouterr().err.splitlines() if "File" in line]
    assert [line.rpartition(" ")[2] for line in frames] == ["outer", "inner"]


def test_the_traceback_of_a_mistake_can_be_asked_for(command, monkeypatch):
    monkeypatch.setenv(cli.FULL_ERROR, "1")

    with pytest.raises(ValueError, match="rdrop=-1"):
        command(raising(ValueError("rdrop=-1")))


def test_ctrl_c_ends_with_its_own_status(command):
    with pytest.raises(SystemExit) as stopped:
        command(raising(KeyboardInterrupt()))

    assert stopped.value.code == 130


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_job_and_says_which_failed(command, capsys):
    done = []

    def job(config, folder):
        if config["alpha"] < 0:
            raise ValueError(f"alpha={config['alpha']}: must be positive")
        done.append(config["alpha"])

    with pytest.raises(SystemExit) as stopped:
        command(job, "-m", "alpha=-1,2,-3,4", "hydra.sweep.dir=sweep")

    assert (done, stopped.value.code) == ([2, 4], 1)
    assert capsys.readouterr().err.splitlines() == [
        "alpha=-1: alpha=-1: must be positive",
        "alpha=-3: alpha=-3: must be positive",
        "train.py: 2 of the sweep's jobs failed",
    ]


@pytest.mark.parametrize(
    ("typed", "value"), [([], None), (["mean=null"], None), (["mean=[0.5,1]"], [0.5, 1])]
)
def test_a_setting_of_a_script_may_be_unset_and_has_a_kind_all_the_same(monkeypatch, typed, value):
    seen = []
    monkeypatch.setattr(sys, "argv", ["script.py", *typed])
    before = signal.getsignal(signal.SIGTERM)

    cli.script(seen.append, "What it does.", {"mean": cli.Unset(list, "[0.4]")})

    signal.signal(signal.SIGTERM, before)
    assert seen == [{"mean": value}]


def test_an_unset_setting_of_another_kind_is_refused_with_its_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "mean=0.5"])
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        cli.script(print, "What it does.", {"mean": cli.Unset(list, "[0.4]")})

    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == (
        "script.py: mean='0.5': must be a list; for example mean=[0.4]\n"
    )


def test_a_job_in_a_folder_of_its_own_still_takes_paths_from_where_it_was_typed(command, tmp_path):
    seen = []

    def job(config, folder):
        seen.append((config["out"], os.getcwd(), cli.start_folder()))

    command(job, "out=a b", "hydra.job.chdir=true", "hydra.run.dir=there")
    os.chdir(tmp_path)

    assert seen == [(str(tmp_path / "a b"), str(tmp_path / "there"), tmp_path)]


def test_a_key_that_is_taken_out_must_be_there(command, capsys):
    with pytest.raises(SystemExit):
        command(raising(KeyError("never reached")), "~alpah")

    assert capsys.readouterr().err == (
        "train.py: ~alpah: there is no such key; did you mean alpha?\n"
    )


@pytest.mark.parametrize(
    ("started", "name", "expected"),
    [
        (["train.py"], "deploy", "python deploy.py"),
        (["/a b/deploy.py"], "train", "python '/a b/train.py'"),
        (["train.py"], "import", "repvgg import"),
        (["/venv/bin/repvgg", "train"], "deploy", "repvgg deploy"),
        (["/site-packages/repvgg/__main__.py", "train"], "deploy", "python -m repvgg deploy"),
        (["/site-packages/pytest/__main__.py"], "deploy", "repvgg deploy"),
    ],
)
def test_a_hint_names_the_command_as_this_one_was_started(monkeypatch, started, name, expected):
    monkeypatch.setattr(sys, "argv", started)

    assert cli.command(name) == expected


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (["./train.py", "deploy"], "train.py"),
        (["/venv/bin/repvgg", "train", "a=1"], "repvgg train"),
        (["/venv/bin/repvgg", "a=1"], "repvgg"),
        (["repvgg/__main__.py", "import"], "repvgg import"),
    ],
)
def test_an_error_begins_with_the_program(monkeypatch, started, expected):
    monkeypatch.setattr(sys, "argv", started)

    assert cli.program() == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["deploy.py", "ckpt=a b"], "python deploy.py 'ckpt=a b'"),
        (["/bin/repvgg", "deploy", "ckpt=a b"], "repvgg deploy 'ckpt=a b'"),
        (["-m", "repvgg", "deploy", "ckpt=x"], "repvgg deploy ckpt=x"),
    ],
)
def test_a_command_line_is_recorded_as_it_was_started(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", [part for part in arguments if part != "-m"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments])

    assert cli.command_line() == expected


@pytest.mark.parametrize(
    ("started", "expected"), [(("train.py",), []), (("/venv/bin/repvgg", "train"), ["train"])]
)
def test_further_processes_of_a_run_repeat_the_command(command, started, expected):
    """Lightning starts one for each further device, with the arguments in sys.argv."""
    seen = []

    command(lambda config, folder: seen.append(sys.argv[1:]), "alpha=2", started=started)

    assert seen == [[*expected, "alpha=2"]]


def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(command, capsys, monkeypatch):
    """Root may write everywhere, so the system's answer is put in its place."""

    def make(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", make)
    with pytest.raises(SystemExit) as stopped:
        command(raising(KeyError("never reached")), "hydra.run.dir=runs/one")

    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "train.py: [Errno 13] Permission denied: 'runs/one'; change to a folder that you can write "
        "to, or pass hydra.run.dir=FOLDER\n"
    )


def test_a_file_in_the_way_of_a_run_is_an_error_in_one_line(command, capsys, tmp_path):
    (tmp_path / "runs").touch()

    with pytest.raises(SystemExit):
        command(raising(KeyError("never reached")), "hydra.run.dir=runs/one")

    assert re.fullmatch(r"train\.py: .*'runs/one'; change to .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "repvgg: the command is missing; allowed are train, deploy, verify, predict, "),
        (["trian"], "repvgg: trian: there is no such command; did you mean train? allowed are "),
        (["--fast"], "repvgg: --fast: there is no such command; allowed are train"),
    ],
)
def test_without_a_command_there_is_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["repvgg", *arguments])

    with pytest.raises(SystemExit) as stopped:
        __main__.main()

    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["repvgg", "--version"])

    __main__.main()

    assert capsys.readouterr().out == f"repvgg {repvgg.__version__}\n"


def test_the_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["repvgg", "--help"])

    __main__.main()

    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")] == [
        *cli.COMMANDS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)]
)
def test_help_answers_without_torch(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "repvgg", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0
    assert done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "repvgg.cli" in imported
    assert imported & {"torch", "lightning", "torchvision", "onnx"} == set()
    assert list(tmp_path.iterdir()) == []
