"""Check an archive member by member, before anything in it is unpacked or opened."""

import os
import stat
import zipfile
from pathlib import Path


def check_archive(path: Path) -> None:
    """Check a zip archive that torch wrote: names inside its folder, each once, nothing compressed.

    Torch unpacks by the names that the archive holds, also outside of its folder. It stores its
    members uncompressed, so an archive never needs more space than it has.

    Raises:
        ValueError: it is no zip archive, or a member, which is named, is not as torch writes it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            comment = archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"'{path}' cannot be opened: it is not an archive of torch") from error
    if comment:  # readers differ on where such an archive ends
        raise ValueError(f"'{path}' cannot be opened: its archive ends with a comment")
    seen: set[str] = set()
    for member in members:
        wrong = _fault(member, seen)
        if wrong:
            raise ValueError(f"'{path}' cannot be opened: its member {member.filename!r} {wrong}")
        seen.add(member.filename)
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(f"'{path}' cannot be opened: its members overlap")


def _fault(member: zipfile.ZipInfo, seen: set[str]) -> str:
    """What is wrong with a member; empty if nothing is."""
    name = member.orig_filename
    parts = name.replace("\\", "/").split("/")
    if name != member.filename or not name.isprintable():
        return "has a name that readers take differently"
    if ".." in parts or "" in parts[:-1] or os.path.isabs(name) or ":" in name or "\\" in name:
        return "leaves its folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if name in seen:
        return "is there twice"
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        return "is compressed"
    return ""
