"""The module: parameters plus calls into :mod:`batchformer.core.functional`."""

from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import functional
from .distributed import exchange_rows
from .functional import Attend, Gather, LayerWeights
from .streams import MixedStream, Mode, check_choice
from .training_checks import check_training_pass

GatherMode = Literal["none", "all"]
Layout = Literal["BCHW", "BHWC"]


class BatchFormerLayer(nn.Module):
    """One encoder layer over the batch, with the parameter names and initial values of torch's encoder layer.

    Args:
        dim: Channels C.
        num_heads: Number of heads; divides ``dim``.
        hidden_dim: Width of the feed-forward part.
        drop: Dropout probability in [0, 1].
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop = drop
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=drop)
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def weights(self) -> LayerWeights:
        """Return the parameters as :func:`batchformer.core.functional.encoder_layer` takes them."""
        attn = self.self_attn
        others = (attn.out_proj, self.linear1, self.linear2, self.norm1, self.norm2)
        return LayerWeights(
            attn.in_proj_weight, attn.in_proj_bias, *[p for module in others for p in (module.weight, module.bias)]
        )

    def forward(
        self, x_NTC: Tensor, *, attend: Attend = "batch", padding_NT: Tensor | None = None, gather: Gather | None = None
    ) -> Tensor:
        """Run the layer, (N, T, C) -> (N, T, C); dropout follows ``self.training``."""
        drop, eps, weights = self.drop if self.training else 0.0, self.norm1.eps, self.weights()
        return functional.encoder_layer(
            x_NTC, weights, self.num_heads, drop=drop, attend=attend, padding_NT=padding_NT, gather=gather, eps=eps
        )


class BatchFormer(MixedStream):
    """Learn from the relations between the samples of a mini-batch while training; the identity in ``eval()``.

    The module is a transformer encoder layer whose sequence is the batch. With features (N, C) it is BatchFormer, with
    tokens (B, N, C) or maps it is BatchFormerV2: one layer, attention over the first axis, independently at every
    token. A layer's state dict has the names of ``torch.nn.TransformerEncoderLayer``, whose state dict loads as it is.

    Args:
        dim: Channels C.
        num_heads: Number of attention heads; divides ``dim``.
        mlp_ratio: Width of the feed-forward part divided by ``dim``, above 0; the papers use 1.
        drop: Dropout probability in [0, 1].
        layers: Number of encoder layers, one after the other, at least 1.
        mode: ``"two_stream"`` returns [plain; mixed], twice the rows; ``"single_stream"`` the mixed rows alone.
        gather: ``"all"`` lets samples attend to those of every rank (``torch.distributed``), with exact gradients;
            without a process group it does nothing. Under ``torch.compile`` it breaks the graph (``fullgraph=True``
            fails), because the ranks tell each other their sizes.
        layout: ``None`` for (N, C) and (B, N, C); ``"BCHW"`` or ``"BHWC"`` for maps.
        attend: ``"batch"``, or ``"self"`` for a control in which each sample attends to itself alone.

    Raises:
        ValueError: For arguments outside these ranges.
        TypeError: For counts that are no whole numbers.

    Source:
        BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning, CVPR 2022,
        section 3; BatchFormerV2, arXiv 2204.01254, section 3.

    Example:
        >>> module = BatchFormer(dim=8)
        >>> features, labels = module(torch.randn(4, 8), torch.tensor([0, 1, 1, 2]))
        >>> features.shape, labels
        (torch.Size([8, 8]), tensor([0, 1, 1, 2, 0, 1, 1, 2]))
        >>> module.eval()(features[:4]).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        mlp_ratio: float = 1.0,
        drop: float = 0.5,
        *,
        layers: int = 1,
        mode: Mode = "two_stream",
        gather: GatherMode = "none",
        layout: Layout | None = None,
        attend: Attend = "batch",
    ) -> None:
        super().__init__(mode)
        _check_counts(dim=dim, num_heads=num_heads, layers=layers)
        if dim % num_heads:
            divisors = [heads for heads in range(1, min(dim, 16) + 1) if dim % heads == 0]
            raise ValueError(
                f"Expected num_heads to divide dim, got dim={dim} and num_heads={num_heads}. Take one of {divisors}."
            )
        if not 0.0 <= drop <= 1.0 or mlp_ratio <= 0:
            raise ValueError(f"Expected drop between 0 and 1 and mlp_ratio above 0, got {drop=} and {mlp_ratio=}.")
        self.dim = dim
        self.num_heads = num_heads
        self.drop = drop
        self.gather = check_choice("gather", gather, get_args(GatherMode))
        self.layout = check_choice("layout", layout, (None, *get_args(Layout)))
        self.attend = check_choice("attend", attend, get_args(Attend))
        hidden_dim = max(1, round(dim * mlp_ratio))
        self.layers = nn.ModuleList(BatchFormerLayer(dim, num_heads, hidden_dim, drop) for _ in range(layers))
        self.register_load_state_dict_pre_hook(_accept_single_layer)  # type: ignore[no-untyped-call]

    def mix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the mixed stream alone, of the shape of ``x``, in training and in ``eval()`` (there without dropout).

        Arguments and errors are those of :meth:`forward`.
        """
        x_NTC, padding_NT = self._to_tokens(x, mask)
        ranks = exchange_rows(x_NTC, masked=mask is not None) if self.gather == "all" else None
        if x_NTC.shape[0] == 0:
            raise ValueError(f"Expected at least one sample, got an empty batch of shape {tuple(x.shape)}.")
        if self.training and not torch.compiler.is_compiling():
            check_training_pass(self, alone=ranks is None and x_NTC.shape[0] == 1)
        out_NTC, gather = x_NTC, ranks.gather if ranks is not None else None
        for layer in self.layers:
            out_NTC = layer(out_NTC, attend=self.attend, padding_NT=padding_NT, gather=gather)
        if self.layout == "BCHW":
            out_NTC = out_NTC.transpose(1, 2)
        return out_NTC.reshape(x.shape).to(x.dtype)

    def _to_tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected features as a tensor, got {type(x).__name__}. Convert with torch.as_tensor(x).")
        if not x.is_floating_point():
            raise TypeError(f"Expected features of a floating type, got {x.dtype}. Convert with x.float().")
        channels = 1 if self.layout == "BCHW" else -1
        axes = (4,) if self.layout else (2, 3)
        if x.dim() not in axes or x.shape[channels] != self.dim:
            raise ValueError(_explain_shape(tuple(x.shape), self.dim, self.layout))
        spatial = tuple(s for axis, s in enumerate(x.shape) if axis != channels % x.dim())
        if mask is not None and (tuple(mask.shape) != spatial or mask.dtype != torch.bool):
            raise ValueError(
                f"Expected a boolean mask of shape {spatial} (true = padding) for x of shape {tuple(x.shape)}, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}."
            )
        padding_NT = None if mask is None else mask.reshape(mask.shape[0], -1)
        if self.layout == "BCHW":
            return x.flatten(2).transpose(1, 2), padding_NT
        return (x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)), padding_NT

    def extra_repr(self) -> str:
        """Return the settings that ``print`` shows beside the layers."""
        settings = {"mode": self.mode, "gather": self.gather, "layout": self.layout, "attend": self.attend}
        return ", ".join([f"dim={self.dim}", *(f"{name}={value!r}" for name, value in settings.items())])


def _accept_single_layer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of one ``torch.nn.TransformerEncoderLayer``, which published checkpoints hold, to our first."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}self_attn.")]:
        state_dict[f"{prefix}layers.0.{key.removeprefix(prefix)}"] = state_dict.pop(key)
    for name in ("linear1", "linear2", "norm1", "norm2"):
        for kind in ("weight", "bias"):
            if f"{prefix}{name}.{kind}" in state_dict:
                state_dict[f"{prefix}layers.0.{name}.{kind}"] = state_dict.pop(f"{prefix}{name}.{kind}")


def _explain_shape(got: tuple[int, ...], dim: int, layout: Layout | None) -> str:
    if layout is not None:
        expected = {"BCHW": f"(B, {dim}, H, W)", "BHWC": f"(B, H, W, {dim})"}[layout]
        return f"Expected maps of shape {expected} for layout={layout!r}, got {got}."
    message = f"Expected features of shape (N, {dim}) or tokens of shape (B, N, {dim}), got {got}."
    if len(got) == 4 and dim in (got[1], got[-1]):
        return f"{message} Flatten the map or pass layout='{'BCHW' if got[1] == dim else 'BHWC'}'."
    return f"{message} Set dim to the channels of the features, or use the module at another point of the network."


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise TypeError(f"Expected {name} to be a whole number, got {count!r} ({type(count).__name__}).")
        if count < 1:
            raise ValueError(f"Expected {name} of at least 1, got {count}.")
