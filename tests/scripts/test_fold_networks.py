"""The study of folding, on a few small networks."""

import copy

import pytest
import torch
from torch import nn

from repvgg import fuse_conv_bn
from scripts.studies import fold_networks, paper_networks

FEW = [("timm", "test_resnet"), ("papers", "repvgg_d2se")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), FEW)
def test_a_folded_network_equals_the_unfolded_one(family, name):
    row = fold_networks.measure(family, name)

    assert row["outcome"] == "right"
    assert row["error"] < 1e-9
    assert not row["narrow"]
    assert row["fused"] > 0
    assert row["again_fused"] == row["again_merged"] == 0


@pytest.mark.slow
def test_a_wrong_fold_is_reported():
    def wrong(network: nn.Module):
        folded, report = fuse_conv_bn(network)
        with torch.no_grad():
            next(folded.parameters()).mul_(1 + 1e-6)
        return folded, report

    row = fold_networks.measure("papers", "acnet", fold=wrong)

    assert row["outcome"] == "wrong"
    assert row["error"] > 1e-9


def test_a_raising_and_a_repeating_fold_are_reported():
    def raises(network: nn.Module):
        raise KeyError("conv")

    assert fold_networks.measure("papers", "acnet", fold=raises)["outcome"] == "crash"

    class Renamed:
        kept, untraced, merged, fused = {}, {}, [], [("conv", "bn")]

    again = fold_networks.measure(
        "papers", "acnet", fold=lambda network: (copy.deepcopy(network), Renamed)
    )
    assert again["again_fused"] == 1


@pytest.mark.slow
def test_the_page_counts_networks_and_reasons():
    rows = [fold_networks.measure("papers", name) for name in ("acnet", "tcn")]

    page = fold_networks.summary([{k: str(v) for k, v in row.items()} for row in rows])

    assert "| papers | 2 | 0 | 0 | 0 |" in page
    assert "| papers | 6 | 1 | it is fed by getitem(), which is no convolution" in page


@pytest.mark.parametrize("name", paper_networks.NETWORKS)
def test_every_network_of_a_paper_runs(name):
    network = paper_networks.NETWORKS[name]().eval()

    network(*paper_networks.Papers().inputs(name, network)[0]["args"])
