"""Networks by name: shapes, sizes, width, and BatchFormer in front of the classifier."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from batchformer import insert, remove
from batchformer.tasks.image_classification.network import ImageClassifier
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


def build(label: str, seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    return build_model(num_classes=K, **NETWORKS[label])


def images_for(label: str, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, NETWORKS[label].get("in_channels", 3), 32, 32, generator=generator)


def train_rows(network: ImageClassifier, images: Tensor) -> Tensor:
    """The logits of a training step."""
    if isinstance(network, PaCo):
        output = network(images, images.flip(-1), torch.arange(len(images)) % K)
        assert isinstance(output, PaCoOutput)
        return output.logits
    logits: Tensor = network(images)
    return logits


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


@pytest.mark.parametrize("label", ["small", "ride small", "paco small"])  # resnet32 is the small one with more blocks
def test_dynamo_traces_the_network_in_one_graph(label: str) -> None:
    network, images = build(label), images_for(label)
    twin = copy.deepcopy(network)
    target = torch.arange(4) % K
    arguments = (images, images.flip(-1), target) if isinstance(network, PaCo) else (images,)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arguments), twin(*arguments)
    if isinstance(expected, PaCoOutput):
        assert torch.equal(network.get_buffer("queue.keys"), twin.get_buffer("queue.keys"))
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


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown kind 'rides'"):
        build_model("resnet32", 10, kind="rides")
