"""Official names against networks written by hand with torch's own modules, which have these names."""

import argparse
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from batchformer import BatchFormer, insert
from batchformer.tasks.set_prediction.published.checkpoints import convert_checkpoint, load_published, published_kind
from batchformer.tasks.set_prediction.published.convert import convert

transformers = pytest.importorskip("transformers")

Build = Callable[..., Any]
C, HEADS, FFN, QUERIES, K = 32, 4, 32, 5, 3
KINDS = {
    "detr": "detr",
    "segmentation": "detr",
    "conditional": "conditional_detr",
    "deformable": "deformable_detr",
    "box refinement": "deformable_detr",
    "two stages": "deformable_detr",
}


class Official(nn.Module):
    """Names of the official code, forward passes of the paper's equations. Shapes as in its code: tokens first."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Module()
        encoder.layers = nn.ModuleList(nn.TransformerEncoderLayer(C, HEADS, FFN, 0.0) for _ in range(3))
        decoder = nn.Module()
        decoder.layers = nn.ModuleList(nn.TransformerDecoderLayer(C, HEADS, FFN, 0.0) for _ in range(2))
        decoder.norm = nn.LayerNorm(C)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = encoder, decoder
        self.class_embed = nn.Linear(C, K + 1)
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList(nn.Linear(C, out) for out in (C, C, 4))
        self.query_embed = nn.Embedding(QUERIES, C)
        self.input_proj = nn.Conv2d(16, C, 1)
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def encode(self, layer: int, x_SBC: Tensor, pos_SBC: Tensor, padding_BS: Tensor) -> Tensor:
        part: Any = self.transformer.encoder.layers[layer]
        where = x_SBC + pos_SBC
        x = part.norm1(x_SBC + part.self_attn(where, where, x_SBC, key_padding_mask=padding_BS)[0])
        out: Tensor = part.norm2(x + part.linear2(F.relu(part.linear1(x))))
        return out

    def decode(
        self, memory_SBC: Tensor, pos_SBC: Tensor, padding_BS: Tensor, *, norm_between: bool
    ) -> tuple[Tensor, Tensor]:
        query_QBC = self.query_embed.weight[:, None].expand(-1, memory_SBC.shape[1], -1)
        x = torch.zeros_like(query_QBC)
        decoder: Any = self.transformer.decoder
        for part in decoder.layers:
            x = part.norm1(x + part.self_attn(x + query_QBC, x + query_QBC, x)[0])
            keys = memory_SBC + pos_SBC
            seen = part.multihead_attn(x + query_QBC, keys, memory_SBC, key_padding_mask=padding_BS)[0]
            x = part.norm2(x + seen)
            x = part.norm3(x + part.linear2(F.relu(part.linear1(x))))
            x = decoder.norm(x) if norm_between else x
        x = decoder.norm(x).transpose(0, 1)
        first, second, third = self.bbox_embed.layers
        return self.class_embed(x), third(F.relu(second(F.relu(first(x))))).sigmoid()


def encoder_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What the encoder of a model of transformers gets: features, positions, mask."""
    seen: list[dict[str, Any]] = []
    hook = model.model.encoder.register_forward_pre_hook(lambda _, args, named: seen.append(named), with_kwargs=True)
    model.eval()(batch["pixel_values"], batch["pixel_mask"])
    hook.remove()
    positions = next(seen[0][name] for name in ("spatial_position_embeddings", "object_queries") if name in seen[0])
    return {"x": seen[0]["inputs_embeds"], "positions": positions, "padding": seen[0]["attention_mask"] == 0}


@pytest.fixture(autouse=True)
def _fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def official_names(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in checkpoints of the official code, for the tiny models of these tests."""
    linear = lambda name, out, into=C: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}  # noqa: E731
    norm = lambda name: {f"{name}.weight": (C,), f"{name}.bias": (C,)}  # noqa: E731
    dense = lambda name: {  # noqa: E731
        f"{name}.in_proj_weight": (3 * C, C),
        f"{name}.in_proj_bias": (3 * C,),
        **linear(f"{name}.out_proj", C),
    }
    mlp = lambda name, *widths: {  # noqa: E731
        key: shape for i, width in enumerate(widths) for key, shape in linear(f"{name}.layers.{i}", width).items()
    }
    levels = 4
    sampling = lambda name: {  # noqa: E731
        **linear(f"{name}.sampling_offsets", HEADS * levels * 4 * 2),
        **linear(f"{name}.attention_weights", HEADS * levels * 4),
        **linear(f"{name}.value_proj", C),
        **linear(f"{name}.output_proj", C),
    }
    deformable = KINDS[kind] == "deformable_detr"
    names = resnet_names()
    for i in range(3):
        layer = f"transformer.encoder.layers.{i}"
        names |= sampling(f"{layer}.self_attn") if deformable else dense(f"{layer}.self_attn")
        names |= linear(f"{layer}.linear1", FFN) | linear(f"{layer}.linear2", C, FFN)
        names |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
    for i in range(2):
        layer = f"transformer.decoder.layers.{i}"
        if kind == "conditional":
            parts = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
            parts += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"] + ["ca_qpos"] * (i == 0)
            for part in parts:
                names |= linear(f"{layer}.{part}_proj", C)
            names |= linear(f"{layer}.self_attn.out_proj", C) | linear(f"{layer}.cross_attn.out_proj", C)
        else:
            names |= dense(f"{layer}.self_attn")
            names |= sampling(f"{layer}.cross_attn") if deformable else dense(f"{layer}.multihead_attn")
        names |= linear(f"{layer}.linear1", FFN) | linear(f"{layer}.linear2", C, FFN)
        names |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2") | norm(f"{layer}.norm3")
    if deformable:
        names |= {"transformer.level_embed": (levels, C)}
        for i, channels in enumerate((8, 16, 16, 16)):
            size = 3 if i == 3 else 1
            names |= {f"input_proj.{i}.0.weight": (C, channels, size, size), f"input_proj.{i}.0.bias": (C,)}
            names |= norm(f"input_proj.{i}.1")
        heads = 3 if kind == "two stages" else 2
        for i in range(heads):
            names |= linear(f"class_embed.{i}", K) | mlp(f"bbox_embed.{i}", C, C, 4)
            if kind != "deformable":
                names |= mlp(f"transformer.decoder.bbox_embed.{i}", C, C, 4)
            if kind == "two stages":
                names |= linear(f"transformer.decoder.class_embed.{i}", K)
        if kind == "two stages":
            names |= linear("transformer.enc_output", C) | norm("transformer.enc_output_norm")
            names |= linear("transformer.pos_trans", 2 * C, 2 * C)
            names |= {"transformer.pos_trans_norm.weight": (2 * C,), "transformer.pos_trans_norm.bias": (2 * C,)}
        else:
            names |= linear("transformer.reference_points", 2) | {"query_embed.weight": (QUERIES, 2 * C)}
        return names
    names |= norm("transformer.decoder.norm") | {"query_embed.weight": (QUERIES, C)}
    names |= {"input_proj.weight": (C, 16, 1, 1), "input_proj.bias": (C,)}
    names |= linear("class_embed", K + (kind != "conditional")) | mlp("bbox_embed", C, C, 4)
    if kind == "conditional":
        names |= mlp("transformer.decoder.query_scale", C, C) | mlp("transformer.decoder.ref_point_head", C, 2)
    if kind == "segmentation":
        names = {f"detr.{name}": shape for name, shape in names.items()} | mask_head_names()
    return names


def resnet_names() -> dict[str, tuple[int, ...]]:
    def conv(name: str, norm: str, out: int, into: int, size: int) -> dict[str, tuple[int, ...]]:
        statistics = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.weight": (out, into, size, size)} | {f"{norm}.{word}": (out,) for word in statistics}

    names = conv("conv1", "bn1", 8, 3, 7)
    for i, (into, out) in enumerate(zip((8, 8, 8, 16), (8, 8, 16, 16), strict=True)):
        block = f"layer{i + 1}.0"
        names |= conv(f"{block}.conv1", f"{block}.bn1", out, into, 3)
        names |= conv(f"{block}.conv2", f"{block}.bn2", out, out, 3)
        if i > 0:
            names |= conv(f"{block}.downsample.0", f"{block}.downsample.1", out, into, 1)
    return {f"backbone.0.body.{name}": shape for name, shape in names.items()}


def mask_head_names() -> dict[str, tuple[int, ...]]:
    widths = [C + 8, C + 8, C // 2, C // 4, C // 8, C // 16]
    names: dict[str, tuple[int, ...]] = {}
    for i, (into, out) in enumerate(itertools.pairwise(widths), 1):
        names |= {f"mask_head.lay{i}.weight": (out, into, 3, 3), f"mask_head.lay{i}.bias": (out,)}
        names |= {f"mask_head.gn{i}.weight": (out,), f"mask_head.gn{i}.bias": (out,)}
    for i, (into, out) in enumerate(zip((16, 8, 8), widths[2:], strict=False), 1):
        names |= {f"mask_head.adapter{i}.weight": (out, into, 1, 1), f"mask_head.adapter{i}.bias": (out,)}
    names |= {"mask_head.out_lay.weight": (1, C // 16, 3, 3), "mask_head.out_lay.bias": (1,)}
    for part in ("q_linear", "k_linear"):
        names |= {f"bbox_attention.{part}.weight": (C, C), f"bbox_attention.{part}.bias": (C,)}
    return names


def official(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.rand(shape) for name, shape in official_names(kind).items()}


def layer_of_batchformer(seed: int = 0) -> dict[str, Tensor]:
    """As the published code makes it; one for all insertions or one for each."""
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(C, 4, C, dropout=0.5).state_dict()


def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_finds_its_place(detector: Build, kind: str) -> None:
    model, weights = detector(kind), official(kind)
    report = convert_checkpoint({"model": weights}, model)
    assert report.complete, str(report)
    assert report.kind == KINDS[kind] == published_kind(weights)
    assert sum(t.numel() for t in report.state_dict.values()) == sum(t.numel() for t in weights.values())
    everything = torch.cat([t.flatten() for t in weights.values()]).sort().values
    assert torch.cat([t.flatten() for t in report.state_dict.values()]).sort().values.equal(everything)
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    assert convert_checkpoint(wrapped, model).state_dict.keys() == report.state_dict.keys()


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("detr", {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}),
        ("conditional", {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer"}),
        ("deformable", {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm", "norm3": "final_layer"}),
    ],
)
def test_order_of_the_decoders_norms(detector: Build, kind: str, order: dict[str, str]) -> None:
    weights = official(kind)
    state = convert_checkpoint(weights, detector(kind)).state_dict
    for theirs, name in order.items():
        here = next(key for key in state if f"decoder.layers.1.{name}" in key and key.endswith("weight"))
        assert state[here].equal(weights[f"transformer.decoder.layers.1.{theirs}.weight"])


def test_detr_by_hand(detector: Build, scenes: Build) -> None:
    """Encoder, decoder and heads of the official network against transformers with its weights."""
    reference, batch = Official(), scenes(3)
    results = []
    for auxiliary in (False, True):
        model = detector("detr", auxiliary_loss=auxiliary)
        report = convert_checkpoint(reference.state_dict(), model)
        assert {name.split(".")[1] for name in report.missing} == {"backbone"}
        model.load_state_dict(report.state_dict, strict=False)
        inputs = encoder_inputs(model, batch)
        x, positions = inputs["x"].transpose(0, 1), inputs["positions"].transpose(0, 1)
        for layer in range(3):
            x = reference.encode(layer, x, positions, inputs["padding"])
        # Not the official network: with an auxiliary loss transformers normalises between the decoder's layers.
        logits, boxes = reference.decode(x, positions, inputs["padding"], norm_between=auxiliary)
        out = model.eval()(batch["pixel_values"], batch["pixel_mask"])
        torch.testing.assert_close(out.logits, logits, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(out.pred_boxes, boxes, rtol=1e-8, atol=1e-8)
        results.append(logits)
    assert not results[0].isclose(results[1]).all()


def test_an_encoder_layer_and_batch_attention_by_hand(detector: Build, scenes: Build) -> None:
    """The mixed stream after the first layer: the official layer, then torch's over the batch, padding left out."""
    reference, batch, mixing = Official(), scenes(3), nn.TransformerEncoderLayer(C, 4, C, dropout=0.0)
    model = detector("detr")
    insert(model, after="model.encoder.layers.0", drop=0.0)
    report = convert_checkpoint({**reference.state_dict(), **named("transformer.bf", mixing.state_dict())}, model)
    assert (report.batchformer, report.inserted_at) == ("loaded", ())
    model.load_state_dict(report.state_dict, strict=False)
    inputs = encoder_inputs(model, batch)
    seen: list[Tensor] = []
    model.model.encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(batch["pixel_values"], batch["pixel_mask"])
    x_SBC = reference.encode(0, inputs["x"].transpose(0, 1), inputs["positions"].transpose(0, 1), inputs["padding"])
    x_BSC, padding_BS = x_SBC.transpose(0, 1), inputs["padding"]
    nowhere = padding_BS & padding_BS.all(0)  # not asked about, but torch wants something to look at
    mixed = mixing(x_BSC, src_key_padding_mask=(padding_BS & ~nowhere).T)
    mixed = torch.where(padding_BS[..., None], x_BSC, mixed)
    torch.testing.assert_close(seen[0], torch.cat((x_BSC, mixed)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_backbone_against_torchvision(detector: Build, block: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), [1, 1, 1, 1], width_per_group=64)
    widths = [w * getattr(torchvision.models.resnet, block).expansion for w in (64, 128, 256, 512)]
    kind = "basic" if block == "BasicBlock" else "bottleneck"
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=widths, depths=[1, 1, 1, 1], layer_type=kind, out_features=["stage4"]
    )
    model = detector("detr", backbone_config=config).eval()
    weights = {f"backbone.0.body.{name}": value for name, value in theirs.state_dict().items() if "fc" not in name}
    report = convert_checkpoint({**weights, **Official().state_dict()}, model)
    assert not report.missing and [*report.mismatched] == ["model.input_projection.weight"]
    model.load_state_dict(report.state_dict, strict=False)
    x = torch.randn(2, 3, 64, 64)
    expected = x
    for name, part in theirs.eval().named_children():
        expected = expected if name in ("avgpool", "fc") else part(expected)
    found = model.model.backbone(x, torch.ones(2, 64, 64))
    maps = found[0] if isinstance(found, tuple) else found  # with positions beside them in 4.57
    torch.testing.assert_close(maps[-1][0], expected, rtol=1e-6, atol=1e-6)


def test_batchformer_shared_and_one_for_each_layer(detector: Build) -> None:
    weights = official("deformable")
    shared = weights | named("transformer.bf", layer_of_batchformer())
    own = weights
    for i in (0, 2):
        for place in (f"transformer.bf.{i}", f"transformer.encoder.bf.{i}"):  # the published code holds them twice
            own = own | named(place, layer_of_batchformer(i))
    places = [f"model.encoder.layers.{i}" for i in (0, 2)]

    def modules(checkpoint: Any, **words: Any) -> tuple[Any, list[BatchFormer]]:
        model = detector("deformable")
        handle = insert(model, after=places, **words)
        report = convert_checkpoint(checkpoint, model)
        model.load_state_dict(report.state_dict, strict=False)
        return report, handle.modules

    def equal(module: BatchFormer, state: dict[str, Tensor]) -> bool:
        return all(module.state_dict()[f"layers.0.{name}"].equal(value) for name, value in state.items())

    report, (one,) = modules(shared)
    assert report.complete and report.batchformer == "loaded" and equal(one, layer_of_batchformer())
    report, pair = modules(shared, share=False)
    assert report.complete and all(equal(module, layer_of_batchformer()) for module in pair)
    report, pair = modules(own, share=False)
    assert report.complete and report.inserted_at == (0, 2)
    assert equal(pair[0], layer_of_batchformer(0)) and equal(pair[1], layer_of_batchformer(2))
    report, _ = modules(own)
    assert set(report.unexpected) == {"transformer.bf.0", "transformer.bf.2"} and len(report.missing) == 12


def test_several_layers_of_batchformer(detector: Build) -> None:
    stacked = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 4, C), 2, enable_nested_tensor=False)
    model = detector("deformable")
    handle = insert(model, after="model.encoder.layers.0", layers=2)
    report = convert_checkpoint(official("deformable") | named("transformer.bf.0", stacked.state_dict()), model)
    assert report.complete and report.inserted_at == (0,)
    model.load_state_dict(report.state_dict)
    for name, value in stacked.state_dict().items():
        assert handle.modules[0].state_dict()[name].equal(value)
    shallow = detector("deformable")
    insert(shallow, after="model.encoder.layers.0")
    report = convert_checkpoint(official("deformable") | named("transformer.bf.0", stacked.state_dict()), shallow)
    assert any("layers.1.self_attn" in name for name in report.unexpected)


def test_batchformer_in_one_of_both_alone(detector: Build) -> None:
    plain, published = detector("detr"), official("detr") | named("transformer.bf", layer_of_batchformer())
    report = convert_checkpoint({"model": published, "args": {"insert_idx": [0]}}, plain)
    assert report.complete and (report.batchformer, report.inserted_at) == ("left out", (0,))
    assert str(report).splitlines()[0].endswith("BatchFormer: left out (after encoder layers 0)")
    ways = "set model.config.auxiliary_loss = False, or keep it and call batchformer.tasks.set_prediction.decoder_norm"
    assert f"{ways}.normalize_copies(model)." in str(report)
    panoptic = convert_checkpoint(official("segmentation"), detector("segmentation"))
    assert f"{ways}.normalize_copies(model)." in str(panoptic)
    plain.config.auxiliary_loss = False
    assert convert_checkpoint(published, plain).note == ""
    insert(plain, after="model.encoder.layers.0")
    report = convert_checkpoint(official("detr"), plain)
    assert report.complete and report.batchformer == "new"


def test_files(detector: Build, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint0049.pth"
    arguments = argparse.Namespace(lr=1e-4, insert_idx=[0], dataset_file="coco", masks=False, device="cuda")
    published = official("detr") | named("transformer.bf", layer_of_batchformer())
    torch.save({"model": published, "epoch": 49, "args": arguments, "optimizer": {"state": {}}}, path)
    model = detector("detr")
    insert(model, after="model.encoder.layers.0")
    report = load_published(model, path)
    assert (report.batchformer, report.inserted_at) == ("loaded", (0,))
    for name, value in report.state_dict.items():
        assert model.state_dict()[name].equal(value)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="Expected a state dict in .*, got list"):
        load_published(model, path)
    with pytest.raises(FileNotFoundError):
        load_published(model, tmp_path / "nothing.pth")


class Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_files_with_objects_are_refused(detector: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": official("detr"), "args": Runs()}, "bad.pth")
    with pytest.raises(ValueError, match="holds Python objects, which could run any code"):
        load_published(detector("detr"), "bad.pth")
    Path("text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="but 'text.pth' is none, or holds"):
        load_published(detector("detr"), "text.pth")
    assert not Path("touched").exists()


def test_what_does_not_fit_is_said_and_nothing_loaded(detector: Build, tmp_path: Path) -> None:
    path = tmp_path / "coco.pth"
    weights = official("detr") | {"class_embed.weight": torch.rand(92, C), "class_embed.bias": torch.rand(92)}
    del weights["query_embed.weight"]
    torch.save(weights | {"transformer.something.weight": torch.rand(1)}, path)
    model = detector("detr")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        "Expected a checkpoint for this DetrForObjectDetection, got\ndetr: * tensors; BatchFormer: none\n"
        "missing: model.query_position_embeddings.weight\nunexpected: transformer.something.weight\n"
        "shape of class_labels_classifier.weight: (92, 32) in the checkpoint, (4, 32) here\n"
        "shape of class_labels_classifier.bias: (92,) in the checkpoint, (4,) here\nWith auxiliary_loss=True"
    )
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\*", r"\d+")):
        load_published(model, path)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    report = load_published(model, path, strict=False)
    assert not report.complete
    projection = model.state_dict()["model.input_projection.weight"]
    assert projection.equal(weights["input_proj.weight"])


def test_a_detectors_checkpoint_in_a_panoptic_model(detector: Build, tmp_path: Path) -> None:
    """Stage two starts from a detector whose mask head is new."""
    torch.save(official("detr"), tmp_path / "detector.pth")
    model = detector("segmentation")
    report = load_published(model, tmp_path / "detector.pth", strict=False)
    assert not report.unexpected and not report.mismatched
    assert {name.partition(".")[0] for name in report.missing} == {"mask_head", "bbox_attention"}
    panoptic = convert_checkpoint(official("segmentation"), detector("detr"))
    assert {name.partition(".")[0] for name in panoptic.unexpected} == {"mask_head", "bbox_attention"}


def test_a_folder_of_a_panoptic_checkpoint(scenes: Build, tmp_path: Path) -> None:
    """Its README, word by word, for the loss of all layers: the predictions stay those without it."""
    torch.save({"model": official("segmentation"), "args": argparse.Namespace(nheads=8)}, tmp_path / "panoptic.pth")
    convert(tmp_path / "panoptic.pth", tmp_path / "out")
    code = re.findall("^    .*", (tmp_path / "out" / "README.md").read_text(), flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(code[:2])), names)
    model, batch = names["model"].eval(), scenes(2, kind="segmentation")
    assert type(model).__name__ == "DetrForSegmentation" and model.config.auxiliary_loss is False
    images = {name: batch[name].float() for name in ("pixel_values", "pixel_mask")}
    before = model.float()(**images)
    exec(textwrap.dedent("\n".join(code[2:])), names)
    assert model.config.auxiliary_loss is True
    after = model(**images)
    for name in ("logits", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(after[name], before[name])


def test_other_checkpoints_are_refused(detector: Build) -> None:
    model = detector("detr")
    with pytest.raises(ValueError, match="official DETR, Conditional DETR or Deformable DETR code, got keys like"):
        convert_checkpoint(model.state_dict(), model)
