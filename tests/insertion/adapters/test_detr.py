"""Insertion into detectors against two separate passes of the plain model, with torch's layer in the second.

Runs with transformers 4.57 and with 5.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer import BatchFormer, BatchFormerWarning, describe, insert, remove
from batchformer.insertion.adapters.detr import padding_of

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


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["detr", "segmentation", "deformable", "dab", "smca"])
def test_several_layers_and_their_gradients(detector: Build, scenes: Build, kind: str, share: bool) -> None:
    """The first point doubles, later ones mix the mixed half; every parameter gets the gradient of both streams."""
    model, batch = detector(kind, encoder_layers=4).requires_grad_(True), scenes(3, kind=kind)
    places = [layers_of(model)[i] for i in (1, 3)]
    handle = insert(model, after=places, share=share, drop=0.0)
    out = model(**batch)
    out.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    unused = [name for name, grad in got.items() if grad is None]
    model.zero_grad()
    modules = handle.modules * (2 if share else 1)
    remove(model)
    plain, mixed = two_passes(model, batch, modules, places)
    for name, values in predictions(out).items():
        torch.testing.assert_close(values, torch.cat((plain[name], mixed[name])), **CLOSE[torch.float64])
    ((plain.loss + mixed.loss) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name in unused
        else:
            torch.testing.assert_close(
                got[name], parameter.grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
    own = [grad for name, grad in got.items() if name.startswith("batchformer")]
    assert len(own) == 12 * (1 if share else 2)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in own)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_the_plain_network_bit_for_bit(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind).eval(), scenes(3, kind=kind)
    torch.manual_seed(1)
    plain = model(**batch)
    keys = list(model.state_dict())
    handle = insert(model, after=layers_of(model), share=False)
    torch.manual_seed(1)
    inserted = model(**batch)
    handle.remove()
    torch.manual_seed(1)
    removed = model(**batch)
    assert list(model.state_dict()) == keys
    for out in (inserted, removed):
        assert out.keys() == plain.keys()
        for name, value in out.items():
            for got, expected in zip(flat(value), flat(plain[name]), strict=True):
                assert torch.equal(got, expected), name


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [leaf for part in values for leaf in flat(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_split_gives_the_plain_models_outputs(detector: Build, scenes: Build, kind: str) -> None:
    """Every output, those with layers or queries first too; with as many images as layers."""
    model, batch = hold_norms(detector(kind)), scenes(2, kind=kind)
    names = {"output_hidden_states": True} if kind == "mask2former" else {}
    handle = insert(model, after=layers_of(model)[0])
    plain, mixed = handle.split(model(**batch, **names))
    remove(model)
    expected = model(**batch, **names)
    assert plain is not None and mixed is not None and plain.keys() == expected.keys()
    for name, value in expected.items():
        if "loss" not in name:  # of both streams together
            for left, right, half in zip(flat(value), flat(plain[name]), flat(mixed[name]), strict=True):
                torch.testing.assert_close(left, right, **CLOSE[left.dtype], msg=lambda m, n=name: f"{n}: {m}")
                assert half.shape == left.shape


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_front_of_the_point_is_computed_twice(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind), scenes(3, kind=kind)
    layers = layers_of(model)
    last = min(1, len(layers) - 1)
    handle = insert(model, after=layers[last])
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
            rows[name] = first.shape[0]

        return note

    for name, module in model.named_modules():
        if not list(module.children()) and list(module.parameters(recurse=False)) and "batchformer" not in name:
            module.register_forward_pre_hook(count(name), with_kwargs=True)
    model(**batch)
    front = [once.name for once in handle.plan.run_once]
    inside = {name: n for name, n in rows.items() if any(name.startswith(f"{part}.") or name == part for part in front)}
    assert len(inside) > 20
    assert set(inside.values()) == {3}
    behind = f"{layers[-1]}." if last < len(layers) - 1 else "model.decoder_input_proj"
    assert {n for name, n in rows.items() if name.startswith(behind)} == {6}


@pytest.mark.parametrize("kind", ["detr", "conditional", "deformable", "two stages", "dab", "smca"])
def test_padding_of_one_image_does_not_reach_another(detector: Build, kind: str) -> None:
    """Another size of canvas, anything in the padding: the mixed stream is the same, unless padding takes part."""
    model = detector(kind)
    without_bleeding(model)
    torch.manual_seed(2)
    image, mask = torch.randn(2, 3, 128, 128), torch.zeros(2, 128, 128, dtype=torch.long)
    mask[0, :32, :64], mask[1, :64, :64] = 1, 1  # the first is lower
    encoder = model.get_submodule(layers_of(model)[0].removesuffix(".layers.0"))

    def soil(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        padding = (named["attention_mask"] == 0)[..., None]
        return args, {**named, "inputs_embeds": named["inputs_embeds"] + torch.linspace(-5, 5, 32) * padding}

    def mixed(side: int) -> Tensor:
        out = model(pixel_values=image[..., :side, :side], pixel_mask=mask[..., :side, :side])
        return torch.cat((out.logits[3], out.pred_boxes[3]), -1)

    results = {}
    for padding in ("mask", "attend"):
        handle = insert(model, after=layers_of(model)[0], drop=0.0, padding=padding)
        nn.init.normal_(handle.modules[0].layers[0].self_attn.out_proj.weight)
        results[padding, "small"], results[padding, "large"] = mixed(64), mixed(128)
        hook = encoder.register_forward_pre_hook(soil, with_kwargs=True)
        results[padding, "dirty"] = mixed(64)
        hook.remove()
        handle.remove()
    # The group norms of Deformable DETR look at padding, with and without BatchFormer.
    for name in ("dirty",) if kind in ("deformable", "two stages") else ("large", "dirty"):
        torch.testing.assert_close(results["mask", "small"], results["mask", name], rtol=1e-5, atol=1e-6)
    assert (results["attend", "small"] - results["attend", "dirty"]).abs().max() > 1e-4


def without_bleeding(model: nn.Module) -> None:
    """Replace the convolutional network by one whose kernels do not overlap: maps of padding alone are zero."""
    from transformers.modeling_outputs import BackboneOutput

    class Patches(nn.Module):
        def __init__(self, strides: list[int], channels: list[int]) -> None:
            super().__init__()
            pairs = zip(strides, channels, strict=True)
            self.maps = nn.ModuleList(nn.Conv2d(3, c, stride, stride, bias=False) for stride, c in pairs)

        def forward(self, x: Tensor) -> Any:
            return BackboneOutput(feature_maps=tuple(conv(x) for conv in self.maps))

    holder = next(m for m in model.modules() if hasattr(m, "intermediate_channel_sizes"))
    channels = list(holder.intermediate_channel_sizes)
    holder.model = Patches([8, 16, 32][-len(channels) :], channels)


@pytest.mark.parametrize("kind", ["detr", "deformable", "smca"])
def test_padded_tokens_are_the_same_in_both_streams(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind), scenes(3, kind=kind)
    layers = layers_of(model)
    padding = token_padding(model, batch)
    assert 0 < padding.sum() < padding.numel()
    seen: list[Tensor] = []
    model.get_submodule(layers[1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for words in ({}, {"padding": "attend"}):
        handle = insert(model, after=layers[0], **words)
        model(**batch)
        plain, mixed = seen.pop().chunk(2)
        changed = (plain != mixed).any(-1)
        assert changed.equal(~padding if not words else torch.ones_like(padding))
        handle.remove()


@pytest.mark.parametrize("kind", ["detr", "deformable"])
def test_published_behaviour_attends_to_padding(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind), scenes(3, kind=kind)
    place = layers_of(model)[0]
    handle = insert(model, after=place, drop=0.0, padding="attend")
    out, modules = model(**batch), handle.modules
    assert "padded tokens take part" in str(describe(model))
    remove(model)
    plain, mixed = two_passes(model, batch, modules, [place], masked=False)
    torch.testing.assert_close(out.logits, torch.cat((plain.logits, mixed.logits)), **CLOSE[torch.float64])


@pytest.mark.parametrize("kind", ["detr", "conditional"])
def test_masks_of_every_attention_implementation(detector: Build, scenes: Build, kind: str) -> None:
    """Additive and boolean masks in version 5; 4.57 has one attention of its own for these."""
    model = detector(kind)
    insert(model, after=layers_of(model)[0], drop=0.0)
    logits = []
    for implementation in ("eager", "sdpa"):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = implementation
        logits.append(model(**scenes(3)).logits)
    torch.testing.assert_close(logits[0], logits[1], **CLOSE[torch.float64])


def test_forms_of_masks() -> None:
    hidden = torch.zeros(2, 3, 8)
    real = torch.tensor([[1, 1, 1], [1, 1, 0]])
    boolean = real.bool()[:, None, None].expand(2, 1, 3, 3)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~boolean, torch.finfo(torch.float32).min)
    for mask in (real, real.bool(), real.float(), boolean, additive, additive[:, :, :1], additive.double().clamp(-1e4)):
        assert padding_of({"hidden_states": hidden, "attention_mask": mask}).equal(real == 0)
    one_row = padding_of({"hidden_states": hidden, "attention_mask": boolean[1:]})
    assert one_row.equal((real[1:] == 0).expand(2, 3))
    assert padding_of({"hidden_states": hidden, "attention_mask": None}) is None
    assert padding_of({"hidden_states": hidden}) is None
    for mask, form in ((torch.zeros(2, 3, 3), r"shape \(2, 3, 3\)"), ("blocks", "str")):
        with pytest.raises(TypeError, match=rf"got {form}. Use attn_implementation='sdpa' or 'eager', or .*'attend'"):
            padding_of({"hidden_states": hidden, "attention_mask": mask})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["detr", "conditional", "deformable", "dab", "smca"])
def test_activation_checkpointing_gives_the_same_gradients(
    detector: Build, scenes: Build, kind: str, reentrant: bool
) -> None:
    """Two passes of other sizes before the backward, in which a layer may run again."""
    found = []
    for enable in (False, True):
        model = detector(kind)
        insert(model, after=layers_of(model)[1:], drop=0.0)
        if enable:
            if not model.supports_gradient_checkpointing:
                pytest.skip("this version has no checkpointing here")
            # Version 5 gave it another name.
            switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            switch({"use_reentrant": reentrant})
        sum(model(**scenes(n, kind=kind, seed=n)).loss for n in (2, 4)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_and_with_tuples(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind), scenes(2, kind=kind)
    insert(model, after=layers_of(model)[0], drop=0.0)
    images = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    out = model(**images)
    assert out.loss is None
    first = next(iter(predictions(out).values()))
    assert first.shape[0] == 4
    by_position = model(images["pixel_values"], return_dict=False)
    assert by_position[0].shape == first.shape
    assert model(images["pixel_values"]).keys() == out.keys()  # no mask: nothing is padding


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_labels_doubled_before_are_refused(detector: Build, scenes: Build, kind: str) -> None:
    model, batch = detector(kind), scenes(2, kind=kind)
    handle = insert(model, after=layers_of(model)[0], drop=0.0)
    name = "class_labels" if kind == "mask2former" else "labels"
    lists = {key: handle.expand(value) for key, value in batch.items() if isinstance(value, list)}
    with pytest.raises(
        ValueError, match=f"{name} with one entry for each of the 2 samples, got 4.*doubled in the model"
    ):
        model(**{**batch, name: lists[name]})
    with pytest.raises(ValueError, match="each of the 2 samples, got 1"):
        model(batch["pixel_values"], **{**{key: batch[key] for key in lists}, name: batch[name][:1]})
    out = model(**batch)
    assert out.loss.isfinite() and len(next(iter(predictions(out).values()))) == 4
    # Without doubling there is nothing to count.
    model.eval()
    assert model(**batch).loss.isfinite()


def test_single_stream(detector: Build, scenes: Build) -> None:
    model, batch = detector("deformable"), scenes(3)
    place = layers_of(model)[0]
    handle = insert(model, after=place, mode="single_stream", drop=0.0)
    out, modules = model(**batch), handle.modules
    assert handle.split(out) == (None, out)
    remove(model)
    _, mixed = two_passes(model, batch, modules, [place])
    torch.testing.assert_close(out.logits, mixed.logits, **CLOSE[torch.float64])
    torch.testing.assert_close(out.loss, mixed.loss, **CLOSE[torch.float64])


def test_two_insertions_in_any_order_and_one_removed(detector: Build, scenes: Build) -> None:
    model, batch = detector("detr"), scenes(3)
    layers = layers_of(model)
    late = insert(model, after=layers[2], drop=0.0)
    early = insert(model, after=layers[0], drop=0.0)
    modules = {"early": early.modules[0], "late": late.modules[0]}
    both = model(**batch)
    early.remove()
    alone = model(**batch)
    late.remove()
    plain, mixed = two_passes(model, batch, [modules["early"], modules["late"]], [layers[0], layers[2]])
    torch.testing.assert_close(both.loss, (plain.loss + mixed.loss) / 2, **CLOSE[torch.float64])
    plain, mixed = two_passes(model, batch, [modules["late"]], [layers[2]])
    torch.testing.assert_close(alone.loss, (plain.loss + mixed.loss) / 2, **CLOSE[torch.float64])


def test_a_layer_that_is_dropped_leaves_the_streams_equal(detector: Build, scenes: Build) -> None:
    """4.57 may skip layers in training (layer drop); the second point then is a later one all the same."""
    model, batch = detector("detr"), scenes(3)
    layers = layers_of(model)
    handle = insert(model, after=[layers[0], layers[1]], drop=0.0)
    first = model.get_submodule(layers[0])
    first._forward_hooks.clear()
    first._forward_pre_hooks.clear()
    out, module = model(**batch), handle.modules[0]
    remove(model)
    plain, mixed = two_passes(model, batch, [module], [layers[1]])
    torch.testing.assert_close(out.logits, torch.cat((plain.logits, mixed.logits)), **CLOSE[torch.float64])


def test_copied_and_pickled(detector: Build, scenes: Build) -> None:
    model, batch = detector("deformable"), scenes(2)
    insert(model, after=layers_of(model)[0], drop=0.0)
    expected = model(**batch).loss
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(**batch).loss, expected)


def test_second_stage_of_panoptic_segmentation(detector: Build, scenes: Build) -> None:
    """The detector and the module are frozen and in training: the mask head learns from both streams."""
    model, batch = detector("segmentation"), scenes(3, kind="segmentation")
    handle = insert(model, after=layers_of(model)[0], drop=0.0)
    handle.modules[0].freeze()
    model.detr.requires_grad_(False)
    out = model(**batch)
    assert out.pred_masks.shape[0] == 6
    assert not out.pred_masks[:3].isclose(out.pred_masks[3:]).all()
    out.loss.backward()
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {
        "mask_head",
        "bbox_attention",
    }


def test_denoising_queries_are_made_for_both_streams(detector: Build, scenes: Build) -> None:
    model, batch = detector("rt-detr", num_denoising=4), scenes(3)
    insert(model, after=layers_of(model)[0], drop=0.0)
    out = model(**batch)
    assert out.logits.shape[0] == 6
    out.loss.backward()
    assert model.model.denoising_class_embed.weight.grad.abs().sum() > 0


def test_batch_evaluation(detector: Build, scenes: Build) -> None:
    model, batch = detector("deformable").eval(), scenes(3)
    handle = insert(model, after=layers_of(model)[0])
    plain, mixed = handle.evaluate_in_batch(batch["pixel_values"], batch["pixel_mask"], labels=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(plain.logits, model(batch["pixel_values"], batch["pixel_mask"]).logits)
    assert not mixed.logits.isclose(plain.logits).all()


def test_ranks_agree_on_having_a_mask(detector: Build, scenes: Build) -> None:
    model, batch = detector("detr"), scenes(2)
    handle = insert(model, after=layers_of(model)[0], gather="all")
    masks: list[Any] = []
    handle.modules[0].register_forward_pre_hook(lambda _, args, named: masks.append(named["mask"]), with_kwargs=True)
    model(batch["pixel_values"])
    assert masks[0] is not None and not masks[0].any()


def test_description(detector: Build) -> None:
    model = detector("deformable")
    insert(model, after=layers_of(model)[1])
    text = str(describe(model))
    assert "labels of the model are doubled" in text and "pixel_values, pixel_mask" in text
    assert "'model.backbone', 'model.input_proj.0'" in text and "run once, later parts on both streams" in text
    assert "'model.encoder.layers.1' run once, later parts on both streams; padded tokens neither attend nor" in text
    model = detector("rt-detr")
    insert(model, after=layers_of(model))
    assert "padded tokens take part" in str(describe(model))


@pytest.mark.parametrize(
    "words",
    [
        {"before": "model.encoder.layers.0"},
        {"after": "model.decoder.layers.0"},
        {"after": "model.encoder.layers.0.self_attn"},
        {"after": ["model.encoder.layers.0", "class_labels_classifier"]},
        {"after": "model.input_projection", "layout": "BCHW"},
    ],
)
def test_other_places_are_refused(detector: Build, words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"after layers of the encoder of Detr.*some of \['model.encoder.layers.0'"):
        insert(detector("detr"), **words)


def test_other_models_are_refused(detector: Build) -> None:
    model = detector("detr")
    with pytest.raises(ValueError, match="image classifiers. Detectors take after='model.encoder.layers.0'"):
        insert(model, before="auto")
    with pytest.raises(ValueError, match="padding to be 'mask' or 'attend', got 'ignore'"):
        insert(model, after=layers_of(model)[0], padding="ignore")  # type: ignore[arg-type]
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    text = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        backbone=None,
        use_timm_backbone=False,
        text_config=transformers.BertConfig(**text, intermediate_size=32),
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_feature_levels": 1},
    )
    with pytest.raises(
        ValueError, match=r"takes images alone, but .* also has the inputs \['vision_features'.*'text_features'"
    ):
        insert(transformers.GroundingDinoForObjectDetection(config), after="model.encoder.layers.0")


def test_relatives_built_alike(scenes: Build) -> None:
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": resnet}
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
    table = transformers.TableTransformerForObjectDetection(transformers.TableTransformerConfig(**own, **sizes))
    insert(table, after="model.encoder.layers.0")
    assert table(**scenes(3)).logits.shape[0] == 6


def test_a_model_around_a_detector_is_refused(detector: Build) -> None:
    around = nn.ModuleDict({"net": detector("detr")})
    with pytest.raises(ValueError, match=r"insert\(model.net, after='model.encoder.layers.1'\)"):
        insert(around, after="net.model.encoder.layers.1")


def test_half_precision(detector: Build, scenes: Build) -> None:
    torch.set_default_dtype(torch.float32)
    for kind in ("detr", "deformable", "smca"):
        model, batch = detector(kind), scenes(3, kind=kind)
        insert(model, after=layers_of(model)[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_part_called_past_the_model_is_refused_in_training(detector: Build, scenes: Build) -> None:
    model, batch = detector("detr"), scenes(2)
    insert(model, after=layers_of(model)[0])
    with pytest.raises(RuntimeError, match=r"one of its part 'model.backbone' alone, in training.*in eval\(\)"):
        model.model(batch["pixel_values"])
    # A frozen backbone stays in eval(): its maps may be had alone, and in the model they are doubled all the same.
    backbone = model.model.backbone.eval()
    alone = backbone(batch["pixel_values"], batch["pixel_mask"])
    maps = alone[0] if isinstance(alone, tuple) else alone
    assert maps[-1][0].shape[0] == 2
    assert model(**batch).logits.shape[0] == 4
    with pytest.raises(RuntimeError, match="'model.input_projection' alone, in training"):
        model.model(batch["pixel_values"])
    model.eval()
    assert model.model(batch["pixel_values"]).last_hidden_state.shape[0] == 2


def test_the_bare_model(detector: Build, scenes: Build) -> None:
    model, batch = detector("conditional").model, scenes(3)
    handle = insert(model, after="encoder.layers.0", drop=0.0)
    plain, mixed = handle.split(model(batch["pixel_values"], batch["pixel_mask"]))
    remove(model)
    expected = model(batch["pixel_values"], batch["pixel_mask"])
    for name in ("last_hidden_state", "intermediate_hidden_states", "reference_points", "encoder_last_hidden_state"):
        torch.testing.assert_close(plain[name], expected[name], **CLOSE[torch.float64])
        assert mixed[name].shape == expected[name].shape


@pytest.mark.parametrize("kind", ["detr", "conditional", "deformable"])
def test_what_transformers_trains_of_its_own_backbone(detector: Build, kind: str) -> None:
    """Its last three stages are meant to be trained, but the names that it looks for are not there."""
    backbone = detector(kind).model.backbone
    weights = dict(backbone.named_parameters())
    trained = [name for name, p in weights.items() if p.requires_grad]
    assert len(weights) == 12  # convolutions alone: batch norms have become constants
    assert len(trained) == 0
    backbone.requires_grad_(True)
    assert sum(p.requires_grad for p in backbone.parameters()) == 12
