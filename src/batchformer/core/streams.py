"""Which rows are plain and which are mixed. The order is always [plain; mixed]."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def expand(targets: T) -> T:
    """Repeat targets for the two streams: what held for N samples then holds for [plain; mixed], 2N rows.

    Args:
        targets: A tensor with N rows (class indices (N,), soft targets (N, K), masks ...); a list with one entry for
            each sample (DETR's list of dicts); a dict or tuple of such things. Numbers, strings, ``None`` and tensors
            without axes are left as they are. Mixup and cutmix come first, then this.

    Returns:
        The same structure with 2N rows.

    Raises:
        TypeError: For anything else, a NumPy array for instance, and for a list of tensors and numbers, such as mixup's
            two label tensors with their weight: that is one target of the whole batch, a tuple.

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
        _refuse_mixed(targets)
        doubled = [*targets, *targets]
    elif isinstance(targets, tuple):
        doubled = _rebuild(targets, [expand(value) for value in targets])
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


def _refuse_mixed(targets: list[Any]) -> None:
    scalars = [isinstance(one, int | float) or (isinstance(one, Tensor) and one.dim() == 0) for one in targets]
    if any(scalars) and any(isinstance(one, Tensor) and one.dim() > 0 for one in targets):
        kinds = ", ".join(type(one).__name__ for one in targets[:5])
        raise TypeError(
            f"Expected a list with one entry for each sample, got tensors beside numbers ({kinds}). Labels of the "
            "whole batch with a weight, as of mixup, go into a tuple: expand((y_a, y_b, lam))."
        )


def split(outputs: T, *, layered: Sequence[str] = ()) -> tuple[T, T]:
    """Undo the doubling: 2N rows -> (plain, mixed), N rows each.

    Args:
        outputs: A tensor with 2N rows; a dict (also transformers' ``ModelOutput``), tuple or list of such tensors; a
            list with one entry for each of 2N rows. Numbers, ``None`` and tensors without axes go to both.
        layered: Keys of a dict whose tensors have another axis first, the rows second, or whose lists have an entry for
            each layer (DETR's ``intermediate_hidden_states`` and ``auxiliary_outputs``).

    Returns:
        The same structure twice.

    Raises:
        ValueError: When the number of rows is odd.
        TypeError: For other types.

    Example:
        >>> split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 2]), tensor([3, 4]))
    """
    halves: Any
    if isinstance(outputs, Tensor):
        halves = (outputs, outputs) if outputs.dim() == 0 else _halves(outputs)
    elif isinstance(outputs, Mapping):
        parts = {key: _split_layers(value) if key in layered else split(value) for key, value in outputs.items()}
        halves = tuple(type(outputs)({k: part[i] for k, part in parts.items()}) for i in (0, 1))  # type: ignore[call-arg]
    elif isinstance(outputs, list) and not all(isinstance(value, Tensor | tuple | list) for value in outputs):
        halves = _halves(outputs)
    elif isinstance(outputs, list | tuple):
        pairs = [split(value) for value in outputs]
        halves = tuple(_rebuild(outputs, [pair[i] for pair in pairs]) for i in (0, 1))
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
    """Weighted mean of the plain and the mixed stream's loss, so that its scale is that of a plain run.

    Args:
        criterion: ``criterion(outputs, targets) -> scalar`` for N rows.
        outputs: 2N rows with ``two_streams``, N rows without.
        targets: N rows, not doubled.
        two_streams: Whether ``outputs`` holds both streams; without, this is ``criterion(outputs, targets)``.
        weights: Of the plain and the mixed stream, not negative, not both zero.

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


def looks_class_sorted(labels: Tensor) -> bool:
    """Whether class indices (N,) come in non-decreasing order with repeats, as from an unshuffled image folder.

    Example:
        >>> looks_class_sorted(torch.tensor([0, 0, 0, 1])), looks_class_sorted(torch.tensor([1, 0, 0, 1]))
        (True, False)
    """
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) < 3:
        return False
    steps = labels[1:] - labels[:-1]
    return bool((steps >= 0).all() and (steps == 0).any())


def _split_layers(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Tensor):
        plain, mixed = _halves(value.transpose(0, 1))
        return plain.transpose(0, 1), mixed.transpose(0, 1)
    if isinstance(value, list | tuple):
        plains, mixeds = zip(*(_split_layers(part) for part in value), strict=True)
        return type(value)(plains), type(value)(mixeds)
    return split(value)


def _halves(rows: Any) -> tuple[Any, Any]:
    if len(rows) % 2:
        raise ValueError(
            f"Expected an even number of rows, [plain; mixed], got {len(rows)}. Split the outputs of a training pass "
            "with two streams only."
        )
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _rebuild(like: Any, values: list[Any]) -> Any:
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
