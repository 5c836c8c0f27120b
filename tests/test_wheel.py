"""What the sdist and the wheel hold. `.ci/wheel` installs the wheel and uses it."""

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

import repvgg
from tests.support.commands import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"


def files(folder: str, ending: str = "") -> set[str]:
    """Files below a folder of the repository, without what programs leave there."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.name.endswith(ending) and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked sdist."""
    place = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-c", BUILD.format("build_sdist"), place]
    with FileLock(tmp_path_factory.getbasetemp().parent / "sdist.lock"):  # of all workers
        there = (ROOT / "repvgg.egg-info").exists()
        subprocess.run(build, cwd=ROOT, check=True)
        if not there:
            shutil.rmtree(ROOT / "repvgg.egg-info")
    (archive,) = place.iterdir()
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
    return place / f"repvgg-{repvgg.__version__}"


@pytest.fixture(scope="module")
def wheel(source) -> zipfile.ZipFile:
    """Built from the sdist, as an installer without a wheel does it."""
    place = source.parent / "wheel"
    place.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD.format("build_wheel"), place], cwd=source, check=True
    )
    (path,) = place.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_need(source):
    needed = set().union(*map(files, ("configs", "docs", "repvgg", "scripts", "tests", ".ci")))
    needed |= {"README.md", "train.py", "deploy.py", "pyproject.toml", "constraints.txt"}

    assert {name for name in needed if not (source / name).is_file()} == set()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_configuration(wheel):
    configs = {f"repvgg/{name}" for name in files("configs", ".yaml")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert held == files("repvgg") | configs


@pytest.mark.slow
def test_the_wheel_says_who_made_what_for_whom(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))

    described = email.message_from_bytes(wheel.read(name))

    assert described["Version"] == repvgg.__version__
    assert described["Author"] == "The repvgg maintainers"
    assert "Typing :: Typed" in described.get_all("Classifier")


def test_the_citation_names_this_version_and_both_papers():
    cited = OmegaConf.load(ROOT / "CITATION.cff")

    assert cited.version == repvgg.__version__
    assert [paper["identifiers"][0]["value"] for paper in cited.references] == [
        "arXiv:2101.03697",
        "arXiv:2106.14448",
    ]
