import hashlib
import json
import shutil

import pytest
import torch

import repvgg
from repvgg.contract import Description, to_float
from repvgg.deploy import certificate
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.folder import write_sums
from repvgg.deploy.report import DeployedFile
from repvgg.deploy.verification import compare_accuracy
from repvgg.export.artifact import build_program
from repvgg.export.formats import FORMATS
from tests.support.networks import settle
from tests.support.reports import CONTRACT, report


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A deployed folder of two formats, which no test changes."""
    path = tmp_path_factory.mktemp("deployed")
    torch.manual_seed(0)
    config = {"name": "repvgg_tiny", "num_classes": 3}
    model = settle(repvgg.create_model(**config))
    description = Description(config, CONTRACT)
    folded = repvgg.switch_to_deploy(model)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    reference = build_program(model, description).double()
    with torch.no_grad():
        scores = reference(to_float(images).double())
    for name in ("safetensors", "onnx"):
        FORMATS[name].save(folded, path / FORMATS[name].filename, description)
    files = {
        FORMATS[name].filename: DeployedFile(1, "0" * 64, {}, "float32")
        for name in ("safetensors", "onnx")
    }
    recorded = Recorded(images, scores.argmax(1), scores, torch.empty(0))
    certificate.write(path, report(files=files), recorded)
    return path


@pytest.fixture
def folder(deployed, tmp_path):
    """A copy of it."""
    return shutil.copytree(deployed, tmp_path / "deployed")


def seal(folder, change=lambda report: None) -> None:
    """Change the report, and write matching sums."""
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)


def test_an_unchanged_folder_passes(folder):
    verdicts, _ = certificate.check(folder)

    assert set(verdicts) == {"model.safetensors", "model.onnx"}
    assert all(verdict.passed for verdict in verdicts.values())


def test_the_sums_are_those_of_sha256sum(folder):
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split("  ")
        assert checksum == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        "model.safetensors",
        "probe.safetensors",
        "report.html",
        "report.json",
        "report.md",
        "SHA256SUMS",
    ],
)
@pytest.mark.parametrize("place", [0, -2])
def test_a_changed_byte_in_any_file_is_an_error(name, place, folder):
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)

    with pytest.raises(ValueError, match="since it was deployed"):
        certificate.check(folder)


@pytest.mark.parametrize("kind", ["missing", "new"])
def test_a_missing_or_new_file_is_an_error(kind, folder):
    if kind == "missing":
        (folder / "model.onnx").unlink()
    else:
        (folder / "model-2.onnx").touch()

    with pytest.raises(ValueError, match=f"{kind} since it was deployed: .'model"):
        certificate.check(folder)


def test_an_artifact_with_other_weights_fails_though_its_sum_fits(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    weights["linear.bias"] = weights["linear.bias"] + 0.1
    save_file(weights, folder / "model.safetensors", metadata=metadata)
    seal(folder)

    verdicts, _ = certificate.check(folder)

    assert {name: verdict.passed for name, verdict in verdicts.items()} == {
        "model.safetensors": False,
        "model.onnx": True,
    }


@pytest.mark.parametrize("bound", [float("inf"), float("nan"), 1e9])
def test_a_bound_that_is_too_wide_lets_no_other_weights_pass(bound, folder):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({k: 2 * v for k, v in load_file(path).items()}, path, metadata=metadata)
    seal(folder, lambda report: report.update(float32_bound=bound))

    verdicts, _ = certificate.check(folder)

    assert not verdicts["model.safetensors"].passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["files"].clear(), "does not list the files"),
        (lambda report: report["files"].pop("model.onnx"), "does not list the files"),
        (lambda report: report.pop("files"), "its report is damaged"),
        (lambda report: report["files"].update({"model.onnx": 3}), "its report is damaged"),
    ],
)
def test_a_damaged_or_incomplete_report_is_an_error(change, message, folder):
    seal(folder, change)

    with pytest.raises(ValueError, match=message):
        certificate.check(folder)


@pytest.mark.parametrize("line", ["0  ../model.onnx\n", "0  model.onnx\n"])
def test_sums_of_other_folders_or_of_a_file_twice_are_rejected(line, folder):
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(line)

    with pytest.raises(ValueError, match="was changed since it was deployed"):
        certificate.check(folder)


def test_a_link_in_place_of_a_file_is_rejected(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    (folder / "model.onnx").rename(elsewhere)
    (folder / "model.onnx").symlink_to(elsewhere)

    with pytest.raises(ValueError, match=r"changed since it was deployed: .'model.onnx'"):
        certificate.check(folder)


def test_a_folder_that_was_not_deployed_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="a folder without SHA256SUMS"):
        certificate.check(tmp_path)


def test_the_report_is_json(folder):
    assert json.loads((folder / "report.json").read_text())["model"]["name"] == "repvgg_tiny"


def scores(*classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


@pytest.mark.parametrize(
    ("given", "lost", "passed"),
    [
        ((0, 1, 2, 0), 0.0, True),
        ((0, 1, 2, 1), 0.25, True),  # one image may always be lost
        ((0, 1, 0, 1), 0.5, False),
    ],
)
def test_int8_is_evaluated_by_the_accuracy_it_loses(given, lost, passed):
    truth = torch.tensor([0, 1, 2, 0])

    verdict = compare_accuracy(scores(0, 1, 2, 0), scores(*given), truth, tolerance=0.01)

    assert (verdict.error, verdict.passed) == (lost, passed)


def test_int8_that_gains_accuracy_loses_nothing():
    verdict = compare_accuracy(scores(1, 1), scores(0, 0), torch.tensor([0, 0]), tolerance=0.0)

    assert (verdict.error, verdict.agreement) == (0.0, 0.0)


def test_int8_that_computes_nan_fails():
    broken = torch.full((2, 3), float("nan"))

    assert not compare_accuracy(scores(1, 1), broken, torch.tensor([0, 0]), tolerance=0.5).passed
