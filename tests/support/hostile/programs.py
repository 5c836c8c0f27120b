"""Archives of torch.export that run code when torch opens them, and archives that are malformed."""

import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

Members = dict[str, bytes]
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
PROGRAM = "models/model.json"


class _Call:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def _torch(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(_Call(marker), buffer)
    return buffer.getvalue()


def _in_sample_inputs(members: Members, root: str, marker: Path) -> None:
    members[f"{root}data/sample_inputs/model.pt"] = _torch(marker)


def _in_a_weight(members: Members, root: str, marker: Path) -> None:
    config = json.loads(members[root + WEIGHTS])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members[root + WEIGHTS] = json.dumps(config).encode()
    members[f"{root}data/weights/{first['path_name']}"] = _torch(marker)


def _constant(members: Members, root: str, name: str, content: bytes) -> None:
    payload = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    members[root + CONSTANTS] = json.dumps({"config": {"c": payload}}).encode()
    members[f"{root}data/constants/{name}"] = content


def _in_a_constant(members: Members, root: str, marker: Path) -> None:
    _constant(members, root, "tensor_0", _torch(marker))


def _in_an_opaque_object(members: Members, root: str, marker: Path) -> None:
    _constant(members, root, "opaque_obj_0", pickle.dumps(_Call(marker)))


def _in_legacy_constants(members: Members, root: str, marker: Path) -> None:
    members[f"{root}data/constants/model.pt"] = _torch(marker)


def _in_a_size(members: Members, root: str, marker: Path) -> None:
    """Torch evaluates the expressions of dynamic sizes."""
    code = f"__import__('os').mkdir({str(marker)!r})"
    program = members[root + PROGRAM].decode()
    members[root + PROGRAM] = program.replace(
        "Symbol('", json.dumps(f"({code} or 1) * Symbol('")[1:-1], 1
    ).encode()


EXPLOITS: dict[str, Callable[[Members, str, Path], None]] = {
    "sample inputs": _in_sample_inputs,
    "a weight": _in_a_weight,
    "a constant": _in_a_constant,
    "an opaque object": _in_an_opaque_object,
    "legacy constants": _in_legacy_constants,
    "an expression of a size": _in_a_size,
}


def read_members(path: Path) -> tuple[Members, str]:
    """The members of an archive, and the folder that all are in."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return members, next(iter(members)).partition("/")[0] + "/"


def write_members(path: Path, members: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_exploit(kind: str, whole: Path, path: Path, marker: Path) -> None:
    """Write a program like `whole` that makes the folder `marker` when torch opens it."""
    members, root = read_members(whole)
    EXPLOITS[kind](members, root, marker)
    write_members(path, members)


def _named(name: str) -> Callable[[Path], None]:
    return lambda path: write_members(path, {"a/archive_format": b"pt2", name: b"x"})


def _link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("a/link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc")


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/zeros", bytes(10**7))


def _twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/x", b"1")
        archive.writestr("a/y", b"2")
    path.write_bytes(path.read_bytes().replace(b"a/y", b"a/x"))


def _comment(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/x", b"1")
        archive.comment = b"PK"


def _overlapping(path: Path) -> None:
    """All members of the directory are the same bytes of the file."""
    members = 50
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/00", bytes(1000))
        first = archive.infolist()[0]
        for number in range(1, members):
            copy = zipfile.ZipInfo(f"a/{number:02}")
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy


# What is wrong -> how it is written, and what is said of it.
MALFORMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a name above the folder": (_named("a/../../out.so"), "leaves its folder"),
    "an absolute name": (_named("/out.so"), "leaves its folder"),
    "a name of Windows": (_named("a\\..\\out.so"), "leaves its folder"),
    "a drive": (_named("C:out.so"), "leaves its folder"),
    "an empty part": (_named("a//out.so"), "leaves its folder"),
    "an escape code": (_named("a/\x1b[2J"), "readers take differently"),
    "a link": (_link, "is a link"),
    "a name twice": (_twice, "is there twice"),
    "compression": (_compressed, "is compressed"),
    "a comment": (_comment, "ends with a comment"),
    "members that overlap": (_overlapping, "overlap"),
    "no archive": (lambda path: path.write_bytes(b"PK" * 50), "not an archive of torch"),
}
