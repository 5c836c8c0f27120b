import pickle
import subprocess
import sys

import pytest
import torch
from networks import settle

from repvgg import checkpoint, create_model
from repvgg.model import DataContract

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

    logits = restored.predictor(checkpoint.to_float(restored.probe.images))
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


def test_describing_leaves_mode_statistics_and_random_state_alone():
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


BAD = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("hello, world\n" * 9), "not a torch file"),
    "truncated": (truncated, "truncated"),
    "pickled code": (lambda path: torch.save({"x": Payload()}, path), "would run code"),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Payload())), "would run code"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
    "foreign": (
        lambda path: torch.save({"state_dict": {}, "arch": "resnet50"}, path),
        "no entry 'repvgg'.*state_dict, arch",
    ),
    "a later format": (change(format=99), "format 99.*update"),
    "no description": (change(data={}), "damaged description"),
    "another description": (change(model={**CONFIG, "num_classes": 4}), "does not fit"),
    "an unknown variant": (change(model={**CONFIG, "name": "repvgg_z9"}), "unknown model"),
    "a missing block": (without_a_block, "does not fit.*stages.1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_what_is_wrong(case, tmp_path, capfd):
    write, message = BAD[case]
    write(tmp_path / "bad.ckpt")

    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "bad.ckpt")

    assert capfd.readouterr().out == ""
