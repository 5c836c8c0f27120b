"""A folder with what the pages name: images, weights, a run, its deployment."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import repvgg
from tests.support import foreign
from tests.support.commands import make
from tests.support.mnist import write_mnist
from tests.support.networks import settle

# Networks of libraries whose published weights are here, as after a download.
WEIGHTS = {"timm": "mobilenetv3_small_050", "torchvision": "shufflenet_v2_x0_5"}
FIRST = "runs/first"


class Place:
    """A folder with what the pages name."""

    def __init__(self, folder: Path, run_folder: Path, deployed: Callable[[], Path]) -> None:
        self.folder = folder
        self._run, self._deployed = run_folder, deployed
        for part, count in (("train", 6), ("test", 2)):
            make(folder / "photos" / part, count=count)
        write_mnist(folder / "data", "FashionMNIST")
        paths = [*(folder / "photos").rglob("*.jpg")]
        rows = [f"{path.relative_to(folder / 'photos')},{path.parent.name}" for path in paths]
        (folder / "photos" / "train.csv").write_text("\n".join(["path,label", *rows]))

    def find(self, key: str, value: str) -> str:
        """The file or folder here for one that a page names."""
        if key == "data.root" or (self.folder / value).exists() or value in ("auto", "null"):
            return value if value == "data" else "photos" if key == "data.root" else value
        if key in ("root", "images"):
            return "photos/train/cat/*.jpg" if "*" in value else "photos"
        name = Path(value).name
        if key == "classes":
            (self.folder / name).write_text("cat\ndog\n")
            return name
        if name.endswith((".pth", ".pt", ".npz")):
            return self._third_party(name, classes=1000 if "RepVGG-" in name else 2)
        if key in ("verify", "folder") or re.search(r"model\S*\.(onnx|pt2|xml|safetensors)", value):
            return self._deployment(name)
        if not (self.folder / FIRST).exists():
            shutil.copytree(self._run, self.folder / FIRST)
        return f"{FIRST}/checkpoints/{'last' if key == 'resume' else 'best'}.ckpt"

    def provide(self, path: str) -> None:
        """Have a file at the path that Python of a page opens; without a folder it is anybody's."""
        if "/" not in path and not path.endswith(".onnx"):
            self._third_party(path, classes=1000)
            return
        found, named = self.folder / self.find("path", path), self.folder / path
        if not named.exists():
            named.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, named)

    def _deployment(self, name: str) -> str:
        if not (self.folder / FIRST / "deploy").exists():
            shutil.copytree(self._deployed(), self.folder / FIRST / "deploy")
        if not name.startswith("model"):
            return f"{FIRST}/deploy"
        return f"{FIRST}/deploy/{name.replace('-int8', '')}"  # the deployment here has no int8

    def _third_party(self, name: str, *, classes: int) -> str:
        """Weights in the authors' layout."""
        torch.manual_seed(0)
        network = settle(repvgg.create_model("repvgg_tiny", num_classes=classes, in_channels=3))
        torch.save(foreign.renamed(network, foreign.authors), self.folder / name)
        return name
