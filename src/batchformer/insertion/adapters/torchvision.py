"""Classification models of torchvision (video included).

- The classifier has four names: ``fc``, ``classifier``, ``head``, ``heads.head``. If it is a ``Sequential``, it is the
  last ``Linear`` in it (VGG, MobileNetV3: after the hidden layers).
- SqueezeNet classifies with a 1x1 convolution on maps (B, C, H, W), before the pooling.
- GoogLeNet and Inception have auxiliary classifiers in training, on features from the middle of the network. Their
  input is doubled by repetition, [plain; plain], so that all outputs have 2N rows and one set of labels. Their loss
  and its gradients stay those of the plain network (batch statistics and dropout see each sample twice).
- Swin's stages return maps (B, H, W, C): ``after="features.5"`` needs ``layout="BHWC"``; stages of convolutional
  networks need ``layout="BCHW"``; ``after="encoder.layers.encoder_layer_8"`` of a ViT returns tokens (B, N, C).
- Segmentation models also have a ``classifier``, with another meaning; they and the detectors are refused.
"""

from dataclasses import replace

from torch import nn

from batchformer.insertion.locate import last_linear, name_of, no_classifier, offered_classifiers, points_before
from batchformer.insertion.plan import InsertionPlan, InsertionPoint

_HEADS = ("fc", "classifier", "head", "heads")
_OTHER_TASKS = ("detection", "segmentation", "optical_flow")
# Auxiliary classifier -> the module whose output it reads.
_AUXILIARY = {"AuxLogits": "Mixed_6e", "aux1": "inception4a", "aux2": "inception4d"}


def find_classifier(model: nn.Module) -> InsertionPlan:
    """Find the last ``Linear`` of the classifier, or SqueezeNet's convolution.

    Raises:
        ValueError: For models of other tasks, and if no classifier is left (replaced by ``Identity``).
    """
    if offered := offered_classifiers(model):
        return InsertionPlan(points_before(model, offered))
    origins = [cls.__module__.split(".") for cls in type(model).__mro__ if cls.__module__.startswith("torchvision.")]
    if any(task in origin for origin in origins for task in _OTHER_TASKS):
        raise no_classifier(model, f"{type(model).__name__} does not classify images")
    heads = [getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
    heads = [head for head in heads if any(True for _ in head.parameters())]
    if len(heads) != 1:
        raise no_classifier(model, f"{len(heads)} of its modules {_HEADS} have parameters")
    convolutions = [module for module in heads[0].modules() if isinstance(module, nn.Conv2d)]
    name = name_of(model, convolutions[-1]) if convolutions else last_linear(model, heads[0])
    points = (InsertionPoint(name, "before"),)
    return replace(plan(model, points), layout="BCHW" if convolutions else None)


def plan(model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
    """Plan to double the input of those auxiliary classifiers that read the batch before it is doubled."""
    order = [name for name, _ in model.named_children()]
    heads = {aux: read for aux, read in _AUXILIARY.items() if aux in order and read in order}
    first = min((order.index(point.name.partition(".")[0]) for point in points), default=0)
    return InsertionPlan(points, {aux: ("x",) for aux, read in heads.items() if order.index(read) < first})
