"""Networks whose branches nearly cancel, so that their own float32 error is large."""

from types import SimpleNamespace

import pytest
import torch

import repvgg
from repvgg import verify
from repvgg.deploy import verification
from tests.support.networks import settle
from tests.support.reports import report

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def forms(size: float, damage: float = 0.0):
    """The forms of a network; biases of size `size` cancel between two branches of each block."""
    torch.manual_seed(0)
    network = settle(repvgg.create_model("repvgg_tiny", num_classes=4))
    with torch.no_grad():
        for block in network.modules():
            if isinstance(block, repvgg.RepVGGBlock):
                block.branch_3x3.bn.bias.add_(size).round_()
                block.branch_1x1.bn.bias.sub_(size).round_()
        reference = repvgg.fusion.copying.copied(network).double()
        folded64 = repvgg.switch_to_deploy(reference)
        folded = repvgg.switch_to_deploy(network)
        folded64.stem.reparam.bias.mul_(1 + damage)
        folded.stem.reparam.bias.mul_(1 + damage)
    put = {"reference": reference, "trained": network, "folded64": folded64, "folded": folded}
    return SimpleNamespace(**{key: torch.nn.ModuleDict({"network": n}) for key, n in put.items()})


def evaluate(found):
    networks = {key: module["network"] for key, module in vars(found).items()}
    blocks = {
        "float64": verify.compare_blocks(networks["reference"], networks["folded64"], IMAGES),
        "float32": verify.compare_blocks(networks["reference"], networks["folded"], IMAGES),
    }
    deploy_forms = SimpleNamespace(**networks)
    return verification.evaluate_forms(deploy_forms, IMAGES, blocks)


def test_an_ill_conditioned_network_is_deployed():
    verdicts = evaluate(forms(2.0**12))
    assert verdicts[verification.OWN].error > 1e-5
    assert all(verdict.passed for verdict in verdicts.values())
    assert verdicts["folded, float64"].tolerance == 1e-10


def test_a_wrong_fold_of_an_ill_conditioned_network_is_rejected():
    verdicts = evaluate(forms(2.0**12, damage=1.0))
    assert not verdicts["folded, float64"].passed
    assert not verdicts["folded, float32"].passed


def test_a_well_conditioned_network_has_the_usual_bound():
    assert evaluate(forms(0.0))["folded, float32"].tolerance == 1e-5


@pytest.mark.parametrize(
    ("own", "bound"),
    [(0.0, 1e-5), (2e-6, 1e-5), (1e-4, 4e-4), (1.0, 1e-2), (float("nan"), 1e-5)],
)
def test_the_bound_grows_with_the_own_error(own, bound):
    assert verify.float32_bound(own) == pytest.approx(bound)


def test_the_report_says_which_bound_holds():
    assert "ill-conditioned" not in report(float32_bound=1e-5).to_html()
    assert "allowed 4.0e-04 instead of 1e-05" in report(float32_bound=4e-4).to_html()
