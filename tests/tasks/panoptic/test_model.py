"""The two networks, the module in the second, and the mask head on matched queries alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from batchformer import insert
from batchformer.tasks.panoptic.loss import stage_criterion
from batchformer.tasks.panoptic.matched import MatchedQueries
from batchformer.tasks.panoptic.model import build_network, detector_inside, with_masks
from batchformer.tasks.panoptic.settings import Detector, LossSettings, NetworkSettings
from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.criterion import SetCriterion
from batchformer.tasks.set_prediction.from_transformers import use_criterion

CLASSES, QUERIES, SIDE = 5, 6, 64


def settings(detector: Detector = "detr", **changes: Any) -> NetworkSettings:
    backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32], trains="all")
    small: dict[str, Any] = {"d_model": 32, "ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
    return NetworkSettings(detector, backbone, **{**small, "num_queries": QUERIES, **changes})


def batch(*targets: int) -> dict[str, Any]:
    """Random images, the second one padded, with so many random targets each."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(targets), 3, SIDE, SIDE, generator=random, dtype=torch.float64)
    mask = torch.ones(len(targets), SIDE, SIDE, dtype=torch.long)
    if len(targets) > 1:
        mask[1, :, SIDE // 2 :] = 0
        pixels[1, ..., SIDE // 2 :] = 0
    labels = [
        {
            "class_labels": torch.randint(0, CLASSES, (count,), generator=random),
            "boxes": 0.3 + 0.3 * torch.rand(count, 4, generator=random, dtype=torch.float64),
            "masks": torch.rand(count, SIDE, SIDE, generator=random) > 0.5,
        }
        for count in targets
    ]
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}


def criterion(detector: Detector = "detr") -> SetCriterion:
    return stage_criterion(LossSettings(), detector, CLASSES, "masks")


def networks(name: Detector = "detr") -> tuple[Any, Any]:
    """The detector, and the network around it with its criterion; fp64."""
    torch.manual_seed(0)
    detector = build_network(settings(name), CLASSES).double()
    network = with_masks(detector).double()
    use_criterion(network, criterion(name))
    return detector, network


def step(network: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    network.zero_grad()
    torch.manual_seed(5)
    output = network(**inputs)
    output.loss.backward()
    return (
        output.loss.detach(),
        {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None},
        output,
    )


@pytest.mark.parametrize("targets", [(3, 1), (2, 0, 4), (0, 0), (1, 1), (9, 2)])
@pytest.mark.parametrize("streams", ["plain", "two_streams"])
@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_matched_queries_change_neither_loss_nor_gradients(
    name: Detector, streams: str, targets: tuple[int, ...]
) -> None:
    _, network = networks(name)
    if streams == "two_streams":
        insert(network, after=f"{name}.model.encoder.layers.0", drop=0.0)
    inputs = batch(*targets)
    loss, gradients, output = step(network, inputs)
    hooks = MatchedQueries(network, criterion(name).match_costs)
    few_loss, few_gradients, few = step(network, inputs)
    torch.testing.assert_close(few_loss, loss, rtol=1e-12, atol=1e-12)
    assert few_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(few_gradients[name], value, rtol=1e-9, atol=1e-13, msg=name)
    rows = len(targets) * (2 if streams == "two_streams" else 1)
    assert few.pred_masks.shape == output.pred_masks.shape == (rows, QUERIES, SIDE // 4, SIDE // 4)
    there = few.pred_masks.flatten(2).abs().amax(-1) > 0
    matched = [min(QUERIES, count) for count in targets] * (rows // len(targets))
    assert there.sum(1).tolist() == matched
    hooks.remove()
    torch.testing.assert_close(step(network, inputs)[2].pred_masks, output.pred_masks)


def test_matched_queries_run_the_mask_head_on_no_others() -> None:
    _, network = networks()
    rows: list[int] = []
    network.mask_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    MatchedQueries(network, criterion().match_costs)
    inputs = batch(2, 1)
    network(**inputs)
    network.eval()(**inputs)
    assert rows == [2 * 2, 2 * QUERIES], "in training the fullest row's, in evaluation all"


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_only_the_mask_head_trains_and_the_detector_keeps_its_mode(name: Detector) -> None:
    detector, network = networks(name)
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"mask_head", "bbox_attention"}
    assert getattr(network, detector_inside(network)) is detector and detector.model.encoder.training
    assert set(step(network, batch(2, 1))[1]) == {n for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_the_detector_inside_says_what_it_said(name: Detector) -> None:
    """Conditional DETR's boxes too: transformers forgets their reference points inside the network with masks."""
    torch.manual_seed(0)
    detector = build_network(settings(name), CLASSES).double().eval()
    inputs = {key: value for key, value in batch(1, 1).items() if key != "labels"}
    with torch.no_grad():
        alone = detector(**inputs)
        inside = with_masks(detector).double().eval()(**inputs)
    torch.testing.assert_close(inside.logits, alone.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inside.pred_boxes, alone.pred_boxes, rtol=1e-9, atol=1e-9)


def test_two_streams_reach_the_masks_and_evaluation_is_the_plain_network() -> None:
    _, network = networks()
    inputs = batch(2, 1)
    images = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        plain, trained = network.eval()(**images), network.train()(**images)
        handle = insert(network, after="detr.model.encoder.layers.0", drop=0.0)
        both = network(**images)
        after = network.eval()(**images)
    torch.testing.assert_close(both.pred_masks[:2], trained.pred_masks)
    assert (both.pred_masks[2:] - both.pred_masks[:2]).abs().max() > 1e-3
    assert torch.equal(after.pred_masks, plain.pred_masks)
    handle.remove()


def test_sizes_that_do_not_go_together_are_refused() -> None:
    backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[16, 32])
    with pytest.raises(ValueError, match=r"four maps for the mask head.*got \[16, 32\]"):
        build_network(NetworkSettings("detr", backbone), 3)
    with pytest.raises(ValueError, match="d_model=40 and num_heads=8"):
        build_network(settings(d_model=40), 3)


def test_the_name_of_earlier_cards_still_builds_the_detector() -> None:
    from batchformer.tasks.panoptic.model import build_detector

    with pytest.warns(DeprecationWarning, match="build_detector is now called build_network"):
        assert type(build_detector(settings(), 3)).__name__ == "DetrForObjectDetection"
