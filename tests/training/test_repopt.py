import types

import pytest
import torch
from torch import nn

from repvgg.training import repopt
from repvgg.training.classifier import Classifier
from tests.support.commands import run

CODE = """
from torch import nn


class Plain(nn.Module):
    def __init__(self, num_classes, in_channels=1):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.down(self.bn(self.conv(self.stem(images).relu())).relu()).relu()
        return self.linear(self.point(x).mean((2, 3)))
"""


def plain() -> nn.Module:
    names: dict[str, object] = {}
    exec(CODE, names)
    return names["Plain"](4)


def test_gradients_are_those_of_the_branches_while_a_run_lasts():
    torch.manual_seed(0)
    network = plain()
    module = Classifier(
        network,
        num_classes=4,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        num_steps=10,
        num_warmup_steps=0,
    )
    images = torch.randn(4, 1, 8, 8)

    def gradients() -> dict[str, torch.Tensor]:
        network.zero_grad()
        network(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    before = gradients()
    callback, trainer = repopt.TrainAsBranches(), types.SimpleNamespace()
    callback.on_fit_start(trainer, module)
    during = gradients()
    callback.teardown(trainer, module, "fit")
    after = gradients()

    mask = torch.ones(8, 8, 3, 3)
    mask[..., 1, 1] += 1
    strided = mask.clone()
    mask[torch.arange(8), torch.arange(8), 1, 1] += 1
    factors = {"conv.weight": mask, "down.weight": strided, "stem.weight": strided[:, :1]}
    for name, gradient in before.items():
        assert torch.allclose(during[name], gradient * factors.get(name, 1)), name
        assert torch.equal(after[name], gradient), name


def test_a_new_network_starts_from_the_sum_of_new_branches():
    torch.manual_seed(0)
    network = plain()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    repopt.start(network)

    added = network.conv.weight - before["conv.weight"]
    outside = torch.ones(3, 3, dtype=torch.bool)
    outside[1, 1] = False
    assert not added[..., outside].any()
    assert (added[..., 1, 1].diagonal() - 1).abs().max() < 8**-0.5  # of a new 1x1
    assert torch.equal(network.point.weight, before["point.weight"])


@pytest.mark.slow
def test_a_run_and_its_continuation_train_as_branches(tmp_path):
    (tmp_path / "plains.py").write_text(CODE)
    given = ("model=custom", "model._target_=plains.Plain", "optim.repopt=true", "seed=0")
    short = ("+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1")

    def train(*arguments: str) -> dict[str, object]:
        done = run("train.py", *given, *short, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "repopt 3 convolutions train as 3x3, 1x1 and identity branches" in done.stdout
        return torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)

    first = train("trainer.max_epochs=1", "hydra.run.dir=a")
    second = train("trainer.max_epochs=2", "resume=a/checkpoints/last.ckpt")

    assert (first["global_step"], second["global_step"]) == (4, 8)
