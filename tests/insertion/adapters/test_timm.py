"""Models of timm and their peculiarities."""

import pytest
import torch
from torch import nn

from batchformer import describe, insert

timm = pytest.importorskip("timm")

N, K = 4, 5
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 10, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}


def images(size: int = 32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 3, size, size)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "resnetv2_18"])
def test_without_a_classifier(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    with pytest.raises(ValueError, match=r"made with num_classes=0.*reset_classifier\(K\)"):
        insert(model, before="auto")
    model.reset_classifier(K)
    insert(model, before="auto")


def test_feature_extractors() -> None:
    model = timm.create_model("resnet10t", features_only=True)
    with pytest.raises(ValueError, match=r"timm's FeatureListNet has no get_classifier\(\)"):
        insert(model, before="auto")


def test_the_head_around_a_backbone_without_classifier() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("resnet10t", num_classes=0)
            self.head = nn.Linear(self.backbone.num_features, K)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.backbone(x))
            return out

    model = Mine()
    assert [point.name for point in insert(model, before="auto").points] == ["head"]
    assert model(images()).shape == (2 * N, K)


def test_distilled_training_gives_both_heads_doubled() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=K, **{**VIT, "depth": 2})
    model.set_distilled_training(True)
    handle = insert(model, before="auto")
    assert [out.shape for out in model(images())] == [(2 * N, K), (2 * N, K)]
    plain, mixed = handle.split(model(images()))
    assert [out.shape for out in (*plain, *mixed)] == [(N, K)] * 4
    assert "weights shared by 2 points" in str(describe(model))


def test_heads_of_several_widths() -> None:
    model = timm.create_model("crossvit_tiny_240", num_classes=K)
    with pytest.raises(ValueError, match=r"got \[96, 192\]. Pass share=False"):
        insert(model, before="auto")
    insert(model, before="auto", share=False)
    assert model(images(240)[:2]).shape == (4, K)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("deit_tiny_distilled_patch16_224", VIT),
        ("beit_base_patch16_224", VIT),
        ("eva02_tiny_patch14_224", VIT),
    ],
)
def test_tokens_of_plain_transformers(name: str, settings: dict[str, object]) -> None:
    model = timm.create_model(name, num_classes=K, **settings)
    handle = insert(model, after="blocks.8", drop=0.0)
    logits = model(images())
    assert logits.shape == (2 * N, K)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.modules[0].parameters())


def test_maps_of_swin_say_which_layout_and_take_it() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=K, **SWIN)
    handle = insert(model, after="layers.0")
    with pytest.raises(ValueError, match=r"got \(4, 8, 8, 16\). Flatten the map or pass layout='BHWC'"):
        model(images())
    handle.remove()
    insert(model, after="layers.0", layout="BHWC")
    assert model(images()).shape == (2 * N, K)


def test_maps_of_convolutional_networks_say_which_layout_and_take_it() -> None:
    model = timm.create_model("resnet10t", num_classes=K)
    handle = insert(model, after="layer3")
    with pytest.raises(ValueError, match=r"Flatten the map or pass layout='BCHW'"):
        model(images())
    handle.remove()
    insert(model, after=["layer3", "layer4"], layout="BCHW", share=False)
    assert model(images()).shape == (2 * N, K)


def test_two_insertions_in_one_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=K, **VIT)
    tokens = insert(model, after="blocks.8")
    classifier = insert(model, before="auto")
    assert model(images()).shape == (2 * N, K)
    tokens.remove()
    assert model(images()).shape == (2 * N, K)
    classifier.remove()
    assert model(images()).shape == (N, K)
