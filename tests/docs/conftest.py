"""A place for the commands and the Python of the pages."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torchvision import models

from tests.support.commands import run
from tests.support.place import WEIGHTS, Place


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Published weights, as after their download."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm.create_model(WEIGHTS["timm"]).state_dict(), folder / "timm.pth")
    name = WEIGHTS["torchvision"]
    cached = (
        folder / "hub" / "checkpoints" / Path(models.get_model_weights(name)["DEFAULT"].url).name
    )
    cached.parent.mkdir(parents=True)
    torch.save(models.get_model(name).state_dict(), cached)
    return folder


@pytest.fixture
def place(tmp_path, folder, deployed) -> Place:
    return Place(tmp_path, folder, deployed)


@pytest.fixture
def deployed(once, folder) -> Callable[[], Path]:
    """Deploys the run where a command needs that, once with tests/deploy/test_command.py."""

    def deploy(home: Path):
        shutil.copytree(folder, home / "run")
        return run("deploy.py", "ckpt=run/checkpoints/best.ckpt", cwd=home)

    return lambda: once("deployed", deploy)[0] / "run" / "deploy"
