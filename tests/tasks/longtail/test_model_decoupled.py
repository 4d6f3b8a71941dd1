"""The second stage: what trains, what stays, and the arithmetic."""

import pytest
import torch
from torch import nn

from batchformer import insert
from batchformer.tasks.image_classification.network import ImageClassifier
from batchformer.tasks.longtail.decoupled import WeightScale, learn_weight_scale, retrain_classifier, tau_normalize
from batchformer.tasks.longtail.model import build_model

IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def network(kind: str = "plain", cosine: bool | None = None) -> ImageClassifier:
    torch.manual_seed(0)
    return build_model("small_resnet", 6, in_channels=1, kind=kind, cosine=cosine)


def one_step(model: ImageClassifier) -> set[str]:
    """Names of the entries of the state dict that a training step changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    model.train()(IMAGES).square().sum().backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", ["plain", "ride"])
def test_crt_starts_the_classifier_anew_and_leaves_backbone_and_statistics(kind: str) -> None:
    model = network(kind)
    old = [c.get_parameter("weight").clone() for c in model.classifiers()]
    assert retrain_classifier(model) is model
    new = [c.get_parameter("weight") for c in model.classifiers()]
    assert not any(torch.equal(weight, before) for weight, before in zip(new, old, strict=True))
    changed = one_step(model)
    expected = {"classifier.weight", "classifier.bias"} if kind == "plain" else {f"heads.{i}.weight" for i in range(3)}
    assert changed == expected  # no batch-norm statistics either


@pytest.mark.parametrize("kind", ["plain", "ride"])
def test_lws_learns_one_factor_a_class(kind: str) -> None:
    model = network(kind).eval()
    before = model(IMAGES)
    learn_weight_scale(model)
    torch.testing.assert_close(model(IMAGES), before)
    changed = one_step(model)
    assert changed == ({"classifier.scale"} if kind == "plain" else {f"heads.{i}.scale" for i in range(3)})


def test_weight_scale_scales_the_weights_and_not_the_bias() -> None:
    linear = nn.Linear(5, 3)
    scaled, x = WeightScale(linear), torch.randn(4, 5)
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
        expected = x @ (scaled.scale[:, None] * linear.weight).T + linear.bias
    torch.testing.assert_close(scaled(x), expected)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_normalisation_equals_the_loop_and_changes_a_copy(tau: float) -> None:
    model = network()
    linear = model.get_classifier()
    assert isinstance(linear, nn.Linear)
    before = linear.weight.clone()
    changed = tau_normalize(model, tau).get_classifier()
    assert isinstance(changed, nn.Linear)
    for row, old in zip(changed.weight.tolist(), before.tolist(), strict=True):
        length = sum(w * w for w in old) ** 0.5
        assert row == pytest.approx([w / length**tau for w in old], rel=1e-5)
    assert changed.bias.abs().sum() == 0
    assert torch.equal(linear.weight, before)
    assert linear.bias.abs().sum() > 0


def test_tau_normalisation_leaves_a_cosine_classifier() -> None:
    model = network(cosine=True).eval()
    assert torch.equal(tau_normalize(model, 0.7)(IMAGES), model(IMAGES))


def test_a_frozen_network_stays_frozen_and_batchformer_in_it_is_inactive() -> None:
    model = network()
    insert(model, before="auto", num_heads=1)
    retrain_classifier(model).train()
    assert model.training
    assert model.get_classifier().training  # type: ignore[union-attr]
    assert not any(m.training for m in model.backbone.modules())  # type: ignore[union-attr]
    assert model(IMAGES).shape == (4, 6)


def test_errors() -> None:
    model = learn_weight_scale(network())
    with pytest.raises(ValueError, match=r"linear or cosine classifier, got WeightScale"):
        learn_weight_scale(model)
    with pytest.raises(ValueError, match=r"got WeightScale"):
        tau_normalize(model)
