"""Backbones: what trains and what does not, in numbers; the maps; both ends of transformers' versions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from batchformer.tasks.set_prediction.backbone import (
    Backbone,
    BackboneSettings,
    create_backbone,
    replace_backbone,
    stand_in,
)

SIZE: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_queries": 5, "num_labels": 3,
}  # fmt: skip
DETECTORS: dict[str, Callable[[Any], nn.Module]] = {
    "detr": lambda c: transformers.DetrForObjectDetection(transformers.DetrConfig(**c)),
    "conditional_detr": lambda c: transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(**c)
    ),
    "deformable_detr": lambda c: transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**c)),
    "segmentation": lambda c: transformers.DetrForSegmentation(transformers.DetrConfig(**c)),
}


def backbone(name: str = "resnet18", **settings: Any) -> Backbone:
    return create_backbone(BackboneSettings(name, **{"pretrained": False, "strides": [32], **settings}))


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_a_resnet50_trains_what_detr_trains() -> None:
    """23.2 of 23.5 million: all but the stem, layer1 and the batch norms."""
    made = backbone("resnet50")
    total = sum(p.numel() for p in made.parameters())
    assert (trained(made), total) == (23_232_512, 23_508_032)
    names = {name.split(".")[1] for name, p in made.named_parameters() if p.requires_grad}
    assert names == {"layer2", "layer3", "layer4"}
    assert made.note() == (
        "Backbone: 23,232,512 of 23,508,032 parameters train (from_stride_8); batch norms are frozen."
    )


def test_the_trap_in_transformers_is_there_or_gone() -> None:
    """Why the count is tested: with its own ResNet a detector of transformers 5 trains no weight of it."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    given = {**SIZE, **stand_in(backbone()), "backbone_config": config}
    model = DETECTORS["detr"](given)
    inner: Any = model.model.backbone  # type: ignore[union-attr]
    weights = [name for name, _ in inner.named_parameters() if name.endswith("convolution.weight")]
    # Fails when the trap is gone: then what the adapter says of it goes too.
    assert len(weights) > 4 and trained(inner) == 0
    model = DETECTORS["detr"]({**SIZE, **stand_in(made := backbone("resnet18"))})
    replace_backbone(model, made)
    assert trained(model.model.backbone) == 11_010_048  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(("trains", "count"), [("nothing", 0), ("from_stride_8", 11_010_048), ("all", 11_166_912)])
def test_what_trains_is_a_word(trains: Any, count: int) -> None:
    made = backbone(trains=trains)
    assert trained(made) == count
    made.train()
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    maps = made.maps(torch.randn(2, 3, 64, 64))
    assert maps[0].requires_grad == (trains != "nothing")
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), "statistics stay"


def test_no_map_of_stride_4_no_rule_that_begins_behind_it() -> None:
    with pytest.raises(ValueError, match="a map of stride 4 for trains='from_stride_8', got strides"):
        Backbone(nn.Conv2d(3, 4, 1), [16], [4], wanted=[16], trains="from_stride_8")


@pytest.mark.parametrize("strides", [[12], [], [32, 16], [16, 16]])
def test_strides_that_there_are_not(strides: list[int]) -> None:
    with pytest.raises(ValueError, match=r"strides out of \[2, 4, 8, 16, 32\], finest first"):
        Backbone(nn.Conv2d(3, 4, 1), [2, 4, 8, 16, 32], [4] * 5, wanted=strides, trains="all")


def test_maps_and_masks() -> None:
    made = backbone(strides=[8, 32])
    mask = torch.zeros(2, 64, 96)
    mask[0], mask[1, :32, :48] = 1, 1
    (fine, fine_mask), (coarse, coarse_mask) = made(torch.randn(2, 3, 64, 96), mask)
    assert fine.shape == (2, 128, 8, 12) and coarse.shape == (2, 512, 2, 3)
    assert fine_mask[0].all() and fine_mask[1].sum() == 4 * 6
    assert coarse_mask.shape == (2, 2, 3) and coarse_mask.dtype == torch.bool


def test_served_maps_take_the_place_of_pixels() -> None:
    made = backbone()
    given = torch.randn(2, 512, 2, 2)
    with made.serving([given]):
        [(found, _)] = made(torch.zeros(2, 3, 64, 64), torch.ones(2, 64, 64))
    assert found is given
    with made.serving(None):
        [(found, _)] = made(torch.zeros(2, 3, 64, 64), torch.ones(2, 64, 64))
    assert not torch.equal(found, given)


def test_other_statistics_are_undone_inside() -> None:
    body = nn.Identity()
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.125)
    made = Backbone(_List(body), [1], [3], wanted=[1], trains="nothing", mean=mean, std=std)
    pixels = torch.rand(1, 3, 4, 4)
    imagenet = (pixels - _column(0.485, 0.456, 0.406)) / _column(0.229, 0.224, 0.225)
    torch.testing.assert_close(made.maps(imagenet)[0], (pixels - _column(*mean)) / _column(*std))


class _List(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.inner(x)]


def _column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None, None]


@pytest.mark.parametrize("kind", DETECTORS)
def test_it_takes_the_place_of_any_detectors_backbone(kind: str) -> None:
    strides = {"deformable_detr": [16, 32], "segmentation": [4, 8, 16, 32]}.get(kind, [32])
    made = backbone(strides=strides)
    given = {**SIZE, **stand_in(made)}
    detector = DETECTORS[kind](given)
    replace_backbone(detector, made)
    output = detector(torch.randn(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64, dtype=torch.int64))
    assert output.pred_boxes.shape == (2, 5, 4)
    assert trained(made) == 11_010_048, "post_init of the detector changes nothing of it"
    with pytest.raises(ValueError, match=r"maps of \[.*\] channels, as the detector was built for, got \[64\]"):
        replace_backbone(detector, backbone(strides=[4], trains="all"))
    with pytest.raises(ValueError, match="Expected a detector with one backbone, got Linear with 0"):
        replace_backbone(nn.Linear(1, 1), made)


def test_weights_of_a_file(tmp_path: Path) -> None:
    first = backbone("efficientnet_lite0", strides=[16])
    file = tmp_path / "weights.pth"
    torch.save(first.body.state_dict(), file)
    second = backbone("efficientnet_lite0", strides=[16], pretrained=True, weights=str(file))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(first.maps(pixels)[0], second.maps(pixels)[0])


def test_a_backbone_of_transformers(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 1], out_features=["stage1"]
    )
    transformers.ResNetBackbone(config).save_pretrained(tmp_path)
    made = create_backbone(BackboneSettings(str(tmp_path), strides=[8, 16]))
    assert [x.shape[1:] for x in made.maps(torch.randn(1, 3, 64, 64))] == [(8, 8, 8), (16, 4, 4)]
    names = [name for name, p in made.named_parameters() if p.requires_grad]
    assert names and all("stages.1" in name or "stages.2" in name for name in names)


def test_without_a_network_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: offline() if pretrained else real(*a, **k)
    )
    with pytest.raises(
        OSError, match=r"'resnet18' could not be loaded.*no connection.*backbone.weights=PATH.*pretrained=false"
    ):
        backbone(pretrained=True)


def real(*args: Any, **kwargs: Any) -> Any:
    from timm.models import create_model

    return create_model(*args, **kwargs)
