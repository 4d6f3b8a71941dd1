"""Description of the modules in a model: where they were inserted, how large they are, and what they change."""

from dataclasses import dataclass

from torch import nn

from batchformer.core.modules import BatchFormer
from batchformer.core.streams import MixedStream

from .handle import Handle, handles


@dataclass(frozen=True)
class Description:
    """Description of a model's modules, to be printed.

    Attributes:
        lines: Lines of the text.
        parameters: Number of parameters of all modules in the model, including modules that were not inserted.
        trainable: Number of those that require gradients.
    """

    lines: tuple[str, ...]
    parameters: int
    trainable: int

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe(model: nn.Module) -> Description:
    """Describe what was inserted into a model: where, how large it is and what is doubled with the batch.

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
            points = handle.points if len(handle.modules) == 1 else handle.points[index : index + 1]
            where = ", ".join(str(point) for point in points)
            shared = f", weights shared by {len(points)} points" if len(points) > 1 else ""
            lines.append(f"{type(module).__name__} {where}: {_describe_module(module)}{shared}")
        lines.append(f"  {_describe_effect(model, handle)}")
        if replaced := handle.replaced_points():
            where = ", ".join(str(point) for point in replaced)
            lines.append(f"  not in effect {where}: the module there was replaced; remove() and insert() again")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, MixedStream)}
    for name, module in modules.items():
        if id(module) not in inserted:
            lines.append(f"{type(module).__name__} as module {name or 'itself'!r}: {_describe_module(module)}")
    parameters = [p for module in modules.values() for p in module.parameters()]
    return Description(
        tuple(lines or ["No BatchFormer in this model."]),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def _describe_module(module: MixedStream) -> str:
    if not isinstance(module, BatchFormer):
        return f"{module.extra_repr()}, {module.mode}"
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
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
        f"dim {module.dim}, {module.num_heads} heads, {depth}, dropout {module.drop}, {module.mode}{extra}, "
        f"{total:,} parameters ({trained:,} trained)"
    )


def _describe_effect(model: nn.Module, handle: Handle) -> str:
    if handle.modules[0].mode == "single_stream":
        return "in training the N mixed rows alone from there on; in eval() the plain network"
    names = [name for name, _ in model.named_modules() if name and not name.startswith(handle.prefix)]
    first, plan = handle.points[0], handle.plan
    after = [p.name for p in handle.points] if first.where == "before" else names[names.index(first.name) + 1 :]
    outside = [name for name in after if not name.startswith(f"{first.name}.")]
    last = repr(outside[-1]) if outside else "the end"
    effect = f"in training 2N rows [plain; mixed] from there on through {last}; in eval() the plain network"
    for name, inputs in plan.doubled_inputs.items():
        effect += f"; {', '.join(inputs)} of {repr(name) if name else 'the model'} are doubled for you"
    if plan.run_once:
        effect += f"; {', '.join(repr(one.name) for one in plan.run_once)} run once, later parts on both streams"
        effect += f"; padded tokens {'take part' if plan.padding is None else 'neither attend nor are attended to'}"
    return effect
