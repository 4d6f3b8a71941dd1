"""Terms of the loss of set prediction, as pure functions of all decoder layers at once.

Axis letters as in matching.py: L layers, N rows, Q queries, K classes, P matched pairs of a layer, H and W pixels.
``weights_N`` or ``weights_P`` weigh rows (the streams); ``None`` is 1 for all. Terms are sums over rows and pairs; the
criterion divides them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import boxes
from .matching import Matches, moved

__all__ = ["box_distances", "cardinality_error", "cross_entropy", "focal", "mask_distances"]


def cross_entropy(
    logits_LNQK: Tensor, matches: Matches, labels_LP: Tensor, *, eos: float, weights_N: Tensor | None = None
) -> Tensor:
    """Compute the weighted mean cross-entropy over all queries, (L,); "no object", the last class, weighs ``eos``.

    Source:
        DETR, equation 2 and section A.4: eos = 0.1; torch's weighted mean, as in the published code.

    Example:
        >>> first = torch.tensor([[0]])  # one layer; one row, whose first query is matched with its first target
        >>> matches = Matches(rows_P=first[0], queries_LP=first, targets_LP=first)
        >>> cross_entropy(torch.zeros(1, 1, 2, 3), matches, labels_LP=torch.tensor([[1]]), eos=0.1).exp()
        tensor([3.])
    """
    layers, rows, queries, classes = logits_LNQK.shape
    labels_LNQ = torch.full((layers, rows, queries), classes - 1, device=logits_LNQK.device)
    labels_LNQ[torch.arange(layers, device=labels_LNQ.device)[:, None], matches.rows_P, matches.queries_LP] = labels_LP
    class_weights = logits_LNQK.new_ones(classes)
    class_weights[-1] = eos
    each = F.cross_entropy(logits_LNQK.flatten(0, 2), labels_LNQ.flatten(), class_weights, reduction="none")
    total_L = _over_rows(each.view(layers, rows, queries).sum(2), weights_N)
    pairs = len(matches.rows_P)
    # Nothing matched and eos = 0: the loss is 0, not 0/0.
    return total_L / ((pairs + eos * (rows * queries - pairs)) or 1.0)


def focal(
    logits_LNQK: Tensor,
    matches: Matches,
    labels_LP: Tensor,
    *,
    alpha: float,
    gamma: float,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Compute the sum of the sigmoid focal loss over all queries and classes, (L,).

    Every entry counts as a miss first, which needs no target tensor; the few matched ones are then corrected.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5; in Deformable DETR.

    Example:
        >>> first = torch.tensor([[0]])
        >>> matches = Matches(rows_P=first[0], queries_LP=first, targets_LP=first)
        >>> logits = torch.tensor([[[[9.0, -9.0], [-9.0, -9.0]]]])  # sure, and right
        >>> focal(logits, matches, labels_LP=first, alpha=0.25, gamma=2.0) < 1e-6
        tensor([True])
    """
    total_L = _over_rows((1 - alpha) * _miss(logits_LNQK, gamma).sum((2, 3)), weights_N)
    hits_LP = matches.of(logits_LNQK).gather(2, labels_LP[..., None]).squeeze(2)
    change_LP = alpha * _miss(-hits_LP, gamma) - (1 - alpha) * _miss(hits_LP, gamma)
    return total_L + _over_rows(change_LP, None if weights_N is None else weights_N[matches.rows_P])


def _miss(logits: Tensor, gamma: float) -> Tensor:
    """Compute the focal loss p^gamma * -log(1 - p), p = sigmoid(logits), of absent classes; of hits with -logits."""
    loss: Tensor = _Miss.apply(logits, gamma)
    return loss


class _Miss(torch.autograd.Function):
    """Focal loss that keeps one tensor for the backward pass, where autograd keeps five; there can be 10^7 logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float) -> Tensor:
        p = logits.sigmoid()
        power = p**gamma
        # -log(1 - p) = max(x, 0) + log(1 + e). On a CPU torch's log1p, softplus and logsigmoid take five times as long
        # as its log; the rounding error of 1 + e is added back. In place, since new memory takes most of the time.
        e = logits.abs().neg_().exp_()
        one = 1 + e
        log = one.log().add_(e.sub_(one - 1).div_(one)).add_(logits.clamp(min=0))
        slope = (1 - p).mul_(log).mul_(gamma).add_(p).mul_(power)
        ctx.save_for_backward(slope)
        return log.mul_(power)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def box_distances(boxes_LP4: Tensor, own_LP4: Tensor, weights_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the sums of the L1 distance and of 1 - GIoU of matched boxes (centers and sides), (L,) and (L,).

    Source:
        DETR, section 3.1, "Bounding box loss".

    Example:
        >>> one, other = torch.tensor([[[0.5, 0.5, 0.4, 0.2]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
        >>> l1, giou = box_distances(one, other)
        >>> round(float(l1), 2), round(float(giou), 2)
        (0.2, 0.5)
    """
    l1_LP = (boxes_LP4 - own_LP4).abs().sum(2)
    giou_LP = 1 - boxes.giou(boxes.to_corners(boxes_LP4), boxes.to_corners(own_LP4))
    return _over_rows(l1_LP, weights_P), _over_rows(giou_LP, weights_P)


def mask_distances(logits_PHW: Tensor, own_PHW: Tensor, weights_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the sums over pairs of the mean focal loss of the pixels and of the dice loss, two scalars.

    Args:
        logits_PHW: Predicted masks of any size, which are resized to that of the targets bilinearly.
        own_PHW: Masks of the matched targets, boolean, or 0 outside and any other number inside.
        weights_P: Weight of each pair.

    Source:
        DETR, section 4.4; focal with alpha 0.25 and gamma 2, dice (Milletari et al., "V-Net", 3DV 2016) with 1 added
        above and below, as in the published code.

    Example:
        >>> truth = torch.eye(8)[None]
        >>> focal, dice = mask_distances(100 * (2 * truth - 1), truth)  # one pair; sure, and right
        >>> float(focal), float(dice)
        (0.0, 0.0)
    """
    truth = own_PHW.flatten(1) != 0
    logits = F.interpolate(logits_PHW[:, None], size=own_PHW.shape[-2:], mode="bilinear", align_corners=False)
    logits = logits.flatten(1)
    focal_P = (torch.where(truth, 0.25, 0.75) * _miss(torch.where(truth, -logits, logits), gamma=2.0)).mean(1)
    inside = logits.sigmoid()
    dice_P = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
    return _over_rows(focal_P, weights_P), _over_rows(dice_P, weights_P)


@torch.no_grad()
def cardinality_error(logits_LNQK: Tensor, sizes: tuple[int, ...], *, kind: str) -> Tensor:
    """Compute the mean over rows of |predicted objects - targets|, (L,), for the log.

    A query counts as an object when its best class beats "no object" ("softmax") or a probability of 1/2 ("focal").

    Example:
        >>> logits = torch.tensor([[[[1.0, -1.0], [2.0, -1.0], [-1.0, -1.0]]]])  # two of three queries
        >>> cardinality_error(logits, (3,), kind="focal")
        tensor([1.])
    """
    if kind == "softmax":
        objects_LNQ = logits_LNQK[..., :-1].amax(-1) >= logits_LNQK[..., -1]
    else:
        objects_LNQ = logits_LNQK.amax(-1) > 0
    counts = moved(torch.tensor(sizes, dtype=logits_LNQK.dtype), logits_LNQK.device)
    return (objects_LNQ.sum(2) - counts).abs().mean(1)


def _over_rows(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over the last axis, weighted."""
    return values.sum(-1) if weights is None else (values * weights).sum(-1)
