"""deploy.py, and what is done with what it wrote, on a short run."""

import copy
import json
import re
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import repvgg
from repvgg import export
from repvgg.commands import deploy
from repvgg.contract import DataContract
from repvgg.data.sets import digits
from repvgg.deploy import predict
from repvgg.deploy import settings as settings_of_deploy
from repvgg.deploy.folder import write_sums
from repvgg.deploy.report import Report
from repvgg.export.formats import FORMATS, Format
from tests.support import foreign
from tests.support.commands import ROOT, SHORT, run, run_fresh, tree
from tests.support.networks import settle


@pytest.fixture(scope="module")
def deploy_once(once, folder) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """deploy.py as most type it, on a copy of the run."""

    def command(home: Path) -> subprocess.CompletedProcess[str]:
        shutil.copytree(folder, home / "run")
        return run("deploy.py", "ckpt=run/checkpoints/best.ckpt", cwd=home)

    return once("deployed", command)


@pytest.fixture(scope="module")
def deployed(deploy_once) -> subprocess.CompletedProcess[str]:
    return deploy_once[1]


@pytest.fixture(scope="module")
def place(deploy_once) -> Path:
    return deploy_once[0] / "run" / "deploy"


@pytest.mark.slow
def test_deploying_writes_both_formats_and_a_report(place):
    assert sorted(path.name for path in place.iterdir()) == [
        "SHA256SUMS",
        "model.onnx",
        "model.safetensors",
        "probe.safetensors",
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.slow
def test_a_process_of_its_own_deploys_the_same(place, tmp_path):
    path = place.parent / "checkpoints" / "best.ckpt"

    done = run_fresh("deploy.py", f"ckpt={path}", "out=out", "benchmark=false", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    same = [(folder / "model.safetensors").read_bytes() for folder in (place, tmp_path / "out")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_the_report_certifies_every_step(place):
    report = json.loads((place / "report.json").read_text())

    assert report["verdict"] == "passed"
    assert report["verdicts"]["folded, float64"]["error"] <= 1e-10
    for name in ("folded, float32", "model.safetensors", "model.onnx"):
        assert report["verdicts"][name]["error"] <= 1e-5
        assert report["verdicts"][name]["agreement"] == 1.0
    assert len(report["blocks"]["float64"]) == 7
    assert max(report["blocks"]["float64"].values()) <= 1e-10
    assert report["size"]["deployed"]["parameters"] < report["size"]["trained form"]["parameters"]
    assert report["latency"]["milliseconds"]["deployed, torch"]["median"] > 0


def test_the_summary_of_the_report_is_printed(deployed, place):
    report = Report.from_json((place / "report.json").read_text())

    assert report.summary() in deployed.stdout
    assert report.training.folder == "run"
    assert report.training.data == "digits"
    assert report.created.endswith("Z")


def test_the_deployed_graph_has_one_convolution_a_block(place):
    nodes = [node.op_type for node in onnx.load(place / "model.onnx").graph.node]

    assert (nodes.count("Conv"), nodes.count("Relu"), nodes.count("Gemm")) == (7, 7, 1)
    assert not {"BatchNormalization", "Add"} & set(nodes)


def test_deploying_leaves_nothing_in_the_working_folder(place):
    run = place.parent

    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert {path.name for path in run.iterdir()} >= {"checkpoints", "deploy"}
    assert not [path for path in run.iterdir() if path.name.startswith(".deploy")]


@pytest.mark.slow
def test_an_existing_deployment_is_kept_unless_it_may_be_replaced(folder, tmp_path):
    arguments = [f"ckpt={folder / 'checkpoints' / 'best.ckpt'}", "out=out", "benchmark=false"]
    first = run("deploy.py", *arguments, "formats=[onnx]", cwd=tmp_path)
    before = tree(tmp_path)

    refused = run("deploy.py", *arguments, cwd=tmp_path)
    unchanged = tree(tmp_path) == before
    replaced = run("deploy.py", *arguments, "formats=[safetensors]", "overwrite=true", cwd=tmp_path)

    assert first.returncode == 0, first.stderr
    assert refused.returncode == 1
    assert "pass overwrite=true" in refused.stderr
    assert unchanged
    assert replaced.returncode == 0, replaced.stderr
    assert {path for path in tree(tmp_path) if "model" in path} == {"out/model.safetensors"}


@pytest.mark.slow
def test_a_deployment_goes_where_it_is_told(folder, tmp_path):
    out = tmp_path / "new" / "it's a folder, with (signs)=ä"

    done = run(
        "deploy.py",
        f"ckpt={folder / 'checkpoints' / 'last.ckpt'}",
        f"out={out}",
        "formats=[safetensors]",
        "benchmark=false",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").is_file()


def settings(**overrides) -> dict:
    """The configuration of deploy.py with overrides."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("deploy"), resolve=True)
    return {**composed, "formats": ["safetensors"], "benchmark": False, **overrides}


def spoiled(name: str) -> Format:
    """A format that writes another bias than that of the network."""
    whole = FORMATS[name]

    def save(network, path, description):
        network = copy.deepcopy(network)
        with torch.no_grad():
            network.stem.reparam.bias.add_(1e-3)
        whole.save(network, path, description)

    return replace(whole, save=save)


def with_a_layer_too_many(name: str) -> Format:
    whole = FORMATS[name]

    def load(path, **options):
        return replace(whole.load(path, **options), layers={"convolutions": 8, "batchnorms": 0})

    return replace(whole, load=load)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoiled, r"verification failed.*model\.safetensors: error"),
        (with_a_layer_too_many, "holds 8 convolutions and 0 BatchNorms, the folded network"),
    ],
)
def test_a_failed_verdict_leaves_nothing_behind(damage, message, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "safetensors", damage("safetensors"))
    path = str(folder / "checkpoints" / "best.ckpt")

    with pytest.raises(ValueError, match=message):
        deploy.deploy(settings(ckpt=path, out=str(tmp_path / "out")), tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_int8_that_loses_too_much_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    from repvgg.export import int8

    def narrow(histogram):
        return 0.0, histogram.high / 100

    monkeypatch.setattr(int8, "RANGES", {"narrow": narrow})
    path = str(folder / "checkpoints" / "best.ckpt")
    config = settings(ckpt=path, out=str(tmp_path / "out"), int8=True, int8_float_layers=0)

    with pytest.raises(ValueError, match=r"model-int8\.onnx, onnxruntime: accuracy lost"):
        deploy.deploy(config, tmp_path)

    assert list(tmp_path.iterdir()) == []


HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture(scope="module")
def certified(once, folder) -> Path:
    """A deployment of everything: stored images in, probabilities out."""
    arguments = [
        f"ckpt={folder / 'checkpoints' / 'best.ckpt'}",
        "out=out",
        "formats=[safetensors,onnx,pt2,openvino]",
        "input=uint8",
        "output=probabilities",
        "int8=true",
        f"bf16={'true' if HAS_BF16 else 'false'}",
        "data=digits",
    ]
    home, _ = once("certified", lambda home: run("deploy.py", *arguments, cwd=home))
    return home / "out"


@pytest.mark.slow
def test_every_format_is_certified_and_int8_keeps_the_accuracy(certified):
    report = json.loads((certified / "report.json").read_text())

    files = {"model.safetensors", "model.onnx", "model.pt2", "model.xml"}
    rounded = {f"model-int8.onnx, {engine}" for engine in ("onnxruntime", "OpenVINO")}
    compared = report["int8"]["verdicts"]
    assert set(report["files"]) == files | {"model.bin", "model-int8.onnx"}
    assert all(report["verdicts"][name]["error"] <= 1e-5 for name in files)
    assert set(compared) == rounded
    assert all(verdict["error"] <= 0.005 for verdict in compared.values())
    assert set(report["accuracy_on_validation"]) >= files | rounded
    assert min(report["agreement_on_validation"].values()) > 0.97
    assert report["int8"]["source"] == "the training set"
    assert len(report["int8"]["trials"]) >= 10


@pytest.mark.slow
def test_every_predictor_is_timed_beside_a_control(certified):
    measured = json.loads((certified / "report.json").read_text())["latency"]["milliseconds"]

    assert set(measured) >= {"trained form, torch", "deployed, torch", "deployed, torch, again"}
    assert measured["deployed, torch"]["ratio"] == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16; the next test covers that")
def test_bf16_is_certified_in_both_engines(certified):
    verdicts = json.loads((certified / "report.json").read_text())["verdicts"]

    assert verdicts["deployed, torch, bf16"]["passed"]
    assert verdicts["model.xml, bf16"]["passed"]


def test_bf16_is_rejected_where_the_cpu_has_none(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    path = str(folder / "checkpoints" / "best.ckpt")

    with pytest.raises(ValueError, match="bf16=true: this CPU has no bf16"):
        deploy.deploy(settings(ckpt=path, out=str(tmp_path / "out"), bf16=True), tmp_path)


@pytest.mark.slow
def test_a_deployed_folder_is_verified_again(certified, tmp_path):
    done = run("deploy.py", f"verify={certified}", "trust=true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_changed_byte_fails_the_verification(certified, tmp_path):
    shutil.copytree(certified, tmp_path / "out")
    content = bytearray((tmp_path / "out" / "model.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "out" / "model.bin").write_bytes(content)

    done = run("deploy.py", "verify=out", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr == "deploy.py: out: changed since it was deployed: ['model.bin']\n"


def test_only_what_was_deployed_is_replaced(folder, tmp_path):
    path = str(folder / "checkpoints" / "best.ckpt")
    config = settings(ckpt=path, out=str(tmp_path / "out"))
    deploy.deploy(config, tmp_path)
    (tmp_path / "out" / "thesis.tex").touch()
    before = tree(tmp_path)

    with pytest.raises(ValueError, match=r"to a deployment, so it is not replaced: thesis\.tex"):
        deploy.deploy(config | {"overwrite": True}, tmp_path)

    assert tree(tmp_path) == before


def test_a_folder_with_a_report_of_something_else_is_not_replaced(folder, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    path = str(folder / "checkpoints" / "best.ckpt")

    with pytest.raises(ValueError, match="is not a deployment, so it is not replaced"):
        deploy.deploy(settings(ckpt=path, out=str(tmp_path), overwrite=True), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("input", "bytes"), ("output", "labels")])
def test_an_unknown_input_or_output_is_rejected(key, value, folder, tmp_path):
    path = str(folder / "checkpoints" / "best.ckpt")

    with pytest.raises(ValueError, match=f"{key}='{value}': must be one of"):
        deploy.deploy(settings(ckpt=path, out=str(tmp_path / "out"), **{key: value}), tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_reported_before_anything_is_done(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_of_deploy, "find_spec", lambda name: None)
    path = str(folder / "checkpoints" / "best.ckpt")

    with pytest.raises(ValueError, match="openvino is missing: run pip install openvino"):
        deploy.deploy(
            settings(ckpt=path, out=str(tmp_path / "out"), formats=["openvino"]), tmp_path
        )

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_everybody_may_read_what_was_deployed(certified):
    assert {path.stat().st_mode & 0o444 for path in certified.iterdir()} == {0o444}


@pytest.mark.slow
def test_an_int8_file_with_other_outputs_fails_the_verification(certified, tmp_path):
    from safetensors.torch import load_file, save

    shutil.copytree(certified, tmp_path / "out")
    recorded = load_file(tmp_path / "out" / "probe.safetensors")
    recorded["int8"] = recorded["int8"].roll(1, dims=1)
    (tmp_path / "out" / "probe.safetensors").write_bytes(save(recorded))
    (tmp_path / "out" / "SHA256SUMS").unlink()
    write_sums(tmp_path / "out")

    with pytest.raises(ValueError, match=r"model-int8\.onnx: error 1\.0e\+00"):
        deploy.deploy(settings(verify=str(tmp_path / "out")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model-int8.onnx", "model.pt2", "model.xml"])
def test_a_deployed_file_labels_images_by_itself(name, certified, tmp_path):
    images, labels = digits().test
    for i in range(8):
        Image.fromarray(images[i, 0].numpy()).save(tmp_path / f"{i}.png")

    done = run("predict", f"model={certified / name}", "images=.", "trust=true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [path for path, _, _ in lines] == [f"{i}.png" for i in range(8)]
    assert sum(int(label) == truth for (_, label, _), truth in zip(lines, labels, strict=False)) > 6


GRAY = DataContract(["a"], 1, [8, 8], [0.4], [0.2], "bilinear")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_pixels_are_read_as_they_are_in_every_mode(mode, tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif mode != "L":
        image = image.convert(mode)
    image.save(tmp_path / "x.png")

    read = predict.read(tmp_path / "x.png", GRAY)

    assert torch.equal((read * 255).round().to(torch.uint8)[0], torch.from_numpy(pixels))


def test_an_image_of_another_size_is_resized_by_its_shorter_side_and_cropped(tmp_path):
    pixels = np.zeros((16, 40), dtype=np.uint8)
    pixels[:, 12:28] = 200  # the square in the middle
    Image.fromarray(pixels).save(tmp_path / "x.png")

    read = predict.read(tmp_path / "x.png", GRAY)

    assert read.shape == (1, 8, 8)
    assert read[0, :, 1:-1].min() == pytest.approx(200 / 255, abs=0.01)


@pytest.mark.parametrize(("mode", "message"), [("RGBA", "transparent"), ("F", "no known scale")])
def test_pixels_whose_brightness_is_not_known_are_refused(mode, message, tmp_path):
    Image.new(mode, (8, 8)).save(tmp_path / "x.tiff")

    with pytest.raises(ValueError, match=message):
        predict.read(tmp_path / "x.tiff", GRAY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2", "model.xml"])
def test_a_damaged_file_is_rejected_in_one_line(name, certified, tmp_path):
    (tmp_path / name).write_bytes((certified / name).read_bytes()[:5000])

    with pytest.raises(ValueError, match="cannot be opened") as caught:
        export.open_artifact(tmp_path / name, trust=True)

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=model.onnx"], "images is missing: pass images=PATH"),
        (["model=none.onnx", "images=x.png"], "'none.onnx' is no file"),
        (["model=none.onnx", "images=."], "images=.: there is no image"),
    ],
)
def test_a_mistake_in_labelling_is_told_in_one_line(arguments, message, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    where = tmp_path / "empty" if arguments[-1] == "images=." else tmp_path

    done = run("predict", *arguments, cwd=where)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def small_disk():
    """Writing fails in the middle of a file, at 100,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in FORMATS if name != "aoti"],  # whose compiler writes elsewhere first
)
def test_a_full_disk_leaves_nothing_behind(name, folder, tmp_path, small_disk):
    path = folder / "checkpoints" / "best.ckpt"
    arguments = [f"ckpt={path}", "out=out", f"formats=[{name}]", "benchmark=false"]

    done = run("deploy.py", *arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_int8_of_a_network_that_was_never_trained_is_rejected(folder, tmp_path):
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    restored = repvgg.checkpoint.load(folder / "checkpoints" / "best.ckpt")
    torch.manual_seed(0)
    fresh = repvgg.create_model(**restored.config)
    content["state_dict"] = {f"net.{key}": value for key, value in fresh.state_dict().items()}
    content[repvgg.checkpoint.KEY] = repvgg.checkpoint.describe(
        fresh,
        config=restored.config,
        data=restored.data,
        images=restored.probe.images,
        labels=restored.probe.labels,
    )
    torch.save(content, tmp_path / "fresh.ckpt")

    with pytest.raises(ValueError, match="int8=true: this network was never trained"):
        deploy.deploy(settings(ckpt=str(tmp_path / "fresh.ckpt"), int8=True), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["fresh.ckpt"]


@pytest.mark.parametrize(
    ("key", "value"), [("image_size", [16, 16]), ("classes", list("abcdefghij"))]
)
def test_data_that_does_not_fit_the_checkpoint_is_rejected(key, value, folder, tmp_path):
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    content[repvgg.checkpoint.KEY]["data"][key] = value
    if key == "image_size":
        probe = content[repvgg.checkpoint.KEY]["probe"]
        probe["images"] = probe["images"].repeat(1, 1, 2, 2)
        restored = repvgg.checkpoint.load(folder / "checkpoints" / "best.ckpt")
        probe["logits"] = restored.predictor(probe["images"] / 255).detach()
    torch.save(content, tmp_path / "best.ckpt")
    data = {"_target_": "repvgg.data.digits"}

    with pytest.raises(ValueError, match=f"data: its {key} is"):
        deploy.deploy(settings(ckpt=str(tmp_path / "best.ckpt"), data=data), tmp_path)


def test_a_checkpoint_whose_logits_are_not_its_own_is_not_deployed(folder, tmp_path):
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"]["net.linear.bias"][3] += 0.1
    torch.save(content, tmp_path / "best.ckpt")

    done = run("deploy.py", "ckpt=best.ckpt", cwd=tmp_path)

    assert done.returncode == 1
    assert "verification failed, nothing was written: probe" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


@pytest.mark.slow
def test_a_network_trained_with_every_regularizer_deploys_exactly(tmp_path):
    noise = ["model.branch_drop=0.1", "model.drop_path=0.1", "rdrop_warmup=1"]
    mixtures = ["mixup=0.2", "cutmix=1", "label_smoothing=0.1"]
    settings = [*SHORT, *noise, *mixtures, "trainer.accumulate_grad_batches=4"]
    trained = run("train.py", *settings, "hydra.run.dir=run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr

    done = run("deploy.py", "ckpt=run/checkpoints/best.ckpt", "formats=[safetensors]", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "R-Drop 1, each image twice in the batch, each step at the cost of two" in trained.stdout
    report = json.loads((tmp_path / "run" / "deploy" / "report.json").read_text())
    assert report["verdicts"]["folded, float64"]["error"] <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "foreign", "code"])
def test_a_file_that_is_no_checkpoint_is_rejected_in_one_line(kind, folder, tmp_path):
    path = tmp_path / "bad.ckpt"
    if kind == "truncated":
        path.write_bytes((folder / "checkpoints" / "best.ckpt").read_bytes()[:100_000])
    else:
        torch.save({"weights": torch.ones(1)} if kind == "foreign" else {"f": Path}, path)

    done = run("deploy.py", "ckpt=bad.ckpt", cwd=tmp_path)

    assert done.returncode == 1
    assert re.match(r"deploy\.py: 'bad\.ckpt'.*\n$", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


@pytest.mark.slow
def test_a_network_of_torchvision_is_trained_and_deployed(tmp_path):
    done = run(
        "train.py",
        "model=torchvision",
        "model.name=resnet18",
        "model.over_parameterize=true",
        "trainer.max_epochs=1",
        *(f"+trainer.limit_{part}_batches=1" for part in ("train", "val", "test")),
        "data.batch_size=16",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/digits-resnet18/*/checkpoints/best.ckpt")

    short = ("formats=[safetensors]", "benchmark=false")
    deployed = run("deploy.py", f"ckpt={path}", *short, cwd=tmp_path)

    assert deployed.returncode == 0, deployed.stderr
    report = json.loads((path.parents[1] / "deploy" / "report.json").read_text())
    assert report["batchnorms_left"] == {}
    assert report["size"]["deployed"]["parameters"] == 11_170_570
    deployed_file = export.open_artifact(path.parents[1] / "deploy" / "model.safetensors")
    assert deployed_file.layers == {"convolutions": 20, "batchnorms": 0}


@pytest.mark.slow
def test_a_third_party_checkpoint_is_deployed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = settle(repvgg.create_model("repvgg_tiny", num_classes=1000))
    torch.save({"state_dict": foreign.renamed(network, foreign.authors)}, "weights.pth")

    deploy.deploy(settings(ckpt="weights.pth", formats=["onnx"]), tmp_path)

    report = json.loads((tmp_path / "weights-deploy" / "report.json").read_text())
    assert report["origin"].startswith("repvgg_tiny in the authors' layout, multi-branch")
    assert report["data"]["classes"][0] == "tench"
    assert report["accuracy_on_probe"] == {}
    assert report["verdicts"]["model.onnx"]["error"] < 1e-5
    page = (tmp_path / "weights-deploy" / "report.md").read_text()
    assert "accuracy on" not in page
    page = (tmp_path / "weights-deploy" / "report.html").read_text()
    assert "Not known: the checkpoint holds no labelled images" in page
    assert "8 images of noise" in page
    assert "<img" not in page
    with pytest.raises(ValueError, match="holds no images to measure ranges on; pass for example"):
        deploy.deploy(settings(ckpt="weights.pth", int8=True, overwrite=True), tmp_path)
