"""Objects beside the weights of a file become inert stand-ins, and no code runs."""

import argparse
import datetime
import enum
import functools
import pathlib
import pickle
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque
from fractions import Fraction

import numpy as np
import pytest
import torch

import repvgg
from repvgg import checkpoint, create_model
from repvgg.checkpoint import tensors
from repvgg.checkpoint.standins import StandIn
from tests.support import foreign
from tests.support.networks import relative_error, settle

RAN: list[str] = []  # what code of a file would add to


def run_code(*_):
    RAN.append("ran")


class Phase(enum.Enum):
    TRAIN = 1


class Config(dict):
    """As yacs has it: a dictionary with state of its own."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.__dict__["frozen"] = True


class History:
    def __init__(self):
        self.log = np.zeros(3)

    def __setstate__(self, state):
        run_code()


class Calls:
    """Would call something when it is unpickled."""

    def __init__(self, called, *given, state=None):
        self.reduced = (called, given) if state is None else (called, given, state)

    def __reduce__(self):
        return self.reduced


def network(**overrides) -> repvgg.RepVGG:
    torch.manual_seed(0)
    return settle(create_model("repvgg_tiny", **{"num_classes": 10} | overrides))


EXTRAS = {
    "scalar": np.float64(0.5),
    "array": np.arange(6, dtype=">i2").reshape(2, 3).T,
    "objects": np.array([{}, None], dtype=object),
    "random state": np.random.default_rng(0),
    "namespace": argparse.Namespace(out=pathlib.Path("x"), lr=np.float32(1)),
    "windows": pathlib.PureWindowsPath("x"),
    "time": datetime.datetime(2024, 1, 1),
    "defaultdict": defaultdict(list, {"a": [1]}),
    "deque": deque([1]),
    "slice": slice(1),
    "enum": Phase.TRAIN,
    "fraction": Fraction(1, 2),
    "partial": functools.partial(torch.relu),
    "class": torch.nn.ReLU,
    "config": Config(),
    "history": History(),
    "module": torch.nn.Linear(2, 2),
    "set": {1, (2, 3)},
    "bytes": b"\xff",
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_do_not_change_them(zipped, protocol, tmp_path):
    weights = network().state_dict()
    RAN.clear()
    torch.save(
        {**EXTRAS, "state_dict": weights},
        tmp_path / "a.pth",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )

    content = tensors.read(tmp_path / "a.pth")

    assert all(torch.equal(content["state_dict"][key], value) for key, value in weights.items())
    assert content["scalar"] == 0.5
    assert np.array_equal(content["array"], EXTRAS["array"])
    assert (content["defaultdict"], content["set"]) == ({"a": [1]}, {1, (2, 3)})
    assert content["bytes"] == b"\xff"
    for key in ("objects", "namespace", "time", "deque", "enum", "config", "history", "module"):
        assert type(content[key]) is StandIn
    assert repr(content["history"]) == f"<stand-in for {__name__}.History>"
    assert RAN == []


def archive(path, pickled: bytes) -> None:
    """A torch file with one storage of four numbers and a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", bytes(16))
        file.writestr("archive/version", "3\n")


STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
HOSTILE = {
    "os.system": (b"cposix\nsystem\n(U\x04exittR.", "names posix.system, which could run code"),
    "eval": (b"c__builtin__\neval\n(U\x011tR.", "names builtins.eval"),
    "getattr": (
        b"c__builtin__\ngetattr\n(ctorch\nnn\nU\x0b__globals__tR.",
        "names builtins.getattr",
    ),
    "call of a method": (
        b"c__builtin__\ngetattr\n(ctorch\nhub\nU\x04loadtR)R.",
        "names builtins.getattr",
    ),
    "an old instance": (b"(itest_files\nrun_code\n.", "cannot be read"),
    "an extension": (b"\x80\x02\x82\x01.", "cannot be read"),
    "a strange id": (b"U\x07storageQ.", "in a way that torch does not write"),
    "an id of another kind": (b"(U\x04filectorch\nFloatStorage\ntQ.", "torch does not write"),
    "state of a tensor": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x04t(K\x01tI00\n}tR}b.",
        "gives state to a Tensor",
    ),
    "beyond the storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x05t(K\x01tI00\n}tR.",
        "larger than its storage",
    ),
    "a call of a dictionary": (b"}(tR.", "calls a dict"),
    "items of a tuple": (b")U\x01aK\x01s.", "sets an item of a tuple"),
    "a huge text": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00.", "cannot be read"),
    "a huge array": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(L99999999999L\ntcnumpy\ndtype\n(U\x02f8I00\nI01\ntR(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tbI00\nC\x01xtb.",
        "does not have its recorded size",
    ),
    "a name of the terminal": (b"ctorch\n\x1b[2J\n.", "an impossible name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_ends_in_one_error_and_runs_nothing(case, tmp_path, capfd):
    pickled, message = HOSTILE[case]
    archive(tmp_path / "a.pth", pickled)
    RAN.clear()

    with pytest.raises(ValueError, match=message):
        tensors.read(tmp_path / "a.pth")

    assert RAN == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "call",
    [
        Calls(run_code, 1),
        Calls(run_code, state={"__class__": run_code, "name": "torch.Size"}),
        Calls(torch.hub.load, "somebody/repository", "main"),
        Calls(torch.load, "x"),
        Calls(functools.partial, run_code, 1),
        Calls(functools.partial(run_code)),
    ],
)
def test_a_call_beside_the_weights_is_not_made(call, tmp_path):
    torch.save({"x": call, "state_dict": network().state_dict()}, tmp_path / "a.pth")
    RAN.clear()

    assert isinstance(tensors.read(tmp_path / "a.pth")["x"], StandIn)
    assert RAN == []


def test_state_onto_functions_and_classes_changes_neither(tmp_path):
    before = dict(vars(History)), dict(vars(run_code))
    name = History.__module__.encode()
    for target in (b"History", b"run_code"):
        archive(tmp_path / "a.pth", b"}U\x01ac" + name + b"\n" + target + b"\n}U\x01kK\x01sbs.")

        content = tensors.read(tmp_path / "a.pth")

        assert repr(content["a"]) == f"<stand-in for {__name__}.{target.decode()}>"
    assert (dict(vars(History)), dict(vars(run_code))) == before


def test_no_module_is_imported_because_a_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_file.py").write_text("import test_files; test_files.run_code()")
    monkeypatch.syspath_prepend(tmp_path)
    archive(tmp_path / "a.pth", b"}U\x01acimported_by_a_file\nName.inner\n)\x81s.")
    RAN.clear()

    content = tensors.read(tmp_path / "a.pth")

    assert content["a"].name == "imported_by_a_file.Name.inner"
    assert RAN == []


def test_a_program_behind_a_pickle_is_not_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pth")

    with pytest.raises(ValueError, match="a TorchScript program"):
        tensors.read(tmp_path / "a.pth")


def test_a_pickled_network_is_an_error_that_asks_for_its_weights(tmp_path):
    for content, message in (
        ({"model": network()}, r"not opened.*: model \(a repvgg\.models\.network\.RepVGG\)"),
        (network(), r"holds a repvgg\.models\.network\.RepVGG, and loading that could run code"),
    ):
        torch.save(content, tmp_path / "a.pth")

        with pytest.raises(ValueError, match=message + r".*torch\.save\(model\.state_dict\(\)"):
            checkpoint.load(tmp_path / "a.pth")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["all", "some", "npz", "big-endian", "pickled"])
@torch.no_grad()
def test_arrays_of_numpy_are_weights(how, tmp_path):
    deployed = repvgg.switch_to_deploy(network())
    arrays = {
        key: tensor if how == "some" and "linear" in key else tensor.numpy()
        for key, tensor in foreign.renamed(deployed, foreign.authors).items()
    }
    if how == "big-endian":
        arrays = {key: array.astype(array.dtype.newbyteorder(">")) for key, array in arrays.items()}
    if how == "npz":
        np.savez(tmp_path / "a", **arrays)
    else:
        torch.save(arrays, tmp_path / "a.npz", pickle_protocol=4 if how == "pickled" else 2)
    images = torch.rand(2, 3, 32, 32)

    opened = checkpoint.load(tmp_path / "a.npz").model

    assert torch.equal(opened(images), deployed(images))
    assert torch.equal(checkpoint.from_state_dict(arrays)(images), deployed(images))


def test_arrays_of_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Calls(run_code, 1)], dtype=object), y=np.ones(2))
    RAN.clear()

    content = tensors.read(tmp_path / "a.npz")

    assert (repr(content["x"]), content["y"].sum()) == ("<stand-in for numpy.ndarray>", 2)
    assert RAN == []


NECK = {"neck.conv.weight": torch.zeros(4, 64, 1, 1)}
BACKBONES = {
    "ours": lambda key: key,
    "the authors'": foreign.authors,
    "timm's": foreign.timm,
    "mmpretrain's": foreign.mmpretrain,
    "the PSPNet example's": lambda key: "layer" + foreign.authors(key).removeprefix("stage"),
    "timm's features_only": lambda key: foreign.timm(key).replace("stages.", "stages_"),
    "behind a prefix": lambda key: f"backbone.body.{foreign.timm(key)}",
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("source", BACKBONES)
@torch.no_grad()
def test_a_backbone_returns_features_and_initializes_a_network(source, form, tmp_path):
    given = network()
    features = create_model("repvgg_tiny", num_classes=0).eval()
    features.load_state_dict(
        {key: value for key, value in given.state_dict().items() if "linear" not in key}
    )
    images = torch.rand(8, 3, 32, 32)
    expected = features(images)
    assert expected.shape == (8, 64)
    if form == "deployed":
        given.switch_to_deploy()
    naming = BACKBONES[source]
    weights = {naming(k): v for k, v in given.state_dict().items() if not k.startswith("linear")}
    torch.save({**weights, **NECK}, tmp_path / "a.pth")

    start = checkpoint.open_network(tmp_path / "a.pth")
    begun = create_model("repvgg_tiny", num_classes=5)
    new = checkpoint.initialize(begun, start, images)

    assert relative_error(expected, start.model(images)) < 1e-5
    assert "without a classifier" in start.origin
    assert "1 other tensors beside it (neck.conv.weight)" in start.origin
    assert new == ["linear.weight", "linear.bias"]
    pooled = begun.eval().forward_features(images).mean((2, 3))
    assert relative_error(expected, pooled) < 1e-4
    with pytest.raises(
        ValueError, match=r"repvgg_tiny without a classifier.*train one first.*open_net"
    ):
        checkpoint.load(tmp_path / "a.pth")


def test_auxiliary_classifiers_need_classes():
    with pytest.raises(ValueError, match=r"auxiliary_heads=True: .*num_classes=0"):
        create_model("repvggplus_l2pse", num_classes=0)


def test_deep_nesting_is_refused_without_recursion(tmp_path):
    archive(tmp_path / "a.pth", b"}U\x01a" + b"]" * 3000 + b"a" * 2999 + b"s.")

    with pytest.raises(ValueError, match="it nests more than 50 wrappers"):
        checkpoint.load(tmp_path / "a.pth")


def test_metadata_of_a_state_dict_is_dropped(tmp_path):
    weights = OrderedDict(network().state_dict())
    weights._metadata = {"": {"version": 1}}
    torch.save([weights, pathlib.Path("x")], tmp_path / "a.pth")

    content = tensors.read(tmp_path / "a.pth")

    assert list(content["0"]) == list(weights)
    assert pickle.loads(pickle.dumps(content["1"])).name == "pathlib.PosixPath"


def test_a_file_without_checksums_is_read(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(computed)

    assert torch.equal(tensors.read(tmp_path / "x.pth")["a"], torch.ones(3))
