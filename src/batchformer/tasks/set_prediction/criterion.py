"""The criterion of set prediction: match, then the terms of every decoder layer, of the masks and of the encoder.

Axis letters as in matching.py: L decoder layers, N rows, Q queries (of a two-stage encoder: its tokens), K classes, M
targets, P pairs, H and W pixels.

Losses are sums over pairs, divided by the number of targets of all rows (with several processes, by the mean number of
a process). With two streams the targets are doubled, so that this is the mean of both streams' losses, and a run with
BatchFormer has the scale of a plain run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import loss_terms as terms
from .matching import Kind, MatchCosts, Matches, Stage, match_stages, moved, pack

__all__ = ["LossWeights", "SetCriterion", "SetOutputs", "build_criterion"]

_WEIGHT_OF = {"loss_ce": "class_", "loss_bbox": "l1", "loss_giou": "giou", "loss_mask": "mask", "loss_dice": "dice"}


@dataclass(frozen=True)
class SetOutputs:
    """Predictions of a detector for N rows.

    Attributes:
        logits_LNQK: Class logits of each decoder layer, the final one last; the last class of the "softmax" kind is "no
            object".
        boxes_LNQ4: Boxes as centers and sides, in shares of the image, 0..1.
        masks_NQHW: Mask logits of the final layer.
        encoder_logits_NQK: Class logits of the encoder's proposals (two-stage Deformable DETR).
        encoder_boxes_NQ4: Boxes of the encoder's proposals.
    """

    logits_LNQK: Tensor
    boxes_LNQ4: Tensor
    masks_NQHW: Tensor | None = None
    encoder_logits_NQK: Tensor | None = None
    encoder_boxes_NQ4: Tensor | None = None


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms in the total, alike in all layers; each at least 0.

    Attributes:
        class_: Weight of the class term; published are 1 with "softmax" and 2 with "focal". The loss of transformers
            takes 1 in both.
        l1: Weight of the L1 distance of boxes.
        giou: Weight of 1 - GIoU.
        mask: Weight of the focal loss of the masks.
        dice: Weight of the dice loss of the masks.
    """

    class_: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    mask: float = 1.0
    dice: float = 1.0


@dataclass(frozen=True)
class SetCriterion:
    """The loss of DETR ("softmax") and of Conditional DETR, Deformable DETR and SMCA ("focal").

    Attributes:
        num_classes: K, number of classes without "no object".
        kind: Rule by which logits become scores; see :class:`MatchCosts`.
        weights: Weights of the terms.
        costs: Costs of the matching; ``None`` means the published ones of the kind.
        eos: Weight of "no object" in the cross-entropy ("softmax").
        alpha: Weight of a hit in the focal loss ("focal"), in 0..1.
        gamma: Exponent of the focal loss, at least 0.
        cardinality: Whether to compute ``cardinality_error``, which is for the log only.
        two_streams: Whether the rows are [plain; mixed], or a function that tells (``lambda: handle.doubles``); it
            matters only with stream weights that differ.
        stream_weights: Weights of the plain and of the mixed stream, at least 0, not both 0.

    Raises:
        ValueError: For other stream weights, or for different ones without ``two_streams``.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1; Zhu et al., "Deformable
        DETR", ICLR 2021, A.4 (two-stage). BatchFormerV2: targets are doubled, each stream is matched by itself.

    Example:
        >>> criterion = SetCriterion(num_classes=3)
        >>> outputs = SetOutputs(torch.zeros(2, 1, 5, 4), torch.full((2, 1, 5, 4), 0.5))
        >>> target = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
        >>> loss = criterion(outputs, [target])
        >>> sorted(loss)[:3], round(float(loss["loss_ce"]), 4)  # log(4): all classes are as likely
        (['cardinality_error', 'cardinality_error_0', 'loss'], 1.3863)
    """

    num_classes: int
    kind: Kind = "softmax"
    weights: LossWeights = field(default_factory=LossWeights)
    costs: MatchCosts | None = None
    eos: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
    cardinality: bool = True
    two_streams: bool | Callable[[], bool] = False
    stream_weights: Sequence[float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        plain, mixed = self.stream_weights
        if min(plain, mixed) < 0 or plain + mixed == 0:
            raise ValueError(f"Expected stream weights that are not negative and not both zero, got {plain}, {mixed}.")
        if plain != mixed and self.two_streams is False:
            raise ValueError(
                f"Expected two_streams with different stream weights, got {plain}, {mixed}. Pass two_streams=lambda: "
                "handle.doubles, with the handle that insert() returned."
            )

    @property
    def match_costs(self) -> MatchCosts:
        """Costs of the matching: those that were given, or the published ones."""
        return self.costs or MatchCosts(self.kind, class_=2.0 if self.kind == "focal" else 1.0)

    def __call__(self, outputs: SetOutputs, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Compute the loss and its terms.

        Args:
            outputs: Predictions for N rows; half precision is converted to fp32.
            targets: Targets of each row: ``class_labels`` (T,) int; ``boxes`` (T, 4), centers and sides in shares of
                the image; and, if masks are predicted, ``masks`` (T, H, W), each padded, or of the image's own size as
                long as the largest is as large as the padded batch.

        Returns:
            ``loss``, the weighted sum, and the terms without their weights under transformers' names: ``loss_ce``,
            ``loss_bbox``, ``loss_giou`` and ``cardinality_error`` of the final layer, those of earlier layers with
            ``_0``, ``_1``, ... and those of the encoder with ``_enc``; ``loss_mask`` and ``loss_dice``.

        Raises:
            FloatingPointError: For predictions that are not finite.
            ValueError: For targets that do not fit, see :func:`~batchformer.tasks.set_prediction.matching.match`.
        """
        with torch.autocast(outputs.logits_LNQK.device.type, enabled=False):
            found: dict[str, Tensor] = self._losses(outputs, targets)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator] # the assignment leaves the device: no graph holds it
    def _losses(self, outputs: SetOutputs, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        stages = self._stages(outputs, targets)
        matches = match_stages(stages, self.match_costs)
        weights_N = self._row_weights(outputs.logits_LNQK)
        count = _targets_per_rank(len(stages[0].targets.labels_M), stages[0].boxes_LNQ4)
        earlier = [f"_{layer}" for layer in range(len(outputs.logits_LNQK) - 1)]
        groups = [
            (suffixes, self._stage_terms(stage, pairs, count, weights_N))
            for stage, pairs, suffixes in zip(stages, matches, ([*earlier, ""], ["_enc"]), strict=False)
        ]
        if outputs.masks_NQHW is not None:
            groups.append(([""], _mask_terms(outputs.masks_NQHW, targets, matches[0], count, weights_N)))
        named = {
            name + suffix: value
            for suffixes, group in groups
            for name, term_L in group.items()
            for suffix, value in zip(suffixes, term_L.unbind(), strict=True)
        }
        weighted = [
            getattr(self.weights, weight) * group[name].sum()
            for _, group in groups
            for name, weight in _WEIGHT_OF.items()
            if name in group
        ]
        return {**named, "loss": torch.stack(weighted).sum()}

    def _stages(self, outputs: SetOutputs, targets: Sequence[Mapping[str, Any]]) -> list[Stage]:
        logits, boxes = _upcast(outputs.logits_LNQK), _upcast(outputs.boxes_LNQ4)
        rows, classes = logits.shape[1], logits.shape[3] - (self.kind == "softmax")
        if len(targets) != rows:
            raise ValueError(
                f"Expected targets for each of {rows} rows, got {len(targets)}. With BatchFormer in training there are "
                "two rows for each image: give the model its labels, or handle.expand(labels) to the criterion."
            )
        if classes != self.num_classes:
            raise ValueError(
                f"Expected logits of {self.num_classes} classes{' and no object' * (self.kind == 'softmax')}, got "
                f"{logits.shape[3]} in all. Check num_classes and kind, here {self.kind!r}."
            )
        packed = pack(targets, boxes)
        stages = [Stage(logits, boxes, packed)]
        if outputs.encoder_logits_NQK is not None and outputs.encoder_boxes_NQ4 is not None:
            # A proposal is an object or none: the first class stands for any.
            objects = replace(packed, labels_M=torch.zeros_like(packed.labels_M))
            logits, boxes = _upcast(outputs.encoder_logits_NQK), _upcast(outputs.encoder_boxes_NQ4)
            stages.append(Stage(logits[None], boxes[None], objects))
        return stages

    def _row_weights(self, logits_LNQK: Tensor) -> Tensor | None:
        """Return weights whose mean over the rows is 1, or ``None`` where all rows weigh the same."""
        plain, mixed = self.stream_weights
        rows = logits_LNQK.shape[1]
        if plain == mixed or not (self.two_streams() if callable(self.two_streams) else self.two_streams):
            return None
        if rows % 2:
            raise ValueError(
                f"Expected two rows for each image, [plain; mixed], got {rows} rows. Pass two_streams=lambda: "
                "handle.doubles, which tells whether there are two streams."
            )
        weights = torch.tensor([plain] * (rows // 2) + [mixed] * (rows // 2), dtype=logits_LNQK.dtype)
        return moved(2 * weights / (plain + mixed), logits_LNQK.device)

    def _stage_terms(
        self, stage: Stage, matches: Matches, count: Tensor, weights_N: Tensor | None
    ) -> dict[str, Tensor]:
        """Compute the terms of each layer, (L,), by name."""
        logits_LNQK, boxes_LNQ4, targets = stage
        labels_LP, own_LP4 = targets.labels_M[matches.targets_LP], targets.boxes_M4[matches.targets_LP]
        if self.kind == "softmax":
            class_L = terms.cross_entropy(logits_LNQK, matches, labels_LP, eos=self.eos, weights_N=weights_N)
        else:
            focal = {"alpha": self.alpha, "gamma": self.gamma}
            class_L = terms.focal(logits_LNQK, matches, labels_LP, weights_N=weights_N, **focal) / count
        weights_P = None if weights_N is None else weights_N[matches.rows_P]
        l1_L, giou_L = terms.box_distances(matches.of(boxes_LNQ4), own_LP4, weights_P)
        found = {"loss_ce": class_L, "loss_bbox": l1_L / count, "loss_giou": giou_L / count}
        if self.cardinality:
            found["cardinality_error"] = terms.cardinality_error(logits_LNQK, targets.sizes, kind=self.kind)
        return found


def build_criterion(
    kind: Kind,
    num_classes: int,
    *,
    class_weight: float | None = None,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    no_object_weight: float = 0.1,
    class_cost: float | None = None,
    l1_cost: float = 5.0,
    giou_cost: float = 2.0,
    mask_weight: float = 1.0,
    dice_weight: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    masks_alone: bool = False,
    two_streams: bool | Callable[[], bool] = False,
    stream_weights: Sequence[float] = (1.0, 1.0),
) -> SetCriterion:
    """Build the criterion of a detector, or of the mask head on it; the defaults are the published values.

    Args:
        kind: "softmax" for DETR, "focal" for Conditional DETR, Deformable DETR and SMCA.
        num_classes: K, number of classes without "no object".
        class_weight: Weight of the class term; ``None``: 1 with "softmax", 2 with "focal".
        l1_weight: Weight of the L1 distance of the boxes.
        giou_weight: Weight of 1 minus the generalised IoU of the boxes.
        no_object_weight: Weight of "no object" in the cross-entropy of the "softmax" kind.
        class_cost: Weight of the class in the matching; ``None``: 1 with "softmax", 2 with "focal".
        l1_cost: Weight of the L1 distance of the boxes in the matching.
        giou_cost: Weight of the generalised IoU of the boxes in the matching.
        mask_weight: Weight of the focal loss of the masks.
        dice_weight: Weight of the dice loss of the masks.
        alpha: Weight of a hit in the focal loss of the classes, in 0..1.
        gamma: Exponent of the focal loss of the classes, at least 0.
        masks_alone: Whether only the terms of the masks count: on a frozen detector the other terms are constants.
            The matching stays the same.
        two_streams: Whether the rows are [plain; mixed], or a function that tells.
        stream_weights: Weights of the plain and of the mixed stream.

    Source:
        DETR, appendices A.2 and A.4; Conditional DETR, section 3.5; Deformable DETR, appendix A.4.

    Example:
        >>> build_criterion("focal", 3).weights
        LossWeights(class_=2.0, l1=5.0, giou=2.0, mask=1.0, dice=1.0)
        >>> build_criterion("softmax", 3, masks_alone=True).weights
        LossWeights(class_=0.0, l1=0.0, giou=0.0, mask=1.0, dice=1.0)
    """
    published = 1.0 if kind == "softmax" else 2.0
    weights = LossWeights(published if class_weight is None else class_weight, l1_weight, giou_weight)
    if masks_alone:
        weights = LossWeights(class_=0.0, l1=0.0, giou=0.0)
    return SetCriterion(
        num_classes,
        kind,
        replace(weights, mask=mask_weight, dice=dice_weight),
        MatchCosts(kind, published if class_cost is None else class_cost, l1_cost, giou_cost),
        eos=no_object_weight,
        alpha=alpha,
        gamma=gamma,
        cardinality=False,
        two_streams=two_streams,
        stream_weights=stream_weights,
    )


def _mask_terms(
    masks_NQHW: Tensor,
    targets: Sequence[Mapping[str, Any]],
    matches: Matches,
    count: Tensor,
    weights_N: Tensor | None,
) -> dict[str, Tensor]:
    """Compute the mask terms of the final layer, (1,), by name."""
    queries_P, targets_P = matches.queries_LP[-1], matches.targets_LP[-1]
    predicted_PHW = _upcast(masks_NQHW[matches.rows_P, queries_P])
    own_PHW = moved(_padded_masks(targets), masks_NQHW.device)[targets_P]
    weights_P = None if weights_N is None else weights_N[matches.rows_P]
    focal, dice = terms.mask_distances(predicted_PHW, own_PHW, weights_P)
    return {"loss_mask": focal[None] / count, "loss_dice": dice[None] / count}


def _padded_masks(targets: Sequence[Mapping[str, Any]]) -> Tensor:
    """Join the masks of all rows, (M, H, W); smaller ones are padded with zeros at the right and the bottom."""
    for row, target in enumerate(targets):
        masks = target.get("masks")
        if masks is None or masks.dim() != 3 or len(masks) != len(target["class_labels"]):
            raise ValueError(
                f"Expected masks (T, H, W) for the {len(target['class_labels'])} targets of row {row}, since masks are "
                f"predicted, got {None if masks is None else tuple(masks.shape)}."
            )
    height, width = (max(target["masks"].shape[axis] for target in targets) for axis in (1, 2))
    return torch.cat(
        [
            F.pad(target["masks"], (0, width - target["masks"].shape[2], 0, height - target["masks"].shape[1]))
            for target in targets
        ]
    )


def _targets_per_rank(count: int, like: Tensor) -> Tensor:
    """Return the mean number of targets of a process, at least 1, on the device of the predictions."""
    total = like.new_full((), count)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp_(min=1)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
