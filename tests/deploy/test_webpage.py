"""report.html: self-contained, readable, and harmless whatever the names hold."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from repvgg.contract import DataContract
from repvgg.deploy import certificate
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.report import Report, card, samples, webpage
from repvgg.deploy.report.training import find_training
from tests.deploy.test_report import VERSION_0_1
from tests.support.reports import report, whole_report
from tests.support.reports import samples as shown

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](https://example.com) ![x](https://example.com/x.png) `code` | cell | <b>",
    "two\nlines\r\n\n# heading",
    "\x1b[31mred\x1b[0m \u202eevil \udc80",
    "x" * 300,
    "{{ 7 * 7 }} {% for %} $x$",
]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order; collects what a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def data(names, channels=3, size=8) -> DataContract:
    return DataContract(names, channels, [size, size], [0.5] * channels, [0.5] * channels, "box")


def html(given: Report, images: samples.Samples | None = None) -> str:
    return given.to_html(images, webpage.draw(given, images))


@pytest.fixture(scope="module")
def whole() -> str:
    return html(whole_report(), shown())


def test_a_page_holds_the_verdict_the_files_the_figures_and_every_table(whole):
    page = Page(whole)

    assert page.elements.count("h1") == 1
    assert page.elements.count("svg") == 4
    assert page.elements.count("img") == 6 + 2
    assert page.elements.count("pre") == 2
    for words in (
        "was folded without changing its results",
        "of 1e-05 allowed",
        "Line: from the lower to the upper quartile",
        "most confident mistakes",
        "model card",
        "float32 is allowed 4.0e-04 instead of 1e-05",
        "1 batchnorms could not be folded",
        "multi-branch, pytorch",
        "minmax",
        "1111111111111111...",
    ):
        assert words.lower() in page.words.lower()
    assert "trained form" not in page.words
    assert "deployed, torch" not in page.words


def test_a_page_needs_nothing_from_elsewhere(whole):
    page = Page(whole)

    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.elements)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", whole)
    assert set(re.findall(r"https?://[^\s\"<)]+", whole)) <= {
        "http://www.w3.org/2000/svg",  # names of formats, which no reader opens
        "http://www.w3.org/1999/xlink",
    }


def test_a_page_follows_the_setting_of_its_reader(whole):
    assert "prefers-color-scheme: dark" in whole
    assert "@media print" in whole
    declared = set(re.findall(r"--(\w+):", whole))
    assert set(re.findall(r"var\(--(\w+)\)", whole)) <= declared


def test_the_same_report_is_the_same_page():
    images = shown()

    assert html(whole_report(), images) == html(whole_report(), images)


@pytest.fixture(scope="module")
def attacked() -> Report:
    """A report in which everything that a file or a user may choose is hostile."""
    text = " ".join(HOSTILE)
    return replace(
        whole_report(),
        checkpoint=text,
        origin=text,
        model={"name": text, "_target_": text},
        data=data(HOSTILE),
        batchnorms_left={text: text},
        blocks={"float32": dict.fromkeys(HOSTILE, 1e-7)},
        environment={"repvgg": text, text: text},
        command=text,
        training=replace(whole_report().training, folder=text, data=text, overrides=[text]),
    )


def test_hostile_names_are_shown_harmlessly_in_the_page(attacked):
    text = html(attacked, shown(len(HOSTILE)))
    page = Page(text)

    assert page.handlers == []
    assert {"script", "b"}.isdisjoint(page.elements)
    assert page.elements.count("h1") == 1
    assert all(address.startswith(("data:image/png", "#")) for address in page.addresses)
    assert not set("\x1b\u202e\r") & set(text)
    assert "<script>alert(1)</script>" in page.words
    assert "{{ 7 * 7 }}" in page.words
    text.encode()


def test_hostile_names_are_shown_harmlessly_in_markdown_and_terminal(attacked):
    lines = attacked.to_markdown().splitlines()

    text = "\n".join(line for line in lines if not line.startswith("`"))  # code
    assert sum(line.startswith("#") for line in lines) == 1
    assert not re.search(r"(?<!\\)<|(?<!\\)!\[|(?<!\\)\[click|https?://", text)
    rows = [re.sub(r"\\.", "", line) for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {10, 3}
    assert not set("\x1b\u202e\r") & set("".join(lines) + attacked.summary())
    assert len(attacked.summary().splitlines()) == 5


@pytest.mark.parametrize(("count", "channels", "size"), [(2, 1, 8), (1000, 3, 512)])
def test_a_page_is_written_for_any_classes_and_images(count, channels, size):
    names = [f"class {number}" for number in range(count)]
    given = replace(whole_report(), data=data(names, channels, size))
    images = shown(2, channels, size)
    images = images._replace(
        probabilities=torch.nn.functional.pad(images.probabilities, (0, count - 2))
    )

    text = html(given, images)

    page = Page(text)
    assert page.elements.count("svg") == 4
    assert len(text) < 1_500_000
    assert ("and 990 more" in page.words) == (count == 1000)


def test_a_page_leaves_out_what_was_not_measured():
    least = report(accuracy_on_probe={}, origin="repvgg_tiny in timm's layout", blocks={})

    page = Page(html(least))

    assert "repvgg_tiny in timm's layout" in page.words
    assert "on the 4 images of noise" in page.words
    assert "Not known: the checkpoint holds no labelled images." in page.words
    for words in ("int8", "Latency", "ill-conditioned", "times as fast", "Sample images"):
        assert words not in page.words
    assert "svg" not in page.elements


def test_a_report_of_version_0_1_becomes_a_page():
    page = Page(html(Report.from_json(VERSION_0_1.read_text())))

    assert page.elements.count("svg") == 2
    assert "8.1" in page.words


def test_without_matplotlib_the_report_is_written_without_figures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recorded = Recorded(*(torch.rand(1) for _ in Recorded._fields))

    lines = certificate.write(tmp_path, whole_report(), recorded, shown())

    assert lines == [
        "report.html has no figures: matplotlib is missing: run pip install matplotlib"
    ]
    page = Page((tmp_path / "report.html").read_text())
    assert "This report has no figures: matplotlib was not installed." in page.words
    assert page.elements.count("img") == 8


def test_the_most_confident_mistakes_come_first():
    given = shown()._replace(
        labels=torch.tensor([0, 0, 0, 1]),
        probabilities=torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.1, 0.9], [0.2, 0.8]]),
        images=torch.rand(4, 1, 8, 8),
    )

    assert samples.mistakes(given) == [2, 0]
    assert samples.confusion(given).tolist() == [[1, 2], [0, 1]]


def test_a_run_is_found_by_the_files_of_its_folder(folder):
    found = find_training(folder / "checkpoints" / "best.ckpt")

    assert found.data == "digits"
    assert "model=repvgg_tiny" in found.overrides
    assert 0 <= found.metrics["test/accuracy"] <= 1


def test_another_checkpoint_does_not_get_the_metrics_of_the_best(folder):
    assert find_training(folder / "checkpoints" / "last.ckpt").metrics == {}


@pytest.mark.parametrize("images", ["test", "validation"])
def test_only_test_images_give_a_test_accuracy(images, tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    for part in (path.parent, tmp_path / ".hydra"):
        part.mkdir()
    torch.save({"epoch": 3}, path)
    metrics = {"val/accuracy": 0.7, "test/accuracy": 0.7}
    results = {"metrics": metrics, "tested_on": images, "best_epoch": 3, "last_epoch": 5}
    (tmp_path / "results.json").write_text(json.dumps(results))

    found = find_training(path)

    assert ("test/accuracy" in found.metrics) == (images == "test")
    assert found.metrics["val/accuracy"] == 0.7


@pytest.mark.parametrize("content", ["", "[]", '{"metrics": 3, "overrides": 3}', "{"])
def test_a_damaged_folder_of_a_run_tells_nothing(content, tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    for part in (path.parent, tmp_path / ".hydra"):
        part.mkdir()
    torch.save({"epoch": 3}, path)
    (tmp_path / "results.json").write_text(content)
    (tmp_path / ".hydra" / "hydra.yaml").write_text(content)

    found = find_training(path)

    assert (found.data, found.metrics, [*found.overrides]) == (None, {}, [])


def test_a_checkpoint_outside_of_a_run_has_none(tmp_path):
    assert find_training(tmp_path / "best.ckpt") is None


def test_a_card_states_the_preprocessing_of_the_input():
    rows = dict(card.card(replace(whole_report(), input="uint8")))

    assert rows["input"] == "images (N, 32, 32, 3), uint8 in 0..255"
    assert "center crop 32x32; the files subtract the mean 0.4, 0.5, 0.6" in rows["preprocessing"]
