"""Matching of predictions with targets: the assignment of least cost, for every layer and row of a step at once.

Axis letters: L decoder layers, N rows (images; both streams' with BatchFormer), Q queries, K classes (of the softmax
kind with "no object" last), M targets of all rows, one row after the other, P matched pairs of one layer.

The cost of a pair is formed for an image's own targets only, (L, M, Q), never (N Q, M). It is computed on the device of
the predictions and goes to the host in one transfer, together with the checks of predictions and targets.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import boxes

__all__ = ["Kind", "MatchCosts", "Matches", "Stage", "Targets", "match", "match_stages", "moved", "pack", "pair_costs"]

Kind = Literal["softmax", "focal"]
# A row whose predictions are larger is as lost as one with NaN; below it no cost overflows.
_LIMIT = 1e12
# Number of costs that takes scipy about half a millisecond, several times as long as a thread takes to start.
_WORTH_A_THREAD = 2**17


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the terms of a pair's cost.

    Attributes:
        kind: "softmax": classes and "no object" exclude each other, and the cost is minus the probability of the
            target's class (DETR). "focal": each class has its sigmoid, and the cost is the focal loss of a hit minus
            that of a miss (Deformable DETR, Conditional DETR, SMCA).
        class_: Weight of the class cost; published are 1 for "softmax" and 2 for "focal".
        l1: Weight of the L1 distance of boxes as centers and sides.
        giou: Weight of minus the generalised IoU of boxes.
        alpha: Weight of a hit in the focal loss, in 0..1.
        gamma: Exponent of the focal loss, at least 0.

    Raises:
        ValueError: For another kind, or when every weight is 0.
    """

    kind: Kind = "softmax"
    class_: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "focal"):
            raise ValueError(f"Expected kind 'softmax' or 'focal', got {self.kind!r}.")
        if self.class_ == self.l1 == self.giou == 0:
            raise ValueError(
                "Expected a cost that is not 0, got class_=0, l1=0 and giou=0, with which all pairs are as good. Set "
                "one of them."
            )


@dataclass(frozen=True)
class Targets:
    """Targets of all rows in one list.

    Attributes:
        labels_M: Class index of each target.
        boxes_M4: Boxes as centers and sides, in shares of the image.
        rows_M: Row that each target belongs to, ascending.
        sizes: Number of targets of each row, on the host.
    """

    labels_M: Tensor
    boxes_M4: Tensor
    rows_M: Tensor
    sizes: tuple[int, ...]


class Matches(NamedTuple):
    """Matched pairs; every layer has equally many, since a row has min(Q, its targets) of them.

    Attributes:
        rows_P: Row of each pair, alike in every layer.
        queries_LP: Index of the query in that row.
        targets_LP: Index of the target among all M.
    """

    rows_P: Tensor
    queries_LP: Tensor
    targets_LP: Tensor

    def of(self, predictions_LNQX: Tensor) -> Tensor:
        """Return the matched ones of predictions (L, N, Q, ...), (L, P, ...)."""
        layers = torch.arange(len(self.queries_LP), device=self.rows_P.device)[:, None]
        return predictions_LNQX[layers, self.rows_P, self.queries_LP]


class Stage(NamedTuple):
    """Predictions of the same queries by L layers, and the targets that they are matched with."""

    logits_LNQK: Tensor
    boxes_LNQ4: Tensor
    targets: Targets


def pack(targets: Sequence[Mapping[str, Any]], like: Tensor) -> Targets:
    """Join the targets of all rows.

    Args:
        targets: Labels of each row as transformers has them: ``class_labels`` (T,) and ``boxes`` (T, 4), T at least 0.
        like: Tensor on the device and of the floating type of the result.

    Raises:
        ValueError: When a row lacks one of the two, or has other shapes.

    Example:
        >>> one = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
        >>> none = {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        >>> packed = pack([one, none, one], torch.zeros(()))
        >>> packed.rows_M.tolist(), packed.sizes
        ([0, 2], (1, 0, 1))
    """
    for row, target in enumerate(targets):
        if missing := {"class_labels", "boxes"} - set(target):
            raise ValueError(f"Expected class_labels and boxes for every row, got none of {missing} in row {row}.")
        labels, box = target["class_labels"], target["boxes"]
        if labels.dim() != 1 or box.shape != (len(labels), 4):
            raise ValueError(
                f"Expected class_labels (T,) and boxes (T, 4), got {tuple(labels.shape)} and {tuple(box.shape)} in row "
                f"{row}. An image without objects has shapes (0,) and (0, 4)."
            )
    sizes = tuple(len(target["class_labels"]) for target in targets)
    labels_M = torch.cat([target["class_labels"] for target in targets])
    boxes_M4 = torch.cat([target["boxes"] for target in targets])
    rows_M = moved(torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)), like.device)
    return Targets(
        moved(labels_M, like.device, torch.int64),
        moved(boxes_M4, like.device, like.dtype),
        rows_M,
        sizes,
    )


@torch.no_grad()
def pair_costs(logits_LNQK: Tensor, boxes_LNQ4: Tensor, targets: Targets, costs: MatchCosts) -> Tensor:
    """Compute the cost of every query for every target of its own row, (L, M, Q).

    Args:
        logits_LNQK: Class logits; with the "softmax" kind the last class is "no object".
        boxes_LNQ4: Boxes as centers and sides.
        targets: Targets of N rows; labels out of range count as the nearest class here.
        costs: Weights of the terms.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1, equations 1 and 2; the
        focal form is Deformable DETR's.

    Example:
        >>> box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
        >>> targets = pack([{"class_labels": torch.tensor([0]), "boxes": box}], box)
        >>> logits = torch.tensor([[[[9.0, 0.0], [0.0, 9.0]]]])  # one layer, one row, two queries
        >>> pair_costs(logits, box.expand(1, 1, 2, 4), targets, MatchCosts(l1=0.0)).round(decimals=2)
        tensor([[[-3., -2.]]])
    """
    rows_M = targets.rows_M
    labels_M = targets.labels_M.clamp(0, logits_LNQK.shape[-1] - 1)
    if costs.kind == "softmax":
        class_LMQ = -logits_LNQK.softmax(-1).transpose(2, 3)[:, rows_M, labels_M]
    else:
        hit = logits_LNQK.transpose(2, 3)[:, rows_M, labels_M].sigmoid()
        miss = 1 - hit
        # The 1e-8 is the published code's; in fp32 it is what keeps log(0) away.
        class_LMQ = (1 - costs.alpha) * hit**costs.gamma * (miss + 1e-8).log()
        class_LMQ -= costs.alpha * miss**costs.gamma * (hit + 1e-8).log()
    # One plane for each coordinate, contiguous along Q: every operation below runs over whole vectors.
    both = torch.cat((boxes_LNQ4, boxes.to_corners(boxes_LNQ4)), dim=-1).movedim(-1, 0).contiguous()
    centers, corners = both.index_select(2, rows_M).movedim(0, -1).split(4, dim=-1)
    own_M14 = targets.boxes_M4[:, None]
    cost_LMQ = costs.class_ * class_LMQ
    cost_LMQ += costs.l1 * (centers - own_M14).abs_().sum(-1)
    cost_LMQ -= costs.giou * boxes.giou(corners, boxes.to_corners(own_M14))
    return cost_LMQ


def match(logits_LNQK: Tensor, boxes_LNQ4: Tensor, targets: Sequence[Mapping[str, Any]], costs: MatchCosts) -> Matches:
    """Assign targets to queries at the least total cost, for each layer and row by itself.

    With more targets than queries, every query gets a target and the other targets get none.

    Args:
        logits_LNQK: Class logits.
        boxes_LNQ4: Boxes as centers and sides, in shares of the image.
        targets: Labels of each of N rows: ``class_labels`` (T,) and ``boxes`` (T, 4).
        costs: Weights of the terms.

    Raises:
        FloatingPointError: For predictions that are NaN, infinite or larger than 1e12.
        ValueError: For labels out of range, and for target boxes that are not finite or have a negative side. Sides of
            0 are allowed.

    Source:
        DETR, equation 1; the solver is scipy's (Crouse 2016, a shortest augmenting path).

    Example:
        >>> logits = torch.tensor([[[[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]]])  # one layer, one row, two queries
        >>> box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
        >>> target = {"class_labels": torch.tensor([0]), "boxes": box}
        >>> match(logits, box.expand(1, 1, 2, 4), [target], MatchCosts()).queries_LP
        tensor([[1]])
    """
    return match_stages([Stage(logits_LNQK, boxes_LNQ4, pack(targets, boxes_LNQ4))], costs)[0]


@torch.no_grad()
def match_stages(stages: Sequence[Stage], costs: MatchCosts) -> list[Matches]:
    """Match several stages (decoder, two-stage encoder) like :func:`match`, with one transfer to the host in all."""
    parts = [part for stage in stages for part in (pair_costs(*stage, costs), *_faults(stage, costs.kind))]
    host = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    arrays = iter(np.split(host, np.cumsum([part.numel() for part in parts])[:-1]))
    found = []
    for stage, (cost, lost, labels, sides) in zip(
        stages, zip(arrays, arrays, arrays, arrays, strict=True), strict=True
    ):
        _raise_faults(stage, costs.kind, lost, labels, sides)
        found.append(_assign(cost.reshape(len(stage.logits_LNQK), -1, stage.logits_LNQK.shape[2]), stage.targets))
    return found


def _assign(cost_LMQ: NDArray[Any], targets: Targets) -> Matches:
    sizes, queries = np.array(targets.sizes, dtype=np.int64), cost_LMQ.shape[2]
    starts = np.cumsum(sizes) - sizes
    blocks = [cost_MQ[start : start + size] for cost_MQ in cost_LMQ for start, size in zip(starts, sizes, strict=True)]
    of_row, queries_of = (
        np.concatenate(found).reshape(len(cost_LMQ), -1) for found in zip(*_solve(blocks), strict=True)
    )
    rows = np.repeat(np.arange(len(sizes)), np.minimum(sizes, queries))
    pairs = (rows, queries_of, of_row + starts[rows])
    return Matches(*(moved(torch.from_numpy(x), targets.rows_M.device) for x in pairs))


def _solve(blocks: list[NDArray[Any]]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Assign within each block (targets, queries), on at most as many threads as torch has: scipy frees the GIL."""
    from scipy.optimize import linear_sum_assignment

    workers = min(torch.get_num_threads(), 1 + sum(block.size for block in blocks) // _WORTH_A_THREAD)
    if workers == 1:
        return [linear_sum_assignment(block) for block in blocks]
    shares = [blocks[first::workers] for first in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        solved = list(pool.map(lambda share: [linear_sum_assignment(block) for block in share], shares))
    return [solved[at % workers][at // workers] for at in range(len(blocks))]


def _faults(stage: Stage, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the checks: norm of each row's predictions (L, N), labels out of range (M,), bad boxes (M,)."""
    logits, predicted, targets = stage
    size_LN = sum(torch.linalg.vector_norm(x, dim=(2, 3)) for x in (logits, predicted))
    classes = logits.shape[-1] - (kind == "softmax")
    wrong_M = (targets.labels_M < 0) | (targets.labels_M >= classes)
    bad_M = ~targets.boxes_M4.isfinite().all(-1) | (targets.boxes_M4[:, 2:] < 0).any(-1)
    return size_LN.to(predicted.dtype), wrong_M.to(predicted.dtype), bad_M.to(predicted.dtype)


def _raise_faults(stage: Stage, kind: Kind, size: Any, wrong: Any, bad: Any) -> None:
    rows = np.repeat(np.arange(len(stage.targets.sizes)), stage.targets.sizes)
    if wrong.any():
        classes = stage.logits_LNQK.shape[-1] - (kind == "softmax")
        labels = stage.targets.labels_M.cpu().numpy()[wrong > 0]
        raise ValueError(
            f"Expected class labels from 0 to {classes - 1}, got {sorted(set(labels.tolist()))} in rows "
            f"{sorted(set(rows[wrong > 0].tolist()))}. Number the categories from 0 without gaps, or build the model "
            "with more classes."
        )
    if bad.any():
        raise ValueError(
            "Expected target boxes (cx, cy, w, h) that are finite with w and h not negative, got others in rows "
            f"{sorted(set(rows[bad > 0].tolist()))}. Corner format goes through boxes.to_centers first."
        )
    if not (size < _LIMIT).all():
        layers, lost = np.nonzero(~(size.reshape(len(stage.logits_LNQK), -1) < _LIMIT))
        raise FloatingPointError(
            f"Expected finite predictions, got NaN, infinite or beyond {_LIMIT:.0e} in layers "
            f"{sorted(set(layers.tolist()))}, rows {sorted(set(lost.tolist()))}. The run has diverged, or fp16 "
            "overflows: lower the learning rate, clip gradients, or train in bf16 or fp32."
        )


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor to a device; to a GPU without waiting, since a blocking copy would wait for the forward pass."""
    return x.to(device, dtype, non_blocking=device.type == "cuda")
