"""Models of timm.

- ``get_classifier()`` is on every model: a module, a tuple (distilled models: a head for each token), or lists of
  heads (EfficientViM); with ``num_classes=0`` it is an ``Identity``.
- Some give back their whole ``ClassifierHead``, pooling included; the classifier is its ``fc``. RepViT gives a module
  that holds both heads of its distillation.
- LeViT, EfficientFormer V2 and RepViT have a batch norm in the head. The module goes behind it: in front, the mixed
  half would change the statistics of the plain half.
- Some classify pooled maps (N, C, 1, 1) with a 1x1 convolution (DLA, DPN, ResNetV2).
- VOLO has a second head for the patch tokens, which ``get_classifier()`` leaves out; both must see the same rows.
- Swin's stages give maps (B, H, W, C): ``after="layers.2"`` takes ``layout="BHWC"``; stages of convolutional networks
  give (B, C, H, W) and take ``layout="BCHW"``; blocks of plain ViTs give tokens (B, N, C) and take nothing.
- In CaiT the class token, and in NaFlexViT the attention mask, comes into the network beside the patches: there the
  doubled batch cannot be followed from the middle of the network on (torch raises), ``before="auto"`` works.
"""

from torch import nn

from batchformer.insertion.locate import last_linear, name_of, no_classifier, offered_classifiers
from batchformer.insertion.plan import Place, Plan


def find_classifier(model: nn.Module) -> Plan:
    """The classifier, or all heads of a distilled model (parallel branches that share the weights).

    Raises:
        ValueError: For encoders and feature extractors, and with ``num_classes=0``.
    """
    offered = offered_classifiers(model)
    if not offered:
        raise no_classifier(model, f"timm's {type(model).__name__} has no get_classifier()")
    heads = [part for head in offered for part in _parts(head) if any(True for _ in part.parameters())]
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
    places = tuple(Place(name, "before") for name in names)
    return Plan(places, layer={"layout": "BCHW"} if maps else {})


def plan(model: nn.Module, places: tuple[Place, ...]) -> Plan:
    """Nothing follows: timm's networks take the images alone and compute no loss."""
    return Plan(places)


def _parts(head: nn.Module) -> list[nn.Module]:
    children = dict(head.named_children())
    if "global_pool" in children and "fc" in children:
        return [children["fc"]]
    return [children[name] for name in ("head", "head_dist") if name in children] or [head]
