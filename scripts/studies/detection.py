"""Train, fold and export a detector on a RepVGG backbone: python -m scripts.studies.detection

Trains torchvision's RetinaNet on synthetic scenes of rectangles and ellipses, with the feature maps
of a network as its backbone. Then folds the detector and exports it to ONNX, twice: whole, with the
TorchScript exporter, and up to the outputs of its head, with torch.export. Prints how far every
feature map, the outputs of the head and the detections are from the multi-branch detector in
float64. The largest error of all seeds counts.
"""

import copy
import statistics
import tempfile
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import repvgg
from repvgg import cli
from repvgg.checks import check_integer, check_number
from repvgg.models import RepVGGFeatures
from repvgg.verify import relative_error
from scripts.studies import report

DEFAULTS: dict[str, Any] = {
    "model": "repvgg_a0",
    "seeds": 3,
    "steps": 400,
    "lr": 1e-3,
    "size": 96,  # of the images
    "batch": 8,
    "images": 32,  # held out
}
NUM_CLASSES = 3  # background, rectangle, ellipse
WIDTH = 64  # channels of the pyramid
SURE = 0.2  # score of a detection that counts as found; focal losses give low ones at first
SAME_BOX = 0.01  # pixels
SAME_SCORE = 1e-3

Detections = list[dict[str, Tensor]]  # by image: boxes (D, 4), scores (D,), labels (D,)


class Pyramid(nn.Module):
    """The feature maps of a backbone, all with the same number of channels."""

    def __init__(self, backbone: RepVGGFeatures, out_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels)
        self.out_channels = out_channels  # torchvision's detectors read it

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        pyramid: OrderedDict[str, Tensor] = self.pyramid(numbered(self.backbone(images)))
        return pyramid


class Raw(nn.Module):
    """A detector without what surrounds its layers: images (N, 3, H, W) -> all maps and outputs."""

    def __init__(self, detector: RetinaNet) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.detector.backbone.backbone(images)
        pyramid = self.detector.backbone.pyramid(numbered(maps))
        head = self.detector.head(list(pyramid.values()))
        return [*maps, *pyramid.values(), head["cls_logits"], head["bbox_regression"]]


def numbered(maps: list[Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((str(number), one) for number, one in enumerate(maps))


class Result(NamedTuple):
    """One seed.

    Attributes:
        losses: at the start and at the end, means of a tenth of the steps.
        recall, precision: of the multi-branch detector on the held-out images.
        errors: by output, then by form.
        same: by form: detections that are those of the multi-branch detector in float64, and their
            number in both.
        seconds: of CPU, of the training and of all.
    """

    losses: tuple[float, float]
    recall: float
    precision: float
    errors: dict[str, dict[str, float]]
    same: dict[str, tuple[int, int, int]]
    seconds: tuple[float, float]


def main(settings: dict[str, Any]) -> None:
    for key in ("seeds", "steps", "images"):
        check_integer(key, settings[key], minimum=1, example=DEFAULTS[key])
    check_integer("batch", settings["batch"], minimum=2, example=8)
    check_integer("size", settings["size"], minimum=64, example=96)
    check_number("lr", settings["lr"], example=1e-3)
    results = [study(seed, settings) for seed in range(settings["seeds"])]

    print(f"`{report.command('detection', settings, DEFAULTS)}`: {settings['model']}, ", end="")
    print(
        f"{settings['size']}x{settings['size']}, {settings['steps']} steps of {settings['batch']}"
    )
    print(f"images, {settings['images']} held out, n = {len(results)} seeds, {report.machine()},")
    print(f"{report.versions('torchvision', 'onnx', 'onnxruntime')}, one thread\n")
    print("| seed | loss, first | loss, last | recall | precision | training, CPU s | all, CPU s |")
    print("|---|---|---|---|---|---|---|")
    for seed, result in enumerate(results):
        first, last = result.losses
        training, whole = result.seconds
        print(
            f"| {seed} | {first:.3f} | {last:.3f} | {result.recall:.3f} | {result.precision:.3f} | "
            f"{training:.0f} | {whole:.0f} |"
        )
    forms = list(results[0].same)
    print(f"\n| largest error against float64 | {' | '.join(forms)} |")
    print(f"|---|{'---|' * len(forms)}")
    for name in results[0].errors:
        worst = [max(result.errors[name][form] for result in results) for form in forms]
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in worst)} |")
    counts = []
    for form in forms:
        rows = torch.tensor([result.same[form] for result in results])
        same, given, expected = rows.sum(0).tolist()
        counts.append(f"{same} of {expected}" + (f" ({given} found)" if given != expected else ""))
    print(f"| same detections | {' | '.join(counts)} |")


def study(seed: int, settings: dict[str, Any]) -> Result:
    """Train one detector, fold it, export it and compare."""
    begin = time.process_time()
    torch.manual_seed(seed)
    detector = build(settings["model"], settings["size"])
    losses = train(detector, settings, seed)
    trained = time.process_time()
    tenth = max(1, len(losses) // 10)
    images, targets = draw(settings["images"], settings["size"], seed=10_000 + seed)
    folded = fold(detector, images[:2])
    detector.eval()

    forms: dict[str, tuple[list[Tensor], Detections]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reference = run(copy.deepcopy(detector).double(), images.double())
        forms["multi-branch, float32"] = run(detector, images)
        forms["folded, float64"] = run(fold(copy.deepcopy(detector).double()), images.double())
        forms["folded, float32"] = run(folded, images)
        forms["ONNX, float32"] = run_onnx(folded, images, Path(folder))
    names = [f"map of {name}" for name in detector.backbone.backbone.feature_info.module_name()]
    names += [f"pyramid {number}" for number in range(len(names))]
    names += ["class logits", "box regression"]
    errors = {
        name: {
            form: relative_error(reference[0][number], outputs[number])
            for form, (outputs, _) in forms.items()
        }
        for number, name in enumerate(names)
    }
    same = {form: count_same(reference[1], found) for form, (_, found) in forms.items()}
    recall, precision = evaluate(reference[1], targets)
    return Result(
        (statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])),
        recall,
        precision,
        errors,
        same,
        (trained - begin, time.process_time() - begin),
    )


def build(model: str, size: int) -> RetinaNet:
    """RetinaNet on the maps of the last three stages."""
    backbone = repvgg.create_model(model, features_only=True, out_indices=(2, 3, 4))
    sizes = tuple((2 * step,) for step in backbone.feature_info.reduction())
    return RetinaNet(
        Pyramid(backbone, WIDTH),
        num_classes=NUM_CLASSES,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        min_size=size,
        max_size=size,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def train(detector: RetinaNet, settings: dict[str, Any], seed: int) -> list[float]:
    """Train with AdamW; the rate falls linearly. Returns the loss of each step."""
    steps = settings["steps"]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=settings["lr"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    detector.train()
    losses = []
    for step in range(steps):
        images, targets = draw(settings["batch"], settings["size"], seed=step + 100_000 * seed)
        loss = sum(detector(list(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fold(detector: RetinaNet, images: Tensor | None = None) -> RetinaNet:
    """Fold the blocks of a detector; with images the whole is compared, module by module."""
    folded = repvgg.switch_to_deploy(detector, images)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise ValueError(f"these BatchNorms are not folded: {', '.join(left)}")
    return folded


def run(detector: RetinaNet, images: Tensor) -> tuple[list[Tensor], Detections]:
    """All maps and outputs on the images, and the detections of each image."""
    return Raw(detector)(normalized(images)), [detector([image])[0] for image in images]


def run_onnx(detector: RetinaNet, images: Tensor, folder: Path) -> tuple[list[Tensor], Detections]:
    """As `run`, by onnxruntime."""
    import onnxruntime

    raw, whole = folder / "raw.onnx", folder / "whole.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's exporters
        torch.onnx.export(Raw(detector), (normalized(images),), raw, dynamo=True, verbose=False)
        # torch.export cannot follow the number of boxes through torchvision's batched_nms.
        torch.onnx.export(
            detector, ([images[0]],), whole, dynamo=False, opset_version=18, input_names=["image"]
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for path in (raw, whole)
    ]
    (name,) = (given.name for given in sessions[0].get_inputs())
    outputs = [
        torch.from_numpy(o) for o in sessions[0].run(None, {name: normalized(images).numpy()})
    ]
    detections = []
    for image in images:
        found = [torch.from_numpy(o) for o in sessions[1].run(None, {"image": image.numpy()})]
        detections.append(dict(zip(("boxes", "scores", "labels"), found, strict=True)))
    return outputs, detections


def normalized(images: Tensor) -> Tensor:
    """As the detector does it."""
    return (images - 0.5) / 0.25


def draw(count: int, size: int, *, seed: int) -> tuple[Tensor, Detections]:
    """Draw scenes: one to three rectangles (1) and ellipses (2) that do not touch, on noise.

    Returns:
        images (N, 3, size, size) in [0, 1], and boxes and labels of each.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(size)
    images = 0.3 * torch.rand(count, 3, size, size, generator=generator)
    targets = []
    for image in images:
        boxes: list[list[int]] = []
        labels: list[int] = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            width, height = torch.randint(size // 6, size // 2, (2,), generator=generator).tolist()
            left = int(torch.randint(size - width, (), generator=generator))
            top = int(torch.randint(size - height, (), generator=generator))
            box = [left, top, left + width, top + height]
            label = int(torch.randint(1, NUM_CLASSES, (), generator=generator))
            color = 0.4 + 0.6 * torch.rand(3, 1, generator=generator)
            if boxes and box_iou(torch.tensor([box]), torch.tensor(boxes)).max() > 0:
                continue
            x = (axis - left - (width - 1) / 2) / (width / 2)
            y = (axis - top - (height - 1) / 2) / (height / 2)
            distance = torch.stack(torch.meshgrid(y.abs(), x.abs(), indexing="ij"))
            inside = distance.amax(0) <= 1 if label == 1 else distance.square().sum(0) <= 1
            image[:, inside] = color
            boxes.append(box)
            labels.append(label)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return images, targets


def count_same(expected: Detections, given: Detections) -> tuple[int, int, int]:
    """Detections with the label, box and score of one expected; how many are given and expected."""
    same = 0
    for ours, theirs in zip(expected, given, strict=True):
        near = (ours["boxes"][:, None] - theirs["boxes"][None]).abs().amax(2) < SAME_BOX
        near &= (ours["scores"][:, None] - theirs["scores"][None]).abs() < SAME_SCORE
        near &= ours["labels"][:, None] == theirs["labels"][None]
        same += int(near.any(1).sum())
    counts = [sum(len(image["boxes"]) for image in images) for images in (given, expected)]
    return same, counts[0], counts[1]


def evaluate(found: Detections, targets: Detections) -> tuple[float, float]:
    """Recall and precision of the detections of a score above SURE, at an IoU above 0.5."""
    hit = objects = right = total = 0
    for given, target in zip(found, targets, strict=True):
        sure = given["scores"] > SURE
        match = box_iou(target["boxes"].to(given["boxes"]), given["boxes"][sure]) > 0.5
        match &= target["labels"][:, None] == given["labels"][sure][None]
        hit += int(match.any(1).sum())
        right += int(match.any(0).sum())
        objects += len(match)
        total += int(sure.sum())
    return hit / objects, right / max(1, total)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.script(main, __doc__ or "", DEFAULTS)
