"""Checkpoints that claim absurd sizes, or are well-formed and wrong; each a few kB, by its kind."""

import copy
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import repvgg
from repvgg.checkpoint.native import NETWORK_PREFIX, describe
from repvgg.contract import DataContract
from tests.support.networks import settle

Content = dict[str, Any]
CONFIG = {
    "name": "repvgg_tiny",
    "num_classes": 3,
    "depths": [1, 1, 1, 1],
    "widths": [4, 4, 4, 4],
    "in_channels": 3,
}
DATA = DataContract(["a", "b", "c"], 3, [8, 8], [0.5] * 3, [0.2] * 3, "bilinear", 9)


def ours() -> Content:
    """A small checkpoint of ours that is right."""
    torch.manual_seed(0)
    model = settle(repvgg.create_model(**CONFIG))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    entry = describe(model, config=CONFIG, data=DATA, images=images, labels=torch.tensor([0, 2]))
    weights = {NETWORK_PREFIX + key: value for key, value in model.state_dict().items()}
    return {
        "state_dict": weights,
        "repvgg": {**entry, "origin": ""},
        "epoch": 1,
        "global_step": 10,
        "hyper_parameters": {},
        "pytorch-lightning_version": "2.6.6",
    }


def _set(*path: str, value: object) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value

    return change


def _model(**arguments: object) -> Callable[[Content], None]:
    return lambda content: content["repvgg"]["model"].update(arguments)


def _data(**arguments: object) -> Callable[[Content], None]:
    return lambda content: content["repvgg"]["data"].update(arguments)


def _probe(**arguments: object) -> Callable[[Content], None]:
    return lambda content: content["repvgg"]["probe"].update(arguments)


def _weights(change: Callable[[torch.Tensor], torch.Tensor], key: str = "") -> Any:
    def apply(content: Content) -> None:
        weights = content["state_dict"]
        for name in weights:
            if key in name and weights[name].is_floating_point():
                weights[name] = change(weights[name])

    return apply


def _expanded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def _deep(depth: int) -> list[object]:
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


def _laughs() -> object:
    """A list of 2^60 entries, of which each is there twice."""
    found: object = [torch.zeros(1)]
    for _ in range(60):
        found = [found, found]
    return found


def _cycle() -> Content:
    found: Content = {}
    found["state_dict"] = found
    return found


HUGE = 10**9
# A change to a checkpoint of ours that claims more than the file holds.
ABSURD: dict[str, Callable[[Content], None]] = {
    "1e9 blocks": _model(depths=[HUGE, 1, 1, 1]),
    "1e5 blocks": _model(depths=[1, 10**5, 1, 1]),
    "1e6 channels": _model(widths=[10**6] * 4),
    "1e12 channels": _model(widths=[10**12] * 4),
    "1e30 channels": _model(widths=[10**30] * 4),
    "1e9 classes": _model(num_classes=HUGE),
    "1e9 input channels": _model(in_channels=HUGE),
    "1e9 groups": _model(groups=HUGE),
    "a million strides": _model(strides=[2] * 10**6),
    "a million depths": _model(depths=[1] * 10**6),
    "another network": _model(name="repvgg_b3", depths=[4, 6, 16, 1], widths=[2560] * 4),
    "a large network of timm": lambda content: content["repvgg"].update(
        model={"library": "timm", "name": "resnet152", "num_classes": 3, "in_channels": 3}
    ),
    "1e9 classes of timm": lambda content: content["repvgg"].update(
        model={"library": "timm", "name": "resnet18", "num_classes": HUGE, "in_channels": 3}
    ),
    "1e9 classes of torchvision": lambda content: content["repvgg"].update(
        model={"library": "torchvision", "name": "resnet18", "num_classes": HUGE, "in_channels": 3}
    ),
    "images of 1e6 pixels a side": _data(image_size=[10**6, 10**6]),
    "images of 1e30 pixels a side": _data(image_size=[10**30, 10**30]),
    "resized to 1e9 pixels": _data(resize_size=HUGE),
    "1e12 probe images": _probe(images=_expanded(10**9, 3, 8, 8, dtype=torch.uint8)),
    "1e12 logits": _probe(logits=_expanded(2, 10**12)),
    "1e12 labels": _probe(labels=_expanded(10**12, dtype=torch.int64)),
    "probe images of 1e6 pixels a side": _probe(
        images=_expanded(2, 3, 10**6, 10**6, dtype=torch.uint8)
    ),
    "a weight of 1e12 numbers": _set(
        "state_dict", "net.linear.weight", value=_expanded(10**6, 10**6)
    ),
    "a weight of its shape, all one number": _set(
        "state_dict", "net.linear.weight", value=_expanded(3, 4)
    ),
    "lists in the config": _model(depths=_deep(300)),
    "a list of 2^60 entries in the config": _model(depths=_laughs()),
    "100,000 classes": _data(classes=[str(i) for i in range(10**5)]),
}

NAN = math.nan
# What does not belong to a checkpoint, or is unusual.
HARMLESS: dict[str, Callable[[Content], None]] = {
    "lists in lists": _set("more", value=_deep(300)),
    "a list of 2^60 entries": _set("more", value=_laughs()),
    "itself": lambda content: content.update(more=content),
    "a number as origin": _set("repvgg", "origin", value=3),
    "a class of 10 MB": _data(classes=["a", "b", "c" * 10**7]),
    "half of the weights in float64": _weights(lambda tensor: tensor.double(), "stages"),
}
# A change to a checkpoint of ours that is well-formed and wrong.
WRONG: dict[str, Callable[[Content], None]] = {
    "channels of the data": _data(in_channels=1, mean=[0.5], std=[0.2]),
    "channels of the probe batch": _probe(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)),
    "size of the probe batch": _probe(images=torch.zeros(2, 3, 9, 9, dtype=torch.uint8)),
    "an empty probe batch": _probe(
        images=torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        labels=torch.zeros(0, dtype=torch.int64),
        logits=torch.zeros(0, 3),
    ),
    "a probe batch in float": _probe(images=torch.zeros(2, 3, 8, 8)),
    "logits of fewer classes": _probe(logits=torch.zeros(2, 2)),
    "logits in int": _probe(logits=torch.zeros(2, 3, dtype=torch.int64)),
    "complex logits": _probe(logits=torch.zeros(2, 3, dtype=torch.complex64)),
    "logits of NaN": _probe(logits=torch.full((2, 3), NAN)),
    "labels in float": _probe(labels=torch.zeros(2)),
    "labels beyond the classes": _probe(labels=torch.tensor([0, 3])),
    "fewer labels": _probe(labels=torch.tensor([0])),
    "labels of a matrix": _probe(labels=torch.zeros(2, 2, dtype=torch.int64)),
    "fewer classes": _data(classes=["a", "b"]),
    "more classes": _data(classes=["a", "b", "c", "d"]),
    "no classes": _data(classes=[]),
    "numbers as classes": _data(classes=[1, 2, 3]),
    "std of 0": _data(std=[0.2, 0.0, 0.2]),
    "std of NaN": _data(std=[0.2, NAN, 0.2]),
    "std of infinity": _data(std=[0.2, math.inf, 0.2]),
    "mean of NaN": _data(mean=[0.2, NAN, 0.2]),
    "mean of infinity": _data(mean=[0.2, math.inf, 0.2]),
    "mean of 1e400": _data(mean=[0.2, 10**400, 0.2]),
    "no interpolation": _data(interpolation="x"),
    "an image of 0 pixels": _data(image_size=[0, 8]),
    "complex weights": _weights(lambda tensor: tensor.to(torch.complex64)),
    "integer weights": _weights(lambda tensor: tensor.to(torch.int64)),
    "boolean weights": _weights(lambda tensor: tensor.bool()),
    "sparse weights": _weights(lambda tensor: tensor.to_sparse(), "linear.weight"),
    "weights without values": _weights(lambda tensor: tensor.to("meta")),
    "quantized weights": _weights(
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "linear.weight"
    ),
    "weights of NaN": _weights(lambda tensor: tensor * NAN, "linear.weight"),
    "weights of infinity": _weights(lambda tensor: tensor + math.inf, "linear.weight"),
    "a variance below 0": _weights(lambda tensor: tensor - 10, "running_var"),
    "a transposed weight": _weights(lambda tensor: tensor.t().clone(), "linear.weight"),
    "bn_eps of NaN": _model(bn_eps=NAN),
    "a dropout of 2": _model(dropout=2),
    "another format": _set("repvgg", "format", value=2),
    "a format of NaN": _set("repvgg", "format", value=NAN),
    "a library of its own": _model(library="os"),
}


def resumable() -> Content:
    """A small checkpoint of ours, with what Lightning stores of a training."""
    model = settle(repvgg.create_model(**CONFIG))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    counts = {"ready": 10, "completed": 10}
    return ours() | {
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": counts}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 10}],
        "callbacks": {},
    }


def _momentum(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        for state in content["optimizer_states"][0]["state"].values():
            state["momentum_buffer"] = change(state["momentum_buffer"])

    return apply


def _without(key: str) -> Callable[[Content], None]:
    return lambda content: content.pop(key)


# A change to `resumable` with which no training can be resumed.
UNRESUMABLE: dict[str, Callable[[Content], None]] = {
    "no step": _without("global_step"),
    "a step below 0": _set("global_step", value=-1),
    "a step of text": _set("global_step", value="x"),
    "a step of NaN": _set("global_step", value=NAN),
    "no loops": _without("loops"),
    "loops of text": _set("loops", value="x"),
    "loops without a fit": _set("loops", value={}),
    "progress of text": _set("loops", "fit_loop", "epoch_progress", value="x"),
    "no optimizer": _without("optimizer_states"),
    "optimizers of nothing": _set("optimizer_states", value=None),
    "an optimizer without groups": _set("optimizer_states", value=[{"state": {}}]),
    "an optimizer of text": _set("optimizer_states", value=["x"]),
    "momenta of another shape": _momentum(lambda tensor: torch.zeros(7, 7)),
    "momenta that are expanded": _momentum(lambda tensor: _expanded(*tensor.shape)),
    "momenta of 1e12 numbers": _momentum(lambda tensor: _expanded(10**6, 10**6)),
    "sparse momenta": _momentum(lambda tensor: tensor.to_sparse()),
    "momenta without values": _momentum(lambda tensor: tensor.to("meta")),
    "schedulers of text": _set("lr_schedulers", value="x"),
    "callbacks of text": _set("callbacks", value="x"),
}

STOCK: dict[str, object] = {
    "none": None,
    "text": "x",
    "list": [],
    "mapping": {},
    "huge": 10**30,
    "negative": -1,
    "tensor": torch.tensor([NAN]),
}


def replaced() -> Iterator[tuple[str, Callable[[Content], None]]]:
    """Every value of a checkpoint of ours, except single weights, replaced by each of STOCK."""
    for path in _paths(ours()):
        if path[0] == "state_dict" and len(path) > 1:
            continue
        if path in (("repvgg",), ("repvgg", "origin")) or path[0] in LIGHTNINGS:
            continue
        for name, value in STOCK.items():
            yield f"{'.'.join(path)}: {name}", _set(*path, value=value)


LIGHTNINGS = ("epoch", "global_step", "hyper_parameters", "pytorch-lightning_version")


def _paths(content: Content, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from _paths(value, (*before, key))


def write_ours(change: Callable[[Content], None], path: Path) -> None:
    content = ours()
    change(content)
    torch.save(content, path)


def _saved(content: Callable[[], object]) -> Callable[[Path], None]:
    return lambda path: torch.save(content(), path)


def _zipped(name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> Any:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr(name, content)

    return write


def _array_of(shape: tuple[int, ...]) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def _safetensors(header: bytes, size: int, claimed: int | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header) if claimed is None else claimed) + header)
            file.truncate(size)

    return write


def _pickled(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def _many_blocks() -> Content:
    weights = {key.removeprefix("net."): value for key, value in ours()["state_dict"].items()}
    kernel = "stages.2.{}.branch_3x3.conv.weight"
    return weights | {kernel.format(number): torch.zeros(4, 4, 3, 3) for number in range(3000)}


def _of_version_128(path: Path) -> None:
    """A zip archive whose directory asks for a version of zip that does not exist."""
    write_ours(lambda content: None, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 128
    path.write_bytes(content)


def _many_networks() -> Content:
    return {
        f"a{number}.rbr.stage0.rbr_dense.conv.weight": torch.zeros(1, 1, 3, 3)
        for number in range(20_000)
    }


# Files of other programs that claim more than they hold.
OTHERS: dict[str, Callable[[Path], None]] = {
    "lists in lists": _saved(lambda: {"a": _deep(300)}),
    "a list of 2^60 entries": _saved(_laughs),
    "itself": _saved(_cycle),
    "200,000 keys": _saved(lambda: {f"k{i}": 0 for i in range(200_000)}),
    "20,000 networks": _saved(_many_networks),
    "3,000 blocks": _saved(_many_blocks),
    "a zip archive of version 12.8": _of_version_128,
    "a key of 10 MB": _saved(lambda: {"a." * 5 * 10**6: torch.zeros(1)}),
    "a key of 1 MB of stages": _saved(lambda: {"stage1.0.rbr_dense." * 50_000: torch.zeros(1)}),
    "a block number of 5,000 digits": _saved(
        lambda: {f"stage1.{'9' * 5000}.rbr_dense.conv.weight": torch.zeros(1, 1, 3, 3)}
    ),
    "a block number of 1e9": _saved(
        lambda: {f"stage1.{10**9}.rbr_dense.conv.weight": torch.zeros(1, 1, 3, 3)}
    ),
    "expanded weights": _saved(
        lambda: {
            key.removeprefix("net."): torch.zeros(()).expand(10**6, 10**6)
            for key in ours()["state_dict"]
        }
    ),
    "expanded weights of the right shape": _saved(
        lambda: {
            key.removeprefix("net."): value.new_zeros(()).expand(value.shape)
            for key, value in ours()["state_dict"].items()
        }
    ),
    "a zip bomb of arrays": _zipped("a.npy", _array_of((10**9,)) + bytes(2 * 10**8)),
    "an array of 1e12 numbers": _zipped("a.npy", _array_of((10**12,))),
    "an array of 1e30 numbers": _zipped("a.npy", _array_of((10**30,))),
    "a header of 64 kB": _zipped("a.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535),
    "a compressed pickle": _zipped("archive/data.pkl", b"\x80\x02" + bytes(2 * 10**8)),
    "safetensors that are holes": _safetensors(
        b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
        8 + 72 + 4 * 10**9,
    ),
    "safetensors with a header of 2^60 bytes": _safetensors(b"{}", 100, 2**60),
    "safetensors that nest": _safetensors(b'{"a":' * 20_000, 200_000),
    "safetensors that overlap": _safetensors(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        200,
    ),
    "a pickle that nests": _pickled(b"\x80\x02" + b"(l" * 10**6 + b"."),
    "a pickle of a string of 2^31 bytes": _pickled(b"\x80\x02X\xff\xff\xff\x7f" + b"a."),
    "a pickle of bytes of 2^60": _pickled(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a."),
    "a pickle of a bytearray of 2^60": _pickled(b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"a."),
    "a frame of 2^60 bytes": _pickled(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"."),
    "a memo at 2^31": _pickled(b"\x80\x02]r\xff\xff\xff\x7f."),
    "an integer of 10 MB": _pickled(
        b"\x80\x02\x8b" + struct.pack("<i", 10**7) + b"\x7f" * 10**7 + b"."
    ),
    "an integer of a million digits": _pickled(b"I" + b"9" * 10**6 + b"\n."),
    "marks": _pickled(b"\x80\x02" + b"(" * 10**6),
    "protocol 250": _pickled(pickle.dumps({"a": 1}).replace(b"\x80\x04", b"\x80\xfa", 1)),
}


def damaged(whole: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Truncations and flipped bits of a file."""
    random = np.random.default_rng(seed)
    for number in range(count):
        at = int(random.integers(1, len(whole)))
        if number % 2:
            yield f"first {at} bytes", whole[:at]
        else:
            content = bytearray(copy.copy(whole))
            content[at] ^= 1 << int(random.integers(8))
            yield f"a bit of byte {at}", bytes(content)
