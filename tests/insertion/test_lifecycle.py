"""Models with the module inserted are copied, saved, compiled and checkpointed; after remove() they are exported."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchformer import Handle, handles, insert, remove

N, K = 4, 5
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def vit(**settings: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=K, **{**VIT, **settings})
    return model


def resnet() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", num_classes=K)
    return model


def images(n: int = N) -> Tensor:
    return torch.randn(n, 3, 32, 32)


@pytest.fixture
def trained() -> tuple[nn.Module, Handle]:
    """After a training pass, so that there is state to get wrong."""
    torch.manual_seed(0)
    model = net()
    handle = insert(model, after=["0", "2"], drop=0.0)
    model(torch.randn(N, 4)).sum().backward()
    return model, handle


def round_trip(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone(trained: tuple[nn.Module, Handle], how: str) -> None:
    model, handle = trained
    twin = round_trip(model, how)
    x = torch.randn(N, 4)
    expected = model(x)
    assert twin(x).equal(expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any()
    assert model(x).equal(expected)
    remove(twin)
    assert twin(x).shape == (N, 3)
    assert model(x).equal(expected)
    twin = round_trip(model, how)
    handle.remove()
    assert twin(x).equal(expected)
    assert model(x).shape == (N, 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_a_handle_of_its_own(trained: tuple[nn.Module, Handle], how: str) -> None:
    model, handle = trained
    assert handles(model) == [handle]
    twin = round_trip(model, how)
    [own] = handles(twin)
    assert own is not handle
    model.eval()  # the twin stays in training
    labels = torch.arange(N)
    assert own.expand(labels).shape == (2 * N,)
    assert handle.expand(labels) is labels
    assert own.split(twin(torch.randn(N, 4)))[1] is not None
    assert own.remove() is twin
    assert handles(twin) == []
    assert handles(model) == [handle]
    second = insert(model, before="3")
    assert handles(model) == [handle, second]
    assert handles(nn.Linear(2, 2)) == []


def test_a_copy_in_the_other_mode(trained: tuple[nn.Module, Handle]) -> None:
    model, _ = trained
    twin = copy.deepcopy(model).eval()
    x = torch.randn(N, 4)
    assert twin(x).shape == (N, 3)
    assert model(x).shape == (2 * N, 3)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "moving average"])
def test_averaged_models(trained: tuple[nn.Module, Handle], average: object) -> None:
    model, _ = trained
    averaged = AveragedModel(model, multi_avg_fn=average)  # type: ignore[arg-type]
    averaged.update_parameters(model)
    first = {name: p.clone() for name, p in averaged.module.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, first[name] + 0.5)
    x = torch.randn(N, 4)
    assert averaged.eval()(x).shape == (N, 3)
    assert remove(averaged.module)(x).shape == (N, 3)
    assert model(x).shape == (2 * N, 3)


def test_state_dict_round_trip(trained: tuple[nn.Module, Handle]) -> None:
    model, _ = trained
    other = net()
    insert(other, after=["0", "2"], drop=0.0)
    other.load_state_dict(model.state_dict())
    x = torch.randn(N, 4)
    assert other(x).equal(model(x))
    plain = net()
    with pytest.raises(RuntimeError, match="batchformer"):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(remove(model).state_dict())
    assert plain(x).equal(model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_type(trained: tuple[nn.Module, Handle], dtype: torch.dtype) -> None:
    model, _ = trained
    out = model.to(dtype)(torch.randn(N, 4, dtype=dtype))
    assert out.dtype == dtype
    assert out.shape == (2 * N, 3)
    assert out.isfinite().all()


def test_autocast(trained: tuple[nn.Module, Handle]) -> None:
    model, _ = trained
    x = torch.randn(N, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1)


def test_compiled_without_a_graph_break_in_both_modes_and_after_remove() -> None:
    """One model with all kinds of points: a first one, a later one, and one whose weights are in a holder."""
    model = vit(depth=1)
    tokens = insert(model, after=["patch_embed", "blocks.0"], drop=0.0)
    classifier = insert(model, before="auto", share=False, drop=0.0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (4, 6, 3):  # the second size compiles again, from then on sizes are symbols
        x = images(n)
        with torch.set_grad_enabled(n == 4):  # once: the backward graph takes most of the time
            got = compiled(x)
        assert got.shape[0] == 2 * n
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    for mode in (False, True):
        model.train(mode)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert compiled(x).shape[0] == (2 * n if mode else n)
    tokens.remove()
    classifier.remove()
    assert compiled(images()).shape == (N, K)


def test_maps_compiled_without_a_graph_break() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, K, 3))
    insert(model, after=["0", "3"], share=False, layout="BCHW", num_heads=1, drop=0.0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own, of whatever torch is there
def test_compiled_by_inductor() -> None:
    model = vit()
    insert(model, after="blocks.0", drop=0.0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = images()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_timms_own_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for enable in (False, True):
        model = vit().double()
        insert(model, after=["blocks.0", "blocks.1"], drop=0.0)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        # Two passes before one backward, of which the second has as many samples as the first has rows.
        sum(model(images(n).double()).square().sum() for n in (3, 6)).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert expected is not None, name
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("build", [vit, resnet])
def test_exported_after_remove(build: object, tmp_path: Path) -> None:
    model: nn.Module = build().eval()  # type: ignore[operator]
    x = images()
    plain = model(x)
    insert(model, before="auto")
    model.train()(x)
    running = copy.deepcopy(model.state_dict())
    remove(model).eval()
    expected = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in program.state_dict if "batchformer" in name]
    assert any("batchformer" in key for key in running)
    if build is vit:  # no batch statistics, so the training pass left no trace
        assert expected.equal(plain)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("build", [vit, resnet])
def test_onnx_after_remove(build: object, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model: nn.Module = build()  # type: ignore[operator]
    insert(model, before="auto")
    model(images())
    remove(model).eval()
    x = images()
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-3, atol=1e-4)
