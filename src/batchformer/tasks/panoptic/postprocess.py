"""Postprocessing of a detector's queries and masks into panoptic maps and instances, as pure functions.

Axis letters: Q queries, K classes, h, w of the mask head, H, W pixels, S segments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.tasks.set_prediction.matching import Kind

from .maps import PanopticMap

__all__ = ["Frame", "Instances", "batch_maps", "instances", "masks_at", "panoptic_map"]


class Frame(NamedTuple):
    """Sizes of an image in its batch, each (height, width) in pixels.

    Attributes:
        padded: Size of the batch.
        resized: Size of the image inside it, at the top left.
        original: Size of the image file.
    """

    padded: tuple[int, int]
    resized: tuple[int, int]
    original: tuple[int, int]

    @classmethod
    def of(cls, batch: Mapping[str, Any], row: int) -> "Frame":
        """Read the sizes of an image off ``pixel_mask`` (B, H, W), and ``size`` and ``orig_size`` of the labels."""
        label, (height, width) = batch["labels"][row], batch["pixel_mask"].shape[-2:]
        (resized, original) = (tuple(int(x) for x in label[name]) for name in ("size", "orig_size"))
        return cls((height, width), (resized[0], resized[1]), (original[0], original[1]))


def masks_at(masks_Qhw: Tensor, frame: Frame) -> Tensor:
    """Bring mask logits to the image's own size: the padding is cut off, the rest is interpolated.

    Args:
        masks_Qhw: Mask logits of the padded batch, as the mask head gives them.
        frame: Sizes of the image.

    Returns:
        Logits ``(Q, H, W)``, float32, H and W of the file.

    Example:
        >>> masks_at(torch.zeros(3, 8, 8), Frame((32, 32), (32, 20), (64, 40))).shape
        torch.Size([3, 64, 40])
    """
    if len(masks_Qhw) == 0:  # which interpolation refuses
        return masks_Qhw.new_zeros((0, *frame.original), dtype=torch.float32)
    masks_1QHW = F.interpolate(masks_Qhw[None].float(), frame.padded, mode="bilinear", align_corners=False)
    masks_1QHW = masks_1QHW[..., : frame.resized[0], : frame.resized[1]]
    if frame.resized != frame.original:
        masks_1QHW = F.interpolate(masks_1QHW, frame.original, mode="bilinear", align_corners=False)
    return masks_1QHW[0]


def panoptic_map(
    logits_QK: Tensor,
    masks_Qhw: Tensor,
    frame: Frame,
    is_thing_K: Tensor,
    *,
    kind: Kind = "softmax",
    threshold: float = 0.85,
    smallest: int = 4,
) -> PanopticMap:
    """Make the panoptic map of one image.

    Queries whose best class is no-object, or whose confidence is not above ``threshold``, are left out. Each pixel goes
    to the query with the largest mask logit there; queries of the same stuff class become one segment. Segments of
    ``smallest`` pixels or fewer are dropped and their pixels go to the best of those that remain, until none is that
    small.

    Args:
        logits_QK: Class logits: with "softmax" ``(Q, K + 1)``, no-object last; with "focal" ``(Q, K)``.
        masks_Qhw: Mask logits of the padded batch.
        frame: Sizes of the image.
        is_thing_K: For each class ``(K,)`` bool: True for things, False for stuff.
        kind: Rule by which logits become scores: DETR's softmax, or Conditional DETR's sigmoid of each class.
        threshold: Least confidence of a query, in 0..1.
        smallest: Number of pixels up to which a segment is dropped.

    Returns:
        The map; without a confident query all of it is void.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, appendix A.6. Its code gives up a
        stuff query that was merged into another of its class when any segment of the image is dropped; here it stays.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])  # a thing, a stuff, no-object
        >>> masks = torch.tensor([[[5.0, -5.0]], [[0.0, 0.0]]])
        >>> frame = Frame((1, 2), (1, 2), (1, 2))
        >>> panoptic_map(logits, masks, frame, torch.tensor([True, False]), smallest=0).ids_HW
        tensor([[1, 2]])
    """
    scores_Q, labels_Q = (logits_QK.float().softmax(-1) if kind == "softmax" else logits_QK.float().sigmoid()).max(-1)
    keep_Q = (labels_Q < len(is_thing_K)) & (scores_Q > threshold)
    # The most confident query comes first, and gives a segment of merged stuff its score.
    order = scores_Q.argsort(descending=True, stable=True)
    order = order[keep_Q[order]]
    scores_Q, labels_Q = scores_Q[order], labels_Q[order]
    height, width = frame.original
    if len(labels_Q) == 0:
        return _renumbered(labels_Q.new_zeros((height, width)), labels_Q, scores_Q)
    masks_QP = masks_at(masks_Qhw[order], frame).flatten(1)
    merged_Q = _merge_stuff(labels_Q, is_thing_K)
    alive_Q = torch.ones_like(labels_Q, dtype=torch.bool)
    ids_P = merged_Q[masks_QP.argmax(0)]
    while True:
        area_Q = torch.bincount(ids_P, minlength=len(labels_Q))
        # A segment of merged stuff counts as a whole, under its first query.
        small_Q = alive_Q & (area_Q[merged_Q] <= smallest)
        if not bool(small_Q.any()):
            break
        alive_Q &= ~small_Q
        if not bool(alive_Q.any()):
            return _renumbered(labels_Q.new_zeros((height, width)), labels_Q[:0], scores_Q[:0])
        lost_P = small_Q[ids_P]
        remaining = alive_Q.nonzero()[:, 0]
        ids_P[lost_P] = merged_Q[remaining[masks_QP[remaining][:, lost_P].argmax(0)]]
    return _renumbered(ids_P.view(height, width) + 1, labels_Q, scores_Q)


def _merge_stuff(labels_Q: Tensor, is_thing_K: Tensor) -> Tensor:
    """Return, for each query, the first query of its segment: itself, or the first of its stuff class."""
    itself = torch.arange(len(labels_Q), device=labels_Q.device)
    same_QQ = (labels_Q[:, None] == labels_Q[None]) & ~is_thing_K.to(labels_Q.device)[labels_Q][:, None]
    return torch.where(same_QQ.any(1), same_QQ.int().argmax(1), itself)


def _renumbered(ids_HW: Tensor, labels_Q: Tensor, scores_Q: Tensor) -> PanopticMap:
    """Number the segments that have pixels 1..S, in the order of their queries."""
    there_Q = torch.bincount(ids_HW.flatten(), minlength=len(labels_Q) + 1)[1:] > 0
    numbers = torch.cat((there_Q.new_zeros(1, dtype=torch.long), there_Q.cumsum(0)))
    labels_S = labels_Q[there_Q]
    return PanopticMap(numbers[ids_HW], labels_S, scores_Q[there_Q], torch.zeros_like(labels_S, dtype=torch.bool))


class Instances(NamedTuple):
    """Things found in one image, in the order of their queries.

    Attributes:
        masks_SHW: Masks at the size of the file, bool.
        scores_S: Score of each instance, in 0..1.
        labels_S: Class index of each instance.
    """

    masks_SHW: Tensor
    scores_S: Tensor
    labels_S: Tensor


def instances(
    logits_QK: Tensor, masks_Qhw: Tensor, frame: Frame, is_thing_K: Tensor, *, kind: Kind = "softmax"
) -> Instances:
    """Find the instances of one image for mask AP: every query whose best class is a thing, with its mask above 1/2.

    Args:
        logits_QK: Class logits as in `panoptic_map`; no-object takes part in the softmax and is never chosen.
        masks_Qhw: Mask logits of the padded batch.
        frame: Sizes of the image.
        is_thing_K: For each class ``(K,)`` bool: True for things, False for stuff.
        kind: Rule by which logits become scores.

    Example:
        >>> found = instances(torch.eye(3), torch.ones(3, 2, 2), Frame((4, 4), (4, 4), (4, 4)), torch.ones(2) > 0)
        >>> found.labels_S, found.masks_SHW.shape
        (tensor([0, 1, 0]), torch.Size([3, 4, 4]))
    """
    logits_QK = logits_QK.float()
    scores_Q, labels_Q = (logits_QK.softmax(-1)[:, :-1] if kind == "softmax" else logits_QK.sigmoid()).max(-1)
    keep_Q = is_thing_K.to(labels_Q.device)[labels_Q]
    return Instances(masks_at(masks_Qhw[keep_Q], frame) > 0, scores_Q[keep_Q], labels_Q[keep_Q])


def batch_maps(
    output: Any, batch: Mapping[str, Any], is_thing_K: Tensor, *, kind: Kind = "softmax", **settings: Any
) -> list[tuple[PanopticMap, Instances]]:
    """Return the panoptic map and the instances of every image of a batch.

    Args:
        output: Output of the network, with ``logits`` (B, Q, K) and ``pred_masks`` (B, Q, h, w).
        batch: Batch of B images; see :meth:`Frame.of`.
        is_thing_K: For each class ``(K,)`` bool: True for things, False for stuff.
        kind: Rule by which logits become scores.
        **settings: ``threshold`` and ``smallest`` of :func:`panoptic_map`.
    """
    found = []
    for row in range(len(batch["labels"])):
        logits, masks, frame = output.logits[row], output.pred_masks[row], Frame.of(batch, row)
        whole = panoptic_map(logits, masks, frame, is_thing_K, kind=kind, **settings)
        found.append((whole, instances(logits, masks, frame, is_thing_K, kind=kind)))
    return found
