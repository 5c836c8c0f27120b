import pytest

from repvgg import cli
from repvgg.deploy.settings import DeploySettings, VerifySettings, one_run
from tests.support.commands import compose


@pytest.fixture
def ckpt(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_the_configuration_is_read_into_types(ckpt, tmp_path):
    settings = DeploySettings.read(compose("deploy", f"ckpt={ckpt}"))

    assert settings == DeploySettings(
        ckpt=ckpt,
        out=tmp_path / "run" / "deploy",
        overwrite=False,
        formats=("safetensors", "onnx"),
        input="float32",
        output="logits",
        bf16=False,
        int8=False,
        int8_images=256,
        int8_float_layers=2,
        int8_drop=0.005,
        benchmark=True,
        data=None,
    )


def test_a_data_set_is_read_without_the_sections_for_training(ckpt):
    settings = DeploySettings.read(compose("deploy", f"ckpt={ckpt}", "data=digits"))

    assert settings.data["_target_"] == "repvgg.data.digits"


@pytest.mark.parametrize("kind", [DeploySettings, VerifySettings])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+foo=1", "foo: there is no such key; allowed are verify, trust"),
        ("+format=onnx", r"format: there is no such key; did you mean formats\?"),
        ("+model.strides=1", "model: there is no such key"),
        ("~formats", "formats is missing"),
    ],
)
def test_a_key_that_nothing_reads_is_an_error(kind, override, message, ckpt):
    key = "ckpt" if kind is DeploySettings else "verify"

    with pytest.raises(ValueError, match=message):
        kind.read(compose("deploy", f"{key}={ckpt}", override))


def test_an_argument_without_a_data_set_is_an_error(ckpt):
    config = compose("deploy", f"ckpt={ckpt}", "+data.root=folder")

    with pytest.raises(ValueError, match="names no data set; pass for example data=digits"):
        DeploySettings.read(config)


@pytest.mark.parametrize("override", ["model.strides=[1,1]", "+model.foo=1", "++trainer.x=1"])
def test_a_key_of_training_is_an_error_beside_a_data_set(override):
    with pytest.raises(ValueError, match=r"(model|trainer)\.\w+: there is no such key"):
        one_run(cli.Arguments([], ["data=digits", override]))


def test_a_sweep_is_an_error():
    with pytest.raises(ValueError, match="one checkpoint at a time"):
        one_run(cli.Arguments(["-m"], ["int8=true,false"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("int8=1", "int8=1: must be true or false"),
        ("formats=[onnx,onnx]", "each once; pass for example"),
        ("formats=onnx", r"formats=onnx: must be a list of .*pass for example formats=\[onnx\]"),
        ("formats=[[onnx]]", "must be a list of"),
        ("int8_images=0", "int8_images=0"),
        ("int8_drop=1.5", "int8_drop=1.5"),
        ("ckpt=none.ckpt", "there is no file of that name"),
        ("ckpt=null", "ckpt is missing: run repvgg deploy ckpt="),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(override, message, ckpt):
    with pytest.raises(ValueError, match=message):
        DeploySettings.read(compose("deploy", f"ckpt={ckpt}", override))


def test_verify_stands_alone(ckpt):
    with pytest.raises(ValueError, match="it stands alone; run repvgg deploy verify=FOLDER"):
        VerifySettings.read(compose("deploy", "verify=deploy", f"ckpt={ckpt}"))
