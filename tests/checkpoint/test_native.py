import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

import repvgg
from repvgg import checkpoint, create_model
from repvgg.contract import DataContract, Description, to_float
from repvgg.export.formats import save_safetensors
from repvgg.models.registry import build_model
from tests.support.networks import relative_error, settle

CONFIG = {"name": "repvgg_tiny", "num_classes": 3, "in_channels": 1, "strides": [1, 1, 2, 2, 1]}
CONTRACT = DataContract(["a", "b", "c"], 1, [8, 8], [0.3], [0.4], "bilinear")
IMAGES = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)


def content(seed: int = 0) -> dict:
    """What train.py writes, as far as loading needs it."""
    torch.manual_seed(seed)
    model = settle(create_model(**CONFIG))
    entry = checkpoint.describe(
        model, config=CONFIG, data=CONTRACT, images=IMAGES, labels=torch.tensor([0, 1, 2, 0])
    )
    weights = {f"net.{key}": value for key, value in model.state_dict().items()}
    return {"state_dict": weights, checkpoint.KEY: entry, "epoch": 3}


def test_a_checkpoint_gives_back_the_network_and_what_it_knows(tmp_path):
    torch.save(content(), tmp_path / "best.ckpt")

    restored = checkpoint.load(tmp_path / "best.ckpt")

    assert restored.config == CONFIG
    assert restored.data == CONTRACT
    assert torch.equal(restored.probe.images, IMAGES)


def test_the_restored_predictor_reproduces_the_recorded_logits(tmp_path):
    torch.save(content(), tmp_path / "best.ckpt")

    restored = checkpoint.load(tmp_path / "best.ckpt")

    logits = restored.predictor(to_float(restored.probe.images))
    torch.testing.assert_close(logits, restored.probe.logits, rtol=1e-5, atol=1e-6)


def test_a_probe_is_saved_without_the_data_set_it_was_cut_from():
    many = torch.zeros(1000, 1, 8, 8, dtype=torch.uint8)

    probe = checkpoint.describe(
        create_model(**CONFIG),
        config=CONFIG,
        data=CONTRACT,
        images=many[:4],
        labels=torch.zeros(1000).long()[:4],
    )["probe"]

    assert [tensor.untyped_storage().nbytes() for tensor in probe.values()] == [256, 32, 48]


def test_describing_keeps_mode_statistics_and_random_state():
    model = settle(create_model(**CONFIG)).train()
    model.stem.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    checkpoint.describe(
        model, config=CONFIG, data=CONTRACT, images=IMAGES, labels=torch.zeros(4).long()
    )

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_loading_needs_neither_lightning_nor_hydra(tmp_path):
    torch.save(content(), tmp_path / "best.ckpt")
    program = (
        "import sys, repvgg\n"
        f"repvgg.checkpoint.load({str(tmp_path / 'best.ckpt')!r})\n"
        "print([m for m in ('lightning', 'hydra', 'torchvision') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.stdout.strip(), done.stderr) == ("[]", "")


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("this must not be printed",))


def truncated(path):
    torch.save(content(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(**entries):
    def write(path):
        changed = content()
        changed[checkpoint.KEY] |= entries
        torch.save(changed, path)

    return write


def without_a_block(path):
    changed = content()
    for key in [key for key in changed["state_dict"] if "stages.1.0" in key]:
        del changed["state_dict"][key]
    torch.save(changed, path)


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "world")


def a_program(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def damaged_arrays(path):
    with path.open("wb") as file:
        np.savez(file, x=np.arange(1000))
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)


def holes(path):
    with path.open("wb") as file:
        file.write(b"x")
        file.truncate(2**24 + 1)


BAD = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
    "another zip": (another_zip, "a zip archive that is truncated, or that torch did not"),
    "a program": (a_program, "a TorchScript program; store its state_dict"),
    "a list": (lambda path: torch.save([1, 2], path), "no tensors in it; its first keys: 0, 1"),
    "text": (lambda path: path.write_text("hello, world\n" * 9), "it is text, not a torch file"),
    "bytes": (
        lambda path: path.write_bytes(b"\xff" * 99),
        r"read: it is truncated, or not a torch file$",
    ),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "holes": (holes, "most of it is holes, without content"),
    "damaged arrays": (damaged_arrays, r"is damaged: Bad CRC-32 .*"),
    "truncated": (truncated, "truncated"),
    "pickled code": (lambda path: torch.save({"x": Payload()}, path), "could run code"),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Payload())), "could run code"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
    "foreign": (
        lambda path: torch.save({"state_dict": {}, "arch": "resnet50"}, path),
        "there are no tensors in it; its first keys: state_dict, arch",
    ),
    "a later format": (change(format=99), "format 99.*update"),
    "no description": (change(data={}), "damaged description"),
    "another description": (change(model={**CONFIG, "num_classes": 4}), "does not fit"),
    "no classes": (
        change(model={**CONFIG, "num_classes": 0}),
        "damaged description: a network of 0 classes",
    ),
    "no entry": (change(model=None), "damaged description: AttributeError"),
    "an unknown variant": (
        change(model={**CONFIG, "name": "repvgg_z9"}),
        "name=repvgg_z9: there is no such model",
    ),
    "a missing block": (without_a_block, "does not fit.*stages.1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_an_error_that_says_what_is_wrong(case, tmp_path, capfd):
    write, message = BAD[case]
    write(tmp_path / "bad.ckpt")

    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "bad.ckpt")

    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("key", "value"), [("bn_eps", 1e-3), ("strides", [2] * 5), ("weights", "net")]
)
def test_a_checkpoint_of_ours_takes_no_assumptions(key, value, tmp_path):
    torch.save(content(), tmp_path / "best.ckpt")

    for load in (checkpoint.load, checkpoint.open_network):
        with pytest.raises(ValueError, match=f"which records this: leave out {key}"):
            load(tmp_path / "best.ckpt", **{key: value})


@pytest.mark.parametrize("block", ["repvgg", "qarepvgg"])
@torch.no_grad()
def test_a_deployed_file_is_opened_by_its_description(block, tmp_path):
    config = CONFIG | {"name": f"{block}_tiny", "bn_eps": 1e-3}
    torch.manual_seed(0)
    network = repvgg.switch_to_deploy(settle(create_model(**config)))
    said = {key: value for key, value in config.items() if key != "num_classes"}
    save_safetensors(network, tmp_path / "model.safetensors", Description(said, CONTRACT))

    opened = checkpoint.load(tmp_path / "model.safetensors")

    assert (opened.config, opened.data) == (config, CONTRACT)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(opened.model(images), network(images))
    branched = repvgg.switch_to_train(opened.model, images).eval()
    assert branched.stem.branch_3x3.bn.eps == 1e-3
    assert relative_error(network(images), branched(images)) < 1e-5
    with pytest.raises(ValueError, match="it records these: leave out bn_eps and strides"):
        checkpoint.load(tmp_path / "model.safetensors", strides=[2] * 5)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"version": "1"}',
        '{"model": {}, "data": {}}',
        Description({"name": "repvgg_tiny"}, CONTRACT).to_json().replace("[0.4]", "[0]"),
        Description({"name": "repvgg_tiny"}, CONTRACT).to_json().replace("[8, 8]", "[8]"),
    ],
)
def test_other_metadata_is_not_a_description(text):
    assert checkpoint.description({"__metadata__": {"repvgg": text}}) is None


def network_of(model: torch.nn.Module, **config) -> checkpoint.Network:
    return checkpoint.Network(model, CONFIG | config, CONTRACT, "")


def fresh(**overrides) -> torch.nn.Module:
    torch.manual_seed(1)
    return create_model(**CONFIG | overrides)


@pytest.mark.parametrize("form", ["training", "deployed"])
@torch.no_grad()
def test_a_network_is_initialized_from_a_checkpoint_of_either_form(form):
    torch.manual_seed(0)
    source = settle(create_model(**CONFIG))
    images = torch.randn(16, 1, 8, 8)
    expected = source(images)
    if form == "deployed":
        source.switch_to_deploy()
    network = fresh()

    new = checkpoint.initialize(network, network_of(source), images)

    assert new == []
    assert relative_error(expected, network.eval()(images)) < 1e-5


@pytest.mark.parametrize(
    "overrides", [{"strides": [2, 2, 1, 2, 2]}, {"bn_eps": 1e-3}, {"name": "qarepvgg_tiny"}]
)
@torch.no_grad()
def test_a_folded_checkpoint_is_divided_among_the_networks_branches(overrides):
    torch.manual_seed(0)
    deployed = repvgg.switch_to_deploy(settle(create_model(**CONFIG)))
    images = torch.randn(16, 1, 16, 16)
    wanted = repvgg.switch_to_deploy(fresh(**overrides))
    wanted.load_state_dict(deployed.state_dict())
    network = fresh(**overrides)

    new = checkpoint.initialize(network, network_of(deployed), images)

    assert new == []
    assert relative_error(wanted(images), network.eval()(images)) < 1e-5
    expected = repvgg.switch_to_train(wanted, images).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in network.state_dict().items())


def test_another_batchnorm_epsilon_is_an_error():
    with pytest.raises(ValueError, match=r"this network's have 0\.001: build .* bn_eps=1e-05"):
        checkpoint.initialize(
            fresh(bn_eps=1e-3), network_of(create_model(**CONFIG)), torch.zeros(2, 1, 8, 8)
        )


def test_another_number_of_classes_gets_a_new_classifier():
    source = settle(create_model(**CONFIG))
    network = fresh(num_classes=5)
    before = network.linear.weight.clone()

    new = checkpoint.initialize(network, network_of(source), torch.zeros(2, 1, 8, 8))

    assert new == ["linear.weight", "linear.bias"]
    assert torch.equal(network.linear.weight, before)
    assert torch.equal(network.stem.branch_3x3.bn.bias, source.stem.branch_3x3.bn.bias)


@torch.no_grad()
def test_a_new_identity_branch_is_zero_at_first():
    source = settle(create_model(**CONFIG | {"strides": [1, 2, 2, 2, 2]}))
    network = fresh()

    new = checkpoint.initialize(network, network_of(source), torch.zeros(2, 1, 8, 8))

    assert new
    assert all(".branch_identity." in key for key in new)
    x = torch.randn(2, 16, 8, 8)
    block, theirs = network.stages[0][0].eval(), source.stages[0][0]
    assert relative_error(theirs(x), block(x)[..., ::2, ::2]) < 1e-6


def test_another_network_is_an_error_and_stays_unchanged():
    network = fresh(widths=[8, 16, 16, 32])
    before = {key: value.clone() for key, value in network.state_dict().items()}

    with pytest.raises(ValueError, match=r"repvgg_tiny, which does not fit this network: stem\."):
        checkpoint.initialize(network, network_of(create_model(**CONFIG)), torch.zeros(2, 1, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_classifier_of_any_network_is_the_layer_declared_last():
    source, network = (
        build_model({"library": "torchvision", "name": "resnet18", "num_classes": count})
        for count in (4, 6)
    )
    start = checkpoint.Network(source, {"name": "resnet18"}, None, "")

    assert checkpoint.initialize(network, start, torch.zeros(2, 3, 32, 32)) == [
        "fc.weight",
        "fc.bias",
    ]
    assert torch.equal(network.conv1.weight, source.conv1.weight)


NAMES = [f"class {i}" for i in range(CONFIG["num_classes"])]


def test_a_thousand_folders_are_matched_by_name_where_the_checkpoint_has_their_names():
    folders = [f"n{10000000 + number}" for number in range(1000)]
    source, network = fresh(num_classes=1000), fresh(num_classes=1000)
    start = network_of(source)._replace(data=contract(folders[::-1]))

    checkpoint.initialize(network, start, torch.zeros(2, 1, 8, 8), classes=folders)

    assert torch.equal(network.linear.weight, source.linear.weight.flip(0))


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("order", ["reversed", "one more", "one renamed", "none known"])
@torch.no_grad()
def test_a_classifier_is_matched_by_class_names(order, form):
    torch.manual_seed(0)
    source = settle(create_model(**CONFIG))
    if form == "deployed":
        source.switch_to_deploy()
    start = network_of(source)._replace(data=contract(NAMES))
    classes = {
        "reversed": NAMES[::-1],
        "one more": ["another", *NAMES],
        "one renamed": [*NAMES[1:], "zebra"],
        "none known": [f"other {name}" for name in NAMES],
    }[order]
    network = fresh(num_classes=len(classes))
    before = network.linear.weight.clone()

    new = checkpoint.initialize(network, start, torch.randn(16, 1, 8, 8), classes=classes)

    for row, name in enumerate(classes):
        known = name in NAMES
        expected = source.linear.weight[NAMES.index(name)] if known else before[row]
        assert torch.equal(network.linear.weight[row], expected)
        if known:
            assert network.linear.bias[row] == source.linear.bias[NAMES.index(name)]
    assert (
        new
        == {
            "reversed": [],
            "one more": ["linear.weight of another", "linear.bias of another"],
            "one renamed": ["linear.weight of zebra", "linear.bias of zebra"],
            "none known": ["linear.weight", "linear.bias"],
        }[order]
    )


def contract(classes: list[str]) -> DataContract:
    return DataContract(classes, 1, (8, 8), (0.5,), (0.5,), "bilinear")
