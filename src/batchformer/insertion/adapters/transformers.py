"""Image (and video) classifiers of transformers, versions 4.57 to 5.

- The model computes its own loss: ``labels``, passed by name or by position, are doubled once at the top, and so is
  ``num_items_in_batch``, by which transformers' Trainer has the summed loss divided.
- The head is ``classifier``, ``head`` or ``fc``; models distilled "WithTeacher" have two, parallel branches.
- ResNet, RegNet and BiT classify with ``Sequential(Flatten, Linear)`` on maps (B, C, 1, 1); the module is inserted
  before the ``Linear``.
- LeViT's heads are a batch norm and a ``Linear``. The module is inserted after the norm: before it, the mixed half
  would change the statistics of the plain half.
- ``TimmWrapperForImageClassification`` holds a timm model.
- Layers return a tensor in some versions and a tuple in others; insertion accepts both. Their names change as well: in
  4.57 ``after="vit.encoder.layer.8"``, in 5 ``after="vit.layers.8"``. Swin's blocks return tokens (B, N, C), not maps.
- ImageGPT and the text models' ``score`` read every token and pick one by the rows of ``input_ids``; Perceiver
  classifies inside its decoder. ``before="auto"`` refuses them.
"""

import re

from torch import nn

from batchformer.insertion.locate import last_linear, no_classifier, offered_classifiers, points_before
from batchformer.insertion.plan import InsertionPlan, InsertionPoint

from . import detr, timm

_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill", "head", "dist_head", "fc")
_TASKS = re.compile(r"For(Image|Video)Classification")
_LABELS: dict[str, tuple[str, ...]] = {"": ("labels", "num_items_in_batch")}


def find_classifier(model: nn.Module) -> InsertionPlan:
    """Find the heads of an image classifier.

    Raises:
        ValueError: For models of other tasks, and if no head has parameters (``num_labels=0``).
    """
    if offered := offered_classifiers(model):
        return InsertionPlan(points_before(model, offered), _LABELS)
    if not any(_TASKS.search(cls.__name__) for cls in type(model).__mro__):
        hint = ". Detectors take after='model.encoder.layers.0'" if detr.is_detector(model) else ""
        raise no_classifier(model, f"{type(model).__name__} is not one of transformers' image classifiers{hint}")
    if hasattr(model, "timm_model"):
        inner = timm.find_classifier(model.timm_model)  # type: ignore[arg-type]
        points = tuple(InsertionPoint(f"timm_model.{point.name}", point.where) for point in inner.points)
        return InsertionPlan(points, _LABELS, inner.layout)
    heads = [getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
    heads = [head for head in heads if any(True for _ in head.parameters())]
    if not heads:
        raise no_classifier(model, f"none of {_HEADS} has parameters (num_labels=0 leaves none)")
    return InsertionPlan(tuple(InsertionPoint(last_linear(model, head), "before") for head in heads), _LABELS)


def plan(model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
    """Plan to double the labels, at whichever point the batch doubles; in detectors more is doubled."""
    return detr.plan(model, points) if detr.is_detector(model) else InsertionPlan(points, _LABELS)
