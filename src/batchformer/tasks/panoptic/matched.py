"""Training of the mask head on matched queries alone, since the loss needs no other masks.

The mask head of DETR runs once for each query of each image, which is most of the cost of its training, and its loss is
on the few queries that are matched with a segment. Leaving the others out changes neither the loss nor a gradient.

Axis letters: N rows (images; both streams' with BatchFormer), Q queries, S slots (matched queries of the fullest row),
P matched pairs, h, w of the mask head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.matching import MatchCosts, match

from .model import detector_inside

__all__ = ["MatchedQueries"]


class MatchedQueries:
    """Hooks on a network with a mask head; they act when it is given ``labels`` in training.

    The masks of queries without a target are then zeros.

    Args:
        network: Network from `with_masks`, into which BatchFormer has been inserted already, if at all.
        costs: Costs of the matching, those of the criterion.

    Example:
        >>> from batchformer.tasks.panoptic.model import build_network, with_masks
        >>> from batchformer.tasks.panoptic.settings import NetworkSettings
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network = with_masks(build_network(small, 7))
        >>> matched = MatchedQueries(network, MatchCosts())
        >>> matched.remove()
    """

    def __init__(self, network: nn.Module, costs: MatchCosts) -> None:
        self.costs = costs
        self._labels: Any = None
        self._logits: Tensor | None = None
        self._boxes: Tensor | None = None
        self._places: tuple[Tensor, Tensor, Tensor, tuple[int, int]] | None = None
        detector = network.get_submodule(detector_inside(network))
        head = network.get_submodule("mask_head")
        self._hooks = [
            network.register_forward_pre_hook(self._begin, with_kwargs=True),
            detector.get_submodule("class_labels_classifier").register_forward_hook(self._keep_logits),
            detector.get_submodule("bbox_predictor").register_forward_hook(self._keep_boxes),
            head.register_forward_pre_hook(self._choose, with_kwargs=True),
            head.register_forward_hook(self._spread),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        self._labels = named.get("labels") if module.training else None
        self._logits = self._boxes = self._places = None

    def _keep_logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._logits = output

    def _keep_boxes(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._boxes = output

    def _choose(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Keep the attention maps of the matched queries; rows with fewer are filled up with their first query's."""
        if self._labels is None:
            return None
        assert self._logits is not None and self._boxes is not None
        found = match(self._logits[None].float(), self._boxes[None].float().sigmoid(), self._labels, self.costs)
        rows_P, queries_P = found.rows_P, found.queries_LP[0]
        rows, queries = self._logits.shape[:2]
        counts_N = torch.bincount(rows_P, minlength=rows)
        slots_P = torch.arange(len(rows_P), device=rows_P.device) - (counts_N.cumsum(0) - counts_N)[rows_P]
        slots = max(1, min(queries, max(len(target["class_labels"]) for target in self._labels)))
        queries_NS = rows_P.new_zeros((rows, slots))
        queries_NS[rows_P, slots_P] = queries_P
        self._places = rows_P, slots_P, queries_P, (rows, queries)

        def chosen(maps_NQ: Tensor) -> Tensor:
            return maps_NQ[torch.arange(len(maps_NQ), device=maps_NQ.device)[:, None], queries_NS]

        if "attention_masks" in named:
            return args, {**named, "attention_masks": chosen(named["attention_masks"])}
        return (args[0], chosen(args[1]), *args[2:]), named  # transformers 4.57: by position

    def _spread(self, module: nn.Module, args: Any, masks: Tensor) -> Tensor | None:
        """Sort the masks ``(N S, 1, h, w)`` back to their queries, ``(N Q, 1, h, w)``."""
        if self._places is None:
            return None
        rows_P, slots_P, queries_P, (rows, queries) = self._places
        masks_NShw = masks.view(rows, -1, *masks.shape[2:])
        masks_NQhw = masks.new_zeros((rows, queries, *masks.shape[2:]))
        masks_NQhw[rows_P, queries_P] = masks_NShw[rows_P, slots_P]
        return masks_NQhw.flatten(0, 1)[:, None]
