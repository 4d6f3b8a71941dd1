"""Backbones and networks: shapes, sizes, width, and BatchFormer in front of the classifier."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer import insert, remove
from batchformer.tasks.image_classification.backbone import ResNet, create_backbone, stages
from batchformer.tasks.image_classification.network import CosineClassifier, LongTailNetwork
from batchformer.tasks.longtail.model import build_model
from batchformer.tasks.longtail.paco import PaCo, PaCoOutput

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet32": {"name": "resnet32"},
    "resnet32 grey": {"name": "resnet32", "in_channels": 1},
    "small": {"name": "small_resnet", "in_channels": 1},
    "small cosine": {"name": "small_resnet", "in_channels": 1, "cosine": True},
    "resnet10": {"name": "resnet10"},
    "resnet50": {"name": "resnet50"},
    "timm": {"name": "mobilenetv3_small_050"},
    "ride resnet32": {"name": "resnet32", "kind": "ride"},
    "ride small": {"name": "small_resnet", "in_channels": 1, "kind": "ride", "experts": 2},
    "ride resnet10": {"name": "resnet10", "kind": "ride"},
    "paco small": {"name": "small_resnet", "in_channels": 1, "kind": "paco", "queue_size": 16},
    "paco resnet10": {"name": "resnet10", "kind": "paco", "queue_size": 16},
}
K = 7


def build(label: str, seed: int = 0) -> LongTailNetwork:
    torch.manual_seed(seed)
    return build_model(num_classes=K, **NETWORKS[label])


def images_for(label: str, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, NETWORKS[label].get("in_channels", 3), 32, 32, generator=generator)


def train_rows(network: LongTailNetwork, images: Tensor) -> Tensor:
    """The logits of a training step."""
    if isinstance(network, PaCo):
        output = network(images, images.flip(-1), torch.arange(len(images)) % K)
        assert isinstance(output, PaCoOutput)
        return output.logits
    logits: Tensor = network(images)
    return logits


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("label", NETWORKS)
def test_shapes(label: str) -> None:
    network, images = build(label), images_for(label)
    experts = (NETWORKS[label].get("experts", 3),) if NETWORKS[label].get("kind") == "ride" else ()
    assert train_rows(network, images).shape == (4, *experts, K)
    assert network.eval()(images).shape == (4, *experts, K)


@pytest.mark.parametrize("label", NETWORKS)
def test_the_classifiers_see_the_pooled_feature(label: str) -> None:
    network, images = build(label), images_for(label)
    found = network.get_classifier()
    classifiers = found if isinstance(found, tuple) else (found,)
    seen: list[torch.Size] = []
    for classifier in classifiers:
        classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    train_rows(network, images)
    assert seen == [(4, network.num_features)] * len(classifiers)


@pytest.mark.parametrize("label", NETWORKS)
def test_batchformer_doubles_the_rows_in_training_and_is_nothing_in_eval(label: str) -> None:
    network, images = build(label), images_for(label)
    plain = network.eval()(images)
    handle = insert(network, before="auto", num_heads=1)
    assert torch.equal(network(images), plain)
    rows = train_rows(network.train(), images)
    assert len(rows) == 8
    assert not torch.allclose(rows[:4], rows[4:])
    rows.sum().backward()
    shared = [
        name for name, p in network.named_parameters() if "self_attn.in_proj_weight" in name and p.grad is not None
    ]
    assert len(shared) == 1  # one module, whatever the number of experts
    handle.remove()
    assert len(train_rows(network, images)) == 4


@pytest.mark.parametrize("label", ["resnet32", "small cosine", "ride small", "paco small"])
def test_the_plain_rows_are_those_of_the_network_without_batchformer(label: str) -> None:
    with_module, without, images = build(label), build(label), images_for(label)
    insert(with_module, before="auto", num_heads=1)
    torch.testing.assert_close(train_rows(with_module, images)[:4], train_rows(without, images))


@pytest.mark.parametrize("label", ["resnet32", "small", "ride small", "paco small"])
def test_removal_gives_back_the_keys_and_outputs(label: str) -> None:
    network, images = build(label).eval(), images_for(label)
    before, keys = network(images), list(network.state_dict())
    insert(network, before="auto", num_heads=1)
    remove(network)
    assert list(network.state_dict()) == keys
    assert torch.equal(network(images), before)


@pytest.mark.parametrize("label", ["resnet32", "small", "ride small", "paco small", "resnet10"])
def test_copies_and_pickles_are_independent_and_equal(label: str) -> None:
    network, images = build(label).eval(), images_for(label)
    expected = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(network(images), expected)


@pytest.mark.parametrize("label", ["resnet32", "small", "ride small", "paco small"])
def test_dynamo_traces_the_network_in_one_graph(label: str) -> None:
    network, images = build(label), images_for(label)
    twin = copy.deepcopy(network)
    target = torch.arange(4) % K
    arguments = (images, images.flip(-1), target) if isinstance(network, PaCo) else (images,)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arguments), twin(*arguments)
    if isinstance(expected, PaCoOutput):
        assert torch.equal(network.get_buffer("queue"), twin.get_buffer("queue"))
        found, expected = found.anchors, expected.anchors
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", ["resnet32", "small", "small cosine", "ride small", "paco small"])
def test_bf16_autocast_and_channels_last_stay_near_fp32(label: str) -> None:
    network, images = build(label).eval(), images_for(label)
    expected = network(images)
    network = network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(images.contiguous(memory_format=torch.channels_last)).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_resnet32_has_the_published_size_and_no_shortcut_parameters() -> None:
    network = build_model("resnet32", 10)
    assert parameters(network) == 464_154  # He et al. 2016, table 6: 0.46 M
    assert network.num_features == 64
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 31  # and the classifier: 32 layers
    assert {m.kernel_size for m in convolutions} == {(3, 3)}


def test_option_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    shortcut = create_backbone("resnet32").get_submodule("layer2.0.downsample")
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "theirs"), [("resnet50", "resnet50"), ("resnext50", "resnext50_32x4d"), ("resnet18", "resnet18")]
)
def test_timm_backbones_equal_timms(name: str, theirs: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=10).eval()
    ours = build_model(name, 10).eval()
    assert parameters(ours) == parameters(reference)
    backbone = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    assert not ours.backbone.load_state_dict(backbone, strict=True).missing_keys  # type: ignore[union-attr]
    ours.get_classifier().load_state_dict(reference.fc.state_dict())  # type: ignore[union-attr]
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), reference(images))


def test_resnet10_is_a_resnet18_with_one_block_a_stage() -> None:
    ours = create_backbone("resnet10").state_dict()
    theirs = timm.create_model("resnet18", num_classes=0).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if k.split(".")[1] != "1"}


@pytest.mark.parametrize(
    ("name", "full", "reduced"),
    [("resnet32", 64, 48), ("small_resnet", 64, 48), ("resnet10", 512, 384), ("resnet50", 2048, 1536)],
)
def test_reduced_width_is_rides(name: str, full: int, reduced: int) -> None:
    assert create_backbone(name).num_features == full
    backbone = create_backbone(name, reduced=True).eval()
    assert backbone.num_features == reduced
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, reduced)
    shared, _ = stages(backbone)
    full_shared, _ = stages(create_backbone(name))
    assert parameters(shared) == parameters(full_shared)  # only the experts' stages are narrower


def test_resnext50_is_reduced_to_1536_features() -> None:
    assert create_backbone("resnext50", reduced=True).num_features == 1536


@pytest.mark.parametrize("name", ["resnet32", "small_resnet", "resnet10", "resnet18"])
def test_stages_compose_to_the_backbone(name: str) -> None:
    backbone, images = create_backbone(name).eval(), torch.randn(2, 3, 32, 32)
    shared, own = stages(backbone)
    assert torch.equal(own(shared(images)), backbone(images))


def test_cosine_classifier_ignores_length_and_scales_by_30() -> None:
    classifier, x = CosineClassifier(5, 3), torch.randn(4, 5)
    expected = [[30 * float(F.cosine_similarity(f, w, dim=0)) for w in classifier.weight.detach()] for f in x]
    torch.testing.assert_close(classifier(x), torch.tensor(expected))
    torch.testing.assert_close(classifier(100 * x), classifier(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(x).dtype == torch.float32
        torch.testing.assert_close(classifier(x), torch.tensor(expected))
    classifier(torch.zeros(1, 5)).sum().backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Unknown backbone 'resnet5O'. Did you mean .*resnet50"):
        create_backbone("resnet5O")
    with pytest.raises(ValueError, match="Unknown backbone 'resnet51'") as told:  # timm has the name that we have
        create_backbone("resnet51")
    near = str(told.value).partition("Did you mean ")[2].partition("?")[0].split(", ")
    assert len(near) == len(set(near)) == 3
    with pytest.raises(ValueError, match=r"Reduced width is defined for .*not for 'resnet18'"):
        create_backbone("resnet18", reduced=True)
    with pytest.raises(ValueError, match=r"no pretrained weights for 'resnet32'"):
        create_backbone("resnet32", pretrained=True)
    with pytest.raises(ValueError, match=r"Experts share the first stages of a ResNet; MobileNetV3 has no such split"):
        stages(create_backbone("mobilenetv3_small_050"))
    with pytest.raises(ValueError, match=r"Unknown kind 'rides'"):
        build_model("resnet32", 10, kind="rides")
    with pytest.raises(ValueError, match=r"as many depths as widths"):
        ResNet((1, 1), (8,))


def test_missing_pretrained_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"weights of 'resnet50' could not be loaded.*no route.*pretrained=False"):
        create_backbone("resnet50", pretrained=True)
