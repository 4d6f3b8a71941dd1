"""The module: parameters plus calls into :mod:`batchformer.core.functional`."""

import warnings
from numbers import Integral
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from . import functional, streams
from .cpu_kernels import dropout
from .distributed import RankRows, exchange_rows
from .functional import Attend, LayerWeights
from .training_checks import BatchFormerWarning, label, note_training_pass, warn_if_frozen, watch_optimizers

Mode = Literal["two_stream", "single_stream"]
GatherMode = Literal["none", "all"]
Layout = Literal["BCHW", "BHWC"]


class BatchFormerLayer(nn.Module):
    """One encoder layer over the batch. Parameter names and initial values are ``torch.nn.TransformerEncoderLayer``'s.

    Args:
        dim: Channels C.
        num_heads: Heads; divides ``dim``.
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
        """The parameters as :func:`batchformer.core.functional.encoder_layer` takes them."""
        attn = self.self_attn
        return LayerWeights(
            attn.in_proj_weight,
            attn.in_proj_bias,
            attn.out_proj.weight,
            attn.out_proj.bias,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            self.norm1.weight,
            self.norm1.bias,
            self.norm2.weight,
            self.norm2.bias,
        )

    def forward(
        self,
        x_NTC: Tensor,
        *,
        attend: Attend = "batch",
        padding_NT: Tensor | None = None,
        ranks: RankRows | None = None,
    ) -> Tensor:
        """(N, T, C) -> (N, T, C); dropout follows ``self.training``."""
        return functional.encoder_layer(
            x_NTC,
            self.weights(),
            self.num_heads,
            drop=self.drop if self.training else 0.0,
            attend=attend,
            padding_NT=padding_NT,
            gather=ranks.gather if ranks is not None else None,
            eps=self.norm1.eps,
        )


class BatchFormer(nn.Module):
    """Learn from the relations between the samples of a mini-batch while training; the identity in ``eval()``.

    A transformer encoder layer whose sequence is the batch. With features (N, C) it is BatchFormer, with tokens
    (B, N, C) or maps it is BatchFormerV2: one layer, attention over the first axis, independently at every token.

    Args:
        dim: Channels C.
        num_heads: Attention heads; divides ``dim``.
        mlp_ratio: Width of the feed-forward part over ``dim``; the papers use 1.
        drop: Dropout probability in [0, 1].
        layers: Encoder layers, one after the other.
        mode: ``"two_stream"``: [plain; mixed], twice the rows. ``"single_stream"``: the mixed rows alone.
        gather: ``"all"``: samples see those of every rank (``torch.distributed``), with exact gradients; without a
            process group it is ``"none"``. Under ``torch.compile`` the one thing that breaks the graph (no
            ``fullgraph=True``): ranks tell each other their sizes.
        layout: ``None`` for (N, C) and (B, N, C); ``"BCHW"`` or ``"BHWC"`` for maps.
        attend: ``"batch"``, or what a control needs: ``"self"`` (each sample sees itself alone) or ``"nothing"`` (no
            layer, only its dropout).

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
        attend: Attend | Literal["nothing"] = "batch",
    ) -> None:
        super().__init__()
        _check_arguments(dim, num_heads, mlp_ratio, drop, layers, mode, gather, layout, attend)
        self.dim = dim
        self.num_heads = num_heads
        self.mode: Mode = mode
        self.gather: GatherMode = gather
        self.layout: Layout | None = layout
        self.attend: Attend | Literal["nothing"] = attend
        hidden_dim = max(1, round(dim * mlp_ratio))
        depth = 0 if attend == "nothing" else layers
        self.drop = drop
        self.layers = nn.ModuleList(BatchFormerLayer(dim, num_heads, hidden_dim, drop) for _ in range(depth))
        self.inserted_at = ""  # filled by insert(), for messages
        self.frozen = False
        self._told: set[str] = set()
        self.register_load_state_dict_pre_hook(_accept_single_layer)  # type: ignore[no-untyped-call]

    def freeze(self) -> Self:
        """Keep the random weights as they are, on purpose (a control): no gradients and no warning about it."""
        self.frozen = True
        return self.requires_grad_(False)

    @property
    def doubles(self) -> bool:
        """Whether the next forward pass returns twice the rows: in training, with two streams."""
        return self.training and self.mode == "two_stream"

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
            x: (N, C), (B, N, C), or a map as ``layout`` says. N at least 1.
            targets: Anything that :func:`batchformer.expand` takes.
            mask: Boolean, the shape of ``x`` without channels; true where a token is padding.
            doubled: Whether ``x`` is [plain; mixed] already, from an earlier module: only the mixed half attends then,
                and ``targets`` and ``mask`` stay those of the doubled batch.

        Returns:
            In training [plain; mixed] with 2N rows (``"single_stream"``: N mixed rows), in ``eval()`` ``x``; with
            targets a pair, the targets doubled where the rows are.

        Raises:
            ValueError: For a wrong shape or an empty batch.
            TypeError: For features that are no tensor, or not of a floating type.
        """
        if not self.training:
            return x if targets is None else (x, targets)
        if doubled:
            plain, mixed = streams.split(x)
            mixed = self.mix(mixed, mask=None if mask is None else streams.split(mask)[1])
            return torch.cat((plain, mixed)) if targets is None else (torch.cat((plain, mixed)), targets)
        mixed = self.mix(x, mask=mask)
        out = torch.cat((x, mixed)) if self.mode == "two_stream" else mixed
        if targets is None:
            return out
        return out, streams.expand(targets) if self.mode == "two_stream" else targets

    def mix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The mixed stream alone, shape of ``x``, in training and in ``eval()`` (there without dropout)."""
        x_NTC, padding_NT = self._to_tokens(x, mask)
        ranks = exchange_rows(x_NTC, masked=mask is not None) if self.gather == "all" else None
        if x_NTC.shape[0] == 0:
            raise ValueError(f"Expected at least one sample, got an empty batch of shape {tuple(x.shape)}.")
        if self.training and not torch.compiler.is_compiling():
            self._tell_once(alone=ranks is None and x_NTC.shape[0] == 1)
        if self.attend == "nothing":
            return dropout(x, self.drop if self.training else 0.0)
        out_NTC = x_NTC
        for layer in self.layers:
            out_NTC = layer(out_NTC, attend=self.attend, padding_NT=padding_NT, ranks=ranks)
        return self._from_tokens(out_NTC, x).to(x.dtype)

    def _to_tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected features as a tensor, got {type(x).__name__}. Convert with torch.as_tensor(x).")
        if not x.is_floating_point():
            raise TypeError(f"Expected features of a floating type, got {x.dtype}. Convert with x.float().")
        channels = 1 if self.layout == "BCHW" else -1
        axes = (4,) if self.layout else (2, 3)
        if x.dim() not in axes or x.shape[channels] != self.dim:
            raise ValueError(_shape_message(tuple(x.shape), self.dim, self.layout))
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

    def _from_tokens(self, out_NTC: Tensor, like: Tensor) -> Tensor:
        if self.layout == "BCHW":
            return out_NTC.transpose(1, 2).reshape(like.shape)
        return out_NTC.reshape(like.shape)

    def _tell_once(self, *, alone: bool) -> None:
        if "trained" not in self._told:
            self._told.add("trained")
            if not self.frozen:
                warn_if_frozen(self)
                watch_optimizers(self)
        note_training_pass(self)
        if alone and "alone" not in self._told:
            self._told.add("alone")
            warnings.warn(
                f"{label(self)} got a batch of one sample, which has no other sample to attend to. Use larger batches "
                "(drop_last=True for the last one), or gather='all' on several ranks.",
                BatchFormerWarning,
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_told": set()}  # a copy warns for itself

    def extra_repr(self) -> str:
        """What ``print`` shows beside the layers."""
        words = {"mode": self.mode, "gather": self.gather, "layout": self.layout, "attend": self.attend}
        return ", ".join([f"dim={self.dim}", *(f"{name}={value!r}" for name, value in words.items())])


def _accept_single_layer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the state dict of one ``torch.nn.TransformerEncoderLayer`` as it is (published checkpoints hold these)."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}self_attn.")]:
        state_dict[f"{prefix}layers.0.{key.removeprefix(prefix)}"] = state_dict.pop(key)
    for name in ("linear1", "linear2", "norm1", "norm2"):
        for kind in ("weight", "bias"):
            if f"{prefix}{name}.{kind}" in state_dict:
                state_dict[f"{prefix}layers.0.{name}.{kind}"] = state_dict.pop(f"{prefix}{name}.{kind}")


def _shape_message(got: tuple[int, ...], dim: int, layout: Layout | None) -> str:
    if layout is not None:
        expected = {"BCHW": f"(B, {dim}, H, W)", "BHWC": f"(B, H, W, {dim})"}[layout]
        return f"Expected maps of shape {expected} for layout={layout!r}, got {got}."
    message = f"Expected features of shape (N, {dim}) or tokens of shape (B, N, {dim}), got {got}."
    if len(got) == 4 and dim in (got[1], got[-1]):
        return f"{message} Flatten the map or pass layout='{'BCHW' if got[1] == dim else 'BHWC'}'."
    return f"{message} Set dim to the channels of the features, or insert at another place."


def _check_arguments(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop: float,
    layers: int,
    mode: str,
    gather: str,
    layout: str | None,
    attend: str,
) -> None:
    counts: dict[str, object] = {"dim": dim, "num_heads": num_heads, "layers": layers}
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise TypeError(f"Expected {name} to be a whole number, got {count!r} ({type(count).__name__}).")
    if dim < 1 or num_heads < 1 or dim % num_heads:
        divisors = [h for h in range(1, min(dim, 16) + 1) if dim % h == 0]
        raise ValueError(
            f"Expected num_heads to divide dim, got dim={dim} and num_heads={num_heads}. Take one of {divisors}."
        )
    if not 0.0 <= drop <= 1.0:
        raise ValueError(f"Expected drop between 0 and 1, got {drop}.")
    if mlp_ratio <= 0 or layers < 1:
        raise ValueError(f"Expected mlp_ratio > 0 and layers >= 1, got mlp_ratio={mlp_ratio} and layers={layers}.")
    for name, value, known in (
        ("mode", mode, ("two_stream", "single_stream")),
        ("gather", gather, ("none", "all")),
        ("layout", layout, (None, "BCHW", "BHWC")),
        ("attend", attend, ("batch", "self", "nothing")),
    ):
        if value not in known:
            raise ValueError(f"Expected {name} to be one of {known}, got {value!r}.")
