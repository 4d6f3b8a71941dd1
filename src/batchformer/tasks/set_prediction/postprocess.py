"""Postprocessing of a detector's queries into scored boxes."""

from typing import Literal

import torch
from torch import Tensor


def detections(
    logits_BQK: Tensor, boxes_BQ4: Tensor, sizes_B2: Tensor, kind: Literal["softmax", "focal"], top: int = 100
) -> list[dict[str, Tensor]]:
    """Turn queries into scored boxes in pixels, by the rule that was published with each detector.

    With ``"softmax"`` (DETR) each query gives one detection: its best class except "no object", which is the last. With
    ``"focal"`` (Conditional DETR, Deformable DETR, SMCA) the ``top`` best pairs of query and class are detections.

    Args:
        logits_BQK: Class logits (B, Q, K); with "softmax" (B, Q, K + 1).
        boxes_BQ4: Center x, center y, width and height, as shares of the image in 0..1.
        sizes_B2: Height and width of each image in pixels.
        kind: Rule by which logits become scores.
        top: Largest number of detections of an image; COCO counts the best 100.

    Returns:
        For each image ``scores`` (D,), best first, ``labels`` (D,) in 0..K-1, and ``boxes`` (D, 4), x1, y1, x2, y2.

    Source:
        DETR, section 3.1 and appendix; Deformable DETR, appendix A.4 (the best pairs of query and class).

    Example:
        >>> logits, boxes = torch.tensor([[[2.0, -3.0], [-3.0, 1.0]]]), torch.tensor([[[0.5, 0.5, 0.5, 0.5]] * 2])
        >>> found = detections(logits, boxes, torch.tensor([[100, 200]]), "focal", top=2)[0]
        >>> found["labels"].tolist(), found["boxes"][0].tolist()
        ([0, 1], [50.0, 25.0, 150.0, 75.0])
    """
    logits_BQK, boxes_BQ4 = logits_BQK.float(), boxes_BQ4.float()
    if kind == "softmax":
        scores_BD, labels_BD = logits_BQK.softmax(-1)[..., :-1].max(-1)
        scores_BD, queries_BD = scores_BD.sort(dim=1, descending=True, stable=True)
        scores_BD, queries_BD = scores_BD[:, :top], queries_BD[:, :top]
        labels_BD = labels_BD.gather(1, queries_BD)
    else:
        classes = logits_BQK.shape[-1]
        pairs_BP = logits_BQK.sigmoid().flatten(1)
        scores_BD, pairs_BD = pairs_BP.topk(min(top, pairs_BP.shape[1]), dim=1)
        queries_BD, labels_BD = pairs_BD // classes, pairs_BD % classes
    boxes_BD4 = boxes_BQ4.gather(1, queries_BD[..., None].expand(-1, -1, 4))
    center, half = boxes_BD4[..., :2], boxes_BD4[..., 2:] / 2
    height, width = sizes_B2.to(boxes_BD4).unbind(1)
    scale_B4 = torch.stack([width, height, width, height], dim=1)
    boxes_BD4 = torch.cat([center - half, center + half], dim=-1) * scale_B4[:, None]
    return [
        {"scores": scores, "labels": labels, "boxes": boxes}
        for scores, labels, boxes in zip(scores_BD, labels_BD, boxes_BD4, strict=True)
    ]
