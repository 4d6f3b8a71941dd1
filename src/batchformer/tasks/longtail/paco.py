"""PaCo: a query encoder, a key encoder that follows it by momentum, and a queue of keys with their classes.

Axis letters: N samples, A anchors (query rows), C features, D embedding width, K classes, M keys, Q queue slots.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.tasks.image_classification.network import LongTailNetwork, Network, make_classifier

__all__ = ["PaCo", "PaCoHead", "PaCoOutput", "gather_rows"]


@dataclass(frozen=True)
class PaCoOutput:
    """What `PaCo` returns in training.

    Not a tuple: with BatchFormer only the anchors double, so it must not be split along its rows as a whole.
    ``handle.split(output.anchors)`` gives the two streams, `with_anchors` puts one of them back beside the keys.

    Attributes:
        logits: ``(A, K)``, of the linear classifier.
        queries: ``(A, D)``, unit length. A is N, or 2N with BatchFormer inserted, [plain; mixed].
        keys: ``(M, D)``, unit length, without gradient: the N keys of this batch, then the queue.
        key_targets: ``(M,)``; -1 for a slot of the queue that is still empty.
    """

    logits: Tensor
    queries: Tensor
    keys: Tensor
    key_targets: Tensor

    @property
    def anchors(self) -> tuple[Tensor, Tensor]:
        """``logits`` and ``queries``: what doubles."""
        return self.logits, self.queries

    def with_anchors(self, logits: Tensor, queries: Tensor) -> "PaCoOutput":
        """The same keys beside other anchors, for instance those of one stream."""
        return replace(self, logits=logits, queries=queries)


class PaCoHead(nn.Module):
    """What follows the pooled feature: the linear classifier (the class centers) and the MLP that embeds queries.

    One module, so that a BatchFormer in front of it doubles both.

    Args:
        in_features: C.
        num_classes: K.
        embed_dim: D.
        cosine: Cosine classifier in the place of the linear one.

    Example:
        >>> logits, queries = PaCoHead(16, 10, embed_dim=8)(torch.randn(4, 16))
        >>> logits.shape, queries.shape
        (torch.Size([4, 10]), torch.Size([4, 8]))
    """

    def __init__(self, in_features: int, num_classes: int, embed_dim: int = 128, *, cosine: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, num_classes
        self.classifier = make_classifier(in_features, num_classes, cosine=cosine)
        self.mlp = nn.Sequential(
            nn.Linear(in_features, in_features),
            nn.BatchNorm1d(in_features),
            nn.ReLU(inplace=True),
            nn.Linear(in_features, embed_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(A, C)`` to logits ``(A, K)`` and, in training, unit embeddings ``(A, D)``."""
        return self.classifier(x), F.normalize(self.mlp(x).float(), dim=1) if self.training else None


class PaCo(LongTailNetwork):
    """Query encoder, momentum key encoder and queue around any backbone; in eval mode backbone and classifier alone.

    **With BatchFormer** (``insert(network, before="auto")``) the pooled feature of the query doubles, so that the
    linear classifier *and* the MLP see ``2N`` rows, [plain; mixed]; the keys come from the plain key encoder and stay
    N. No code was published for PaCo with BatchFormer: this wiring is our reconstruction. The MLP's batch norm then
    takes its statistics over both streams; it is not used in eval mode.

    Source: Cui et al., "Parametric Contrastive Learning", ICCV 2021. Differs from the published code in that an empty
    slot of the queue is left out of the loss (there it starts as random vectors of random classes), in that the queue's
    length need not be a multiple of the batch, and in that keys are not shuffled between processes.

    Args:
        backbone: Images to pooled features ``(N, C)``, with ``num_features``.
        num_classes: K.
        embed_dim: D.
        queue_size: Q; 8192 on ImageNet-LT, 1024 on CIFAR-100-LT.
        momentum: Of the key encoder.
        cosine: Cosine classifier in the place of the linear one.

    Raises:
        ValueError: If ``momentum`` or ``queue_size`` is out of range.

    Example:
        >>> from batchformer.tasks.longtail.model import create_backbone
        >>> network = PaCo(create_backbone("small_resnet", in_channels=1), 10, queue_size=32)
        >>> images = torch.randn(4, 1, 28, 28)
        >>> output = network(images, images.flip(-1), torch.tensor([0, 1, 2, 3]))
        >>> output.logits.shape, output.keys.shape, network.eval()(images).shape
        (torch.Size([4, 10]), torch.Size([36, 128]), torch.Size([4, 10]))
    """

    queue: Tensor
    queue_targets: Tensor
    queue_at: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        embed_dim: int = 128,
        queue_size: int = 8192,
        momentum: float = 0.999,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0 or queue_size < 1:
            raise ValueError(f"Expected 0 <= momentum <= 1 and queue_size >= 1, got {momentum} and {queue_size}.")
        self.num_features = int(backbone.num_features)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.momentum = momentum
        self.backbone = backbone
        self.head = PaCoHead(self.num_features, num_classes, embed_dim, cosine=cosine)
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.key_mlp = copy.deepcopy(self.head.mlp).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(queue_size, embed_dim))
        self.register_buffer("queue_targets", torch.full((queue_size,), -1))
        self.register_buffer("queue_at", torch.zeros((), dtype=torch.long))

    def get_classifier(self) -> nn.Module:
        """The head: classifier and MLP, both on the pooled feature."""
        return self.head

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of the linear classifier."""
        self.head.classifier = new(self.head.classifier)

    def classifiers(self) -> tuple[nn.Module, ...]:
        """The linear classifier alone: what a second stage retrains."""
        return (self.head.classifier,)

    def freeze(self) -> Self:
        """Not offered: the second stage has no use for keys and queue.

        Raises:
            RuntimeError: Always; it names `plain`, whose network can be frozen.
        """
        raise RuntimeError("A second stage trains the classifier alone: freeze network.plain(), not the PaCo network.")

    def plain(self) -> Network:
        """Backbone and linear classifier as a `Network` on the same weights: for test, export, second stage."""
        network = Network(self.backbone, self.num_classes)
        network.classifier = self.head.classifier
        return network.train(self.training)

    def forward(
        self, x: Tensor, key_images: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | PaCoOutput:
        """One training step's output, or logits in eval mode.

        Args:
            x: Query images ``(N, channels, H, W)``, one augmented view.
            key_images: The other view, needed in training.
            targets: Class indices ``(N,)``, needed in training.

        Returns:
            In training a `PaCoOutput`; the key encoder has moved and the queue has taken the keys. In eval mode logits
            ``(N, K)``.

        Raises:
            ValueError: If, in training, the second view or the targets are missing or are no class indices.
        """
        if not self.training:
            logits, _ = self.head(self.backbone(x))
            return logits  # type: ignore[no-any-return]
        if key_images is None or targets is None or targets.ndim != 1:
            raise ValueError(
                "Expected, in training, two views and class indices (N,): network(view1, view2, targets). PaCo's "
                "positives need classes, so mixup and cutmix cannot be used; for logits alone call network.eval()."
            )
        logits, queries = self.head(self.backbone(x))
        with torch.no_grad():
            self.follow()
            keys = F.normalize(self.key_mlp(self.key_backbone(key_images)).float(), dim=1)
            # Copies: the queue changes in place before the backward pass.
            output = PaCoOutput(
                logits, queries, torch.cat([keys, self.queue]), torch.cat([targets, self.queue_targets])
            )
            self.enqueue(keys, targets)
        return output

    @torch.no_grad()
    def follow(self) -> None:
        """Move the key encoder towards the query encoder: ``key = momentum * key + (1 - momentum) * query``."""
        for query, key in ((self.backbone, self.key_backbone), (self.head.mlp, self.key_mlp)):
            for source, target in zip(query.parameters(), key.parameters(), strict=True):
                target.lerp_(source, 1.0 - self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, targets: Tensor) -> None:
        """Write the keys of all processes, in the order of their ranks, over the oldest slots."""
        keys, targets = gather_rows(keys), gather_rows(targets)
        size = len(self.queue)
        slots = (self.queue_at + torch.arange(len(keys), device=keys.device)) % size
        end = self.queue_at + len(keys)
        # More keys than slots: the last ones stay. Writing all would leave the order of equal slots undefined.
        self.queue.index_copy_(0, slots[-size:], keys[-size:].to(self.queue.dtype))
        self.queue_targets.index_copy_(0, slots[-size:], targets[-size:])
        self.queue_at.copy_(end % size)


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, the same on every rank; without gradient.

    Args:
        rows: ``(n, ...)``; n may differ between ranks.

    Returns:
        ``(sum of n, ...)``; ``rows`` itself where there is one process.

    Example:
        >>> gather_rows(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    longest = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded.contiguous())
    return torch.cat([part[: int(count)] for part, count in zip(everyone, counts, strict=True)])
