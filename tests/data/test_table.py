"""Images that CSV files list."""

import pytest

from repvgg.data.folders import csv
from tests.support.commands import make

ROWS = [f"images/{name}/{i}.jpg,{name}" for name in ("cat", "dog") for i in range(6)]


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "images")
    return tmp_path


def write(root, rows=ROWS, *, name="train.csv", header="path,label", end="\n", encoding="utf-8"):
    text = "".join(f"{line}{end}" for line in [header, *rows])
    (root / name).write_bytes(text.encode(encoding))


def opened(folder, **options):
    given = {"root": str(folder), "train": "train.csv", "batch_size": 2, "num_workers": 0}
    return csv(**{**given, "image_size": 16, "resize_size": 16, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"end": "\r\n"},
        {"encoding": "utf-8-sig"},
        {"rows": ["", *ROWS[:5], "  ", ",", *ROWS[5:], ""]},
        {"rows": [f'"{row[:-4]}", "{row[-3:]}"' for row in ROWS]},
        {"header": "label,size,path", "rows": [f"{row[7:10]},9,{row[:-4]}" for row in ROWS]},
    ],
    ids=["plain", "Windows", "BOM", "empty lines", "quoted", "columns"],
)
def test_every_kind_of_table_lists_the_same_images(options, root):
    write(root, **options)

    data = opened(root, holdout=0.3)

    assert data.contract.classes == ["cat", "dog"]
    assert sorted(path[-9:] for path in data.train.paths + data.val.paths) == sorted(
        row[7:-4] for row in ROWS
    )
    assert data.summary().startswith(
        "2 classes, images: 8 training (train.csv), 4 validation (held out of train.csv)"
    )


def test_a_comma_in_quotes_belongs_to_the_name(root):
    write(root, [row.replace("dog,", "dog,").replace(",dog", ',"dog, large"') for row in ROWS])

    assert opened(root).contract.classes == ["cat", "dog, large"]


def test_whole_numbers_are_sorted_by_value(root):
    write(root, [f"{row.partition(',')[0]},{i}" for i, row in enumerate(ROWS)])

    with pytest.raises(ValueError, match="each class has only one image"):
        opened(root)
    write(root, [f"{row.partition(',')[0]},{i % 6 * 2}" for i, row in enumerate(ROWS)])
    assert opened(root).contract.classes == ["0", "2", "4", "6", "8", "10"]


def test_columns_and_other_tables_can_be_named(root):
    write(root, ROWS[::2], header="file,breed")
    write(root, ROWS[1::2], header="file,breed", name="val.csv")
    write(root, ROWS[:1], header="file,breed", name="test.csv")

    data = opened(root, val="val.csv", test="test.csv", path_column="file", label_column="breed")

    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [6, 6, 1]
    assert data.notes == [
        "without images in test.csv: dog",
        "in train.csv and in test.csv too: 1 image",
    ]


def test_an_image_that_is_listed_twice_is_kept_and_noted(root):
    write(root, [*ROWS, ROWS[0]])

    data = opened(root)

    assert len(data.train.labels) + len(data.val.labels) == 13
    assert data.notes == ["listed more than once in train.csv: 1 image, which are kept"]


def test_missing_images_are_left_out_if_it_is_wished(root):
    (root / "images" / "cat" / "3.jpg").unlink()
    write(root)

    data = opened(root, skip_unreadable=True)

    assert len(data.train.labels) + len(data.val.labels) == 11
    assert data.notes == ["left out of train.csv: 1 of 12 images are missing"]


def test_a_table_can_stay_in_memory(root):
    write(root)

    assert opened(root, in_memory=True, in_channels=1).train.images.shape == (10, 1, 16, 16)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*ROWS, "images/no.jpg,cat", "images/nor.jpg,dog"], {}, r"2 of 14 images are missing, the "
         r"first: .*images/no.jpg \(line 14\); paths start at root"),
        (["images/cat,cat", *ROWS], {}, r"1 of 13 images are missing, the first: .*images/cat"),
        ([*ROWS, "images/cat/0.jpg"], {}, "line 14 has no label: images/cat/0.jpg"),
        ([*ROWS, ",cat"], {}, "line 14 has no path: ,cat"),
        (ROWS, {"path_column": "file"}, "path_column=file: .*no such column; .* is path, label"),
        (ROWS, {"label_column": "lable"}, "label_column=lable: .* did you mean label?"),
        (ROWS[:6], {}, "train=train.csv: lists one class alone, cat"),
        ([], {}, "train.csv: lists no images"),
        (ROWS, {"train": "gone.csv"}, "train=.*gone.csv: cannot be read: No such file"),
        (ROWS, {"train": None}, "train is missing: pass train=train.csv"),
        (ROWS, {"root": None}, "root is missing"),
        (ROWS, {"root": "gone"}, "root=gone: there is no such folder"),
        ([*ROWS, 'images/cat/0.jpg,"cat'], {}, "line 14: unexpected end of data"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_one_clear_error(rows, options, message, root):
    write(root, rows)

    with pytest.raises(ValueError, match=message):
        opened(root, **options)


def test_a_class_that_does_not_train_is_an_error(root):
    write(root)
    write(root, [*ROWS[:3], "images/dog/0.jpg,Dog"], name="val.csv")

    with pytest.raises(
        ValueError, match=r"val=val.csv: line 5 has the class Dog.*mean dog\? 1 of 4"
    ):
        opened(root, val="val.csv")


def test_another_encoding_is_an_error(root):
    write(root, [row.replace("dog", "dög") for row in ROWS], encoding="latin-1")

    with pytest.raises(ValueError, match=r"train.csv: is not in UTF-8"):
        opened(root)


def test_names_are_unicode_of_one_form(root):
    write(root, [*ROWS, "images/cat/0.jpg,caf\u00e9", "images/cat/1.jpg,cafe\u0301"])

    assert opened(root).contract.classes == ["caf\u00e9", "cat", "dog"]
