"""Published checkpoints, made of torch's own layers, which have the official names, become folders for transformers."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from batchformer import BatchFormer, cli
from batchformer.tasks.set_prediction.published.networks import build_published

transformers = pytest.importorskip("transformers")
C, K, QUERIES = 32, 5, 7


def head(out: int) -> nn.Module:
    mlp = nn.Module()
    mlp.layers = nn.ModuleList(nn.Linear(C, width) for width in (C, C, out))
    return mlp


def backbone(block: Any, blocks: list[int]) -> nn.Module:
    resnet = torchvision.models.ResNet(block, blocks)
    del resnet.fc
    return nn.ModuleList([nn.ModuleDict({"body": resnet})])


def detr(block: Any, blocks: list[int], heads: int = 8) -> nn.Module:
    model = nn.Module()
    model.transformer = nn.Transformer(C, heads, 2, 3, dim_feedforward=48, dropout=0.0, batch_first=True)
    model.transformer.encoder.norm = None
    model.backbone = backbone(block, blocks)
    model.input_proj = nn.Conv2d(512 * block.expansion, C, 1)
    model.query_embed = nn.Embedding(QUERIES, C)
    model.class_embed, model.bbox_embed = nn.Linear(C, K + 1), head(4)
    return model


def sampling(heads: int, levels: int, points: int) -> nn.Module:
    attention = nn.Module()
    attention.sampling_offsets = nn.Linear(C, heads * levels * points * 2)
    attention.attention_weights = nn.Linear(C, heads * levels * points)
    attention.value_proj, attention.output_proj = nn.Linear(C, C), nn.Linear(C, C)
    return attention


def deformable(refine: bool) -> nn.Module:
    """Four levels out of three maps, as published; ``refine``: a box head for each decoder layer."""
    model = detr(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    transformer: Any = model.transformer
    transformer.level_embed = nn.Parameter(torch.randn(4, C))
    transformer.reference_points = nn.Linear(C, 2)
    for layer in transformer.encoder.layers:
        layer.self_attn = sampling(8, 4, 2)
    for layer in transformer.decoder.layers:
        del layer.multihead_attn
        layer.cross_attn = sampling(8, 4, 3)
    transformer.decoder.norm = None
    widths = ((128, 1), (256, 1), (512, 1), (512, 3))
    model.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(w, C, k), nn.GroupNorm(32, C)) for w, k in widths)
    model.query_embed = nn.Embedding(QUERIES, 2 * C)
    model.class_embed = nn.ModuleList([nn.Linear(C, K)] * 3)
    model.bbox_embed = nn.ModuleList([head(4) for _ in range(3)] if refine else [head(4)] * 3)
    if refine:
        transformer.decoder.bbox_embed = model.bbox_embed
    return model


def content(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "args": argparse.Namespace(nheads=8, **arguments)}


def test_a_checkpoint_becomes_a_folder_for_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(content(detr(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1])), tmp_path / "detr.pth")
    assert cli.main(["convert", str(tmp_path / "detr.pth"), f"--out={tmp_path / 'detr'}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("detr: ") and "BatchFormer: none" in said
    assert sorted(path.name for path in (tmp_path / "detr").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    built = build_published(tmp_path / "detr.pth").model
    config = built.config
    assert (config.num_labels, config.num_queries, config.encoder_layers, config.decoder_layers) == (K, QUERIES, 2, 3)
    assert (config.encoder_ffn_dim, config.backbone_config.depths) == (48, [1, 2, 1, 1])
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "detr").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, built(images).logits)


@pytest.mark.parametrize("refine", [False, True])
def test_the_tensors_say_how_large_a_deformable_detector_is(refine: bool) -> None:
    model, report, insertion = build_published(content(deformable(refine)))
    assert report.complete and insertion is None
    config: Any = model.config
    assert (config.num_feature_levels, config.encoder_n_points, config.decoder_n_points) == (4, 2, 3)
    assert (config.with_box_refine, config.two_stage, config.num_labels) == (refine, False, K)
    assert config.backbone_config.out_features == ["stage2", "stage3", "stage4"]


def test_batchformer_comes_along(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    official = detr(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    official.transformer.bf = nn.TransformerEncoderLayer(C, 4, C, 0.5)
    torch.save(content(official, insert_idx=[1]), tmp_path / "v2.pth")
    assert cli.main(["convert", str(tmp_path / "v2.pth"), f"--out={tmp_path / 'v2'}"]) == 0
    readme = (tmp_path / "v2" / "README.md").read_text()
    model = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "v2")
    # What the README says, word by word.
    code = "\n".join(line.strip() for line in readme.partition("BatchFormer")[2].splitlines()[1:])
    exec(code, {"model": model})
    (module,) = [part for part in model.modules() if isinstance(part, BatchFormer)]
    assert torch.equal(module.layers[0].linear1.weight, official.transformer.bf.linear1.weight)
    assert "encoder.layers.1" in readme
    assert any("batchformer" in name for name in load_file(tmp_path / "v2" / "batchformer.safetensors"))


def test_what_cannot_be_converted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = content(detr(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))["model"]
    for name, state, expected in (
        ("other", {"fc.weight": torch.zeros(2, 2)}, "Expected a checkpoint of the official DETR"),
        ("headless", {k: v for k, v in whole.items() if "backbone" not in k}, "Expected a whole detr with a ResNet"),
        ("more", {**whole, "extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        assert cli.main(["convert", str(tmp_path / f"{name}.pth"), f"--out={tmp_path / name}"]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert cli.main(["convert", str(tmp_path / "nothing.pth"), f"--out={tmp_path / 'out'}"]) == 2


@pytest.mark.parametrize(
    "cut",
    [lambda whole: b"hello", lambda whole: b"", lambda whole: whole[: len(whole) // 2]],
    ids=["text", "empty", "cut"],
)
def test_a_damaged_file_is_said_to_be_one(cut: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.pth"
    torch.save({"model": {"transformer.level_embed": torch.zeros(4, C)}}, path)
    path.write_bytes(cut(path.read_bytes()))
    assert cli.main(["convert", str(path), f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"Expected a whole file of torch.save(), but '{path}' cannot be read" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_nothing_of_an_earlier_run_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BatchFormer's weights of another checkpoint would be loaded with this one's; a file of the user's stays."""
    official = detr(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    plain, out = content(official), tmp_path / "out"
    official.transformer.bf = nn.TransformerEncoderLayer(C, 4, C, 0.5)
    for name, holds in (("with", content(official)), ("plain", plain)):
        torch.save(holds, tmp_path / f"{name}.pth")
        assert cli.main(["convert", str(tmp_path / f"{name}.pth"), f"--out={out}"]) == 0
        said = capsys.readouterr().out
        assert (out / "batchformer.safetensors").exists() == ("batchformer.safetensors" in said) == (name == "with")
        (out / "notes.txt").touch()
    assert "notes.txt" not in said and "insert(" not in (out / "README.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
