"""Insertion into detectors against two separate passes of the plain model, with torch's layer in the second.

Runs with transformers 4.57 and with 5.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer import BatchFormer, BatchFormerWarning, insert, remove

transformers = pytest.importorskip("transformers")

Build = Callable[..., Any]
SEVERAL_LAYERS = ["detr", "segmentation", "conditional", "deformable", "two stages", "dab", "mask2former", "smca"]
KINDS = [*SEVERAL_LAYERS, "one level", "box refinement", "rt-detr", "rt-detr v2"]
CLOSE = {torch.float64: {"rtol": 1e-8, "atol": 1e-8}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
UNMASKED = ["rt-detr", "rt-detr v2", "mask2former"]


@pytest.fixture(autouse=True)
def _fp64(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default, since transformers' losses make tensors of that type; Mask2Former of 4.57 knows fp32 alone."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    torch.set_default_dtype(torch.float32 if kind == "mask2former" else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layers_of(model: nn.Module) -> list[str]:
    """The layers of the encoder, wherever this kind and version has them."""
    for stack in (
        "model.encoder.aifi.0",
        "model.encoder.encoder.0",
        "detr.model.encoder",
        "model.pixel_level_module.decoder.encoder",
        "model.encoder",
    ):
        with contextlib.suppress(AttributeError):
            return [f"{stack}.layers.{i}" for i in range(len(model.get_submodule(f"{stack}.layers")))]
    raise AssertionError("no encoder")


def hold_norms(model: nn.Module) -> nn.Module:
    """Batch norms behind the point would mix the statistics of both streams; two separate passes cannot."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


class Mixes:
    """The oracle's hook: the output of a layer, mixed by torch's own layer whose sequence is the batch."""

    def __init__(self, module: BatchFormer, padding_BS: Tensor | None) -> None:
        layer = nn.TransformerEncoderLayer(module.dim, module.num_heads, module.dim, dropout=0.0)
        layer.load_state_dict({key.removeprefix("layers.0."): value for key, value in module.state_dict().items()})
        self.layer, self.padding_BS = layer, padding_BS

    def __call__(self, _: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        padding = self.padding_BS
        if padding is None:
            mixed = self.layer(x)
        else:
            # A place that is padding in every image would be empty: let it see itself, its result is not used.
            alone = padding & padding.all(0)
            mixed = self.layer(x, src_key_padding_mask=(padding & ~alone).T)
            mixed = torch.where(padding[..., None], x, mixed)
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])


def token_padding(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """From the mask that the encoder gets in the plain model, one row for each image in every version."""
    encoder = model.get_submodule(layers_of(model)[0].removesuffix(".layers.0"))
    seen: list[Tensor] = []
    hook = encoder.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model.eval()(batch["pixel_values"], batch["pixel_mask"])
    model.train()
    hook.remove()
    assert seen[0].dim() == 2
    return seen[0] == 0


def two_passes(
    model: Any, batch: dict[str, Any], modules: list[BatchFormer], places: list[str], *, masked: bool = True
) -> tuple[Any, Any]:
    """The plain model, and the plain model with torch's layer behind the layers of these names."""
    plain = model(**batch)
    padding = token_padding(model, batch) if masked else None
    oracles = [Mixes(module, padding) for module in modules]
    hooks = [
        model.get_submodule(name).register_forward_hook(oracle) for name, oracle in zip(places, oracles, strict=False)
    ]
    mixed = model(**batch)
    for hook in hooks:
        hook.remove()
    return plain, mixed


def predictions(out: Any) -> dict[str, Tensor]:
    names = ("logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits")
    return {name: out[name] for name in names if name in out}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_both_streams_equal_two_separate_passes(detector: Build, scenes: Build, kind: str, n: int) -> None:
    """Four images for four feature levels among them."""
    model, batch = hold_norms(detector(kind)), scenes(n, side=96 if n == 1 else 64, kind=kind)
    place = layers_of(model)[0]
    handle = insert(model, after=place, drop=0.0)
    with pytest.warns(BatchFormerWarning, match="one sample") if n == 1 else contextlib.nullcontext():
        out = model(**batch)
    modules = handle.modules
    remove(model)
    plain, mixed = two_passes(model, batch, modules, [place], masked=kind not in UNMASKED)
    assert predictions(out)
    for name, got in predictions(out).items():
        assert got.shape[0] == 2 * n
        torch.testing.assert_close(got, torch.cat((plain[name], mixed[name])), **CLOSE[got.dtype])
    if kind != "mask2former":  # its loss looks at random points
        torch.testing.assert_close(out.loss, (plain.loss + mixed.loss) / 2, **CLOSE[torch.float64])
