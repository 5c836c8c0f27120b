"""Links, anchors, pictures and names of README.md and docs/, without building the site."""

import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import repvgg
from repvgg import checkpoint, data, export
from tests.support.commands import CONFIGS, ROOT
from tests.support.pages import PAGES, SPAN, Page, page

README = page("README.md")
LANGUAGES = {"bash", "sh", "python", "diff", "yaml", "csv", "text", "json", "toml", ""}
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
IMAGE = re.compile(r"<(?:img|source)\b[^>]*>")
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class Target(NamedTuple):
    """Where a link or a picture points.

    Attributes:
        alternative: text in place of a picture; None for links, and sources of a picture.
    """

    line: int
    address: str
    is_picture: bool
    alternative: str | None


def targets(shown: Page) -> Iterator[Target]:
    text = SPAN.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), shown.prose)

    def line(found: re.Match[str]) -> int:
        return text.count("\n", 0, found.start()) + 1

    for found in LINK.finditer(text):
        mark, words, address = found.groups()
        yield Target(line(found), address, bool(mark), words if mark else None)
        for inner in LINK.finditer(words):  # a picture that is a link
            yield Target(line(found), inner[3], bool(inner[1]), inner[2])
    for found in IMAGE.finditer(text):
        given = dict(ATTRIBUTE.findall(found[0]))
        alternative = given.get("alt", "") if found[0].startswith("<img") else None
        yield Target(line(found), given.get("src") or given["srcset"], True, alternative)
    for found in re.finditer(r'<a\b[^>]*href="([^"]+)"', text):
        yield Target(line(found), found[1], False, None)


@pytest.mark.parametrize("shown", PAGES, ids=lambda shown: shown.path)
def test_every_link_and_picture_of_a_page_exists(shown):
    broken = []
    for target in targets(shown):
        if re.match(r"[a-z]+:", target.address):
            continue
        path, _, anchor = target.address.partition("#")
        file = (ROOT / shown.path).parent / path if path else ROOT / shown.path
        where = f"{shown.path}:{target.line}: {target.address}"
        if not file.exists():
            broken.append(f"{where}: there is no such file")
        elif anchor and file.suffix == ".md":
            name = file.resolve().relative_to(ROOT).as_posix()
            known = Page(name).anchors
            if anchor not in known:
                broken.append(f"{where}: {name} has no such heading, but {', '.join(known)}")
        elif file.is_dir():
            broken.append(f"{where}: is a folder, which the site does not show; link to a page")

    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("shown", PAGES, ids=lambda shown: shown.path)
def test_every_picture_has_a_text_in_its_place(shown):
    silent = [
        f"{shown.path}:{target.line}: {target.address}"
        for target in targets(shown)
        if target.is_picture and target.alternative is not None and not target.alternative.strip()
    ]

    assert not silent, "\n".join(silent)


def test_every_page_is_in_the_navigation_of_the_site():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/.-]+\.md", config[config.index("nav:") : config.index("not_in_nav:")])
    hidden = [one.strip("/*") for one in re.findall(r"^  (/\S+)$", config, flags=re.MULTILINE)]
    pages = [one.path.removeprefix("docs/") for one in PAGES if one != README]
    needed = {
        one
        for one in pages
        if not any(one.startswith(f"{folder}/") and one.count("/") > 1 for folder in hidden)
    }

    assert needed - {*listed} == set(), "add these pages to the nav of mkdocs.yml"
    assert {*listed} - {*pages} == set(), "mkdocs.yml names pages that do not exist"


@pytest.mark.parametrize("shown", PAGES, ids=lambda shown: shown.path)
def test_a_page_has_one_title_and_marks_its_commands(shown):
    assert len(re.findall(r"^# ", shown.prose, flags=re.MULTILINE)) == 1
    for block in shown.blocks:
        where = f"{shown.path}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: use one of {LANGUAGES}"
        if block.language in ("", "text"):
            assert not re.search(r"^(\$ |python |repvgg |pip )", block.text, re.MULTILINE), (
                f"{where}: this block has commands: open it with ```bash, without $"
            )


def test_the_reference_has_every_public_name():
    shown = "".join(one.text for one in PAGES if one.path.startswith("docs/reference/"))
    documented = {*re.findall(r"^::: (\S+)$", shown, flags=re.MULTILINE)}
    public = {
        f"{module.__name__}.{name}"
        for module in (repvgg, checkpoint, data, export)
        for name in module.__all__
    } - {f"repvgg.{name}" for name in ("checkpoint", "data", "export")}

    assert public - documented == set(), "add `::: NAME` to a page of docs/reference"


def test_the_first_two_commands_do_all_of_their_own_set_up():
    lines = [
        line
        for block in README.blocks
        if block.language == "bash"
        for line in block.text.split("\n")
    ]
    assert lines[0] == (
        "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && "
        "python train.py model=repvgg_a0 rdrop=true"
    )
    assert (
        'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest'
        in lines[1:3]
    )


def test_ci_runs_the_second_command_as_it_stands():
    (line,) = re.findall(r"^command=\$\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)

    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)

    assert found.stdout.strip() == (
        'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest'
    )


@pytest.mark.parametrize("shown", PAGES, ids=lambda shown: shown.path)
def test_every_path_and_variant_that_is_named_exists(shown):
    named = re.findall(
        r"`((?:scripts|tests|configs|docs)/[\w./]+|\.ci/run|constraints\.txt)`", shown.prose
    )
    variants = re.findall(r"`((?:qa)?repvgg(?:plus)?_[a-z]\w*)`", shown.prose)

    assert [path for path in named if not (ROOT / path).exists()] == []
    assert [name for name in variants if not (CONFIGS / "model" / f"{name}.yaml").exists()] == []


def test_the_guide_has_its_twenty_things():
    rows = [line for line in page("docs/guide.md").prose.splitlines() if line.startswith("| ")][1:]

    assert len([row for row in rows if not row.startswith("| |")]) >= 20


def test_three_lines_add_a_network_a_loss_and_a_data_set():
    added = [block.text for block in page("docs/guide.md").blocks if block.language == "diff"]

    assert [len(text.splitlines()) for text in added[:3]] == [3, 3, 3]
