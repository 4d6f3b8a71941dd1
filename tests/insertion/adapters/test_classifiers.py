"""One table of architectures of three libraries, tried with ``before="auto"``. Random weights, tiny variants."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer import describe, insert, remove

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

N, K = 4, 5
Build = Callable[[], nn.Module]


def timm_model(name: str, **settings: Any) -> Build:
    return lambda: timm.create_model(name, num_classes=K, **settings)


def timm_class(path: str, **settings: Any) -> Build:
    module, _, cls = path.rpartition(".")
    return lambda: getattr(getattr(timm.models, module), cls)(num_classes=K, **settings)


def timm_vgg() -> nn.Module:
    """VGG with 16 features in the place of its 4,096, for which a BatchFormer of that width would take seconds."""
    model = timm.models.vgg.VGG(cfg=[8, "M", 8, "M"], num_classes=K, mlp_ratio=0.01)
    model.pre_logits = timm.models.vgg.ConvMlp(8, 16)
    model.head = timm.layers.ClassifierHead(16, K)
    return model


def timm_dla() -> nn.Module:
    widths = [8, 8, 16, 16, 32, 32]
    return timm.models.dla.DLA(levels=[1] * 6, channels=widths, num_classes=K, block=timm.models.dla.DlaBasic)


def torchvision_model(name: str, **settings: Any) -> Build:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=K, **settings)


def torchvision_class(path: str, **settings: Any) -> Build:
    module, _, cls = path.rpartition(".")
    return lambda: getattr(getattr(torchvision.models, module), cls)(num_classes=K, **settings)


def transformers_model(name: str, config: str, **settings: Any) -> Build:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(num_labels=K, **settings))


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=K)


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT_32 = {**VIT, "image_size": 32, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
LEVIT = {
    "hidden_sizes": [16, 32, 32],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "image_size": 64,
}

# name: (builder, image size, the modules that before="auto" must find)
TABLE: dict[str, tuple[Build, int, list[str]]] = {
    "timm resnet": (timm_model("resnet18"), 32, ["fc"]),
    "timm resnext": (timm_model("resnext50_32x4d", layers=(1, 1, 1, 1)), 32, ["fc"]),
    "timm efficientnet": (timm_model("efficientnet_b0"), 32, ["classifier"]),
    "timm efficientnet-lite": (timm_model("efficientnet_lite0"), 32, ["classifier"]),
    "timm mobilenetv3": (timm_model("mobilenetv3_small_050"), 32, ["classifier"]),
    "timm convnext": (timm_model("convnext_atto", depths=(1, 1, 1, 1)), 32, ["head.fc"]),
    "timm vit": (timm_model("vit_tiny_patch16_224", img_size=32, depth=2), 32, ["head"]),
    "timm deit": (timm_model("deit_tiny_patch16_224", img_size=32, depth=2), 32, ["head"]),
    "timm deit, distilled": (
        timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2),
        32,
        ["head", "head_dist"],
    ),
    "timm swin": (
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=16,
            depths=(1, 2),
            num_heads=(1, 2),
        ),
        32,
        ["head.fc"],
    ),
    "timm maxvit": (timm_model("maxvit_rmlp_pico_rw_256", img_size=64), 64, ["head.fc"]),
    "timm regnet": (timm_model("regnetx_002"), 32, ["head.fc"]),
    "timm densenet": (timm_model("densenet121", block_config=(1, 1, 1, 1)), 32, ["classifier"]),
    "timm vgg": (timm_vgg, 32, ["head.fc"]),
    "timm resnetv2, 1x1 convolution": (timm_model("resnetv2_50", layers=(1, 1, 1, 1)), 32, ["head.fc"]),
    "timm dla, 1x1 convolution": (timm_dla, 64, ["fc"]),
    "timm levit, distilled": (timm_model("levit_128s", img_size=64), 64, ["head.linear", "head_dist.linear"]),
    "timm repvit": (timm_model("repvit_m0_9"), 64, ["head.head.l", "head.head_dist.l"]),
    "timm iformer, undistilled": (timm_model("iformer_t"), 64, ["head.head.l"]),
    "timm volo, patch head": (
        timm_class("volo.VOLO", img_size=64, layers=[1] * 4, embed_dims=[16, 32, 32, 32], num_heads=[2] * 4),
        64,
        ["head", "aux_head"],
    ),
    "torchvision resnet": (torchvision_model("resnet18"), 32, ["fc"]),
    "torchvision efficientnet": (torchvision_model("efficientnet_b0"), 32, ["classifier.1"]),
    "torchvision mobilenet_v3": (torchvision_model("mobilenet_v3_small"), 32, ["classifier.3"]),
    "torchvision convnext": (torchvision_convnext, 32, ["classifier.2"]),
    "torchvision regnet": (torchvision_model("regnet_y_400mf"), 32, ["fc"]),
    "torchvision densenet": (
        torchvision_class("densenet.DenseNet", block_config=(1, 1, 1, 1)),
        32,
        ["classifier"],
    ),
    "torchvision squeezenet": (torchvision_model("squeezenet1_1"), 64, ["classifier.1"]),
    "torchvision vit": (
        torchvision_class(
            "vision_transformer.VisionTransformer",
            image_size=32,
            patch_size=16,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        ),
        32,
        ["heads.head"],
    ),
    "torchvision swin": (
        torchvision_class(
            "swin_transformer.SwinTransformer",
            patch_size=[4, 4],
            embed_dim=16,
            depths=[1, 2],
            num_heads=[1, 2],
            window_size=[4, 4],
        ),
        32,
        ["head"],
    ),
    "torchvision maxvit": (
        torchvision_class(
            "maxvit.MaxVit",
            input_size=(32, 32),
            stem_channels=8,
            partition_size=4,
            block_channels=[16, 16],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.0,
        ),
        32,
        ["classifier.5"],
    ),
    "transformers vit": (transformers_model("ViTForImageClassification", "ViTConfig", **VIT_32), 32, ["classifier"]),
    "transformers deit": (transformers_model("DeiTForImageClassification", "DeiTConfig", **VIT_32), 32, ["classifier"]),
    "transformers deit, distilled": (
        transformers_model("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT_32),
        32,
        ["cls_classifier", "distillation_classifier"],
    ),
    "transformers beit": (transformers_model("BeitForImageClassification", "BeitConfig", **VIT_32), 32, ["classifier"]),
    "transformers dinov2": (
        transformers_model("Dinov2ForImageClassification", "Dinov2Config", **VIT_32),
        32,
        ["classifier"],
    ),
    "transformers convnext": (
        transformers_model("ConvNextForImageClassification", "ConvNextConfig", **STAGES),
        32,
        ["classifier"],
    ),
    "transformers convnextv2": (
        transformers_model("ConvNextV2ForImageClassification", "ConvNextV2Config", **STAGES),
        32,
        ["classifier"],
    ),
    "transformers swin": (transformers_model("SwinForImageClassification", "SwinConfig", **SWIN), 32, ["classifier"]),
    "transformers resnet": (
        transformers_model("ResNetForImageClassification", "ResNetConfig", embedding_size=8, **STAGES),
        32,
        ["classifier.1"],
    ),
    "transformers mobilenet_v2": (
        transformers_model("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25),
        32,
        ["classifier"],
    ),
    "transformers swiftformer, distilled": (
        transformers_model("SwiftFormerForImageClassification", "SwiftFormerConfig", depths=[1, 1, 1, 1]),
        64,
        ["head", "dist_head"],
    ),
    "transformers textnet": (transformers_model("TextNetForImageClassification", "TextNetConfig"), 32, ["fc"]),
    "transformers levit, distilled": (
        transformers_model("LevitForImageClassificationWithTeacher", "LevitConfig", **LEVIT),
        64,
        ["classifier.linear", "classifier_distill.linear"],
    ),
}


def made(case: str) -> tuple[nn.Module, Tensor]:
    """A model without dropout whose classifier is not zero (torchvision's ViT starts so), and images."""
    build, size, places = TABLE[case]
    torch.manual_seed(0)
    # fp64: one matrix product of 2N rows need not round as one of N rows does.
    model = without_dropout(build()).double()
    for name in places:
        nn.init.normal_(model.get_submodule(name).weight, std=0.1)
    return model, torch.randn(N, 3, size, size, dtype=torch.float64)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    outputs = model(images)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


@pytest.mark.parametrize("case", TABLE)
def test_architecture(case: str) -> None:
    model, images = made(case)
    places = TABLE[case][2]
    keys = list(model.state_dict())
    plain_train = logits_of(model.train(), images)
    with torch.no_grad():
        plain_eval = logits_of(model.eval(), images)

    handle = insert(model, before="auto", drop=0.0)
    assert [point.name for point in handle.points] == places
    assert all(f"before '{name}'" in str(describe(model)) for name in places)
    with torch.no_grad():
        assert logits_of(model, images).equal(plain_eval)

    logits = logits_of(model.train(), images)
    plain, mixed = handle.split(logits)
    assert plain is not None and mixed is not None
    assert logits.shape == (2 * N, K)
    torch.testing.assert_close(plain, plain_train, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(mixed, plain, rtol=1e-3, atol=1e-3)
    nn.functional.cross_entropy(logits, handle.expand(torch.arange(N) % K)).backward()
    for module in handle.modules:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    assert remove(model) is model
    assert list(model.state_dict()) == keys
    assert logits_of(model.train(), images).equal(plain_train)

    handle = insert(model, before="auto")  # with the papers' dropout, which the plain stream knows nothing of
    with torch.no_grad():
        draws = [handle.split(logits_of(model, images)) for _ in range(2)]
    for plain, mixed in draws:
        assert plain is not None and mixed is not None
        torch.testing.assert_close(plain, plain_train, rtol=1e-9, atol=1e-9)
        assert mixed.isfinite().all()
    assert not torch.allclose(draws[0][1], draws[1][1], rtol=1e-3, atol=1e-3)
