"""Models of timm.

- Every model has ``get_classifier()``: it returns a module, a tuple (distilled models: a head for each token), or lists
  of heads (EfficientViM); with ``num_classes=0`` an ``Identity``.
- Some models return their whole ``ClassifierHead``, pooling included; the classifier is its ``fc``. RepViT returns a
  module that holds both heads of its distillation.
- LeViT, EfficientFormer V2 and RepViT have a batch norm in the head. The module is inserted after it: before it, the
  mixed half would change the statistics of the plain half.
- Some models classify pooled maps (N, C, 1, 1) with a 1x1 convolution (DLA, DPN, ResNetV2).
- VOLO has a second head for the patch tokens, which ``get_classifier()`` leaves out; both must see the same rows.
- Swin's stages return maps (B, H, W, C): ``after="layers.2"`` needs ``layout="BHWC"``. Stages of convolutional networks
  return (B, C, H, W) and need ``layout="BCHW"``; blocks of plain ViTs return tokens (B, N, C) and need nothing.
- CaiT passes the class token, and NaFlexViT the attention mask, into the network beside the patches. There the batch
  cannot be doubled in the middle of the network (torch raises an error); ``before="auto"`` works.
"""

from torch import nn

from batchformer.insertion.locate import last_linear, name_of, no_classifier, offered_classifiers
from batchformer.insertion.plan import InsertionPlan, InsertionPoint


def find_classifier(model: nn.Module) -> InsertionPlan:
    """Find the classifier, or all heads of a distilled model (parallel branches that share the module's weights).

    Raises:
        ValueError: For encoders and feature extractors, and with ``num_classes=0``.
    """
    offered = offered_classifiers(model)
    if not offered:
        raise no_classifier(model, f"timm's {type(model).__name__} has no get_classifier()")
    heads = [part for head in offered for part in _parts_of_head(head) if any(True for _ in part.parameters())]
    if not heads:
        raise no_classifier(
            model,
            "it was made with num_classes=0. Make it with num_classes=K, call model.reset_classifier(K), or insert "
            "into the model that holds your own head",
        )
    if (patches := getattr(model, "aux_head", None)) is not None:
        heads.append(patches)
    maps = any(isinstance(head, nn.Conv2d) for head in heads)
    names = [name_of(model, head) if isinstance(head, nn.Conv2d) else last_linear(model, head) for head in heads]
    points = tuple(InsertionPoint(name, "before") for name in names)
    return InsertionPlan(points, layout="BCHW" if maps else None)


def plan(model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
    """Plan an insertion with nothing else to double: timm's networks take the images alone and compute no loss."""
    return InsertionPlan(points)


def _parts_of_head(head: nn.Module) -> list[nn.Module]:
    children = dict(head.named_children())
    if "global_pool" in children and "fc" in children:
        return [children["fc"]]
    return [children[name] for name in ("head", "head_dist") if name in children] or [head]
