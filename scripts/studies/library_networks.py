"""Networks of timm, transformers and ultralytics, with random weights and nothing downloaded."""

import importlib
import inspect
import os
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from scripts.studies import report

SMALLEST = 128  # pixels, if a network accepts them
ULTRALYTICS_SCALE = "n"


# Keyword arguments of a forward; "args" holds its positional ones.
Inputs = dict[str, Any]


class UnfitError(Exception):
    """A network cannot be measured."""


class Family(Protocol):
    """Networks of one library.

    Attributes:
        on_meta: networks can be built on the meta device, to count their parameters first.
    """

    on_meta: bool

    def names(self) -> list[str]: ...

    def build(self, name: str) -> nn.Module: ...

    def inputs(self, name: str, network: nn.Module) -> list[Inputs]:
        """Inputs to try, in order; the first that the network accepts is used."""

    @staticmethod
    def version() -> str: ...


def require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: pip install {extra}") from error


class Timm:
    """All networks of timm; the study skips those without a BatchNorm or that are too large."""

    on_meta = True

    def __init__(self) -> None:
        self.timm = require("timm", "timm")

    def names(self) -> list[str]:
        return list(self.timm.list_models())

    def build(self, name: str) -> nn.Module:
        network: nn.Module = self.timm.create_model(name)
        return network

    def inputs(self, name: str, network: nn.Module) -> list[Inputs]:
        config = cast(dict[str, Any], network.default_cfg)
        channels, height, width = config["input_size"]
        sizes = [(height, width)]
        if not config.get("fixed_input_size") and min(height, width) > SMALLEST:
            sizes.insert(0, (SMALLEST, SMALLEST))
        return [{"args": (image(channels, *size),)} for size in sizes]

    @staticmethod
    def version() -> str:
        return report.versions("timm")


class Ultralytics:
    """The network of each YAML file in the package, at its smallest scale."""

    on_meta = False

    def __init__(self) -> None:
        os.environ.setdefault("YOLO_OFFLINE", "true")
        package = require("ultralytics", "ultralytics-opencv-headless")
        self.folder = Path(package.__file__).parent / "cfg" / "models"
        self.files = {path.stem: path for path in sorted(self.folder.rglob("*.yaml"))}

    def names(self) -> list[str]:
        return list(self.files)

    def build(self, name: str) -> nn.Module:
        from ultralytics.nn import tasks
        from ultralytics.utils import LOGGER, YAML

        LOGGER.setLevel("ERROR")
        config = YAML.load(self.files[name])
        scales = config.get("scales") or {}
        scale = ULTRALYTICS_SCALE if ULTRALYTICS_SCALE in scales else next(iter(scales), "")
        config |= {"scale": scale, "yaml_file": str(self.files[name])}
        for *_, arguments in config["backbone"]:
            arguments[:] = [None if given == "DEFAULT" else given for given in arguments]  # weights
        last = config["head"][-1][2]
        kinds = {
            "Classify": tasks.ClassificationModel,
            "Segment": tasks.SegmentationModel,
            "Segment26": tasks.SegmentationModel,
            "Pose": tasks.PoseModel,
            "Pose26": tasks.PoseModel,
            "OBB": tasks.OBBModel,
            "OBB26": tasks.OBBModel,
            "RTDETRDecoder": tasks.RTDETRDetectionModel,
            "WorldDetect": tasks.WorldModel,
            "YOLOEDetect": tasks.YOLOEModel,
            "YOLOESegment": tasks.YOLOESegModel,
            "YOLOESegment26": tasks.YOLOESegModel,
            "SemanticSegment": getattr(tasks, "SemanticSegmentationModel", None),
            "Depth": getattr(tasks, "DepthModel", None),
        }
        kind = kinds.get(last, tasks.DetectionModel)
        if kind is None:
            raise UnfitError(f"there is no class for the head {last}")
        network: nn.Module = kind(config, verbose=False)
        return network

    def inputs(self, name: str, network: nn.Module) -> list[Inputs]:
        return [{"args": (image(3, size, size),)} for size in (SMALLEST, 256)]

    @staticmethod
    def version() -> str:
        return report.versions("ultralytics", "ultralytics-opencv-headless")


# Class of a model, and the options of its small configuration.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("ResNetForImageClassification", {}),
    "resnet_basic": (
        "ResNetModel",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    ),
    "resnet_bottleneck_first": ("ResNetModel", {"downsample_in_bottleneck": True}),
    "resnet_backbone": ("ResNetBackbone", {"out_features": ["stage2", "stage4"]}),
    "regnet_y": ("RegNetForImageClassification", {"depths": [1, 2, 3, 2]}),
    "regnet_x": ("RegNetModel", {"layer_type": "x", "depths": [1, 2, 3, 2]}),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", {}),
    "mobilenet_v1_half": ("MobileNetV1Model", {"depth_multiplier": 0.5, "tf_padding": False}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {}),
    "mobilenet_v2_segmentation": ("MobileNetV2ForSemanticSegmentation", {"output_stride": 16}),
    "efficientnet": ("EfficientNetForImageClassification", {"depth_coefficient": 1.0}),
    "efficientnet_b0": (
        "EfficientNetModel",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280},
    ),
    "levit": ("LevitForImageClassification", {}),
    "levit_distilled": ("LevitForImageClassificationWithTeacher", {}),
    "rt_detr_resnet": ("RTDetrResNetBackbone", {"out_features": ["stage2", "stage4"]}),
    "rt_detr_resnet_basic": (
        "RTDetrResNetBackbone",
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    ),
    "rt_detr": ("RTDetrForObjectDetection", {"num_queries": 30, "decoder_layers": 2}),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", {"num_queries": 30, "decoder_layers": 2}),
    "d_fine": ("DFineForObjectDetection", {"num_queries": 30, "decoder_layers": 2}),
    "hgnet_v2": ("HGNetV2ForImageClassification", {}),
    "hgnet_v2_lab": ("HGNetV2Backbone", {"use_learnable_affine_block": True}),
    "textnet": ("TextNetForImageClassification", {}),
    "textnet_backbone": ("TextNetBackbone", {}),
    "mobilevit": ("MobileViTForImageClassification", {}),
    "mobilevit_segmentation": ("MobileViTForSemanticSegmentation", {}),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {"width_multiplier": 0.5}),
    "mobilevitv2_segmentation": ("MobileViTV2ForSemanticSegmentation", {}),
    "swiftformer": ("SwiftFormerForImageClassification", {}),
    "cvt": ("CvtForImageClassification", {}),
    "segformer": ("SegformerForSemanticSegmentation", {}),
    "beit_segmentation": (
        "BeitForSemanticSegmentation",
        {
            **{"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192},
            **{"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        },
    ),
    "upernet": ("UperNetForSemanticSegmentation", {}),
    "table_transformer": ("TableTransformerForObjectDetection", {"use_timm_backbone": False}),
    "detr": ("DetrForObjectDetection", {}),
    "pp_lcnet": ("PPLCNetForImageClassification", {}),
    "pp_lcnet_v3": ("PPLCNetV3Backbone", {}),
    "efficientloftr": ("EfficientLoFTRModel", {}),
    "patchtst": (
        "PatchTSTModel",
        {"num_input_channels": 3, "context_length": 32, "norm_type": "batchnorm"},
    ),
    "patchtsmixer": (
        "PatchTSMixerModel",
        {"num_input_channels": 3, "context_length": 32, "norm_mlp": "BatchNorm"},
    ),
    "wav2vec2_conformer": (
        "Wav2Vec2ConformerModel",
        {
            **{"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
            **{"num_hidden_layers": 2, "num_conv_pos_embeddings": 16},
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "fastspeech2_conformer": ("FastSpeech2ConformerModel", {}),
}


class Transformers:
    """Networks with a BatchNorm that can be built from a configuration alone."""

    on_meta = False

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.transformers = require("transformers", "transformers")
        self.transformers.logging.set_verbosity_error()

    def names(self) -> list[str]:
        return list(TRANSFORMERS)

    def build(self, name: str) -> nn.Module:
        key, options = TRANSFORMERS[name]
        kind = getattr(self.transformers, key, None)
        if kind is None:
            raise UnfitError(f"transformers has no {key}")
        options = dict(options)
        if name == "upernet":
            resnet = self.transformers.ResNetConfig(
                depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
            )
            options |= {"backbone_config": resnet, "hidden_size": 64, "auxiliary_in_channels": 1024}
        if name == "table_transformer":
            options["backbone_config"] = self.transformers.ResNetConfig(depths=[1, 1, 1, 1])
        network: nn.Module = kind(kind.config_class(**options))
        return network

    def inputs(self, name: str, network: nn.Module) -> list[Inputs]:
        if name.startswith("patchtst") or name.startswith("patchtsmixer"):
            return [{"past_values": torch.randn(2, 32, 3)}]
        if name.startswith("wav2vec2"):
            return [{"input_values": torch.randn(1, 4000)}]
        if name.startswith("fastspeech2"):
            return [{"input_ids": torch.randint(1, 60, (1, 12))}]
        config: Any = network.config
        own = getattr(config, "image_size", None) or 224
        height, width = (own, own) if isinstance(own, int) else own
        sizes = [(SMALLEST, SMALLEST), (height, width), (640, 640)]
        key = "pixel_values"
        if key not in inspect.signature(network.forward).parameters:
            return [{"args": (image(3, *size),)} for size in sizes]
        if name == "efficientloftr":
            return [{key: torch.rand(1, 2, 3, *size)} for size in sizes]
        return [{key: image(3, *size)} for size in sizes]

    @staticmethod
    def version() -> str:
        return report.versions("transformers")


def image(channels: int, height: int, width: int) -> Tensor:
    """One random image."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, channels, height, width, generator=generator)
