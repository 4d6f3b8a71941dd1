"""Tiny detectors of transformers and batches of padded images; the same with 4.57 and with 5."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

K = 3
_SMALL = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": K,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "auxiliary_loss": True,
}
_OWN_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_FOUR_LEVELS = {"stages": (2, 3, 4), "num_feature_levels": 4, "disable_custom_kernels": True}
_RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "num_attention_heads": 4,
    "encoder_layers": 1,
    "num_denoising": 0,
    "stages": (2, 3, 4),
}
_MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "num_attention_heads": 4,
    "decoder_layers": 3,
    "train_num_points": 64,
    "stages": (1, 2, 3, 4),
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("DetrForObjectDetection", {}),
    "segmentation": ("DetrForSegmentation", {"stages": (1, 2, 3, 4), "encoder_attention_heads": 8}),
    "conditional": ("ConditionalDetrForObjectDetection", {}),
    "deformable": ("DeformableDetrForObjectDetection", _FOUR_LEVELS),
    "one level": ("DeformableDetrForObjectDetection", {**_FOUR_LEVELS, "stages": (4,), "num_feature_levels": 1}),
    "box refinement": ("DeformableDetrForObjectDetection", {**_FOUR_LEVELS, "with_box_refine": True}),
    "two stages": (
        "DeformableDetrForObjectDetection",
        {**_FOUR_LEVELS, "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 5},
    ),
    "dab": ("DabDetrForObjectDetection", {"hidden_size": 32}),
    "rt-detr": ("RTDetrForObjectDetection", _RT_DETR),
    "rt-detr v2": ("RTDetrV2ForObjectDetection", _RT_DETR),
    "mask2former": ("Mask2FormerForUniversalSegmentation", _MASK2FORMER),
    "smca": ("SmcaForObjectDetection", {"stages": (3, 4), "num_feature_levels": 3}),
}


@pytest.fixture(scope="session")
def detector() -> Callable[..., Any]:
    """A function: kind and settings of the configuration -> tiny model in training."""
    transformers = pytest.importorskip("transformers")

    def build(kind: str, **settings: Any) -> Any:
        torch.manual_seed(0)
        name, extra = _KINDS[kind]
        settings = {**_SMALL, **_OWN_BACKBONE, **extra, **settings}
        resnet = transformers.RTDetrResNetConfig if kind.startswith("rt-detr") else transformers.ResNetConfig
        stages = settings.pop("stages", (4,))
        own = resnet(**_RESNET, out_features=[f"stage{stage}" for stage in stages])
        settings = {"backbone_config": own, **settings}
        library = transformers
        if kind == "smca":
            from batchformer.tasks.detection import smca as library

            settings = {key: value for key, value in settings.items() if key not in _OWN_BACKBONE}
        config = getattr(library, re.sub("For[A-Z].*", "Config", name))(**settings)
        return getattr(library, name)(config).train()

    return build


@pytest.fixture(scope="session")
def scenes() -> Callable[..., dict[str, Any]]:
    """A function: images, side in pixels, kind of detector -> batch of images of several sizes, padded to one."""

    def make(n: int, side: int = 64, kind: str = "detr", seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        images, masks = torch.randn(n, 3, side, side), torch.ones(n, side, side, dtype=torch.long)
        for i in range(n):
            masks[i, side - 10 * (i % 4) :] = 0
            masks[i, :, side - 16 * ((i + 1) % 3) :] = 0
        counts = [i % 3 + (i < 2) for i in range(n)]  # one of them may have none
        classes = [torch.randint(K, (count,)) for count in counts]
        shapes = [torch.rand(count, side, side) > 0.5 for count in counts]
        boxes = [torch.cat((torch.rand(count, 2) * 0.4 + 0.3, torch.rand(count, 2) * 0.4 + 0.1), 1) for count in counts]
        batch = {"pixel_values": images * masks[:, None], "pixel_mask": masks}
        if kind == "mask2former":
            return {**batch, "mask_labels": [shape.to(images.dtype) for shape in shapes], "class_labels": classes}
        labels = [
            {"class_labels": c, "boxes": b} | ({"masks": s} if kind == "segmentation" else {})
            for c, b, s in zip(classes, boxes, shapes, strict=True)
        ]
        return {**batch, "labels": labels}

    return make
