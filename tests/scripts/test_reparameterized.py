import torch
from torch import nn

from scripts.studies import reparameterized
from scripts.studies.runs import read


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.linear((y - 1 + y).mean((2, 3)))


def test_what_runs_is_counted():
    counted = reparameterized.Count()
    with counted, torch.no_grad():
        Block().eval()(torch.rand(1, 3, 8, 8))

    assert counted.found == {"convolutions": 2, "batchnorms": 1, "additions": 2}


def test_every_network_is_timed_in_turns():
    models = {key: Block().eval() for key in reparameterized.MODELS}

    found = reparameterized.latency(models, torch.rand(1, 3, 8, 8), 2)

    assert list(found) == list(models)
    assert all(value > 0 for value in found.values())


def test_the_page_is_that_of_its_rows():
    path = reparameterized.Path("docs/studies/reparameterized")
    page = reparameterized.summary(read(path / "networks.csv"), reparameterized.DEFAULTS)

    published = (path / "networks.md").read_text()
    assert page.split("\n`python")[0] == published.split("\n`python")[0]  # then the machine
