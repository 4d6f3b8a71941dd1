"""Boxes (..., 4) in two formats: centers (cx, cy, w, h), as detectors predict, and corners (x1, y1, x2, y2)."""

import torch
from torch import Tensor

__all__ = ["giou", "to_centers", "to_corners"]


def to_corners(boxes: Tensor) -> Tensor:
    """Convert centers and sides (cx, cy, w, h) to corners (x1, y1, x2, y2).

    Args:
        boxes: Boxes (..., 4) in any unit. A negative side gives an inverted box, x2 < x1.

    Example:
        >>> to_corners(torch.tensor([0.5, 0.5, 0.2, 0.4])).tolist() == torch.tensor([0.4, 0.3, 0.6, 0.7]).tolist()
        True
    """
    center, side = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - 0.5 * side, center + 0.5 * side), dim=-1)


def to_centers(boxes: Tensor) -> Tensor:
    """Convert corners (x1, y1, x2, y2) to centers and sides (cx, cy, w, h).

    Args:
        boxes: Boxes (..., 4) in any unit.

    Example:
        >>> to_centers(torch.tensor([0.0, 0.0, 1.0, 0.5])).tolist()
        [0.5, 0.25, 1.0, 0.5]
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((0.5 * (low + high), high - low), dim=-1)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the generalised IoU of boxes in corner format, element by element.

    ``giou(a[:, None], b)`` gives every pair. ``torchvision.ops.generalized_box_iou`` gives the same numbers, but only
    for every pair of two lists, and NaN for boxes without area. Here 0/0 counts as 0: two boxes without area have IoU
    0, and two that are the same point or lie on one line have GIoU 0. An inverted box (x2 < x1) has no area. Gradients
    are finite in all these cases.

    Args:
        first: Boxes (..., 4) in any unit.
        second: Boxes (..., 4) in the same unit, broadcast against ``first``.

    Returns:
        Generalised IoU (...), in -1..1.

    Source:
        Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 1.

    Example:
        >>> a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
        >>> giou(a[:, None], b)
        tensor([[ 0.3333, -0.3333]])
    """
    ax1, ay1, ax2, ay2 = first.unbind(-1)
    bx1, by1, bx2, by2 = second.unbind(-1)
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    inner = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    inner = inner * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    outer = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    outer = outer * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    union = area_a + area_b - inner
    return inner / _or_one(union) - (outer - union) / _or_one(outer)


def _or_one(area: Tensor) -> Tensor:
    """Return a divisor that is never 0, for numerators that are 0 there. Smaller areas have gradients beyond fp32."""
    return torch.where(area < 1e-30, 1.0, area)
