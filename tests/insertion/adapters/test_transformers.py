"""Models of transformers and their peculiarities. Runs with 4.57 and with 5."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer import describe, insert
from batchformer.core.streams import MixedStream
from batchformer.insertion.insert import insert_module

transformers = pytest.importorskip("transformers")

N, K = 4, 5
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": K,
}


class Copy(MixedStream):
    def mix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return x


def vit(**settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, **settings}))


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 3, 32, 32)


def layer_names(model: nn.Module) -> list[str]:
    """The transformer layers, which are called otherwise in 4.57 and in 5."""
    return [name for name, m in model.named_modules() if type(m).__name__.endswith("Layer") and name[-1].isdigit()]


def test_labels_are_doubled_once_by_name_and_by_position() -> None:
    model = vit().train()
    x, labels = images(), torch.arange(N)
    insert(model, before="auto", drop=0.0)
    out = model(x, labels=labels)
    assert out.logits.shape == (2 * N, K)
    expected = nn.functional.cross_entropy(out.logits, labels.repeat(2))
    torch.testing.assert_close(out.loss, expected)
    assert "labels, num_items_in_batch of the model are doubled" in str(describe(model))
    # By position: after the images, wherever this version has them.
    between = list(inspect.signature(type(model).forward).parameters).index("labels") - 2
    torch.testing.assert_close(model(x, *[None] * between, labels).loss, expected)


@pytest.mark.parametrize("count", [2 * N, torch.tensor(2 * N)], ids=["number", "tensor"])
def test_the_trainers_count_of_samples_follows(count: object) -> None:
    """With gradient accumulation the Trainer has the summed loss divided by the samples of all small batches."""
    model = vit().train()
    x, labels = images(), torch.arange(N)
    expected = model(x, labels=labels, num_items_in_batch=count).loss
    insert_module(model, lambda width, layout: Copy(), before="auto")  # both halves equal: the loss must not change
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=count).loss, expected)


def test_loss_in_eval_and_with_a_single_stream() -> None:
    model = vit()
    x, labels = images(), torch.arange(N)
    plain = model.eval()(x, labels=labels)
    handle = insert(model, before="auto")
    got = model(x, labels=labels)
    assert got.loss.equal(plain.loss)
    assert got.logits.equal(plain.logits)
    handle.remove()
    insert(model, before="auto", mode="single_stream")
    out = model.train()(x, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))


def test_two_insertions_double_the_labels_once() -> None:
    model = vit().train()
    insert(model, before="auto")
    insert(model, after=layer_names(model)[1])
    out = model(images(), labels=torch.arange(N))
    assert out.logits.shape == (2 * N, K)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, torch.arange(N).repeat(2)))


def test_tuples_instead_of_outputs() -> None:
    model = vit().train()
    insert(model, before="auto")
    loss, logits = model(images(), labels=torch.arange(N), return_dict=False)[:2]
    assert logits.shape == (2 * N, K)
    assert loss.dim() == 0


def test_split_takes_model_outputs() -> None:
    model = vit().train()
    handle = insert(model, before="auto")
    plain, mixed = handle.split(model(images()))
    assert type(plain) is type(mixed) is type(model(images()))
    assert plain.logits.shape == mixed.logits.shape == (N, K)


def build(name: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, name)(getattr(transformers, config)(**{**VIT, **settings}))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViTForImageClassification", "ViTConfig"),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        ("BeitForImageClassification", "BeitConfig"),
        ("Dinov2ForImageClassification", "Dinov2Config"),
    ],
)
def test_tokens_of_plain_transformers(name: str, config: str) -> None:
    model = build(name, config).train()
    handle = insert(model, after=layer_names(model)[1], drop=0.0)
    out = model(images())
    assert out.logits.shape == (2 * N, K)
    out.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.modules[0].parameters())


def test_tokens_in_a_block_of_swin() -> None:
    settings = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 2]}
    config = transformers.SwinConfig(num_heads=[1, 2], num_labels=K, **settings)
    model = transformers.SwinForImageClassification(config).train()
    insert(model, after="swin.encoder.layers.1.blocks.0")
    assert model(images()).logits.shape == (2 * N, K)


def test_maps_of_a_convolutional_network() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_labels=K
    )
    model = transformers.ResNetForImageClassification(config).train()
    insert(model, after="resnet.encoder.stages.2", layout="BCHW")
    assert model(images(), labels=torch.arange(N)).logits.shape == (2 * N, K)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for enable in (False, True):
        model = vit(hidden_dropout_prob=0.0).train().double()
        names = layer_names(model)
        insert(model, after=[names[0], names[1]], drop=0.0)
        if enable:
            # Version 5 gave it another name, and its argument as well.
            switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            switch({"use_reentrant": reentrant})
        x = images().double()
        sum(model(part, labels=torch.arange(len(part))).loss for part in (x[:2], x)).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert expected is not None, name
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-11)


def test_a_wrapped_timm_model() -> None:
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=K,
        model_args={"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
    )
    model = transformers.TimmWrapperForImageClassification(config).train()
    handle = insert(model, before="auto")
    assert [point.name for point in handle.points] == ["timm_model.head"]
    assert model(images(), labels=torch.arange(N)).logits.shape == (2 * N, K)


def test_saved_and_loaded_after_remove(tmp_path: Any) -> None:
    model = vit().eval()
    x = images()
    plain = model(x).logits
    handle = insert(model, before="auto")
    handle.remove()
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert again(x).logits.equal(plain)


def test_other_tasks_are_refused_with_candidates() -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForTokenClassification(config)
    with pytest.raises(ValueError, match=r"not one of transformers' image classifiers.*'classifier'\]"):
        insert(model, before="auto")


def test_without_labels_there_is_no_classifier() -> None:
    with pytest.raises(ValueError, match="num_labels=0 leaves none"):
        insert(vit(num_labels=0), before="auto")


def test_own_models_offer_their_classifier() -> None:
    class Mine(transformers.PreTrainedModel):  # type: ignore[name-defined,misc]
        config_class = transformers.ViTConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.trunk = nn.Linear(4, 8)
            self.top = nn.Linear(8, K)

        def get_classifier(self) -> nn.Module:
            return self.top

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            out: Tensor = self.top(self.trunk(x))
            return out

    model = Mine(transformers.ViTConfig())
    assert [point.name for point in insert(model, before="auto").points] == ["top"]
    assert model(torch.randn(N, 4)).shape == (2 * N, K)
