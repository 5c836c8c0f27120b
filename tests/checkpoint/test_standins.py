"""What the reader of foreign pickles creates: plain values, arrays, and names of the rest."""

import _codecs
import io
import pathlib
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from repvgg.checkpoint import standins, tensors
from repvgg.checkpoint.standins import DamagedError, HostileError, StandIn


class Calls:
    """Is pickled as a call."""

    def __init__(self, called, *given):
        self.reduced = called, given

    def __reduce__(self):
        return self.reduced


class Plain:
    """Is pickled as an object of this class, with keyword arguments."""

    def __getnewargs_ex__(self):
        return (1,), {"a": 2}


def read(value: object, protocol: int = 4) -> object:
    return standins.load(io.BytesIO(pickle.dumps(value, protocol)))


ARRAY = np.arange(6, dtype=">i2").reshape(2, 3)
SAME = {
    "complex": 1 + 2j,
    "bytes": b"\xff\x00",
    "bytearray": bytearray(b"\xff"),
    "empty bytes": b"",
    "empty bytearray": bytearray(),
    "set": {1, "a", (2, None), 1.5, b"x"},
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "counter": Counter("aab"),
    "empty counter": Counter(),
    "defaultdict": defaultdict(list, a=[1]),
    "size": torch.Size([2, 3]),
    "list": [1, [2.5, "x"], []],
    "long": [*range(300)],
    "keys": {(1, "a"): 1, None: 2, 1.5: 3, b"x": 4},
}


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
@pytest.mark.parametrize("case", SAME)
def test_plain_values_are_read_as_they_are(case, protocol):
    found = read(SAME[case], protocol)

    assert found == SAME[case]
    assert isinstance(found, dict) or type(found) is type(SAME[case])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.T.copy(order="F"),
        np.array(["a", "bc"]),
        np.array([b"a"]),
        np.array([[True, False]]),
        np.array(1 + 2j),
        np.zeros((0, 3), np.float16),
        np.arange(3, dtype="<u8"),
    ],
)
def test_arrays_keep_their_values_dtypes_and_orders(array, protocol):
    found = read(array, protocol)

    assert np.array_equal(found, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.flags.f_contiguous == array.flags.f_contiguous
    assert found.flags.writeable


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("ab")])
def test_scalars_of_numpy_keep_their_types(value):
    found = read(value)

    assert (found, type(found)) == (value, type(value))


SCALAR = np.float64(1).__reduce__()[0]  # its module differs between versions of NumPy
STAND_INS = {
    "torch.nn.modules.linear.Linear": torch.nn.Linear,
    f"{__name__}.Plain": Plain(),
    "numpy.ndarray": np.array([{}, None], dtype=object),
    "numpy.dtype": np.dtype([("a", "f4")]),
    "torch.Size": Calls(torch.Size, "ab"),
    "collections.OrderedDict": Calls(OrderedDict, 1),
    "builtins.set": Calls(set, "ab"),
    "builtins.bytearray": Calls(bytearray, 3),
    "_codecs.encode": Calls(_codecs.encode, "x", "rot13"),
    f"{SCALAR.__module__}.scalar": Calls(SCALAR, 1, b"x"),
    "pathlib.PosixPath": pathlib.PosixPath("x"),
    "torch._utils._rebuild_parameter": Calls(torch._utils._rebuild_parameter, 1, True, {}),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_other_objects_become_their_names(name):
    found = read(STAND_INS[name])

    assert (type(found).__mro__[-2], found.name) == (StandIn, name)
    assert repr(found) == f"<stand-in for {name}>"


@pytest.mark.parametrize("value", [frozenset({1, (2, 3)}), frozenset()])
def test_a_frozenset_is_read_as_it_is(value):
    assert read([value, 1]) == [value, 1]


def test_keys_that_could_run_code_are_replaced_by_names():
    found = read({frozenset({1}): 1, (1, (2,)): 2})

    assert [(key.name, value) for key, value in found.items()] == [
        ("builtins.frozenset", 1),
        ("builtins.tuple", 2),
    ]


def test_a_method_beside_the_weights_is_named_and_never_called():
    method = b"c__builtin__\ngetattr\n(ctorch\nnn\nU\x04reluto"
    found = standins.load(io.BytesIO(method[:-1] + b"R."))

    assert found.name == "torch.nn.relu"
    with pytest.raises(HostileError, match=r"builtins\.getattr"):
        standins.load(io.BytesIO(method[:-1] + b"R)R."))


def test_changes_of_a_stand_in_are_dropped():
    found = standins.load(
        io.BytesIO(b"\x80\x04cx\nY\n(K\x01K\x02eK\x03a(U\x01aK\x01uU\x01bK\x01s(K\x01\x90}b.")
    )

    assert (type(found), found.name) == (StandIn, "x.Y")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b")K\x01a.", "it appends to a tuple"),
        (b")(K\x01e.", "it appends to a tuple"),
        (b"](U\x01aK\x01u.", "it sets an item of a list"),
        (b"\x80\x04)(K\x01\x90.", "it adds to a tuple"),
        (b"]}b.", "it gives state to a list"),
        (b"K\x01(tR.", "it calls a int"),
        (b"cx\nY\n]R.", r"it calls x\.Y without arguments"),
        (b"K\x01)\x81.", "it calls a int"),
        (
            b"ccollections\nOrderedDict\n((K\x01K\x02ltR.",
            r"it calls collections\.OrderedDict with wrong arguments \(",
        ),
        (b"cx\n" + b"Y" * 500 + b"\n.", "a class in it has an impossible name"),
    ],
)
def test_a_damaged_pickle_says_what_is_wrong(pickled, message):
    with pytest.raises(DamagedError, match=f"^{message}"):
        standins.load(io.BytesIO(pickled))


def test_the_longest_name_has_500_characters():
    found = standins.load(io.BytesIO(b"cx\n" + b"Y" * 498 + b"\n."))

    assert len(found.name) == 500


@pytest.mark.parametrize(
    "name",
    [
        *(
            "os",
            "posix",
            "nt",
            "sys",
            "subprocess",
            "importlib.util",
            "runpy",
            "ctypes",
            "webbrowser",
        )
    ],
)
def test_names_that_could_run_code_end_the_reading(name):
    with pytest.raises(HostileError, match=rf"^{name}\.x$"):
        standins.load(io.BytesIO(f"c{name}\nx\n.".encode()))


@pytest.mark.parametrize("name", ["eval", "exec", "open", "compile", "nonsense"])
def test_functions_of_python_end_the_reading(name):
    with pytest.raises(HostileError, match=rf"^builtins\.{name}$"):
        standins.load(io.BytesIO(f"cbuiltins\n{name}\n.".encode()))


def test_a_name_that_only_begins_like_a_module_is_harmless():
    assert standins.load(io.BytesIO(b"cosmos\nsystem\n.")).name == "osmos.system"


def archive(path, pickled: bytes) -> object:
    """Read a torch file with a storage of four float32, 0 to 3, and a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
        file.writestr("archive/version", "3\n")
    return tensors.read(path)


def rebuilt(size: bytes, stride: bytes, *, offset: bytes = b"K\x00", rest: bytes = b"") -> bytes:
    """A pickle of {"a": tensor, "b": stand-in}; the stand-in makes torch's own reader refuse."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + b"(" + size + b"t("
    return b"}(U\x01bcx\nY\nU\x01a" + made + stride + b"tI00\n}" + rest + b"tRu."


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        (b"K\x04", b"K\x01", b"K\x00", [0, 1, 2, 3]),
        (b"K\x02K\x02", b"K\x01K\x02", b"K\x00", [[0, 2], [1, 3]]),
        (b"K\x03", b"K\x01", b"K\x01", [1, 2, 3]),
        (b"K\x02", b"K\x03", b"K\x00", [0, 3]),
        (b"K\x00", b"K\x01", b"K\x00", []),
        (b"", b"", b"K\x03", 3),
    ],
)
def test_a_tensor_is_a_view_of_its_storage(size, stride, offset, expected, tmp_path):
    found = archive(tmp_path / "a.pth", rebuilt(size, stride, offset=offset))

    assert torch.equal(found["a"], torch.tensor(expected, dtype=torch.float32))
    assert found["b"].name == "x.Y"


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        (b"K\x05", b"K\x01", b"K\x00", "larger than its storage"),
        (b"K\x04", b"K\x01", b"K\x01", "larger than its storage"),
        (b"K\x02", b"K\x04", b"K\x00", "larger than its storage"),
        (b"", b"", b"K\x04", "larger than its storage"),
        (b"J\xff\xff\xff\xff", b"K\x01", b"K\x00", "a tensor of it has no size"),
        (b"K\x02", b"J\xff\xff\xff\xff", b"K\x03", "a tensor of it has no size"),
        (b"K\x02", b"K\x01", b"J\xff\xff\xff\xff", "a tensor of it has no size"),
        (b"U\x01x", b"K\x01", b"K\x00", "a tensor of it has no size"),
        (b"I01\n", b"K\x01", b"K\x00", "a tensor of it has no size"),
        (b"K\x02K\x02", b"K\x01", b"K\x00", "wrong arguments"),
    ],
)
def test_a_tensor_beyond_its_storage_is_an_error(size, stride, offset, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        archive(tmp_path / "a.pth", rebuilt(size, stride, offset=offset))


def test_a_tensor_with_extra_bits_is_only_named(tmp_path):
    found = archive(tmp_path / "a.pth", rebuilt(b"K\x04", b"K\x01", rest=b"}U\x03negI01\ns"))

    assert found["a"].name == "torch._utils._rebuild_tensor_v2"


def test_a_tensor_without_a_storage_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a tensor of it has no storage"):
        archive(
            tmp_path / "a.pth",
            b"}(U\x01bcx\nY\nU\x01actorch._utils\n_rebuild_tensor\n(K\x01K\x00(t(ttRu.",
        )


@pytest.mark.parametrize(
    "made",
    [
        (
            b"(K\x03(K\x02tcnumpy\ndtype\n(U\x02f8I0\nI1\ntR(K\x03U\x01<NNNK\x00K\x00K\x00tbI00\n",
            15,
        ),
        (
            b"(K\x03(K\x02tcnumpy\ndtype\n(U\x02f8I0\nI1\ntR(K\x03U\x01<NNNK\x00K\x00K\x00tbI00\n",
            17,
        ),
        (
            b"(K\x03(J\xfe\xff\xff\xfftcnumpy\ndtype\n(U\x02f8I0\nI1\ntR(K\x03U\x01<NNNK\x00tbI00\n",
            16,
        ),
    ],
)
def test_an_array_has_its_recorded_size(made):
    start = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    given, size = made
    raw = b"C" + bytes([size]) + bytes(size)

    with pytest.raises(DamagedError, match="an array of it does not have its recorded size"):
        standins.load(io.BytesIO(start + given + raw + b"tb."))


def test_the_switch_of_torch_that_forbids_stand_ins_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": pathlib.Path("x")}, tmp_path / "a.pth")

    with pytest.raises(ValueError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD is set: unset it, or sto"):
        tensors.read(tmp_path / "a.pth")
