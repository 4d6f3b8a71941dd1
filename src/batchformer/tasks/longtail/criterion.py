"""Losses by name, each as a callable that a training step gives outputs, targets and the epoch."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchformer.insertion import Handle

from . import loss, loss_paco, loss_ride
from .paco import PaCoOutput

__all__ = ["LOSSES", "Criterion", "build_loss", "loss_of_streams"]


class Criterion(nn.Module):
    """Base of the losses: it holds the training counts, and reweights classes from ``reweight_epoch`` on.

    Args:
        counts: Training images per class ``(K,)``.
        reweight_epoch: First epoch (from 0) with class weights; ``None`` never reweights, 0 always.
        beta: Parameter of the effective number in [0, 1), see `class_balanced_weights`.

    Raises:
        ValueError: If the counts are not K numbers >= 0, at least one of them positive.
    """

    counts: Tensor
    weights: Tensor

    def __init__(self, counts: Tensor, reweight_epoch: int | None = None, beta: float = 0.9999) -> None:
        super().__init__()
        counts = torch.as_tensor(counts)
        if counts.ndim != 1 or len(counts) == 0 or bool((counts < 0).any()) or not bool((counts > 0).any()):
            raise ValueError(f"Expected the training images of each class, K numbers >= 0, got {counts}.")
        self.reweight_epoch = reweight_epoch
        # Not persistent: both follow from the training data, and a checkpoint should load without them.
        self.register_buffer("counts", counts.clone(), persistent=False)
        self.register_buffer("weights", loss.class_balanced_weights(counts, beta), persistent=False)

    def reweights(self, epoch: int) -> bool:
        """Return True when class weights are on in this epoch (from 0)."""
        return self.reweight_epoch is not None and epoch >= self.reweight_epoch

    def weight(self, epoch: int) -> Tensor | None:
        """Return the class weights ``(K,)`` of this epoch, or ``None``."""
        return self.weights if self.reweights(epoch) else None

    def of_logits(self, logits: Tensor, target: Tensor, epoch: int) -> Tensor:
        """Compute the loss of one classifier's logits ``(N, K)``."""
        raise NotImplementedError

    def forward(self, outputs: Tensor, targets: Tensor, epoch: int = 0) -> Tensor:
        """Compute the loss of one stream, a scalar; logits ``(N, E, K)`` of E experts give the sum of their losses."""
        if outputs.ndim == 3:
            return torch.stack([self.of_logits(logits, targets, epoch) for logits in outputs.unbind(1)]).sum()
        return self.of_logits(outputs, targets, epoch)


class CrossEntropy(Criterion):
    """Cross-entropy, class-balanced from ``reweight_epoch`` on."""

    def __init__(
        self, counts: Tensor, label_smoothing: float = 0.0, reweight_epoch: int | None = None, beta: float = 0.9999
    ) -> None:
        super().__init__(counts, reweight_epoch, beta)
        self.label_smoothing = label_smoothing

    def of_logits(self, logits: Tensor, target: Tensor, epoch: int) -> Tensor:
        """Compute `loss.cross_entropy`."""
        return loss.cross_entropy(logits, target, weight=self.weight(epoch), label_smoothing=self.label_smoothing)


class ClassBalanced(CrossEntropy):
    """Cross-entropy reweighted by the effective number of images, by default from the first epoch on."""

    def __init__(
        self, counts: Tensor, beta: float = 0.9999, reweight_epoch: int = 0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(counts, label_smoothing, reweight_epoch, beta)


class LogitAdjusted(Criterion):
    """Logit-adjusted loss; ``tau=1`` is Balanced Softmax."""

    def __init__(
        self, counts: Tensor, tau: float = 1.0, reweight_epoch: int | None = None, beta: float = 0.9999
    ) -> None:
        super().__init__(counts, reweight_epoch, beta)
        self.tau = tau

    def of_logits(self, logits: Tensor, target: Tensor, epoch: int) -> Tensor:
        """Compute `loss.logit_adjusted`."""
        return loss.logit_adjusted(logits, target, self.counts, tau=self.tau, weight=self.weight(epoch))


class BalancedSoftmax(LogitAdjusted):
    """Balanced Softmax."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts, tau=1.0)


class LDAM(Criterion):
    """LDAM, with deferred reweighting (DRW) from ``reweight_epoch`` on."""

    def __init__(
        self,
        counts: Tensor,
        reweight_epoch: int | None = None,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
    ) -> None:
        super().__init__(counts, reweight_epoch, beta)
        self.max_margin, self.scale = max_margin, scale

    def of_logits(self, logits: Tensor, target: Tensor, epoch: int) -> Tensor:
        """Compute `loss.ldam`."""
        return loss.ldam(
            logits, target, self.counts, max_margin=self.max_margin, scale=self.scale, weight=self.weight(epoch)
        )


class RIDELoss(Criterion):
    """RIDE's loss; class weights and per-class temperatures from ``reweight_epoch`` on; distillation with a teacher."""

    temperatures: Tensor

    def __init__(
        self,
        counts: Tensor,
        reweight_epoch: int | None = None,
        diversity: float = -0.2,
        reweight_factor: float = 0.05,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
        distill_temperature: float = 1.5,
        distill_factor: float = 1.0,
    ) -> None:
        super().__init__(counts, reweight_epoch, beta)
        self.diversity, self.max_margin, self.scale = diversity, max_margin, scale
        self.distill_temperature, self.distill_factor = distill_temperature, distill_factor
        temperatures = loss_ride.diversity_temperature(self.counts, reweight_factor)
        self.register_buffer("temperatures", temperatures, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor, epoch: int = 0, teacher_logits: Tensor | None = None) -> Tensor:
        """Compute the loss of one stream; ``teacher_logits``, ``(N, K)`` or ``(N, E', K)``, add distillation."""
        total = loss_ride.ride(
            outputs,
            targets,
            self.counts,
            diversity=self.diversity,
            temperature=self.temperatures if self.reweights(epoch) else 1.0,
            weight=self.weight(epoch),
            max_margin=self.max_margin,
            scale=self.scale,
        )
        if teacher_logits is None:
            return total
        term = loss_ride.distillation(outputs, teacher_logits, temperature=self.distill_temperature)
        return total + self.distill_factor * term


class PaCoLoss(Criterion):
    """PaCo's loss on a `PaCoOutput`."""

    def __init__(
        self,
        counts: Tensor,
        alpha: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 0.2,
    ) -> None:
        super().__init__(counts)
        self.settings = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature}

    def forward(self, outputs: PaCoOutput, targets: Tensor, epoch: int = 0) -> Tensor:  # type: ignore[override]
        """Compute the loss of one stream, or of both if ``outputs`` holds both and ``targets`` is doubled."""
        return loss_paco.paco(
            outputs.logits, outputs.queries, targets, outputs.keys, outputs.key_targets, self.counts, **self.settings
        )


LOSSES: dict[str, Callable[..., Criterion]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "class_balanced": ClassBalanced,
    "logit_adjusted": LogitAdjusted,
    "ldam": LDAM,
    "ride": RIDELoss,
    "paco": PaCoLoss,
}


def build_loss(name: str, counts: Tensor, **settings: Any) -> Criterion:
    """Build a loss by name, ready for ``criterion(outputs, targets, epoch)``, one stream at a time.

    Args:
        name: Name of the loss, one of `LOSSES`.
        counts: Training images per class ``(K,)``.
        **settings: Keyword arguments of the class in `LOSSES`.

    Returns:
        A module without parameters; ``.to(device)`` moves the counts.

    Raises:
        ValueError: If the name or a setting is unknown; the message lists what there is.

    Example:
        >>> criterion = build_loss("ldam", torch.tensor([100, 10]), reweight_epoch=160)
        >>> criterion(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), epoch=0) > 0
        tensor(True)
    """
    if name not in LOSSES:
        raise ValueError(f"Unknown loss {name!r}. Choose one of: {', '.join(LOSSES)}.")
    known = [p for p in inspect.signature(LOSSES[name]).parameters if p != "counts"]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"Loss {name!r} has no setting {', '.join(unknown)}. It has: {', '.join(known) or 'none'}.")
    return LOSSES[name](counts, **settings)


def loss_of_streams(
    criterion: Callable[[Any, Tensor], Tensor],
    outputs: Any,
    targets: Tensor,
    handle: Handle | None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Compute the weighted mean of the losses of both streams, or the loss of the one stream that there is.

    Args:
        criterion: Function from the outputs of one stream and its targets to a scalar.
        outputs: Outputs of a training step: a tensor whose rows double, or a `PaCoOutput`, whose anchors double.
        targets: Class indices ``(N,)`` or probabilities ``(N, K)``.
        handle: Handle of the insertion; ``None`` where BatchFormer is not in the network.
        weights: Weights of the plain and the mixed stream.

    Returns:
        The loss, a scalar.

    Example:
        >>> loss_of_streams(torch.nn.functional.cross_entropy, torch.zeros(2, 4), torch.tensor([0, 3]), None)
        tensor(1.3863)
    """
    if handle is None:
        return criterion(outputs, targets)
    if isinstance(outputs, PaCoOutput):
        # The queries and logits have both streams, the keys only one.
        return handle.loss(
            lambda anchors, rows: criterion(outputs.with_anchors(*anchors), rows), outputs.anchors, targets, weights
        )
    return handle.loss(criterion, outputs, targets, weights)
