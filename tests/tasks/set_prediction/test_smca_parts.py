"""SMCA's parts against plain loops in fp64: prior, positions, co-attention, scale selection, encoder layers."""

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.smca import SmcaConfig
from batchformer.tasks.set_prediction.smca.attention import Attention
from batchformer.tasks.set_prediction.smca.backbone import SmcaBackbone, freeze
from batchformer.tasks.set_prediction.smca.decoder import SmcaDecoder, SmcaDecoderLayer, SpatialPrior
from batchformer.tasks.set_prediction.smca.encoder import SmcaEncoderLayer
from batchformer.tasks.set_prediction.smca.prior import log_gaussian, sine_positions, valid_size

SCALES = ("fixed", "single", "width_height")
HEADS = ("independent", "shared")
C, H, Q = 8, 2, 3
# Two images on three levels; of the second image a part is padding.
SHAPES = ((4, 6), (2, 3), (1, 2))
VALID = (((4, 6), (2, 3), (1, 2)), ((3, 4), (2, 2), (1, 1)))  # rows, columns


def config(levels: int = 1, **changes: Any) -> SmcaConfig:
    small = {"d_model": C, "encoder_attention_heads": H, "decoder_attention_heads": H, "num_queries": Q}
    small |= {"decoder_ffn_dim": 16, "encoder_ffn_dim": 16, "decoder_layers": 2, "num_feature_levels": levels}
    return SmcaConfig(**{**small, **changes})


def random_parameters(module: nn.Module) -> Any:
    """A module in fp64 and eval mode none of whose parameters is a special value."""
    torch.manual_seed(1)
    module.double().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(levels: int) -> list[Tensor]:
    found = []
    for level in range(levels):
        mask = torch.zeros(2, *SHAPES[level], dtype=torch.bool)
        for b in range(2):
            rows, columns = VALID[b][level]
            mask[b, :rows, :columns] = True
        found.append(mask)
    return found


def linear(layer: nn.Linear, x: Tensor) -> list[float]:
    return [
        float(sum(w * v for w, v in zip(row, x, strict=True)) + b)
        for row, b in zip(layer.weight, layer.bias, strict=True)
    ]


def expected_log_prior(prior: SpatialPrior, query: Tensor, reference: Tensor, level: int) -> Tensor:
    """The paper's equations, number by number: (B, H, Q, cells)."""
    rows, columns = SHAPES[level]
    out = torch.empty(2, H, Q, rows * columns, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            for q in range(Q):
                offsets = [0.0] * (2 * H) if prior.offset is None else linear(prior.offset, query[b, q])
                inverse = [1.0] if prior.inverse_extent is None else linear(prior.inverse_extent, query[b, q])
                own = h if prior.heads > 1 else 0
                of_head = len(inverse) // prior.heads if prior.inverse_extent is not None else 0
                x_inverse, y_inverse = inverse[own * of_head], inverse[own * of_head + (1 if of_head == 2 else 0)]
                valid_rows, valid_columns = VALID[b][level]
                x_center = valid_columns / (1 + math.exp(-float(reference[b, q, 0]))) + offsets[2 * h]
                y_center = valid_rows / (1 + math.exp(-float(reference[b, q, 1]))) + offsets[2 * h + 1]
                for i in range(rows):
                    for j in range(columns):
                        gaussian = math.exp(
                            -((j + 0.5 - x_center) ** 2) * x_inverse**2 / prior.beta
                            - (i + 0.5 - y_center) ** 2 * y_inverse**2 / prior.beta
                        )
                        out[b, h, q, i * columns + j] = math.log(gaussian)
    return out


def expected_attention(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (B, Q, C) and weights (B, H, Q, S) of one softmax over the keys that are allowed (B, S)."""
    images, queries, keys, width = query.shape[0], query.shape[1], key.shape[1], C // H
    out = torch.zeros(images, queries, C, dtype=torch.float64)
    weights = torch.zeros(images, H, queries, keys, dtype=torch.float64)
    for b in range(images):
        q_rows = [linear(attention.q_proj, row) for row in query[b]]
        k_rows = [linear(attention.k_proj, row) for row in key[b]]
        v_rows = [linear(attention.v_proj, row) for row in value[b]]
        for h in range(H):
            part = range(h * width, (h + 1) * width)
            for q in range(queries):
                scores = {}
                for s in range(keys):
                    if allowed[b, s]:
                        dot = sum(q_rows[q][c] * k_rows[s][c] for c in part) / math.sqrt(width)
                        scores[s] = math.exp(dot + (0.0 if bias is None else float(bias[b, h, q, s])))
                for s, score in scores.items():
                    weights[b, h, q, s] = score / sum(scores.values())
                    for c in part:
                        out[b, q, c] += float(weights[b, h, q, s]) * v_rows[s][c]
    projected = [[linear(attention.o_proj, out[b, q]) for q in range(queries)] for b in range(images)]
    return torch.tensor(projected, dtype=torch.float64), weights


def test_the_gaussian_is_the_papers() -> None:
    center = torch.tensor([2.0, 0.7], dtype=torch.float64).view(1, 1, 1, 2)
    inverse = torch.tensor([0.5, -2.0], dtype=torch.float64).view(1, 1, 1, 2)  # s = 2 and -1/2: only s^2 counts
    found = log_gaussian(center, inverse, (2, 3), beta=3.0).exp().view(2, 3)
    for i in range(2):
        for j in range(3):
            expected = math.exp(-((j + 0.5 - 2.0) ** 2) / (3.0 * 2**2) - (i + 0.5 - 0.7) ** 2 / (3.0 * 0.5**2))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_far_from_the_center_the_logarithm_stays_finite() -> None:
    far = log_gaussian(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 10.0), (1, 200), beta=1.0)
    assert far.min() < -1e5 and far.isfinite().all()  # exp of it is 0 in every format


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scale", SCALES)
def test_prior_of_every_query_head_and_level(scale: str, heads: str) -> None:
    prior = random_parameters(SpatialPrior(config(prior_scale=scale, prior_heads=heads, prior_beta=5.0)))
    query, reference = draw(2, Q, C), draw(2, Q, 2, seed=1)
    sizes = torch.stack([valid_size(mask) for mask in masks(3)], 1)
    for level, found in enumerate(prior(query, reference, sizes, SHAPES)):
        expected = expected_log_prior(prior, query, reference, level)
        assert found.shape[1] == (H if heads == "independent" else 1)
        assert torch.allclose(found.expand_as(expected), expected, atol=1e-12)


def test_half_precision_keeps_the_positions() -> None:
    prior = SpatialPrior(config(prior_scale="fixed", prior_heads="shared")).bfloat16()
    reference, sizes = torch.full((1, 1, 2), 0.4), torch.ones(1, 1, 2)
    query = torch.zeros(1, 1, C)
    (low,) = prior(query.bfloat16(), reference, sizes, ((3, 100),))
    (full,) = prior.float()(query, reference, sizes, ((3, 100),))
    assert low.dtype == torch.float32 and torch.equal(low, full)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("heads", HEADS)
def test_co_attention_of_a_decoder_layer(levels: int, scale: str, heads: str) -> None:
    layer = random_parameters(SmcaDecoderLayer(config(levels, prior_scale=scale, prior_heads=heads)))
    shapes = SHAPES[:levels]
    tokens = sum(rows * columns for rows, columns in shapes)
    states, queries, reference = draw(2, Q, C), draw(2, Q, C, seed=1), draw(2, Q, 2, seed=2)
    memory, positions = draw(2, tokens, C, seed=3), draw(2, tokens, C, seed=4)
    allowed = torch.cat([mask.flatten(1) for mask in masks(levels)], 1)
    sizes = torch.stack([valid_size(mask) for mask in masks(levels)], 1)
    arguments = (states, queries, memory, allowed, positions, reference, sizes, shapes)
    output, weights = layer(*arguments, True)

    predictor = layer.prior_layer_norm(states + queries)
    everyone = torch.ones(2, Q, dtype=torch.bool)
    attended, _ = expected_attention(layer.self_attn, states + queries, states + queries, states, None, everyone)
    middle = layer.self_attn_layer_norm(states + attended)
    total, expected_weights, at = torch.zeros(2, Q, C, dtype=torch.float64), [], 0
    for level, (rows, columns) in enumerate(shapes):
        part = slice(at, at := at + rows * columns)
        bias = expected_log_prior(layer.prior, predictor, reference, level)
        key = (memory + positions)[:, part]
        attended, own = expected_attention(
            layer.encoder_attn, middle + queries, key, memory[:, part], bias, allowed[:, part]
        )
        for b in range(2):
            for q in range(Q):
                alpha = 1.0
                if levels > 1:
                    exps = [math.exp(x) for x in linear(layer.scale_selection, predictor[b, q])]
                    alpha = exps[level] / sum(exps)
                total[b, q] += alpha * attended[b, q]
                own[b, :, q] *= alpha
        expected_weights.append(own)
    assert torch.allclose(weights, torch.cat(expected_weights, -1), atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[~allowed[:, None, None].expand_as(weights)] == 0).all()
    middle = layer.encoder_attn_layer_norm(middle + total)
    expected = layer.final_layer_norm(middle + layer.mlp(middle))
    assert torch.allclose(output, expected, atol=1e-6)
    assert torch.allclose(layer(*arguments), output, atol=1e-12)  # without weights, another path of torch


@pytest.mark.parametrize("attention", ["intra_scale", "multi_scale"])
def test_encoder_layers_look_within_a_scale_or_across(attention: str) -> None:
    layer = random_parameters(SmcaEncoderLayer(config(3), attention))
    tokens = sum(rows * columns for rows, columns in SHAPES)
    x, positions = draw(2, tokens, C), draw(2, tokens, C, seed=1)
    allowed = torch.cat([mask.flatten(1) for mask in masks(3)], 1)
    level_of = [level for level, (rows, columns) in enumerate(SHAPES) for _ in range(rows * columns)]
    attended = torch.empty_like(x)
    for s in range(tokens):
        seen = [t for t in range(tokens) if attention == "multi_scale" or level_of[t] == level_of[s]]
        query, key = (x + positions)[:, s : s + 1], (x + positions)[:, seen]
        attended[:, s] = expected_attention(layer.self_attn, query, key, x[:, seen], None, allowed[:, seen])[0][:, 0]
    middle = layer.self_attn_layer_norm(x + attended)
    expected = layer.final_layer_norm(middle + layer.mlp(middle))
    assert torch.allclose(layer(x, allowed, positions, SHAPES), expected, atol=1e-10)
    assert torch.allclose(layer(x, allowed.long(), positions, SHAPES), expected, atol=1e-10)  # a mask of 0 and 1


def test_one_level_is_one_scale() -> None:
    intra, multi = SmcaEncoderLayer(config(), "intra_scale").eval(), SmcaEncoderLayer(config(), "multi_scale").eval()
    multi.load_state_dict(intra.state_dict())
    x = torch.randn(2, 6, C)
    assert torch.equal(intra(x, None, None, ((2, 3),)), multi(x, None))


def test_the_reference_is_common_to_layers_and_follows_the_query_alone() -> None:
    decoder = random_parameters(SmcaDecoder(config()))
    queries, memory = draw(2, Q, C), draw(2, 24, C, seed=1)
    queries[1] = queries[0]
    sizes = torch.ones(2, 1, 2, dtype=torch.float64)
    found = decoder(torch.zeros_like(queries), queries, memory, torch.zeros_like(memory), SHAPES[:1], sizes)
    assert torch.equal(found.reference_logits[0], found.reference_logits[1])
    assert not torch.allclose(found.last_hidden_state[0], found.last_hidden_state[1])  # the images differ
    assert torch.equal(found.intermediate_hidden_states[-1], found.last_hidden_state)


def test_sine_positions_equal_a_loop() -> None:
    mask = masks(1)[0]
    found = sine_positions(mask, 8, temperature=100.0)
    for b, (rows, columns) in enumerate(level[0] for level in VALID):
        for i in range(rows):
            for j in range(columns):
                expected = []
                for part in ((i + 1) / rows, (j + 1) / columns):
                    for wave in (1.0, 100.0**0.5):
                        angle = 2 * math.pi * part / wave
                        expected += [math.sin(angle), math.cos(angle)]
                assert found[b, i * 6 + j].tolist() == pytest.approx(expected, abs=1e-5)


NAMES = {
    "transformers": ["embedder.c", "encoder.stages.0.c", "encoder.stages.1.c"],
    "timm resnet": ["conv1", "layer1.0.c", "layer2.0.c"],
    "timm efficientnet": ["conv_stem", "blocks.0.0.c", "blocks.1.0.c"],
    "timm flattened": ["stem_0", "stages_0.c", "stages_1.c"],
}


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("parts", [0, 1, 2, 3, 9])
def test_freezing_counts_stem_and_stages_by_name(layout: str, parts: int) -> None:
    network = nn.Module()
    for name in NAMES[layout]:
        at = network
        *path, last = name.split(".")
        for step in path:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.add_module(last, nn.Conv2d(1, 1, 1, bias=False))
    freeze(network, parts)
    assert [p.requires_grad for p in network.parameters()] == [i >= parts for i in range(3)]


def test_freezing_what_has_no_stages_is_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    freeze(network, 0)
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"got a Sequential without them. Set freeze_backbone_at=0"):
        freeze(network, 2)
    with pytest.raises(ValueError, match="Expected freeze_backbone_at to be 0 or more, got -1"):
        freeze(network, -1)


@pytest.mark.parametrize("dilation", [False, True])
def test_what_trains_of_resnet50(dilation: bool) -> None:
    """The paper's setting: convolutions of stages 2 to 4. Transformers' own count here is 0 in version 5."""
    backbone = SmcaBackbone(SmcaConfig(dilation=dilation))
    assert sum(p.numel() for p in backbone.parameters()) == 23_508_032
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 23_232_512
    assert backbone.intermediate_channel_sizes == [2048]
    backbone.train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and not any(m.training for m in norms)
    mask = torch.ones(1, 64, 96)
    mask[:, :, 70:] = 0
    ((found, small),) = backbone(torch.zeros(1, 3, 64, 96), mask)
    assert found.shape[-2:] == ((4, 6) if dilation else (2, 3))
    assert small.shape == (1, *found.shape[-2:])
    assert small[0, 0].tolist() == ([True] * 5 + [False] if dilation else [True] * 3)


def test_settings_follow_the_paper() -> None:
    single, several = SmcaConfig(), SmcaConfig(num_feature_levels=3)
    assert (single.encoder_layers, single.encoder_ffn_dim, single.decoder_ffn_dim) == (6, 2048, 2048)
    assert (several.encoder_layers, several.encoder_ffn_dim, several.decoder_ffn_dim) == (5, 1024, 1024)
    assert several.encoder_attention == ["intra_scale"] * 2 + ["multi_scale"] + ["intra_scale"] * 2
    assert single.num_queries == 300 and single.hidden_size == 256 and single.num_attention_heads == 8
    assert several.backbone_config.out_features == ["stage3", "stage4"]
    again = SmcaConfig.from_dict(several.to_dict())
    assert again.to_dict() == several.to_dict() and pickle.loads(pickle.dumps(several)).to_dict() == several.to_dict()
    assert SmcaConfig(encoder_attention=["multi_scale"] * 2, num_feature_levels=2).encoder_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_scale": "double"}, "Expected prior_scale to be one of .*'fixed', 'single', 'width_height'.*'double'"),
        ({"prior_heads": "one"}, "Expected prior_heads to be one of"),
        ({"encoder_attention": ["inter"]}, "Expected words of .* in encoder_attention, got"),
        ({"encoder_attention": ["multi_scale"], "encoder_layers": 2}, "one word in encoder_attention for each of 2"),
        ({"d_model": 12, "decoder_attention_heads": 8}, "Expected d_model to be a multiple of 4 and of the heads"),
        ({"prior_beta": 0.0}, "Expected prior_beta > 0, got 0.0"),
        ({"num_feature_levels": 0}, "at least one feature level"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmcaConfig(**changes)
