"""A start for the mask head from which it learns within hundreds of steps.

What tells one query from another enters the mask head as attention maps, which sum to one over all heads and cells:
values of 1/512 beside features of order one. And at three places maps of the backbone are added; those of
EfficientNet-Lite0 spread by 6 to 9, ten times what they are added to. In the published initial weights the masks of two
queries so differ by 1e-6 of their spread, and for hundreds of steps the head learns one mask for all of them.

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
    """Scale the new mask head's weights so that its sums have terms of equal spread.

    The first convolution's weights for the attention maps get the factor that gives them the spread of the features
    beside them; each 1 x 1 convolution of a map of the backbone is divided by the spread of its output.

    Args:
        network: From `with_masks`; its mask head is changed in place.
        run: Calls the network on a batch of its data.
        agree: Makes one of the factors of several processes.

    Returns:
        The factors, of the attention maps and of each of the backbone's maps, finest last.

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
        # In eval(), where BatchFormer is the identity: the arms of a comparison start alike.
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
