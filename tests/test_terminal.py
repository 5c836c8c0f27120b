"""What is shown on a terminal, narrow or without colours, and in a pipe."""

import re
import subprocess
import sys

import pytest

from repvgg import terminal as shown
from repvgg.data import progress
from tests.support.commands import ROOT
from tests.support.terminals import COLOURS, terminal

FACTS = [("data", "photos: 3 classes, [bold]cat[/bold], [/], \x1b[31mdog\x1b[0m, a\tb")]
COMMAND = f"python deploy.py ckpt=runs/{'photos-repvgg_a0/' * 5}checkpoints/best.ckpt"


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_panel_wraps_facts_and_keeps_commands_whole(monkeypatch, columns):
    with terminal(monkeypatch, columns=columns) as seen:
        shown.print_facts("training", FACTS, [("deploy it", COMMAND)])
        lines = seen.plain().splitlines()

    assert lines[-1] == f"deploy it     {COMMAND}"
    assert {len(line) for line in lines[:-1]} == {len(lines[0])}
    assert len(lines[0]) <= columns
    inside = "".join(line[2:-2].strip() + " " for line in lines[1:-2])
    assert "data" in inside
    assert "3 classes" in inside


def test_text_of_the_user_is_shown_as_it_is(monkeypatch):
    with terminal(monkeypatch, columns=120) as seen:
        shown.print_facts("training", FACTS)
        with shown.step("[red]fold[/red]") as step:
            step.result = "[/] \x1b[2J"
        text = seen.plain()
        raw = seen.text()

    assert r"[bold]cat[/bold], [/], \x1b[31mdog\x1b[0m, a\tb" in text
    assert r"[red]fold[/red][/] \x1b[2J" in text
    assert "\x1b[31m" not in raw
    assert "\x1b[2J" not in raw


@pytest.mark.parametrize(("value", "coloured"), [("", True), ("1", False)])
def test_colours_are_left_out_on_request(monkeypatch, value, coloured):
    with terminal(monkeypatch) as seen:
        monkeypatch.setenv("NO_COLOR", value)
        with shown.step("fold") as step:
            step.result = "7 blocks"
        with shown.bar("decoding", 3) as advance:
            advance(1)
        text = seen.text()

    assert "7 blocks" in text
    assert bool(COLOURS.search(text)) == coloured


def test_a_simple_terminal_gets_plain_lines(monkeypatch):
    with terminal(monkeypatch, kind="dumb") as seen:
        shown.print_facts("training", [("data", "digits")])
        with shown.bar("decoding", 3) as advance:
            advance(1)
        with shown.step("fold"):
            pass
        assert seen.text() == "data          digits\r\nfold          done\r\n"


def test_a_pipe_gets_plain_lines(capsys):
    shown.print_facts("training", FACTS, [("watch it", "tensorboard --logdir runs")])
    with shown.step("fold") as step:
        step.result = "7 blocks"

    assert capsys.readouterr().out.splitlines() == [
        r"data          photos: 3 classes, [bold]cat[/bold], [/], \x1b[31mdog\x1b[0m, a\tb",
        "watch it      tensorboard --logdir runs",
        "fold          7 blocks",
    ]


def test_a_step_that_fails_leaves_no_line(monkeypatch):
    with terminal(monkeypatch) as seen:
        with pytest.raises(ValueError, match="exceeds"), shown.step("onnx"):
            raise ValueError("error 1e-3 exceeds 1e-5")
        assert seen.plain().split() == ["⠋", "onnx"]  # which is erased
        assert seen.text().endswith("\x1b[2K")


def test_a_bar_counts_what_is_decoded_and_disappears(monkeypatch):
    monkeypatch.setattr(progress, "LEAST", 10)
    monkeypatch.setattr(shown, "REDRAW_EVERY", 0)
    with terminal(monkeypatch) as seen:
        results = [*progress.show("abcd", 30, 8, "decoding")]
        text = seen.plain()
        assert seen.text().endswith("\x1b[2K")

    assert results == [*"abcd"]
    assert [*dict.fromkeys(re.findall(r"(\d+)/30", text))] == ["0", "8", "16", "24", "30"]


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_leaves_the_error_on_its_own_line(monkeypatch):
    """The terminal echoes ^C where the cursor is, which is the beginning of the line."""
    code = "from repvgg import cli; cli.fail('stopped by Ctrl-C', 130)"
    with terminal(monkeypatch) as seen:
        stdout = sys.stdout
        stdout.write("^C")
        stdout.flush()
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, stderr=stdout, stdout=stdout)
        assert done.returncode == 130
        assert seen.text() == "^C\rrepvgg: stopped by Ctrl-C\r\n"
