import sys

import pytest

from repvgg.checks import ArgumentError
from repvgg.targets import accepts, call, is_from_user_code, locate, make_importable


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_code.py").write_text(
        "import math\nWIDTH = 3\n\ndef build(width, depth=2):\n    return width * depth\n\n"
        "class Outer:\n    class Inner:\n        pass\n"
    )
    (tmp_path / "own_broken.py").write_text("import a_package_that_does_not_exist\n")
    (tmp_path / "own_failing.py").write_text("raise ValueError('of the user')\n")
    yield tmp_path
    for name in ("own_code", "own_broken", "own_failing"):
        sys.modules.pop(name, None)


def test_a_file_in_the_current_folder_is_found(own):
    assert locate("own_code.build", "model._target_")(2) == 4


def test_a_class_inside_a_class_is_found(own):
    assert locate("own_code.Outer.Inner", "loss._target_").__name__ == "Inner"


def test_an_installed_class_is_found():
    assert locate("torch.optim.SGD", "optimizer._target_").__name__ == "SGD"


@pytest.mark.parametrize(
    "config",
    [
        "torch.optim.SGD",
        {"_target_": "torch.nn.NLLLoss", "weight": {"_target_": "torch.ones"}, "own": "own_code.a"},
        [{"_target_": "torchvision.transforms.v2.Identity"}, 3],
    ],
)
def test_the_current_folder_stays_out_where_no_name_needs_it(own, config):
    before = list(sys.path)

    make_importable(config)

    assert sys.path == before


@pytest.mark.parametrize("nested", [False, True])
def test_a_name_in_an_argument_finds_the_current_folder(own, nested):
    if nested:
        make_importable([{"_target_": "torch.nn.NLLLoss", "a": [{"_target_": "own_code.build"}]}])
    else:
        make_importable({"_target_": "own_code.build"})

    assert sys.path[-1] == str(own)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_package.Net", "there is no module no_such_package"),
        ("own_code.biuld", "own_code has no biuld; did you mean build?"),
        ("own_code.build.inner", "own_code.build has no inner"),
        ("own_code.WIDTH", "is a int, not a class or function"),
        ("own_code", "must be the dotted name"),
        ("own_code.py:Net", "for example model._target_=own_code.Net"),
        ("own code.Net", "must be the dotted name"),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_was_tried(own, target, words):
    with pytest.raises(ArgumentError, match=words.replace("?", r"\?")) as caught:
        locate(target, "model._target_")

    assert f"model._target_={target}" in str(caught.value).replace("'", "")


@pytest.mark.parametrize(
    ("module", "error"),
    [("own_broken", ModuleNotFoundError), ("own_failing", ValueError)],
)
def test_an_error_of_the_users_module_passes_through(own, module, error):
    with pytest.raises(error) as caught:
        locate(f"{module}.Net", "model._target_")

    assert not isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 1, "dephts": 2}, "did you mean depth"),
        ({"depth": 2}, "missing a required argument: 'width'"),
    ],
)
def test_wrong_arguments_show_the_signature(own, arguments, words):
    build = locate("own_code.build", "model._target_")

    with pytest.raises(ArgumentError, match=words) as caught:
        call(build, "model._target_", "own_code.build", **arguments)

    assert "build(width, depth=2)" in str(caught.value)


def test_accepted_arguments_are_named_or_taken_by_keyword():
    def takes(a, /, b, *, c):
        pass

    def takes_all(**rest):
        pass

    assert [accepts(takes, name) for name in "abcd"] == [False, True, True, False]
    assert accepts(takes_all, "anything")


def test_an_error_that_passed_through_the_users_code_is_told_from_ours(own):
    (own / "own_code.py").write_text("def build():\n    raise ValueError('of mine')\n")
    build = locate("own_code.build", "model._target_")
    with pytest.raises(ValueError, match="of mine") as theirs:
        build()
    with pytest.raises(ArgumentError) as ours:
        locate("own_code.biuld", "model._target_")
    try:
        raise RuntimeError("of a library") from theirs.value
    except RuntimeError as error:
        wrapped = error

    assert is_from_user_code(theirs.value)
    assert is_from_user_code(wrapped)
    assert not is_from_user_code(ours.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_delta": []}, r"callbacks.mine.min_delta=\[\]: must be float"),
        ({"patience": "x"}, "callbacks.mine.patience=x: must be int"),
        ({"stopping_threshold": "x"}, "stopping_threshold=x: must be float or null"),
    ],
)
def test_types_of_lightnings_arguments_are_checked_since_it_checks_none(given, message):
    target = "lightning.pytorch.callbacks.EarlyStopping"

    with pytest.raises(ArgumentError, match=message):
        call(
            locate(target, "callbacks.mine._target_"),
            "callbacks.mine._target_",
            target,
            "a",
            **given,
        )


def test_whole_numbers_are_taken_for_floats():
    target = "lightning.pytorch.callbacks.EarlyStopping"

    made = call(locate(target, "k"), "k", target, "a", min_delta=1, stopping_threshold=None)

    assert made.min_delta == -1  # of a minimum
