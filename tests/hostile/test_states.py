"""The states of callbacks in a checkpoint are data: they remove nothing outside of their folder."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from repvgg.training.checkpoints import LastCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty:UserWarning")


class Line(L.LightningModule):
    """One weight, whose loss falls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, _):
        loss = (self.weight * batch).square().sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, epochs: int, resumed=None) -> None:
    mine = ModelCheckpoint(folder / "kept", filename="{epoch}", monitor="loss")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[mine, LastCheckpoint(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(torch.ones(2, 1))
    trainer.fit(Line(), loader, ckpt_path=resumed, weights_only=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run of an epoch, in the current one, and a folder that is not its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others").mkdir()
    fit(tmp_path / "run", 1)
    (tmp_path / "run/kept/link").symlink_to(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def poison(folder):
    """Names another path as the best checkpoint so far."""

    def write(path: str):
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        state = next(one for key, one in saved["callbacks"].items() if "'loss'" in key)
        del state["dirpath"]  # Lightning takes that of today for it
        state |= {"best_k_models": {path: torch.tensor(1e9)}, "kth_best_model_path": path}
        torch.save(saved, folder / "poisoned.ckpt")
        return folder / "poisoned.ckpt"

    return write


@pytest.mark.parametrize(
    "path", ["run/kept/../../others", "{run}/kept/../../others", "run/kept/link/others"]
)
def test_a_state_removes_nothing_outside_of_the_folder(path, folder, poison):
    resumed = poison(path.format(run=folder))

    with pytest.raises(ValueError, match=r"outside of its folder .*; resume only runs"):
        fit(folder, 2, resumed)

    assert (folder.parent / "others").is_dir()


@pytest.mark.parametrize("path", ["s3://bucket/others", "simplecache::/others"])
def test_a_state_removes_nothing_at_another_address(path, folder, poison):
    with pytest.raises(ValueError, match="outside of its folder"):
        fit(folder, 2, poison(path))


def test_a_resumed_run_still_replaces_its_own_checkpoints(folder):
    fit(folder, 2, folder / "last.ckpt")

    assert [path.name for path in (folder / "kept").glob("*.ckpt")] == ["epoch=1.ckpt"]
