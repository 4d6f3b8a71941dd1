"""SMCA as a model of transformers: gradients, learning, padding, saving, loss, checkpointing, export, insertion."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, ConditionalDetrImageProcessor, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from batchformer import BatchFormer, insert, remove
from batchformer.tasks.set_prediction.smca import SmcaConfig, SmcaForObjectDetection, SmcaModel

K = 3
LEVELS = (1, 3)
Labels = list[dict[str, Tensor]]


def build(levels: int = 1, seed: int = 0, **changes: Any) -> SmcaForObjectDetection:
    torch.manual_seed(seed)
    stages = ["stage3"] if levels == 1 else ["stage2", "stage3"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic", out_features=stages
    )
    small = {"d_model": 32, "num_queries": 7, "decoder_layers": 2, "encoder_layers": 2 if levels == 1 else 3}
    small |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return SmcaForObjectDetection(SmcaConfig(backbone, num_feature_levels=levels, num_labels=K, **{**small, **changes}))


def no_dropout(levels: int = 1, **changes: Any) -> SmcaForObjectDetection:
    return build(levels, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **changes)


def batch(images: int = 2, seed: int = 0, size: tuple[int, int] = (64, 96)) -> tuple[Tensor, Tensor, Labels]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, *size, generator=generator)
    mask = torch.ones(images, *size, dtype=torch.long)
    mask[-1, :, 64:] = 0
    pixels = pixels * mask[:, None]
    labels = [
        {
            "class_labels": torch.randint(K, (1 + i % 2,), generator=generator),
            "boxes": torch.rand(1 + i % 2, 4, generator=generator) * 0.4 + 0.2,
        }
        for i in range(images)
    ]
    return pixels, mask, labels


class Served(nn.Module):
    """Stands in for the backbone: gives the maps that it was given."""

    def __init__(self, maps: list[Tensor], masks: list[Tensor]) -> None:
        super().__init__()
        self.maps, self.masks = maps, masks
        self.intermediate_channel_sizes = [x.shape[1] for x in maps]

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.maps, self.masks, strict=True))


@pytest.mark.parametrize("levels", LEVELS)
def test_outputs(levels: int) -> None:
    model = build(levels).eval()
    pixels, mask, labels = batch()
    outputs = model(pixels, pixel_mask=mask, labels=labels, output_attentions=True, output_hidden_states=True)
    tokens = 4 * 6 if levels == 1 else 8 * 12 + 4 * 6 + 2 * 3
    assert outputs.logits.shape == (2, 7, K) and outputs.pred_boxes.shape == (2, 7, 4)
    assert ((outputs.pred_boxes > 0) & (outputs.pred_boxes < 1)).all()
    assert outputs.encoder_last_hidden_state.shape == (2, tokens, 32)
    assert outputs.intermediate_hidden_states.shape == (2, 2, 7, 32)
    assert [x.shape for x in outputs.cross_attentions] == [(2, 4, 7, tokens)] * 2
    assert [x.shape for x in outputs.encoder_hidden_states] == [(2, tokens, 32)] * (3 if levels == 1 else 4)
    assert len(outputs.decoder_hidden_states) == 3
    assert len(outputs.auxiliary_outputs) == 1 and outputs.auxiliary_outputs[0]["pred_boxes"].shape == (2, 7, 4)
    plain = model(pixels, pixel_mask=mask)
    assert plain.loss is None and plain.cross_attentions is None and plain.auxiliary_outputs is None
    assert torch.allclose(plain.logits, outputs.logits, atol=1e-5)
    first, second = model(pixels, pixel_mask=mask, return_dict=False)[:2]
    assert torch.equal(first, plain.logits) and torch.equal(second, plain.pred_boxes)


def test_every_class_starts_rare_and_the_windows_one_cell_wide() -> None:
    model = build()
    assert torch.allclose(model.class_labels_classifier.bias.sigmoid(), torch.tensor(0.01))
    for layer in model.model.decoder.layers:
        assert (layer.prior.inverse_extent.weight == 0).all() and (layer.prior.inverse_extent.bias == 1).all()
    centers = model(*batch()[:2]).reference_logits.sigmoid()[0]
    assert (centers.std(0) > 0.05).all()  # the queries start spread over the image


def test_boxes_are_relative_to_the_center_of_the_query() -> None:
    model = build().eval()
    nn.init.zeros_(model.bbox_predictor.layers[-1].weight)
    outputs = model(*batch()[:2])
    assert torch.allclose(outputs.pred_boxes[..., :2], outputs.reference_logits.sigmoid())
    assert torch.allclose(outputs.pred_boxes[..., 2:], torch.tensor(0.5))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", ["fixed", "single", "width_height"])
@pytest.mark.parametrize("heads", ["independent", "shared"])
def test_gradients_reach_every_parameter_that_trains(levels: int, scale: str, heads: str) -> None:
    model = build(levels, prior_scale=scale, prior_heads=heads)
    for layer in model.model.decoder.layers if scale != "fixed" else []:
        nn.init.normal_(layer.prior.inverse_extent.weight, std=0.1)  # from 0 nothing would flow back at the first step
    pixels, mask, labels = batch()
    model(pixels, pixel_mask=mask, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("model.backbone.") and parameter.grad is None
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # All contents of the first decoder layer are zero, as in DETR: nothing to attend to yet.
        if not name.startswith("model.decoder.layers.0.self_attn"):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("levels", LEVELS)
def test_it_learns_a_batch_by_heart(levels: int) -> None:
    def train(steps: int) -> list[float]:
        model, losses = no_dropout(levels), []
        pixels, mask, labels = batch()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            loss = model(pixels, pixel_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(24)
    assert sum(losses[-4:]) / 4 < 0.5 * losses[0]
    assert losses[:3] == train(3)


@pytest.mark.parametrize("levels", LEVELS)
def test_padding_changes_nothing(levels: int) -> None:
    """More padding, whatever is in it, at the bottom and right of the maps."""
    model = build(levels).double().eval()
    sizes = [(24, 4, 6)] if levels == 1 else [(16, 8, 11), (24, 4, 6)]
    maps = [torch.randn(2, *size, dtype=torch.float64) for size in sizes]
    masks = [torch.ones(2, *size[1:], dtype=torch.bool) for size in sizes]
    model.model.backbone = Served(maps, masks)
    pixels = torch.zeros(1, 3, 2, 2).expand(2, -1, -1, -1)
    expected = model(pixels)
    grown = [nn.functional.pad(x, (0, 4 * 2 ** (levels > 1 and i == 0), 0, 3), value=7.0) for i, x in enumerate(maps)]
    grown_masks = [
        nn.functional.pad(mask, (0, x.shape[-1] - mask.shape[-1], 0, 3)) for x, mask in zip(grown, masks, strict=True)
    ]
    model.model.backbone = Served(grown, grown_masks)
    found = model(pixels)
    assert found.encoder_last_hidden_state.shape[1] > expected.encoder_last_hidden_state.shape[1]
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.pred_boxes, expected.pred_boxes, atol=1e-5)
    model.model.backbone = Served(grown, [torch.ones_like(mask) for mask in grown_masks])
    assert not torch.allclose(model(pixels).logits, expected.logits, atol=1e-2)


def test_a_backbone_with_more_maps_gives_the_last_ones() -> None:
    model = build(1).eval()
    coarse = torch.randn(1, 24, 3, 4)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    pixels = torch.zeros(1, 3, 2, 2)
    model.model.backbone = Served([coarse], [mask])
    expected = model(pixels).logits
    model.model.backbone = Served([torch.randn(1, 5, 6, 8), coarse], [torch.ones(1, 6, 8, dtype=torch.bool), mask])
    assert torch.equal(model(pixels).logits, expected)


def test_images_do_not_see_each_other() -> None:
    model = build(3).eval()
    pixels, mask, _ = batch(3)
    together = model(pixels, pixel_mask=mask).logits
    for i in range(3):
        assert torch.allclose(model(pixels[i : i + 1], pixel_mask=mask[i : i + 1]).logits[0], together[i], atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
def test_saved_and_loaded_it_is_the_same(levels: int, tmp_path: Path) -> None:
    model = build(levels, prior_scale="single", prior_beta=3.0).eval()
    pixels, mask, _ = batch()
    model.save_pretrained(tmp_path)
    for loaded in (
        SmcaForObjectDetection.from_pretrained(tmp_path),
        AutoModelForObjectDetection.from_pretrained(tmp_path),
    ):
        assert type(loaded) is SmcaForObjectDetection and loaded.config.prior_beta == 3.0
        assert torch.equal(loaded(pixels, pixel_mask=mask).logits, model(pixels, pixel_mask=mask).logits)
        trains = [(name, p.requires_grad) for name, p in loaded.named_parameters()]
        assert trains == [(name, p.requires_grad) for name, p in model.named_parameters()]
    body, info = SmcaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not next(body.backbone.parameters()).requires_grad
    expected = model.model(pixels, pixel_mask=mask).last_hidden_state
    assert torch.equal(body(pixels, pixel_mask=mask).last_hidden_state, expected)


def test_a_new_head_starts_anew_and_the_rest_is_loaded(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = SmcaForObjectDetection.from_pretrained(tmp_path, num_labels=K + 4, ignore_mismatched_sizes=True)
    assert torch.allclose(loaded.class_labels_classifier.bias, model.class_labels_classifier.bias[:1].expand(K + 4))
    for name, parameter in model.named_parameters():
        if not name.startswith("class_labels_classifier"):
            assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_the_loss_is_transformers_and_can_be_another() -> None:
    model = build().eval()
    pixels, mask, labels = batch()
    outputs = model(pixels, pixel_mask=mask, labels=labels)
    states = outputs.intermediate_hidden_states
    classes = model.class_labels_classifier(states)
    boxes = model.bbox_predictor(states)
    boxes = torch.cat([boxes[..., :2] + outputs.reference_logits, boxes[..., 2:]], -1).sigmoid()
    expected, terms, _ = DeformableDetrForObjectDetectionLoss(
        outputs.logits, labels, outputs.logits.device, outputs.pred_boxes, model.config, classes, boxes
    )
    assert torch.allclose(outputs.loss, expected)
    assert outputs.loss_dict.keys() == terms.keys() and "loss_giou_0" in terms

    def ours(logits: Tensor, labels: Labels, device: Any, pred_boxes: Tensor, config: Any, *layers: Any) -> Any:
        assert layers[0].shape == (2, 2, 7, K) and torch.equal(layers[1][-1], pred_boxes)
        return logits.sum(), {"own": logits.sum()}, None

    model.loss_function = ours
    assert torch.equal(model(pixels, pixel_mask=mask, labels=labels).loss, outputs.logits.sum())


def test_without_auxiliary_loss_the_last_layer_has_it_all() -> None:
    model = build(auxiliary_loss=False)
    pixels, mask, labels = batch()
    outputs = model(pixels, pixel_mask=mask, labels=labels)
    assert outputs.auxiliary_outputs is None and set(outputs.loss_dict) == {
        *("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    }


def test_images_without_objects() -> None:
    pixels, mask, labels = batch()
    labels[0] = {"class_labels": torch.empty(0, dtype=torch.long), "boxes": torch.empty(0, 4)}
    loss = build()(pixels, pixel_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite()


def test_transformers_own_processing_reads_the_output() -> None:
    outputs = build().eval()(*batch()[:2])
    found = ConditionalDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[(640, 960)] * 2, top_k=5
    )
    assert len(found) == 2 and found[0]["boxes"].shape == (5, 4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
def test_checkpointing_gives_the_same_gradients(levels: int, reentrant: bool) -> None:
    model = build(levels)
    checkpointed = copy.deepcopy(model)
    renamed = hasattr(model, "activation_checkpointing_enable")  # transformers 5.2x
    enable = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
    getattr(checkpointed, enable)({"use_reentrant": reentrant})
    calls = []
    checkpointed.model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    pixels, mask, labels = batch()
    for each in (model, checkpointed):
        torch.manual_seed(3)
        each.train()(pixels, pixel_mask=mask, labels=labels).loss.backward()
    assert len(calls) >= 2  # forward, and once more in the backward pass
    for (name, one), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        if one.requires_grad:
            assert torch.allclose(one.grad, other.grad, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = no_dropout(3)
    pixels, mask, labels = batch()
    expected = model(pixels, pixel_mask=mask, labels=labels)
    with torch.autocast("cpu", dtype):
        outputs = model(pixels, pixel_mask=mask, labels=labels)
    outputs.loss.backward()
    assert torch.allclose(outputs.pred_boxes.float(), expected.pred_boxes, atol=0.05)


def compare_export(levels: int, shapes: Any, inputs: tuple[Tensor, Tensor, Labels]) -> None:
    model = build(levels).eval()
    pixels, mask, _ = batch()
    program = torch.export.export(model, (pixels,), {"pixel_mask": mask}, dynamic_shapes=shapes, strict=False)
    pixels, mask, _ = inputs
    found, expected = program.module()(pixels, pixel_mask=mask), model(pixels, pixel_mask=mask)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.pred_boxes, expected.pred_boxes, atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
def test_export(levels: int) -> None:
    images = torch.export.Dim("images", min=1, max=64)
    compare_export(levels, {"pixel_values": {0: images}, "pixel_mask": {0: images}}, batch(3, seed=1))


@pytest.mark.slow
def test_export_for_images_of_any_size() -> None:
    images, side = torch.export.Dim("images", min=1, max=64), torch.export.Dim.AUTO
    shapes = {"pixel_values": {0: images, 2: side, 3: side}, "pixel_mask": {0: images, 1: side, 2: side}}
    compare_export(3, shapes, batch(3, seed=1, size=(96, 128)))


class Plain(nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixels, pixel_mask=mask)
        return outputs.logits, outputs.pred_boxes


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Plain(build(3)).eval()
    pixels, mask, _ = batch()
    torch.onnx.export(model, (pixels, mask), tmp_path / "smca.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "smca.onnx")
    other = batch(seed=1)[0]
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, dict(zip(names, (other.numpy(), mask.numpy()), strict=True)))
    for one, expected in zip(found, model(other, mask), strict=True):
        assert torch.allclose(torch.from_numpy(one), expected, atol=1e-4)


def doubled_by_hand(
    plain: SmcaForObjectDetection, module: BatchFormer, pixels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Both streams of a model without insertion: its own parts, called one by one, on inputs doubled here."""
    inputs: list[dict[str, Any]] = []
    parts = (plain.model.encoder, plain.model.decoder)
    hooks = [
        part.register_forward_pre_hook(lambda _, args, named: inputs.append(named), with_kwargs=True) for part in parts
    ]
    plain(pixels, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    of_encoder, of_decoder = inputs
    first, *others = plain.model.encoder.layers
    seen = of_encoder["attention_mask"]
    shapes = of_encoder["spatial_shapes"]
    states = first(of_encoder["inputs_embeds"], seen, of_encoder["spatial_position_embeddings"], shapes)
    states = module(states, mask=~seen)
    seen, positions = torch.cat([seen] * 2), torch.cat([of_encoder["spatial_position_embeddings"]] * 2)
    for layer in others:
        states = layer(states, seen, positions, shapes)
    doubled = {name: torch.cat([x] * 2) if isinstance(x, Tensor) else x for name, x in of_decoder.items()}
    decoded = plain.model.decoder(**{**doubled, "encoder_hidden_states": states})
    boxes = plain.bbox_predictor(decoded.last_hidden_state)
    boxes = torch.cat([boxes[..., :2] + decoded.reference_logits, boxes[..., 2:]], -1)
    return plain.class_labels_classifier(decoded.last_hidden_state), boxes.sigmoid()


@pytest.mark.parametrize("levels", LEVELS)
def test_insertion_gives_two_streams_in_training_and_nothing_in_eval(levels: int) -> None:
    model = no_dropout(levels)
    plain = copy.deepcopy(model)
    handle = insert(model, after=["model.encoder.layers.0"], drop=0.0)
    pixels, mask, labels = batch(4)
    model.train()
    outputs = model(pixels, pixel_mask=mask, labels=labels)
    assert outputs.logits.shape == (8, 7, K)
    alone = plain.train()(pixels, pixel_mask=mask, labels=labels)
    first, mixed = handle.split(outputs.logits)
    assert torch.allclose(first, alone.logits, atol=1e-5) and not torch.allclose(mixed, first, atol=1e-2)
    logits, boxes = doubled_by_hand(plain, handle.modules[0], pixels, mask)
    assert torch.allclose(outputs.logits, logits, atol=1e-5) and torch.allclose(outputs.pred_boxes, boxes, atol=1e-5)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = plain.eval()(pixels, pixel_mask=mask)
    assert torch.equal(model.eval()(pixels, pixel_mask=mask).logits, expected.logits)
    remove(model)
    assert torch.equal(model(pixels, pixel_mask=mask).logits, expected.logits)
    assert model.state_dict().keys() == plain.state_dict().keys()
