"""Models of torchvision and their peculiarities."""

import pytest
import torch
from torch import Tensor, nn

from batchformer import describe, insert

models = pytest.importorskip("torchvision.models")

N, K = 4, 5


def images(size: int = 32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 3, size, size)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_segmentation_is_refused(name: str) -> None:
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=K, aux_loss=False)
    with pytest.raises(ValueError, match="does not classify images"):
        insert(model, before="auto")


def test_detectors_are_refused() -> None:
    model = models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=K)
    with pytest.raises(ValueError, match="does not classify images"):
        insert(model, before="auto")


def test_a_classifier_that_was_taken_away() -> None:
    model = models.resnet18()
    model.fc = nn.Identity()
    with pytest.raises(ValueError, match="0 of its modules .* have parameters"):
        insert(model, before="auto")


def test_two_classifiers_are_ambiguous() -> None:
    model = models.resnet18(num_classes=K)
    model.head = nn.Linear(512, 2)
    with pytest.raises(ValueError, match=r"2 of its modules .* one of \['fc', 'head'\]"):
        insert(model, before="auto")


def test_derived_classes() -> None:
    class Mine(models.ResNet):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=K)

    assert [point.name for point in insert(Mine(), before="auto").points] == ["fc"]

    class Offers(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(512, K)

        def get_classifier(self) -> nn.Module:
            return self.other

    assert [point.name for point in insert(Offers(), before="auto").points] == ["other"]


def googlenet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = models.googlenet(num_classes=K, init_weights=False, dropout=0.0, dropout_aux=0.0)
    return model


def inception() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = models.inception_v3(num_classes=K, init_weights=False, dropout=0.0)
    model.AuxLogits.conv1.conv = nn.Conv2d(128, 768, 1, bias=False)  # type: ignore[union-attr]  # for small images
    return model


AUXILIARY = {"googlenet": (googlenet, 64, ["aux1", "aux2"]), "inception_v3": (inception, 107, ["AuxLogits"])}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_outputs_have_two_equal_halves(name: str) -> None:
    build, size, names = AUXILIARY[name]
    model = build().double()  # type: ignore[operator]
    x = images(size).double()
    plain_outputs = model(x)
    handle = insert(model, before="auto", drop=0.0)
    assert set(handle.plan.doubled_inputs) == set(names)
    plain, mixed = handle.split(model(x))
    assert type(plain) is type(plain_outputs)
    for got, expected in zip(plain, plain_outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(mixed.logits, plain.logits)
    for one, other in zip(plain[1:], mixed[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    for part in names:
        assert f"x of '{part}' are doubled" in str(describe(model))
    handle.remove()
    assert [out.shape[0] for out in model(x)] == [N] * (1 + len(names))
    model.eval()
    insert(model, before="auto")
    assert model(x).shape == (N, K)


@pytest.mark.parametrize(
    ("point", "doubled"),
    [("inception3a", []), ("inception4a", []), ("inception4b", ["aux1"]), ("inception5a", ["aux1", "aux2"])],
)
def test_auxiliary_heads_after_the_point_see_doubled_rows_already(point: str, doubled: list[str]) -> None:
    model = googlenet()
    width = {"inception3a": 256, "inception4a": 512, "inception4b": 512, "inception5a": 832}[point]
    handle = insert(model, after=point, layout="BCHW", dim=width)
    assert sorted(handle.plan.doubled_inputs) == doubled
    assert [out.shape for out in model(images(64))] == [(2 * N, K)] * 3


def test_single_stream_leaves_auxiliary_heads_alone() -> None:
    model = googlenet()
    insert(model, before="auto", mode="single_stream")
    assert [out.shape for out in model(images(64))] == [(N, K)] * 3


def test_tokens_of_a_vision_transformer() -> None:
    model = models.VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=K)
    insert(model, after="encoder.layers.encoder_layer_*", share=False)
    assert model(images()).shape == (2 * N, K)


def test_maps_of_swin_say_which_layout_and_take_it() -> None:
    model = models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=K)
    handle = insert(model, after="features.1")
    with pytest.raises(ValueError, match=r"got \(4, 8, 8, 16\). Flatten the map or pass layout='BHWC'"):
        model(images())
    handle.remove()
    insert(model, after="features.1", layout="BHWC")
    assert model(images()).shape == (2 * N, K)


def test_maps_of_a_convolutional_network() -> None:
    model = models.resnet18(num_classes=K)
    insert(model, after="layer4", layout="BCHW")
    assert model(images()).shape == (2 * N, K)
