"""The mask head's start: terms of equal spread, and masks that differ from query to query."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.tasks.panoptic.balance import balance
from batchformer.tasks.panoptic.model import build_network, with_masks
from batchformer.tasks.panoptic.settings import NetworkSettings
from batchformer.tasks.set_prediction.backbone import Backbone, BackboneSettings

HEADS = 8


def network() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32], trains="nothing")
    settings = NetworkSettings("detr", backbone, d_model=64, encoder_layers=1, decoder_layers=1, num_queries=6)
    made = with_masks(build_network(settings, 5)).eval()
    with torch.no_grad():
        # As the maps of EfficientNet-Lite0 with its own weights are: far from unit spread.
        next(module for module in made.modules() if isinstance(module, Backbone)).scale.mul_(30)
    return made, torch.randn(3, 3, 128, 128)


def terms(made: Any, images: Tensor) -> tuple[list[float], list[float]]:
    """Spread of the features' and the attention maps' part of the first convolution, and of each map's."""
    seen: dict[str, Tensor] = {}
    convolutions = [m for m in made.mask_head.modules() if isinstance(m, nn.Conv2d)]
    maps = [m for m in convolutions if m.kernel_size == (1, 1)]
    hooks = [convolutions[0].register_forward_pre_hook(lambda module, args: seen.update(first=args[0]))]
    for place, one in enumerate(maps):
        hooks.append(one.register_forward_hook(lambda m, a, out, place=place: seen.update({f"map{place}": out})))
    with torch.no_grad():
        made(images)
        weight = convolutions[0].weight
        parts = [
            F.conv2d(seen["first"][:, part], weight[:, part], padding=1).std().item()
            for part in (slice(None, -HEADS), slice(-HEADS, None))
        ]
    for hook in hooks:
        hook.remove()
    return parts, [seen[f"map{place}"].std().item() for place in range(len(maps))]


def test_terms_have_equal_spread_afterwards() -> None:
    made, images = network()
    (features, attention), maps = terms(made, images)
    assert features > 20 * attention and len(maps) == 3
    factors = balance(made, lambda: made(images))
    (after, attention), maps = terms(made, images)
    assert after == features
    torch.testing.assert_close(attention, features, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(maps), torch.ones(3), rtol=1e-4, atol=0)
    assert factors.shape == (4,)


def test_masks_differ_from_query_to_query() -> None:
    made, images = network()

    def difference() -> float:
        with torch.no_grad():
            masks = made(images).pred_masks
        return float(masks.std(1).mean() / masks.std())

    before = difference()
    balance(made, lambda: made(images))
    assert difference() > 100 * before


def test_processes_agree_and_nothing_else_changes() -> None:
    made, images = network()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    balance(made, lambda: made(images), lambda factors: torch.ones_like(factors))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    balance(made, lambda: made(images))
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 4 and all(name.startswith("mask_head.") and name.endswith("weight") for name in changed)
