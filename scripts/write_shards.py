"""Write a folder of images as shards: python scripts/write_shards.py root=FOLDER out=FOLDER

For data larger than one disk: upload the shards to an object store and train with data=imagefolder
data.root=s3://... The shards hold the image files unchanged. Without val/, the share `holdout` of
the training images of each class validates. Requires litdata: pip install -e ".[shards]"
"""

import json
from pathlib import Path
from typing import Any

from repvgg import cli
from repvgg.checks import check_integer
from repvgg.data.scan import read_parts
from repvgg.data.shards import CONTENTS, write_shards

DEFAULTS: dict[str, Any] = {"root": None, "out": None, "shard_size": 1024, "holdout": 0.05}


def main(settings: dict[str, Any]) -> None:
    for key in ("root", "out"):
        if settings[key] is None:
            raise ValueError(f"{key} is missing: pass {key}=FOLDER")
    root, out = Path(settings["root"]), Path(settings["out"])
    size = check_integer("shard_size", settings["shard_size"], minimum=1, example=1024)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out}: is not empty; pass a new folder")
    parts = read_parts(root, settings["holdout"])
    for part, (paths, labels) in parts.files.items():
        write_shards(paths, labels, out / part, shard_size=size)
        print(f"{part}: {len(paths)} images ({parts.origins[part]})")
    for line in parts.notes:
        print(line)
    contents = {
        "classes": parts.classes,
        "labels": {part: labels.tolist() for part, (_, labels) in parts.files.items()},
        "shard_size": size,
    }
    (out / CONTENTS).write_text(json.dumps(contents))
    print(f"train on it: python train.py data=imagefolder data.root={out}")


if __name__ == "__main__":
    cli.script(main, __doc__ or "", DEFAULTS)
