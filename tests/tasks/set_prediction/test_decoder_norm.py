"""The decoder's norm is put on copies of the layers' outputs, as published."""

import copy
from typing import Any

import pytest
import torch
import transformers

from batchformer.tasks.detection.model import build_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.decoder_norm import normalize_copies
from batchformer.tasks.set_prediction.from_transformers import set_outputs

TARGET = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}


def detectors(kind: Any, **settings: Any) -> tuple[Any, Any]:
    """Ours, and one of the same weights whose decoder transformers runs without auxiliary outputs."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "ffn_dim": 32, "num_queries": 6}
    backbone = BackboneSettings("resnet18", pretrained=False, strides=[32])
    ours = build_network(NetworkSettings(kind, backbone, dropout=0.0, **size, **settings), 3)
    with torch.no_grad():  # a norm that has learned, or two of them equal one
        ours.model.decoder.layernorm.weight.uniform_(0.2, 2.0)
        ours.model.decoder.layernorm.bias.normal_()
    config = copy.deepcopy(ours.config)
    config.auxiliary_loss = False
    plain = type(ours)(config)
    plain.model.backbone = copy.deepcopy(ours.model.backbone)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_the_loss_of_all_layers_changes_no_prediction(kind: str) -> None:
    ours, plain = detectors(kind)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, wanted = ours(images, labels=[TARGET] * 2), plain(images)
        torch.testing.assert_close(found.logits, wanted.logits)
        torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes)
        again = ours(images)
        assert torch.equal(again.logits, found.logits)
    layers = set_outputs(found)
    assert layers.logits_LNQK.shape[0] == 3
    torch.testing.assert_close(layers.logits_LNQK[-1], wanted.logits)


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_every_layer_is_what_a_shorter_decoder_would_say(kind: str) -> None:
    ours, plain = detectors(kind)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        layers = set_outputs(ours(images, labels=[TARGET] * 2))
        for last in (2, 1):
            plain.model.decoder.layers = plain.model.decoder.layers[:last]
            wanted = plain(images)
            torch.testing.assert_close(layers.logits_LNQK[last - 1], wanted.logits)
            torch.testing.assert_close(layers.boxes_LNQ4[last - 1], wanted.pred_boxes)


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_gradients_with_and_without_checkpointing(kind: str) -> None:
    if not detectors(kind)[0].supports_gradient_checkpointing:
        pytest.skip("this version of transformers has none for it")
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        ours, _ = detectors(kind, checkpointing=checkpointing)
        ours.train()(images, labels=[TARGET] * 2).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    assert gradients[0]["model.decoder.layernorm.weight"].abs().sum() > 0
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_hidden_states_deep_copies_and_a_forward_that_broke(kind: str) -> None:
    ours, plain = detectors(kind)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = plain(images, output_hidden_states=True)

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

        handle = ours.model.decoder.layers[1].register_forward_pre_hook(broken, with_kwargs=True)
        with pytest.raises(RuntimeError, match="broken"):
            ours(images)
        handle.remove()
        for model in (ours, copy.deepcopy(ours)):
            found = model(images, output_hidden_states=True)
            torch.testing.assert_close(found.logits, wanted.logits)
            torch.testing.assert_close(found.decoder_hidden_states, wanted.decoder_hidden_states)


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_tuples_are_refused_or_right(kind: str) -> None:
    ours, plain = detectors(kind)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if int(transformers.__version__.split(".")[0]) < 5:  # whose decoder then returns a tuple too
            with pytest.raises(ValueError, match="Expected return_dict=True"):
                ours(images, return_dict=False)
        else:
            torch.testing.assert_close(ours(images, return_dict=False)[0], plain(images).logits)


def test_inside_a_network_with_masks() -> None:
    torch.manual_seed(0)
    tiny = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=tiny, d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_queries=4, num_labels=2,
    )  # fmt: skip
    network = transformers.DetrForSegmentation(config).eval()
    with torch.no_grad():
        network.detr.model.decoder.layernorm.weight.uniform_(0.2, 2.0)
        images = torch.randn(1, 3, 64, 64)
        wanted = network(images).logits
        for part in network.modules():
            if hasattr(part, "config"):
                part.config.auxiliary_loss = True
        assert not torch.allclose(network(images).logits, wanted, atol=1e-3), "transformers' norm between the layers"
        normalize_copies(network)
        torch.testing.assert_close(network(images).logits, wanted)
