"""Copies of networks that hold more than weights."""

import copy
import io
import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor

from repvgg.fusion.copying import copied, plain_weights, unwrapped
from tests.support.networks import relative_error, settle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Small(nn.Module):
    """A network in which a test may store a tensor or an object."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.again(self.bn(self.conv(x)).relu())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return settle(Small()).double()


IMAGES = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: t,
        lambda t: [t, (t,)],
        lambda t: {"a": {"b": t}},
        lambda t: deque([t]),
        lambda t: SimpleNamespace(last=t),
    ],
    ids=["attribute", "list", "dict", "deque", "object"],
)
def test_a_tensor_of_an_earlier_forward_is_detached(network, holder):
    network.left = holder(network(IMAGES))
    found = copied(network)
    assert torch.equal(found(IMAGES), network(IMAGES))
    assert network.left is not found.left


def test_a_stored_tensor_keeps_its_value_without_history(network):
    network.left = network(IMAGES)
    found = copied(network).left
    assert found.grad_fn is None
    assert torch.equal(found, network.left)
    assert network.left.grad_fn is not None


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        threading.Event,
        lambda: (i for i in range(3)),
        lambda: io.BufferedReader(io.BytesIO(b"x")),
        lambda: {"inner": [threading.RLock()]},
        lambda: SimpleNamespace(lock=threading.Lock(), numbers=[1, 2]),
    ],
    ids=["lock", "event", "generator", "file", "nested", "object"],
)
def test_what_cannot_be_copied_is_shared(network, make):
    network.conv.held = make()
    network.held = network.conv.held
    found = copied(network)
    assert torch.equal(found(IMAGES), network(IMAGES))
    assert found.conv.weight is not network.conv.weight


def test_only_the_innermost_object_is_shared(network):
    network.held = SimpleNamespace(lock=threading.Lock(), numbers=[1, 2], owner=network)
    found = copied(network)
    assert found.held.lock is network.held.lock
    assert found.held.numbers == [1, 2]
    assert found.held.numbers is not network.held.numbers
    assert found.held.owner is found


def test_a_copy_keeps_modes_formats_and_ties(network):
    network = network.to(memory_format=torch.channels_last)
    network.tied = network.again
    network.last = nn.Conv2d(4, 4, 1).double()
    network.last.weight = network.again.weight
    network.bn.train()
    found = copied(network)
    assert [m.training for m in found.modules()] == [m.training for m in network.modules()]
    assert found.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert found.tied is found.again
    assert found.last.weight is found.again.weight


@pytest.mark.parametrize("training", [False, True])
def test_a_feature_extractor_stays_in_its_mode(network, training):
    extractor = create_feature_extractor(network, {"bn": "a", "again": "b"}).train(training)
    found = copied(nn.Sequential(extractor))[0]
    assert [m.training for m in found.modules()] == [m.training for m in extractor.modules()]
    extractor.eval()
    found.eval()
    assert all(torch.equal(found(IMAGES)[k], extractor(IMAGES)[k]) for k in "ab")
    found.train()
    assert found.graph is not extractor.graph
    assert "bn" in found.code
    assert found.conv.weight is not extractor.conv.weight


def test_a_traced_network_keeps_its_plain_attributes(network):
    traced = torch.fx.symbolic_trace(network)
    traced.classes = ["a", "b"]
    traced.lock = threading.Lock()
    found = copied(traced)
    assert found.classes == ["a", "b"]
    assert found.lock is traced.lock
    assert torch.equal(found(IMAGES), network(IMAGES))


def test_an_exported_network_is_copied(network):
    exported = torch.export.export(network, (IMAGES,)).module()
    assert relative_error(network(IMAGES), copied(exported)(IMAGES)) < 1e-12


def test_a_scripted_part_is_copied(network):
    whole = nn.Sequential(torch.jit.script(network), nn.ReLU())
    found = copied(whole)
    assert torch.equal(found(IMAGES), whole(IMAGES))


def test_the_wrapper_of_a_compiled_network_is_removed(network):
    compiled = torch.compile(network, backend="eager")
    assert unwrapped(compiled) is network
    assert type(copied(compiled)) is Small


def test_data_parallel_stays(network):
    assert type(copied(nn.DataParallel(network))) is nn.DataParallel


def test_the_wrapper_of_a_distributed_network_is_removed(network, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        compiled = torch.compile(network, backend="eager")
        found = copied(nn.parallel.DistributedDataParallel(compiled))
        network.bn.process_group = torch.distributed.group.WORLD
        kept = copied(network)
    finally:
        torch.distributed.destroy_process_group()
    assert type(found) is Small
    assert torch.equal(kept(IMAGES), network(IMAGES))


def test_a_copy_under_inference_mode_can_train(network):
    with torch.inference_mode():
        network.bn.running_mean = network.bn.running_mean.clone()
        network.left = network(IMAGES)
        found = copied(network)
    assert not any(t.is_inference() for t in found.state_dict().values())
    assert not found.left.is_inference()
    found.train()(IMAGES).sum().backward()
    assert found.conv.weight.grad is not None


def test_a_lazy_module_is_named():
    with pytest.raises(ValueError, match=r"^1, a LazyConv2d, .*run the network once"):
        copied(nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 3)))


def test_a_network_that_cannot_be_copied_is_named():
    class Stubborn(Small):
        def __deepcopy__(self, memo):
            raise KeyError("no")

    with pytest.raises(ValueError, match="Stubborn cannot be copied: KeyError"):
        copied(Stubborn())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


COMPUTED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned bias": lambda conv: prune.random_unstructured(conv, "bias", 0.5),
    "pruned twice": lambda conv: prune.ln_structured(
        prune.l1_unstructured(conv, "weight", 0.3), "weight", 0.5, 2, 0
    ),
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "weight_norm of all": lambda conv: nn.utils.weight_norm(conv, dim=None),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
    "both": lambda conv: parametrize.register_parametrization(
        parametrize.register_parametrization(conv, "weight", Doubled()), "bias", Doubled()
    ),
}


def change_sources(conv):
    """Change the parameters that weights are computed from, as an optimizer does."""
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            if name != "bias":
                parameter.mul_(1.5)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_become_plain_parameters(network, kind, requires_grad):
    COMPUTED[kind](network.conv)
    network.train()(IMAGES)
    network.eval()
    change_sources(network.conv)
    network.requires_grad_(requires_grad)
    found = copied(network)
    plain_weights(found)
    assert set(found.state_dict()) == set(Small().state_dict())
    assert all(p.requires_grad == requires_grad for p in found.parameters())
    assert not found.conv._forward_pre_hooks
    assert type(found.conv) is nn.Conv2d
    assert relative_error(network(IMAGES), found(IMAGES)) < 1e-14
    found.load_state_dict(found.state_dict())
    copy.deepcopy(found)


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_original_still_computes_its_weights(network, kind):
    COMPUTED[kind](network.conv)
    expected = network(IMAGES)
    plain_weights(copied(network))
    assert torch.equal(network(IMAGES), expected)
    keys = set(network.state_dict())
    assert not keys <= set(Small().state_dict())


def test_a_tied_source_keeps_its_value():
    conv, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    other.weight = conv.weight
    parametrize.register_parametrization(conv, "weight", Doubled())
    plain_weights(model := nn.Sequential(conv, other))
    assert torch.equal(model[0].weight, 2 * model[1].weight)


def test_other_hooks_stay(network):
    network.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    prune.l1_unstructured(network.conv, "weight", 0.5)
    expected = network(IMAGES)
    plain_weights(network)
    assert torch.equal(network(IMAGES), expected)
