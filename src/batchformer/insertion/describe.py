"""What was inserted, and how the optimizer should treat it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from batchformer.core.modules import BatchFormer

from .handle import handles


@dataclass(frozen=True)
class Description:
    """One line for each insertion; ``print`` it.

    Attributes:
        lines: The text.
        parameters: Parameters of all BatchFormer modules of the model, those put there by hand included.
        trainable: Those among them that require gradients.
    """

    lines: tuple[str, ...]
    parameters: int
    trainable: int

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe(model: nn.Module) -> Description:
    """Say what was inserted into a model, where, how large it is and what follows it.

    Example:
        >>> from batchformer import insert
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = insert(model, before="auto")
        >>> print(describe(model))
        BatchFormer before '2': dim 8, 4 heads, 1 layer, dropout 0.5, two_stream, 464 parameters (464 trained)
          in training 2N rows [plain; mixed] from there on through '2'; in eval() the plain network
    """
    lines: list[str] = []
    inserted: set[int] = set()
    for handle in handles(model):
        for index, module in enumerate(handle.modules):
            inserted.add(id(module))
            places = handle.places if len(handle.modules) == 1 else handle.places[index : index + 1]
            where = ", ".join(str(place) for place in places)
            shared = f", weights shared by {len(places)} places" if len(places) > 1 else ""
            lines.append(f"BatchFormer {where}: {_facts(module)}{shared}")
        lines.append(f"  {_effect(model, handle)}")
        if gone := handle.replaced():
            where = ", ".join(str(place) for place in gone)
            lines.append(f"  not in effect {where}: the module there was replaced; remove() and insert() again")
    for name, module in model.named_modules():
        if isinstance(module, BatchFormer) and id(module) not in inserted:
            lines.append(f"BatchFormer as module {name or 'itself'!r}: {_facts(module)}")
    modules = [m for m in model.modules() if isinstance(m, BatchFormer)]
    counts = [p for m in modules for p in m.parameters()]
    return Description(
        tuple(lines or ["No BatchFormer in this model."]),
        sum(p.numel() for p in counts),
        sum(p.numel() for p in counts if p.requires_grad),
    )


def _facts(module: BatchFormer) -> str:
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if module.attend == "nothing":
        return f"dim {module.dim}, dropout {module.drop} alone, {module.mode}"
    heads = module.num_heads
    depth = f"{len(module.layers)} layer{'s' if len(module.layers) > 1 else ''}"
    extra = "".join(
        f", {name}={value!r}"
        for name, value, usual in (
            ("attend", module.attend, "batch"),
            ("gather", module.gather, "none"),
            ("layout", module.layout, None),
        )
        if value != usual
    )
    return (
        f"dim {module.dim}, {heads} heads, {depth}, dropout {module.drop}, {module.mode}{extra}, "
        f"{total:,} parameters ({trained:,} trained)"
    )


def _effect(model: nn.Module, handle: Any) -> str:
    if handle.modules[0].mode == "single_stream":
        return "in training the N mixed rows alone from there on; in eval() the plain network"
    names = [name for name, module in model.named_modules() if name and not name.startswith(handle.prefix)]
    first = handle.places[0]
    followers = [p.name for p in handle.places] if first.where == "before" else names[names.index(first.name) + 1 :]
    tops = [name for name in followers if not name.startswith(f"{first.name}.")]
    shown = repr(tops[-1]) if tops else "the end"
    effect = f"in training 2N rows [plain; mixed] from there on through {shown}; in eval() the plain network"
    for name, inputs in handle.plan.companions.items():
        effect += f"; {', '.join(inputs)} of {repr(name) if name else 'the model'} doubled"
    if handle.plan.once:
        effect += f"; once for both streams: {', '.join(repr(once.name) for once in handle.plan.once)}"
        masked = handle.plan.padding is not None
        effect += f"; padded tokens {'neither attend nor are attended to' if masked else 'take part'}"
    return effect
