"""Backbones and classifiers: published sizes, widths, splits, and errors."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from batchformer.tasks.image_classification.backbone import ResNet, create_backbone, stages
from batchformer.tasks.image_classification.network import CosineClassifier, Network


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_resnet32_has_the_published_size_and_no_shortcut_parameters() -> None:
    network = Network(create_backbone("resnet32"), 10)
    assert parameters(network) == 464_154  # He et al. 2016, table 6: 0.46 M
    assert network.num_features == 64
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 31  # and the classifier: 32 layers
    assert {m.kernel_size for m in convolutions} == {(3, 3)}


def test_option_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    shortcut = create_backbone("resnet32").get_submodule("layer2.0.downsample")
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "theirs"), [("resnet50", "resnet50"), ("resnext50", "resnext50_32x4d"), ("resnet18", "resnet18")]
)
def test_timm_backbones_equal_timms(name: str, theirs: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=10).eval()
    ours = Network(create_backbone(name), 10).eval()
    assert parameters(ours) == parameters(reference)
    backbone = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    assert not ours.backbone.load_state_dict(backbone, strict=True).missing_keys  # type: ignore[union-attr]
    ours.get_classifier().load_state_dict(reference.fc.state_dict())  # type: ignore[union-attr]
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), reference(images))


def test_resnet10_is_a_resnet18_with_one_block_a_stage() -> None:
    ours = create_backbone("resnet10").state_dict()
    theirs = timm.create_model("resnet18", num_classes=0).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if k.split(".")[1] != "1"}


@pytest.mark.parametrize(
    ("name", "full", "reduced"),
    [("resnet32", 64, 48), ("small_resnet", 64, 48), ("resnet10", 512, 384), ("resnet50", 2048, 1536)],
)
def test_reduced_width_is_rides(name: str, full: int, reduced: int) -> None:
    assert create_backbone(name).num_features == full
    backbone = create_backbone(name, reduced=True).eval()
    assert backbone.num_features == reduced
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, reduced)
    shared, _ = stages(backbone)
    full_shared, _ = stages(create_backbone(name))
    assert parameters(shared) == parameters(full_shared)  # only the experts' stages are narrower


def test_resnext50_is_reduced_to_1536_features() -> None:
    assert create_backbone("resnext50", reduced=True).num_features == 1536


@pytest.mark.parametrize("name", ["resnet32", "small_resnet", "resnet10", "resnet18"])
def test_stages_compose_to_the_backbone(name: str) -> None:
    backbone, images = create_backbone(name).eval(), torch.randn(2, 3, 32, 32)
    shared, own = stages(backbone)
    assert torch.equal(own(shared(images)), backbone(images))


def test_cosine_classifier_ignores_length_and_scales_by_30() -> None:
    classifier, x = CosineClassifier(5, 3), torch.randn(4, 5)
    expected = [[30 * float(F.cosine_similarity(f, w, dim=0)) for w in classifier.weight.detach()] for f in x]
    torch.testing.assert_close(classifier(x), torch.tensor(expected))
    torch.testing.assert_close(classifier(100 * x), classifier(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(x).dtype == torch.float32
        torch.testing.assert_close(classifier(x), torch.tensor(expected))
    classifier(torch.zeros(1, 5)).sum().backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Unknown backbone 'resnet5O'. Did you mean .*resnet50"):
        create_backbone("resnet5O")
    with pytest.raises(ValueError, match="Unknown backbone 'resnet51'") as told:  # timm has the name that we have
        create_backbone("resnet51")
    near = str(told.value).partition("Did you mean ")[2].partition("?")[0].split(", ")
    assert len(near) == len(set(near)) == 3
    with pytest.raises(ValueError, match=r"Reduced width is defined for .*not for 'resnet18'"):
        create_backbone("resnet18", reduced=True)
    with pytest.raises(ValueError, match=r"no pretrained weights for 'resnet32'"):
        create_backbone("resnet32", pretrained=True)
    with pytest.raises(ValueError, match=r"Experts share the first stages of a ResNet; MobileNetV3 has no such split"):
        stages(create_backbone("mobilenetv3_small_050"))
    with pytest.raises(ValueError, match=r"as many depths as widths"):
        ResNet((1, 1), (8,))


def test_missing_pretrained_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"backbone 'resnet50' could not be loaded.*no route.*pretrained=False"):
        create_backbone("resnet50", pretrained=True)
