"""Scripts, traces, graphs and exports of blocks and networks, in both forms and both modes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import repvgg
from tests.support.networks import relative_error, settle

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's own deprecated ways
SMALL = {
    "depths": (1, 1, 2, 1),
    "widths": (8, 8, 8, 8),
    "num_classes": 5,
    "strides": (2, 1, 2, 2, 1),
}
NETWORKS = {
    "plain": {},
    "qarepvgg": {"block": "qarepvgg"},
    "d2se": {"se_before_relu": 2},
    "plus": {"se_after_relu": 2, "auxiliary_heads": True},
    "noise": {"dropout": 0.3, "branch_drop": 0.2, "drop_path": 0.2},
    "groups": {"groups": 2},
}
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WAYS = {
    "script": lambda network: torch.jit.script(network),
    "trace": lambda network: torch.jit.trace(network, IMAGES, check_trace=False),
    "fx": torch.fx.symbolic_trace,
    "export": lambda network: torch.export.export(network, (IMAGES,)).module(),
}


def build(name, *, deployed, training=False, recompute=False):
    torch.manual_seed(0)
    network = settle(repvgg.create_model("repvgg_a0", **SMALL, **NETWORKS[name]))
    for block in network.modules():
        if isinstance(block, repvgg.RepVGGBlock):
            block.recompute = recompute
    return (repvgg.switch_to_deploy(network) if deployed else network).train(training)


def run(network):
    torch.manual_seed(1)
    return network(IMAGES)


# Blocks recompute their activations in training, before they are folded; of one network all forms.
FORMS = [
    *((name, False, training, False) for name in NETWORKS for training in (False, True)),
    *((name, False, True, True) for name in NETWORKS),
    *((name, True, training, False) for name in NETWORKS for training in (False, True)),
    *(("plain", *form) for form in [(False, False, True), (True, False, True), (True, True, True)]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "deployed", "training", "recompute"), FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_every_form_can_be_recorded(way, name, deployed, training, recompute):
    network = build(name, deployed=deployed, training=training, recompute=recompute)
    expected = run(copy.deepcopy(network))
    recorded = WAYS[way](copy.deepcopy(network))
    assert relative_error(expected, run(recorded)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_features_have_the_same_names_in_both_forms(name):
    network, deployed = (build(name, deployed=form) for form in (False, True))
    names = {f"stages.{i}": f"stages.{i}.{n - 1}.se_after_relu" for i, n in enumerate((1, 1, 2))}
    if "se_after_relu" in NETWORKS[name]:
        names = {key: f"{value}.mul" for key, value in names.items()}
    for form in (network, deployed):
        assert set(names.values()) <= set(get_graph_node_names(form)[1])
    given = create_feature_extractor(deployed, {v: k for k, v in names.items()})(IMAGES)
    x = network.stem(IMAGES)
    for i in range(3):
        x = network.stages[i](x)
        assert relative_error(x, given[f"stages.{i}"]) < 1e-5


def test_pooling_is_a_mean_bit_for_bit():
    network = build("plain", deployed=True)
    features = network.forward_features(IMAGES)
    assert torch.equal(network.linear(features.mean((2, 3))), network.forward_head(features))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "qarepvgg", "d2se"])
@pytest.mark.parametrize("aware", [False, True])
def test_a_deployed_network_is_quantized_by_torch(name, aware):
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    network = build(name, deployed=True)
    prepare = quantize_fx.prepare_qat_fx if aware else quantize_fx.prepare_fx
    prepared = prepare(network.train(aware), get_default_qat_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES)
    quantized = quantize_fx.convert_fx(prepared.eval())
    assert relative_error(network.eval()(IMAGES), quantized(IMAGES)) < 0.3


def test_a_frozen_teacher_runs_inside_a_training_network():
    teacher = build("plain", deployed=True)
    expected = teacher(IMAGES)
    whole = nn.ModuleDict({"teacher": teacher, "head": nn.Linear(5, 2)}).train()
    assert torch.equal(whole["teacher"](IMAGES), expected)
