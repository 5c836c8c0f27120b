"""What README.md and the pages of docs/ show: code blocks, commands, headings, links, pictures."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.commands import ROOT

FENCE = re.compile(r"^( *)```(.*)$")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")  # code within a paragraph, or in a cell of a table
SHOWN = re.compile(r"(?:python3?|repvgg|srun|torchrun) \S")
LAUNCHERS = ("srun", "torchrun", "nohup", "time", "env")
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml))`")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        line: of its first line of text.
        before: the text between the heading or block before it and this block.
        section: its heading.
    """

    page: str
    line: int
    language: str
    text: str
    before: str
    section: str


@dataclass(frozen=True)
class Command:
    """A command that a page shows.

    Attributes:
        program: train.py, deploy.py, a command of `repvgg`, scripts/NAME.py, scripts.studies.NAME,
            or the first word of another program.
        arguments: of the program.
        is_whole: False if the text abbreviates it by "...", or names the program alone.
    """

    page: str
    line: int
    text: str
    program: str
    arguments: tuple[str, ...]
    is_whole: bool = True

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: `{self.text}`"


@dataclass(frozen=True)
class Page:
    """A page, by its path from the root of the repository."""

    path: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    @cached_property
    def blocks(self) -> list[Block]:
        return self._split[0]

    @cached_property
    def prose(self) -> str:
        """The text with its blocks blanked, so that line numbers stay."""
        return self._split[1]

    @cached_property
    def commands(self) -> list[Command]:
        """Of all blocks of bash, of added lines of a diff, and of code in text and tables."""
        found: list[tuple[int, str]] = []
        mentioned: set[tuple[int, str]] = set()
        for block in self.blocks:
            lines = _joined(block)
            if block.language in ("bash", "sh"):
                found += lines
            elif block.language == "diff":
                added = [(line, text[1:]) for line, text in lines if text.startswith("+")]
                found += [one for one in added if SHOWN.match(one[1])]
        for span in SPAN.finditer(self.prose):
            text = " ".join(span[1].replace("\\|", "|").split())
            if SHOWN.match(text):
                found.append((self.prose.count("\n", 0, span.start()) + 1, text))
                if len(text.split()) == 2:  # `python deploy.py`, without what it needs
                    mentioned.add(found[-1])
        return [
            command
            for line, text in sorted(found)
            for piece in re.split(r"\s&&\s", re.sub(r"(^|\s)#.*", "", text).strip())
            if piece and (command := _parse(self.path, line, piece, (line, text) not in mentioned))
        ]

    @cached_property
    def files(self) -> dict[str, str]:
        """The files whose content the page shows, by their names.

        A name is the first line of a block, as a comment, or stands in the text before the block,
        or, for parts of one file, before an earlier block of the section.
        """
        files: dict[str, str] = {}
        section = name = ""
        for block in self.blocks:
            if block.section != section:
                section, name = block.section, ""
            ending = {"python": ".py", "diff": ".py", "yaml": ".yaml"}.get(block.language)
            text = block.text
            if block.language == "diff":
                lines = [line[1:] for line in text.splitlines() if line.startswith("+")]
                text = "".join(f"{line}\n" for line in lines if not SHOWN.match(line))
            if ending is None or not text:
                continue
            named = [one for one in FILE.findall(block.before) if one.endswith(ending)]
            comment = re.match(r"# ([\w./-]+\.(?:py|yaml))$", text.partition("\n")[0])
            if comment:
                name = comment[1]
            elif named and not (ROOT / named[-1]).exists():
                name = named[-1]
            elif block.language != "diff" or not name:
                continue
            files[name] = files.get(name, "") + text
        return files

    @cached_property
    def examples(self) -> list[Block]:
        """The blocks of Python that are no file."""
        shown = "\n".join(self.files.values())
        return [
            block for block in self.blocks if block.language == "python" and block.text not in shown
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link to a heading of the page may name, as on GitHub and on the site."""
        anchors: set[str] = set()
        for heading in re.findall(r"^#{1,6} (.*)$", self.prose, flags=re.MULTILINE):
            plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
            anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            count = 0
            while (f"{anchor}-{count}" if count else anchor) in anchors:
                count += 1
            anchors.add(f"{anchor}-{count}" if count else anchor)
        return anchors | set(re.findall(r'(?:id|name)="([^"]+)"', self.prose))

    @cached_property
    def _split(self) -> tuple[list[Block], str]:
        blocks: list[Block] = []
        prose: list[str] = []
        section, before = "", ""
        inside: list[str] | None = None
        for number, line in enumerate(self.text.splitlines(), 1):
            fence = FENCE.match(line)
            if fence and inside is None:
                language, inside, first = fence[2].strip(), [], number + 1
            elif fence and inside is not None:
                text = textwrap.dedent("".join(f"{one}\n" for one in inside))
                blocks.append(Block(self.path, first, language, text, before, section))
                inside, before = None, ""
            elif inside is not None:
                inside.append(line)
            else:
                if line.startswith("#"):
                    section, before = line, ""
                before += f"{line}\n"
                prose.append(line)
                continue
            prose.append("")
        assert inside is None, f"{self.path}:{first}: this block has no end"
        return blocks, "\n".join(prose)


def _joined(block: Block) -> list[tuple[int, str]]:
    """The lines of a block with their numbers; a line that ends in a backslash goes on."""
    lines: list[tuple[int, str]] = []
    continued = False
    for number, text in enumerate(block.text.splitlines(), block.line):
        if continued:
            first, begun = lines.pop()
            lines.append((first, f"{begun[:-1].rstrip()} {text.strip()}"))
        else:
            lines.append((number, text))
        continued = text.endswith("\\")
    return lines


def _parse(page: str, line: int, text: str, is_whole: bool) -> Command | None:
    """A command of its words; None for a part such as `python` alone."""
    words = shlex.split(text)
    while words and re.match(r"[A-Z_]+=", words[0]):  # environment variables
        del words[0]
    if words and words[0] in LAUNCHERS:
        programs = [
            i for i, word in enumerate(words) if re.fullmatch(r"python|repvgg|.*\.py", word)
        ]
        words = words[programs[0] :] if programs else words
    if not words:
        return None
    program, *arguments = words
    if program in ("python", "python3") and arguments[:2] == ["-m", "repvgg"]:
        program, arguments = "repvgg", arguments[2:]
    if program == "repvgg" and arguments:
        program, *arguments = arguments
        program = {"train": "train.py", "deploy": "deploy.py"}.get(program, program)
    elif program in ("python", "python3"):
        if arguments[:1] == ["-m"] and arguments[1:2] and arguments[1].startswith("scripts."):
            program, arguments = arguments[1], arguments[2:]
        elif arguments[:1] and arguments[0].endswith(".py"):
            program, *arguments = arguments
    return Command(page, line, text, program, tuple(arguments), is_whole and "..." not in text)


PAGES = [
    Page(path.relative_to(ROOT).as_posix())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
]


def page(path: str) -> Page:
    """A page by its path from the root, such as docs/data.md."""
    return next(one for one in PAGES if one.path == path)


def run_examples(shown: Page) -> Iterator[dict[str, Any]]:
    """Run the Python of a page from top to bottom; gives its names after each block.

    An error points to the line of the page.
    """
    names: dict[str, Any] = {"__name__": shown.path}
    for block in shown.examples:
        exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / shown.path), "exec"), names)
        yield names


def in_folder(pages: list[Page], folder: Path) -> None:
    """Write the files that pages show into a folder."""
    for shown in pages:
        for name, text in shown.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
