import shutil
import sys
from xml.etree import ElementTree

import pytest

from repvgg.figures import DARK, LIGHT
from scripts import screenshots

COLOURS = r"print('\x1b[1;32mpassed\x1b[0m <b>&\nhalf\rdone', end='')"


def test_a_terminal_is_drawn_as_it_looks_after_the_command(tmp_path):
    screen = screenshots.run_in_terminal([sys.executable, "-c", COLOURS], tmp_path)

    for theme in (LIGHT, DARK):
        drawn = ElementTree.fromstring(screenshots.draw_terminal([("python <x>", screen)], theme))
        texts = [
            (element.text, element.get("fill"), element.get("font-weight"))
            for element in drawn.iter("{http://www.w3.org/2000/svg}text")
        ]
        assert texts == [
            ("$", theme.muted, None),
            ("python <x>", theme.text, "bold"),
            ("passed", theme.third, "bold"),
            ("<b>&", theme.text, None),
            ("done", theme.text, None),
        ]


def test_a_command_that_fails_is_an_error_with_what_it_printed(tmp_path):
    with pytest.raises(OSError, match=r"failed:\nno such thing$"):
        screenshots.run_in_terminal(
            [sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path
        )


def test_without_a_browser_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)

    with pytest.raises(ValueError, match=r"^Chromium is missing: run apt-get install chromium$"):
        screenshots.photograph("about:blank", tmp_path / "x.png", (100, 100))
