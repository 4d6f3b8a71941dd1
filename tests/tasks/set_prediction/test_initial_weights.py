"""Detectors start as they were published, not as transformers leaves them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from batchformer.tasks.detection.model import build_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.initial_weights import initialize

SIZES: dict[str, Any] = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 64, "num_queries": 200}

OUT = "o_proj.weight" if int(transformers.__version__.split(".")[0]) >= 5 else "out_proj.weight"


def detector(kind: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    backbone = BackboneSettings("resnet18", pretrained=False, strides=[32])
    return build_network(NetworkSettings(kind, backbone, feature_levels=1, **SIZES, **settings), 5).eval()


def run(network: Any) -> Any:
    with torch.no_grad():
        return network(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "deformable_detr", "smca"])
def test_queries_differ_and_rare_classes_are_rare(kind: str) -> None:
    network = detector(kind)
    output = run(network)
    assert torch.isfinite(output.logits).all()
    if kind != "detr":  # whose queries come apart in training only
        assert output.pred_boxes[0].std(0).amax() > 0.02, "queries look at different places"
        assert 0.003 < output.logits.sigmoid().mean() < 0.03


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "deformable_detr"])
def test_xavier_as_in_attention_is_all_you_need(kind: str) -> None:
    network = detector(kind)
    attention = network.model.encoder.layers[1].self_attn
    weight = dict(attention.named_parameters())["output_proj.weight" if kind == "deformable_detr" else OUT].detach()
    bound = math.sqrt(6 / (64 + 64))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert network.model.query_position_embeddings.weight.detach().std() == pytest.approx(1.0, abs=0.05)


def spread(part: nn.Module) -> dict[str, float]:
    """Standard deviation of each matrix, by the name of its layer."""
    return {
        name.removesuffix(".weight"): float(value.detach().std())
        for name, value in part.named_parameters()
        if value.dim() > 1
    }


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "deformable_detr", "smca"])
def test_projections_start_as_those_of_torch_s_attention(kind: str) -> None:
    torch.manual_seed(0)
    torchs = nn.MultiheadAttention(64, 8)
    nn.init.xavier_uniform_(torchs.in_proj_weight)
    stacked, alone = float(torchs.in_proj_weight.detach().std()), math.sqrt(2 / (64 + 64))
    model = detector(kind).model
    found = {f"encoder.{name}": sd for name, sd in spread(model.encoder.layers[1]).items()}
    found |= {f"decoder.{name}": sd for name, sd in spread(model.decoder.layers[1]).items()}
    # In the published code Deformable DETR's encoder and cross-attention, and all of Conditional DETR's decoder, have
    # projections that are layers of their own.
    of_torch = {
        "detr": ("encoder.self_attn.", "decoder.self_attn.", "decoder.encoder_attn."),
        "conditional_detr": ("encoder.self_attn.",),
        "deformable_detr": ("decoder.self_attn.",),
        "smca": ("encoder.self_attn.", "decoder.self_attn.", "decoder.encoder_attn."),
    }[kind]
    inside = {f"{where}{x}_proj" for where in of_torch for x in "qkv"}
    assert inside <= found.keys(), sorted(found)
    for name in inside:
        assert found[name] == pytest.approx(stacked, rel=0.05), name
    square = {
        name: sd
        for name, sd in found.items()
        if name not in inside and any(word in name for word in ("attn", "sa_", "ca_")) and "norm" not in name
        and not any(word in name for word in ("sampling_offsets", "attention_weights"))
    }  # fmt: skip
    assert square
    for name, sd in square.items():
        assert sd == pytest.approx(alone, rel=0.05), name


def test_deformable_attention_keeps_its_pattern() -> None:
    network = detector("deformable_detr")
    for layer in network.model.encoder.layers:
        assert not layer.self_attn.sampling_offsets.weight.any()
        assert layer.self_attn.sampling_offsets.bias.abs().max() == 4, "the last of four points is four cells away"
        assert not layer.self_attn.attention_weights.weight.any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [-2.0, -2.0]), ({"with_box_refine": True}, [-2.0, 0.0]), ({"two_stage": True}, [0.0, 0.0, 0.0])],
)
def test_boxes_of_deformable_detr_start_small(settings: dict[str, bool], expected: list[float]) -> None:
    network = detector("deformable_detr", **settings)
    assert [box.layers[-1].bias[3].item() for box in network.bbox_embed] == expected
    if settings:
        assert network.model.decoder.bbox_embed[0].layers[-1].bias is network.bbox_embed[0].layers[-1].bias


def test_the_same_seed_gives_the_same_detector() -> None:
    first, second = detector("conditional_detr").state_dict(), detector("conditional_detr").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_detector_whose_initial_weights_are_not_known_is_refused() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(model_type="rt_detr")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Deformable DETR or SMCA, got Module.*keep those of transformers"):
        initialize(model)
