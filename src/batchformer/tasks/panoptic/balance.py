"""Initial weights from which the mask head learns within hundreds of steps.

Queries differ in the mask head's input by their attention maps, which sum to one over all heads and cells: these are
values of 1/512, next to features of order one. Three times maps of the backbone are added; those of EfficientNet-Lite0
have a standard deviation of 6 to 9, ten times that of the sum so far. With the published initial weights the masks of
two queries therefore differ by 1e-6 of their standard deviation, and for hundreds of steps the head learns one mask for
all queries.

Axis letters: N rows, C channels, h, w cells.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["balance"]


@torch.no_grad()
def balance(
    network: Any, run: Callable[[], Any], agree: Callable[[Tensor], Tensor] = lambda factors: factors
) -> Tensor:
    """Scale the weights of a new mask head so that the terms of its sums have equal standard deviations.

    The weights of the first convolution for the attention maps are scaled until these contribute as much as the
    features; each 1 x 1 convolution of a map of the backbone is divided by the standard deviation of its output.

    Args:
        network: Network from `with_masks`, whose mask head is changed.
        run: Function that passes a batch through the network.
        agree: Function that turns the factors of several processes into one, such as their mean.

    Returns:
        Factors of the attention maps and of each map of the backbone, the finest last, (4,).

    Example:
        >>> from batchformer.tasks.panoptic.model import build_network, with_masks
        >>> from batchformer.tasks.panoptic.settings import NetworkSettings
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network = with_masks(build_network(small, 7))
        >>> len(balance(network, lambda: network(torch.rand(2, 3, 64, 64))))
        4
    """
    convolutions = [module for module in network.mask_head.modules() if isinstance(module, nn.Conv2d)]
    first, maps = convolutions[0], [one for one in convolutions if one.kernel_size == (1, 1)]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [first.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].detach()}))]
    hooks += [one.register_forward_hook(lambda module, args, out: seen.update({module: out.detach()})) for one in maps]
    trained = network.training
    try:
        # In eval() BatchFormer is the identity, so that the arms of a comparison start alike.
        network.eval()
        run()
    finally:
        network.train(trained)
        for hook in hooks:
            hook.remove()
    heads = network.config.encoder_attention_heads
    features, attention = (
        F.conv2d(seen[first][:, part], first.weight[:, part], padding=first.padding).std()
        for part in (slice(None, -heads), slice(-heads, None))
    )
    factors = agree(torch.stack([features / attention, *(1 / seen[one].std() for one in maps)]))
    first.weight[:, -heads:] *= factors[0]
    for one, factor in zip(maps, factors[1:], strict=True):
        one.weight *= factor
    return factors
