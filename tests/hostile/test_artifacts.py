"""Deployed files and folders that lie: one line, in bounded time and memory, or a right result."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from repvgg.checks import escape
from repvgg.deploy import certificate
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.folder import write_sums
from repvgg.deploy.opening import open_any
from repvgg.deploy.report import DeployedFile
from repvgg.deploy.run import verify_again
from repvgg.export.formats import open_artifact
from tests.support.commands import run
from tests.support.hostile.artifacts import (
    CONFIGS,
    DATA,
    DESCRIPTIONS,
    EXPANDING,
    EXPANDING_IR,
    IR,
    SAFETENSORS,
    WRONG,
    with_nan,
    write_ir,
    write_onnx,
    write_safetensors,
)
from tests.support.hostile.checkpoints import damaged
from tests.support.hostile.limits import measure
from tests.support.reports import report

SECONDS = 2
MEMORY = 80_000_000  # bytes, of the engine and what is imported, beside twice the file's size
IMAGES = torch.full((2, 3, 8, 8), 0.3)
SLOW = ("10^5 empty tensors",)


def refused(path, kind: str) -> None:
    """One line that names the file; from both ways in."""
    for opened in (lambda: open_artifact(path), lambda: open_any(path, "model").predict):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            opened()(IMAGES)
        message = str(caught.value)
        assert message.isprintable(), kind
        assert len(message) < 600, kind
        assert str(path) in message, kind


def use(path) -> None:
    open_artifact(path)(IMAGES)


def limited(path) -> None:
    found = measure(use, path)

    assert found.error.startswith(("ValueError: '", "ArgumentError: '")), found.error
    assert found.error.isprintable()
    assert found.seconds < SECONDS
    assert found.memory < MEMORY + 2 * path.stat().st_size


def test_the_files_that_are_changed_here_are_right(tmp_path):
    write_onnx(tmp_path / "model.onnx")
    write_ir(tmp_path / "model.xml")
    write_safetensors(tmp_path / "model.safetensors")

    for path in tmp_path.glob("model.[osx]*"):
        assert open_artifact(path)(IMAGES).shape == (2, 3)


@pytest.mark.parametrize("kind", EXPANDING)
def test_an_onnx_file_that_expands_is_refused(kind, tmp_path):
    write_onnx(tmp_path / "model.onnx", EXPANDING[kind])

    limited(tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", EXPANDING_IR)
def test_a_graph_of_openvino_that_expands_is_refused(kind, tmp_path):
    write_ir(tmp_path / "model.xml", EXPANDING_IR[kind])

    limited(tmp_path / "model.xml")


def test_a_graph_that_does_not_fit_its_description_is_refused(tmp_path):
    for kind, change in WRONG.items():
        write_onnx(tmp_path / "model.onnx", change)
        refused(tmp_path / "model.onnx", kind)


def test_a_damaged_graph_of_openvino_is_refused(tmp_path):
    for kind, change in IR.items():
        write_ir(tmp_path / "model.xml")
        change(tmp_path / "model.xml")
        refused(tmp_path / "model.xml", kind)


@pytest.mark.parametrize("write", [write_onnx, write_ir, write_safetensors])
def test_a_description_that_is_wrong_is_refused(write, tmp_path):
    suffix = {write_onnx: "onnx", write_ir: "xml", write_safetensors: "safetensors"}[write]
    path = tmp_path / f"model.{suffix}"
    built = CONFIGS if write is write_safetensors else {}
    for kind, text in {**DESCRIPTIONS, **built}.items():
        # Nothing in weights alone contradicts another input format.
        if kind == "input uint8" and built:
            continue
        write(path, text=text)
        refused(path, kind)


def test_weights_that_are_wrong_are_refused(tmp_path):
    for kind, write in SAFETENSORS.items():
        if kind not in SLOW:
            write(tmp_path / "model.safetensors")
            refused(tmp_path / "model.safetensors", kind)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(kind, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", change=lambda tensor: tensor.to(kind))

    assert open_artifact(tmp_path / "model.safetensors")(IMAGES).dtype == torch.float32


@pytest.mark.slow
def test_labels_are_not_made_of_nan(tmp_path):
    write_onnx(tmp_path / "model.onnx", with_nan)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    done = run("predict", "model=model.onnx", "images=x.png", cwd=tmp_path)

    assert "x.png: its logits are NaN or infinite" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("write", [write_onnx, write_ir, write_safetensors])
def test_truncated_files_and_flipped_bits_are_refused_or_still_a_network(write, tmp_path):
    suffix = {write_onnx: "onnx", write_ir: "xml", write_safetensors: "safetensors"}[write]
    path = tmp_path / f"model.{suffix}"
    write(path)
    for kind, content in damaged(path.read_bytes(), 40):
        path.write_bytes(content)
        message = ""
        try:
            assert open_artifact(path)(IMAGES).shape == (2, 3), kind
        except ValueError as error:
            message = str(error)
        assert escape(message) == message, kind
        assert len(message) < 600, kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deployed")
    write_safetensors(path / "model.safetensors")
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    scores = open_artifact(path / "model.safetensors")(images / 255)
    files = {"model.safetensors": DeployedFile(1, "0" * 64, {}, "float32")}
    certificate.write(
        path,
        report(files=files, data=DATA),
        Recorded(images, scores.argmax(1), scores.double(), scores[:0]),
    )
    return path


def _report(change):
    def apply(folder):
        content = json.loads((folder / "report.json").read_text())
        change(content)
        (folder / "report.json").write_text(json.dumps(content))

    return apply


def _probe(**tensors):
    def apply(folder):
        whole = {
            "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
            "labels": torch.zeros(4, dtype=torch.int64),
            "scores": torch.zeros(4, 3, dtype=torch.float64),
            "int8": torch.zeros(0, 3),
        }
        held = {key: value for key, value in {**whole, **tensors}.items() if value is not None}
        (folder / "probe.safetensors").write_bytes(save(held))

    return apply


def _renamed(name):
    return _report(lambda content: content["files"].update({name: content["files"].popitem()[1]}))


def _file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


FOLDERS = {
    "report empty": _file("report.json", b""),
    "report no UTF-8": _file("report.json", b"\xff\xfe"),
    "report a list": _file("report.json", b"[]"),
    "report deep": _file("report.json", b"[" * 10**5 + b"]" * 10**5),
    "report of 10^5 digits": _file("report.json", b'{"verdict": ' + b"9" * 10**5 + b"}"),
    "report null": _file("report.json", b"null"),
    "files a list": _report(lambda content: content.update(files=[1])),
    "no files": _report(lambda content: content.update(files={})),
    "file above": _renamed("../../x.onnx"),
    "file absolute": _renamed("/etc/passwd"),
    "file with escapes": _renamed("\x1b[2J\n.onnx"),
    "file a probe": _renamed("probe.safetensors"),
    "bound a text": _report(lambda content: content.update(float32_bound="1")),
    "bound NaN": _report(lambda content: content.update(float32_bound=float("nan"))),
    "bound 10^400": _report(lambda content: content.update(float32_bound=10**400)),
    "classes missing": _report(lambda content: content["data"].pop("classes")),
    "std 0": _report(lambda content: content["data"].update(std=[0, 0, 0])),
    "verified a list": _report(
        lambda content: content["files"]["model.safetensors"].update(verified=[1])
    ),
    "probe empty": _file("probe.safetensors", b""),
    "probe no header": _file("probe.safetensors", bytes(100)),
    "probe without images": _probe(images=None),
    "probe with more": _probe(more=torch.zeros(1)),
    "probe of no images": _probe(images=torch.zeros(0, 3, 8, 8, dtype=torch.uint8)),
    "probe of floats": _probe(images=torch.zeros(4, 3, 8, 8)),
    "probe of one channel": _probe(images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8)),
    "probe of rank 1": _probe(images=torch.zeros(4, dtype=torch.uint8)),
    "probe of rank 0": _probe(images=torch.tensor(1, dtype=torch.uint8)),
    "probe of no pixels": _probe(images=torch.zeros(4, 3, 0, 0, dtype=torch.uint8)),
    "scores of rank 1": _probe(scores=torch.zeros(4)),
    "scores of rank 0": _probe(scores=torch.tensor(0.0)),
    "scores of five": _probe(scores=torch.zeros(5, 3)),
    "scores complex": _probe(scores=torch.zeros(4, 3, dtype=torch.complex64)),
    "scores NaN": _probe(scores=torch.full((4, 3), torch.nan)),
    "scores of integers": _probe(scores=torch.ones(4, 3, dtype=torch.int64)),
}


def test_a_folder_that_lies_is_refused(folder, tmp_path, capsys):
    for number, (kind, change) in enumerate(FOLDERS.items()):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        change(copied)
        (copied / "SHA256SUMS").unlink()
        write_sums(copied)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            verify_again(copied)
        message = str(caught.value)
        assert escape(message) == message, kind
        assert len(message) < 600, kind
        assert str(copied) in message, kind
