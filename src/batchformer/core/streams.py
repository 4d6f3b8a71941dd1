"""The two streams: which rows are plain and which are mixed. The order is always [plain; mixed]."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

T = TypeVar("T")
Mode = Literal["two_stream", "single_stream"]


class MixedStream(nn.Module):
    """Base of a module that adds a mixed stream to the plain one in training and is the identity in ``eval()``.

    A subclass says in :meth:`mix` how the rows are mixed.

    Args:
        mode: ``"two_stream"`` returns [plain; mixed], twice the rows; ``"single_stream"`` the mixed rows alone.

    Attributes:
        label: Name of the module in messages.
        frozen: True after :meth:`freeze`.
    """

    label: str = "BatchFormer"
    frozen: bool = False

    def __init__(self, mode: Mode = "two_stream") -> None:
        super().__init__()
        self.mode = check_choice("mode", mode, get_args(Mode))

    @property
    def doubles(self) -> bool:
        """True if the next forward pass returns twice the rows: in training, with two streams."""
        return self.training and self.mode == "two_stream"

    def freeze(self) -> Self:
        """Keep the weights as they are, on purpose (a control): no gradients, and no warning about it."""
        self.frozen = True
        return self.requires_grad_(False)

    def mix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the mixed stream alone, of the shape of ``x``, in training and in ``eval()``."""
        raise NotImplementedError

    @overload
    def forward(
        self, x: Tensor, targets: None = None, *, mask: Tensor | None = None, doubled: bool = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, targets: Any, *, mask: Tensor | None = None, doubled: bool = False
    ) -> tuple[Tensor, Any]: ...
    def forward(
        self, x: Tensor, targets: Any = None, *, mask: Tensor | None = None, doubled: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        """Mix the samples of the batch in training; return the input itself in ``eval()``.

        Args:
            x: Features (N, C), tokens (B, N, C) or a map, as the subclass takes them; at least one sample.
            targets: Targets of the batch, any structure that :func:`batchformer.expand` takes.
            mask: Boolean, of the shape of ``x`` without channels; true where a token is padding.
            doubled: True if ``x`` is [plain; mixed] already, from an earlier module. Only the mixed half is mixed
                again then; ``targets`` and ``mask`` are those of the doubled batch.

        Returns:
            In training [plain; mixed] with 2N rows (``"single_stream"``: N mixed rows), in ``eval()`` ``x``. With
            targets, a pair of that and the targets, which are doubled when the rows are.

        Raises:
            ValueError: For a wrong shape or an empty batch.
            TypeError: For features that are no tensor, or not of a floating type.
        """
        if not self.training:
            return x if targets is None else (x, targets)
        if doubled:
            plain, mixed = split(x)
            mixed = self.mix(mixed, mask=None if mask is None else split(mask)[1])
            return torch.cat((plain, mixed)) if targets is None else (torch.cat((plain, mixed)), targets)
        mixed = self.mix(x, mask=mask)
        out = torch.cat((x, mixed)) if self.mode == "two_stream" else mixed
        if targets is None:
            return out
        return out, expand(targets) if self.mode == "two_stream" else targets


def check_choice(name: str, value: T, choices: tuple[Any, ...]) -> T:
    """Return ``value`` if it is one of the choices; raise a ``ValueError`` that names them if it is not."""
    if value not in choices:
        raise ValueError(f"Expected {name} to be one of {choices}, got {value!r}.")
    return value


def expand(targets: T) -> T:
    """Repeat the targets of N samples for the two streams, so that they fit the 2N rows of [plain; mixed].

    Apply mixup and cutmix before this.

    Args:
        targets: A tensor with N rows (class indices (N,), soft targets (N, K), masks ...); a list with one entry for
            each sample (DETR's list of dicts); a dict or tuple of such things. Numbers, strings, ``None`` and tensors
            without axes are left as they are.

    Returns:
        The same structure with 2N rows.

    Raises:
        TypeError: For anything else, a NumPy array for instance, and for a list of tensors and numbers, such as
            mixup's two label tensors with their weight: that is one target of the whole batch and belongs in a tuple.

    Example:
        >>> expand(torch.tensor([0, 2]))
        tensor([0, 2, 0, 2])
        >>> expand([{"boxes": 1}, {"boxes": 2}])
        [{'boxes': 1}, {'boxes': 2}, {'boxes': 1}, {'boxes': 2}]
    """
    doubled: Any
    if isinstance(targets, Tensor):
        doubled = targets if targets.dim() == 0 else torch.cat((targets, targets))
    elif isinstance(targets, list):
        _refuse_tensors_beside_numbers(targets)
        doubled = [*targets, *targets]
    elif isinstance(targets, tuple):
        doubled = make_sequence_like(targets, [expand(value) for value in targets])
    elif isinstance(targets, Mapping):
        doubled = type(targets)({key: expand(value) for key, value in targets.items()})  # type: ignore[call-arg]
    elif targets is None or isinstance(targets, int | float | str):
        doubled = targets
    else:
        raise TypeError(
            "Expected targets as a tensor, a list with one entry for each sample, or a dict or tuple of these, got "
            f"{type(targets).__name__}. Convert it, for example with torch.as_tensor(targets)."
        )
    return doubled  # type: ignore[no-any-return]


def split(outputs: T, *, layered: Sequence[str] = ()) -> tuple[T, T]:
    """Undo the doubling: 2N rows -> (plain, mixed), N rows each.

    Args:
        outputs: A tensor with 2N rows; a dict (also transformers' ``ModelOutput``), tuple or list of such tensors; a
            list with one entry for each of 2N rows. Numbers, ``None`` and tensors without axes go to both.
        layered: Keys of a dict whose tensors have another axis first and the rows second, or whose lists have an entry
            for each layer (DETR's ``intermediate_hidden_states`` and ``auxiliary_outputs``).

    Returns:
        The same structure twice.

    Raises:
        ValueError: If the number of rows is odd.
        TypeError: For other types.

    Example:
        >>> split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 2]), tensor([3, 4]))
    """
    halves: Any
    if isinstance(outputs, Tensor):
        halves = (outputs, outputs) if outputs.dim() == 0 else _halve(outputs)
    elif isinstance(outputs, Mapping):
        parts = {key: _split_layers(value) if key in layered else split(value) for key, value in outputs.items()}
        halves = tuple(type(outputs)({k: part[i] for k, part in parts.items()}) for i in (0, 1))  # type: ignore[call-arg]
    elif isinstance(outputs, list) and not all(isinstance(value, Tensor | tuple | list) for value in outputs):
        halves = _halve(outputs)
    elif isinstance(outputs, list | tuple):
        pairs = [split(value) for value in outputs]
        halves = tuple(make_sequence_like(outputs, [pair[i] for pair in pairs]) for i in (0, 1))
    elif outputs is None or isinstance(outputs, int | float | str):
        halves = (outputs, outputs)
    else:
        raise TypeError(f"Expected outputs as tensors, dicts, tuples or lists, got {type(outputs).__name__}.")
    return halves  # type: ignore[no-any-return]


def stream_loss(
    criterion: Callable[[T, Any], Tensor],
    outputs: T,
    targets: Any,
    *,
    two_streams: bool,
    weights: Sequence[float] = (1.0, 1.0),
) -> Tensor:
    """Compute the weighted mean of the losses of the plain and the mixed stream, on the scale of a plain run's loss.

    Args:
        criterion: ``criterion(outputs, targets) -> scalar`` for N rows.
        outputs: 2N rows with ``two_streams``, otherwise N rows.
        targets: N rows, not doubled.
        two_streams: True if ``outputs`` holds both streams; otherwise the result is ``criterion(outputs, targets)``.
        weights: Weights of the plain and of the mixed stream, each at least 0, not both 0.

    Raises:
        ValueError: For other weights.

    Source:
        BatchFormer, section 3.2 (shared classifier); equal weights give the mean over the 2N rows.

    Example:
        >>> loss = torch.nn.functional.cross_entropy
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 2])
        >>> mean = stream_loss(loss, logits, labels, two_streams=True)
        >>> torch.allclose(mean, loss(logits, expand(labels)))
        True
    """
    plain_weight, mixed_weight = weights
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"Expected stream weights that are not negative and not both zero, got {tuple(weights)}.")
    if not two_streams:
        return criterion(outputs, targets)
    plain, mixed = split(outputs)
    total = plain_weight * criterion(plain, targets) + mixed_weight * criterion(mixed, targets)
    return total / (plain_weight + mixed_weight)


def make_sequence_like(like: Any, values: list[Any]) -> Any:
    """Make a list, tuple or named tuple of the type of ``like``."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def _refuse_tensors_beside_numbers(targets: list[Any]) -> None:
    scalars = [isinstance(one, int | float) or (isinstance(one, Tensor) and one.dim() == 0) for one in targets]
    if any(scalars) and any(isinstance(one, Tensor) and one.dim() > 0 for one in targets):
        kinds = ", ".join(type(one).__name__ for one in targets[:5])
        raise TypeError(
            f"Expected a list with one entry for each sample, got tensors beside numbers ({kinds}). Labels of the "
            "whole batch with a weight, as mixup makes them, belong in a tuple: expand((y_a, y_b, lam))."
        )


def _split_layers(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        plain, mixed = _halve(value.transpose(0, 1))
        return plain.transpose(0, 1), mixed.transpose(0, 1)
    if isinstance(value, list | tuple):
        plains, mixeds = zip(*(_split_layers(part) for part in value), strict=True)
        return type(value)(plains), type(value)(mixeds)
    return split(value)


def _halve(rows: Any) -> tuple[Any, Any]:
    if len(rows) % 2:
        raise ValueError(
            f"Expected an even number of rows, [plain; mixed], got {len(rows)}. Split only the outputs of a training "
            "pass with two streams."
        )
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]
