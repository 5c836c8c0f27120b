"""Deployed files that can run code open only if the user says so."""

import contextlib
import shutil

import pytest
import torch
from PIL import Image

import repvgg
from repvgg.contract import Description
from repvgg.deploy import certificate
from repvgg.deploy.certificate import Recorded
from repvgg.deploy.report import DeployedFile
from repvgg.export.archive import check_archive
from repvgg.export.formats import FORMATS, open_artifact
from tests.support.commands import run
from tests.support.hostile.programs import EXPLOITS, MALFORMED, write_exploit
from tests.support.networks import settle
from tests.support.reports import CONTRACT, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A deployed folder of two formats, one of which can run code."""
    path = tmp_path_factory.mktemp("deployed")
    config = {"name": "repvgg_tiny", "num_classes": 3}
    description = Description(config, CONTRACT)
    folded = repvgg.switch_to_deploy(settle(repvgg.create_model(**config)))
    for name in ("safetensors", "pt2"):
        FORMATS[name].save(folded, path / FORMATS[name].filename, description)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    scores = open_artifact(path / "model.safetensors")(images / 255)
    files = {file.name: DeployedFile(1, "0" * 64, {}, "float32") for file in path.iterdir()}
    certificate.write(
        path, report(files=files), Recorded(images, scores.argmax(1), scores.double(), scores[:0])
    )
    return path


@pytest.fixture(params=EXPLOITS)
def exploit(request, folder, tmp_path):
    """A program that makes the folder `marker` beside it when it is opened."""
    write_exploit(request.param, folder / "model.pt2", tmp_path / "model.pt2", tmp_path / "marker")
    return tmp_path / "model.pt2"


def test_code_in_a_program_runs_only_if_the_file_is_trusted(exploit):
    with pytest.raises(ValueError, match=r"can run code from the file; .* pass trust=true"):
        open_artifact(exploit)
    assert not exploit.with_name("marker").exists()

    with contextlib.suppress(ValueError):  # what the code returned is no tensor
        open_artifact(exploit, trust=True)
    assert exploit.with_name("marker").exists(), "the code cannot run, so nothing was tested"


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "model=model.pt2", "images=x.png"),
        ("evaluate", "ckpt=model.pt2", "data=digits"),
        ("inspect", "path=model.pt2"),
        ("import", "path=model.pt2"),
        ("deploy.py", "ckpt=model.pt2"),
        ("train.py", "init=model.pt2"),
        ("train.py", "resume=model.pt2"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("exploit", ["sample inputs"], indirect=True)
def test_no_command_runs_code_of_a_program(command, exploit):
    Image.new("RGB", (8, 8)).save(exploit.with_name("x.png"))

    done = run(*command, cwd=exploit.parent)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(path.name for path in exploit.parent.iterdir()) == ["model.pt2", "x.png"]


@pytest.mark.parametrize("command", [("verify", "folder=."), ("deploy.py", "verify=.")], ids=str)
def test_without_trust_the_results_of_a_program_are_not_verified(command, folder):
    done = run(*command, cwd=folder)

    assert done.returncode == 1
    assert "model.safetensors: error" in done.stdout
    assert "model.pt2: no byte was changed, but the results were not verified" in done.stderr
    assert "pass trust=true" in done.stderr
    assert run(*command, "trust=true", cwd=folder).returncode == 0


@pytest.mark.parametrize("exploit", ["sample inputs"], indirect=True)
def test_a_folder_is_compared_with_its_sums_before_a_trusted_file_is_opened(
    exploit, folder, tmp_path
):
    changed = shutil.copytree(folder, tmp_path / "deployed")
    shutil.copy(exploit, changed / "model.pt2")

    done = run("verify", "folder=deployed", "trust=true", cwd=tmp_path)

    assert done.returncode == 1
    assert "changed since it was deployed" in done.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["model.pt2", "model.aoti.pt2"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_archive_is_refused_though_it_is_trusted(kind, name, tmp_path):
    write, message = MALFORMED[kind]
    write(tmp_path / name)

    with pytest.raises(ValueError, match=message) as caught:
        open_artifact(tmp_path / name, trust=True)

    assert str(caught.value).isprintable()


def test_an_archive_of_torch_passes(folder):
    check_archive(folder / "model.pt2")


def test_trust_goes_with_verifying_alone(folder):
    done = run("deploy.py", "ckpt=model.safetensors", "trust=true", cwd=folder)

    assert done.returncode == 1
    assert "trust=true: goes with verify=FOLDER" in done.stderr
