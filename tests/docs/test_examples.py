"""The Python of README.md and docs/ runs, each page from top to bottom."""

import re

import pytest
import torch

from tests.support.pages import PAGES, in_folder, run_examples

# Pages whose Python runs in a test that checks its results too.
FILE = re.compile(r'"([\w./-]+\.(?:ckpt|pth|onnx|safetensors|pt2))"')
CHECKED = {"docs/backbone.md": "tests/models/test_backbone.py"}
EXAMPLES = [page for page in PAGES if page.examples and page.path not in CHECKED]
FILES = [page for page in PAGES if page.files]


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.path)
def test_the_python_of_a_page_runs(page, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    torch.manual_seed(0)
    in_folder([page], place.folder)
    for path in FILE.findall("".join(block.text for block in page.examples)):
        place.provide(path)

    for _ in run_examples(page):
        pass


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.path)
def test_the_files_that_a_page_shows_are_whole(page):
    for name, text in page.files.items():
        if name.endswith(".py"):
            exec(compile(text, f"{page.path}: {name}", "exec"), {"__name__": name})


@pytest.mark.parametrize("path", CHECKED)
def test_every_row_of_the_table_is_a_page_with_python(path):
    assert any(page.examples for page in PAGES if page.path == path), f"{path}: delete this row"
