"""What `convert` writes predicts as the official networks do, which are written out here, backbone to boxes."""

import argparse
import itertools
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from batchformer import BatchFormer, cli

transformers = pytest.importorskip("transformers")
C, HEADS, FFN, K, QUERIES = 32, 8, 48, 4, 6
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def sine(at: Tensor) -> Tensor:
    """Numbers from 0 to 1 (...) -> C / 2 sines and cosines of each."""
    wave = 10000 ** (2 * (torch.arange(C // 2) // 2) / (C // 2))
    angles = at[..., None] * 2 * torch.pi / wave
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)


def positions(padding_BHW: Tensor) -> Tensor:
    real = (~padding_BHW).float()
    y, x = real.cumsum(1), real.cumsum(2)
    return torch.cat((sine(y / (y[:, -1:] + 1e-6)), sine(x / (x[:, :, -1:] + 1e-6))), -1)


class Mlp(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def feed_forward(part: Any, x: Tensor) -> Tensor:
    out: Tensor = part.linear2(F.relu(part.linear1(x)))
    return out


class Detr(nn.Module):
    """Names and equations of the official DETR; batch first."""

    classes = K + 1  # one for no object

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = nn.Module(), self.make_decoder()
        self.transformer.encoder.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(C, HEADS, FFN, 0.0, batch_first=True) for _ in range(2)
        )
        self.transformer.decoder.norm = nn.LayerNorm(C)
        norm = torchvision.ops.FrozenBatchNorm2d
        resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
        del resnet.avgpool, resnet.fc
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": resnet})])
        self.input_proj = nn.Conv2d(512, C, 1)
        self.query_embed = nn.Embedding(QUERIES, C)
        self.class_embed, self.bbox_embed = nn.Linear(C, self.classes), Mlp(C, C, C, 4)
        for parameter in self.parameters():  # nothing is 0 or 1, as norms and biases are in the beginning
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.2, 1.5)
        for norm in resnet.modules():
            if isinstance(norm, torchvision.ops.FrozenBatchNorm2d):
                for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    buffer.uniform_(0.2, 1.2)

    def make_decoder(self) -> nn.Module:
        decoder = nn.Module()
        decoder.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(C, HEADS, FFN, 0.0, batch_first=True) for _ in range(3)
        )
        return decoder

    def forward(self, images: Tensor, mask_BHW: Tensor, after_first: Any = None) -> tuple[Tensor, Tensor]:
        """``after_first``: what happens to the rows after the first encoder layer."""
        x = images
        for part in self.backbone[0]["body"].children():
            x = part(x)
        padding = ~F.interpolate(mask_BHW[None].float(), size=x.shape[-2:]).bool()[0]
        where, x, padding = positions(padding).flatten(1, 2), self.input_proj(x).flatten(2).mT, padding.flatten(1)
        for number, layer in enumerate(self.transformer.encoder.layers):
            keys = x + where
            x = layer.norm1(x + layer.self_attn(keys, keys, x, key_padding_mask=padding)[0])
            x = layer.norm2(x + feed_forward(layer, x))
            if number == 0 and after_first is not None:
                x, where, padding = torch.cat((x, after_first(x))), where.repeat(2, 1, 1), padding.repeat(2, 1)
        return self.decode(x, where, padding, self.query_embed.weight.expand(len(x), -1, -1))

    def decode(self, memory: Tensor, where: Tensor, padding: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        x, decoder = torch.zeros_like(query), self.transformer.decoder
        for part in decoder.layers:
            x = part.norm1(x + part.self_attn(x + query, x + query, x)[0])
            seen = part.multihead_attn(x + query, memory + where, memory, key_padding_mask=padding)[0]
            x = part.norm2(x + seen)
            x = part.norm3(x + feed_forward(part, x))
        x = decoder.norm(x)
        return self.class_embed(x), self.bbox_embed(x).sigmoid()


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class ConditionalDetr(Detr):
    """The decoder of the official Conditional DETR: where a query looks is a part of its own in the attention."""

    classes = K

    def make_decoder(self) -> nn.Module:
        decoder = nn.Module()
        decoder.layers = nn.ModuleList(self.make_layer(first=number == 0) for number in range(3))
        decoder.ref_point_head, decoder.query_scale = Mlp(C, C, 2), Mlp(C, C, C)
        return decoder

    def make_layer(self, first: bool) -> nn.Module:
        layer = nn.Module()
        names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
        names += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"] + ["ca_qpos"] * first
        for name in names:
            setattr(layer, f"{name}_proj", nn.Linear(C, C))
        layer.self_attn, layer.cross_attn = nn.Module(), nn.Module()
        layer.self_attn.out_proj, layer.cross_attn.out_proj = nn.Linear(C, C), nn.Linear(C, C)
        layer.linear1, layer.linear2 = nn.Linear(C, FFN), nn.Linear(FFN, C)
        layer.norm1, layer.norm2, layer.norm3 = (nn.LayerNorm(C) for _ in range(3))
        return layer

    def decode(self, memory: Tensor, where: Tensor, padding: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        x, decoder = torch.zeros_like(query), self.transformer.decoder
        reference = decoder.ref_point_head(query)
        center = torch.cat((sine(reference.sigmoid()[..., 1]), sine(reference.sigmoid()[..., 0])), -1)
        for number, part in enumerate(decoder.layers):
            scaled = center * (decoder.query_scale(x) if number else 1)
            q, k = part.sa_qcontent_proj(x) + part.sa_qpos_proj(query), part.sa_kcontent_proj(x)
            q, k, v = map(heads_of, (q, k + part.sa_kpos_proj(query), part.sa_v_proj(x)))
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = part.norm1(x + part.self_attn.out_proj(seen))
            q, k, k_where = part.ca_qcontent_proj(x), part.ca_kcontent_proj(memory), part.ca_kpos_proj(where)
            if number == 0:
                q, k = q + part.ca_qpos_proj(query), k + k_where
            q = torch.cat((heads_of(q), heads_of(part.ca_qpos_sine_proj(scaled))), -1)
            k = torch.cat((heads_of(k), heads_of(k_where)), -1)
            v, real = heads_of(part.ca_v_proj(memory)), ~padding[:, None, None]
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real).transpose(1, 2).flatten(2)
            x = part.norm2(x + part.cross_attn.out_proj(seen))
            x = part.norm3(x + feed_forward(part, x))
        x = decoder.norm(x)
        boxes = self.bbox_embed(x) + F.pad(reference, (0, 2))
        return self.class_embed(x), boxes.sigmoid()


OFFICIAL = {"DetrForObjectDetection": Detr, "ConditionalDetrForObjectDetection": ConditionalDetr}


def converted(official: nn.Module, name: str, folder: Path, **arguments: Any) -> tuple[Any, str]:
    """The network of the folder that the command writes, and the README beside it."""
    # The published runs have an auxiliary loss.
    given = argparse.Namespace(nheads=HEADS, aux_loss=True, **arguments)
    torch.save({"model": official.state_dict(), "args": given, "epoch": 1}, folder / "official.pth")
    assert cli.main(["convert", str(folder / "official.pth"), f"--out={folder / 'out'}"]) == 0
    model = getattr(transformers, name).from_pretrained(folder / "out").eval()
    return model, (folder / "out" / "README.md").read_text()


def code_below(readme: str, heading: str) -> str:
    """The indented lines of a part of a README."""
    lines = readme.partition(heading)[2].partition("\n\n")[2].partition("\n\n")[0]
    assert lines, f"no {heading!r} in the README"
    return textwrap.dedent(lines)


def scene() -> tuple[Tensor, Tensor]:
    """Two images, of which the second is smaller."""
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 60:], mask[1, :, 90:] = 0, 0
    return images * mask[:, None], mask


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_the_folder_predicts_as_the_official_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    official, (images, mask) = OFFICIAL[name]().eval(), scene()
    model, readme = converted(official, name, tmp_path)
    assert model.config.auxiliary_loss is False
    logits, boxes = official(images, mask)
    out = model(images, mask)
    torch.testing.assert_close(out.logits, logits, **CLOSE)
    torch.testing.assert_close(out.pred_boxes, boxes, **CLOSE)
    # With the loss of all layers transformers computes another network; the README says how to avoid that.
    model.config.auxiliary_loss = True
    assert (model(images, mask).logits - logits).abs().max() > 0.05
    model.config.auxiliary_loss = False
    exec(code_below(readme, "loss of all decoder layers"), {"model": model})
    assert model.config.auxiliary_loss is True
    out = model(images, mask, labels=[{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2)
    torch.testing.assert_close(out.logits, logits, **CLOSE)
    assert len(out.auxiliary_outputs) == 2


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_the_folder_and_batchformer_predict_as_the_official_network(name: str, tmp_path: Path) -> None:
    """Both streams; the layer after the first of the encoder is torch's own, over the batch."""
    torch.manual_seed(0)
    official, (images, mask) = OFFICIAL[name]().eval(), scene()
    mixing = nn.TransformerEncoderLayer(C, 4, C, 0.0)
    official.transformer.bf = mixing
    model, readme = converted(official, name, tmp_path, insert_idx=[0])
    for heading in ("loss of all decoder layers", "Training with BatchFormer"):
        exec(code_below(readme, heading), {"model": model})
    (module,) = [part for part in model.modules() if isinstance(part, BatchFormer)]
    module.train()  # the layer alone: the detector has a dropout of its own
    for part in module.modules():
        if hasattr(part, "drop"):
            part.drop = 0.0
    logits, boxes = official(images, mask, mixing)
    out = model(images, mask)
    torch.testing.assert_close(out.logits, logits, **CLOSE)
    torch.testing.assert_close(out.pred_boxes, boxes, **CLOSE)
    assert len(logits) == 4 and not torch.allclose(logits[:2], logits[2:], atol=1e-2)
