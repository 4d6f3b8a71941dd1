"""Our criterion in unedited detectors of transformers: their own ``labels=`` argument makes them compute it.

It works in models that call ``self.loss_function(logits, labels, device, boxes, [masks,] config, layers' logits and
boxes)``: DETR, Conditional DETR, Deformable DETR and DETR for segmentation in transformers 4.57 to 5, and SMCA here.

The losses of transformers differ from the publications (``criterion_for`` follows transformers):

- The class term weighs 1 in the total of transformers whatever ``cls_loss_coefficient`` says; published is 2 ("focal").
- The "focal" kind is matched with alpha 0.25 and gamma 2 whatever ``focal_alpha`` says, here too.
- Two-stage Deformable DETR has no loss on its encoder's proposals in transformers; here it has, as published.
- With several processes transformers divides the number of targets twice by that of the processes (``reduce`` of
  accelerate gives the mean already), and only if accelerate was started; here it is the mean, as published.
- The ``cardinality_error`` of the "focal" kind, for the log only, counts by another rule in transformers 4.57.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .criterion import LossWeights, SetCriterion, SetOutputs
from .matching import MatchCosts

__all__ = ["Installed", "criterion_for", "set_outputs", "use_criterion"]


def criterion_for(model: nn.Module, **changes: Any) -> SetCriterion:
    """Build the criterion that a model of transformers has by its configuration, with the weights of transformers.

    Args:
        model: Detector whose ``config`` has classes, costs and coefficients, and ``focal_alpha`` for the "focal" kind.
        changes: Arguments of :class:`SetCriterion` that replace values of the configuration.

    Raises:
        ValueError: For a model with another loss.

    Example:
        >>> from transformers import DeformableDetrConfig
        >>> model = nn.Module()
        >>> model.config = DeformableDetrConfig(num_labels=7)
        >>> criterion_for(model).kind, criterion_for(model, weights=LossWeights(class_=2.0)).weights.class_
        ('focal', 2.0)
    """
    config: Any = model.config
    if not hasattr(config, "giou_loss_coefficient"):
        raise ValueError(
            f"Expected a detector with DETR's loss, got {type(model).__name__}, whose configuration has no "
            "giou_loss_coefficient. RT-DETR, Mask2Former and others have losses of their own: leave them as they are."
        )
    focal = hasattr(config, "focal_alpha")
    costs = MatchCosts("focal" if focal else "softmax", config.class_cost, config.bbox_cost, config.giou_cost)
    weights = LossWeights(
        l1=config.bbox_loss_coefficient,
        giou=config.giou_loss_coefficient,
        mask=getattr(config, "mask_loss_coefficient", 1.0),
        dice=getattr(config, "dice_loss_coefficient", 1.0),
    )
    of_kind = {"alpha": config.focal_alpha} if focal else {"eos": config.eos_coefficient}
    own = {"num_classes": config.num_labels, "kind": costs.kind, "weights": weights, "costs": costs, **of_kind}
    return SetCriterion(**{**own, **changes})


def set_outputs(output: Any) -> SetOutputs:
    """Convert the output of a detector of transformers to :class:`SetOutputs`.

    Args:
        output: Output object of the model. It has earlier decoder layers (``auxiliary_outputs``) if the model was given
            ``labels`` and ``config.auxiliary_loss`` is set.

    Example:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=torch.zeros(2, 5, 4), pred_boxes=torch.zeros(2, 5, 4))
        >>> set_outputs(output).logits_LNQK.shape
        torch.Size([1, 2, 5, 4])
    """
    layers = [(early["logits"], early["pred_boxes"]) for early in getattr(output, "auxiliary_outputs", None) or []]
    logits, boxes = zip(*layers, (output.logits, output.pred_boxes), strict=True)
    proposals = getattr(output, "enc_outputs_coord_logits", None)
    return SetOutputs(
        torch.stack(logits),
        torch.stack(boxes),
        getattr(output, "pred_masks", None),
        getattr(output, "enc_outputs_class", None),
        None if proposals is None else proposals.sigmoid(),
    )


def use_criterion(model: nn.Module, criterion: SetCriterion | None = None) -> "Installed":
    """Make ``model(pixel_values, pixel_mask, labels=labels)`` compute ``criterion``; nothing else changes.

    The model's output then has the criterion's ``loss`` and ``loss_dict`` (terms without their weights). With
    BatchFormer inserted, give the labels of the images: the insertion doubles them.

    Args:
        model: Detector of transformers, or SMCA.
        criterion: Criterion; ``None`` stands for ``criterion_for(model)``.

    Returns:
        The installation, with ``criterion``, and with ``remove()`` to undo it.

    Raises:
        ValueError: For a model that calls no ``loss_function``, or that has a criterion installed already.

    Example:
        >>> from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig
        >>> small = dict(d_model=16, num_queries=5, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16,
        ...              decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_labels=3)
        >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"])
        >>> own = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone)
        >>> config = ConditionalDetrConfig(**own, **small)
        >>> model = ConditionalDetrForObjectDetection(config)
        >>> installed = use_criterion(model)
        >>> target = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
        >>> output = model(torch.randn(1, 3, 32, 32), labels=[target])
        >>> bool(output.loss > 0), installed.criterion.kind
        (True, 'focal')
        >>> installed.remove()
    """
    if not hasattr(type(model), "loss_function"):
        raise ValueError(f"Expected a detector of transformers with a loss_function, got {type(model).__name__}.")
    if isinstance(getattr(model, "_loss_function", None), Installed):
        raise ValueError("Expected a model without an installed criterion. remove() the one that is there first.")
    return Installed(model, criterion or criterion_for(model))


class Installed:
    """Criterion that a model calls as its ``loss_function``; see :func:`use_criterion`.

    Attributes:
        criterion: Criterion; assign another one to change the loss of the model.
    """

    def __init__(self, model: nn.Module, criterion: SetCriterion) -> None:
        self.criterion = criterion
        self._model = model
        self._before = model.__dict__.get("_loss_function")
        self._proposals: tuple[Tensor, Tensor] | None = None
        self._hooks: list[Any] = []
        config: Any = model.config
        if getattr(config, "two_stage", False):
            # The model calls its loss without the encoder's proposals: they are taken when its inner model returns.
            inner: Any = model.base_model
            self._hooks = [inner.register_forward_hook(self._keep), model.register_forward_hook(self._forget)]
        model.loss_function = self  # type: ignore[assignment]

    def remove(self) -> None:
        """Give the model its former loss back."""
        if self._model.__dict__.get("_loss_function") is not self:
            raise RuntimeError("This criterion was removed before. Call use_criterion() again to install one.")
        for hook in self._hooks:
            hook.remove()
        del self._model._loss_function
        if self._before is not None:
            self._model.loss_function = self._before

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[Mapping[str, Any]],
        device: Any,
        pred_boxes: Tensor,
        *rest: Any,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        """Compute the loss; arguments and results are those of transformers' loss functions."""
        masks = rest[0] if isinstance(rest[0], Tensor) else None
        config, *layers = rest[masks is not None :]
        early = None
        logits_LNQK, boxes_LNQ4 = logits[None], pred_boxes[None]
        if config.auxiliary_loss:
            # Not the layers' own last entry: with a norm between them (Conditional DETR has two) the model predicts
            # with another tensor.
            early = [{"logits": a, "pred_boxes": b} for a, b in zip(layers[0][:-1], layers[1][:-1], strict=True)]
            logits_LNQK = torch.cat((layers[0][:-1], logits_LNQK))
            boxes_LNQ4 = torch.cat((layers[1][:-1], boxes_LNQ4))
        proposals = self._proposals or (None, None)
        found = self.criterion(SetOutputs(logits_LNQK, boxes_LNQ4, masks, *proposals), labels)
        return found.pop("loss"), found, early

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._proposals = output.enc_outputs_class, output.enc_outputs_coord_logits.sigmoid()

    def _forget(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._proposals = None
