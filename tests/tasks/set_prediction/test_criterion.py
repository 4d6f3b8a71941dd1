"""The criterion: every term against a plain loop, properties, precision, what it moves, and faults."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batchformer.core.streams import expand
from batchformer.tasks.set_prediction import boxes
from batchformer.tasks.set_prediction import loss_terms as terms
from batchformer.tasks.set_prediction.criterion import LossWeights, SetCriterion, SetOutputs
from batchformer.tasks.set_prediction.matching import Kind, MatchCosts, match

L, Q, K = 3, 5, 4
SIDE = 8
KINDS: tuple[Kind, ...] = ("softmax", "focal")
SIZES = [2, 0, 7, 1]  # 7: more than there are queries
WEIGHTS = LossWeights(class_=1.7, l1=3.0, giou=1.3, mask=0.6, dice=0.9)
Labels = list[dict[str, Tensor]]


def criterion(kind: Kind, **changes: Any) -> SetCriterion:
    return SetCriterion(K, kind, **{"weights": WEIGHTS, "alpha": 0.3, "gamma": 1.5, "eos": 0.2, **changes})


def scene(
    kind: Kind,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    masks: bool = True,
    encoder: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[SetOutputs, Labels]:
    """Outputs of a two-stage detector with masks, and targets; row n has sizes[n] of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows, classes = len(sizes), K + (kind == "softmax")
    outputs = SetOutputs(
        6 * draw(L, rows, Q, classes) - 3,
        draw(L, rows, Q, 4) * 0.8 + 0.1,
        8 * draw(rows, Q, SIDE // 2, SIDE // 2) - 4 if masks else None,
        6 * draw(rows, 3 * Q, classes) - 3 if encoder else None,
        draw(rows, 3 * Q, 4) * 0.8 + 0.1 if encoder else None,
    )
    targets = [
        {
            "class_labels": torch.randint(K, (size,), generator=generator).to(device),
            "boxes": draw(size, 4) * 0.5 + 0.1,
            "masks": draw(size, SIDE - row, SIDE) > 0.5,
        }
        for row, size in enumerate(sizes)
    ]
    return outputs, targets


# ---------------------------------------------------------------- the loop


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_focal(x: float, present: bool, alpha: float, gamma: float) -> float:
    p = sigmoid(x)
    if present:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def slow_class(logits_NQK: Tensor, wanted: dict[tuple[int, int], int], count: float, c: SetCriterion) -> float:
    total = norm = 0.0
    for n, q in torch.cartesian_prod(torch.arange(len(logits_NQK)), torch.arange(logits_NQK.shape[1])).tolist():
        row = logits_NQK[n, q].tolist()
        if c.kind == "softmax":
            weight = 1.0 if (n, q) in wanted else c.eos
            total -= weight * math.log(math.exp(row[wanted.get((n, q), K)]) / sum(math.exp(x) for x in row))
            norm += weight
        else:
            total += sum(slow_focal(x, wanted.get((n, q)) == k, c.alpha, c.gamma) for k, x in enumerate(row))
            norm = count
    return total / norm


def slow_stage(
    logits_LNQK: Tensor, boxes_LNQ4: Tensor, targets: Labels, c: SetCriterion, names: Sequence[str]
) -> dict[str, float]:
    """Terms of each layer from the matches, which test_matching compares with every permutation."""
    matches = match(logits_LNQK, boxes_LNQ4, targets, c.match_costs)
    labels = torch.cat([t["class_labels"] for t in targets])
    own = torch.cat([t["boxes"] for t in targets])
    count = max(len(labels), 1)
    found = {}
    for layer, name in enumerate(names):
        wanted, l1, giou = {}, 0.0, 0.0
        for n, q, m in zip(
            matches.rows_P.tolist(), matches.queries_LP[layer].tolist(), matches.targets_LP[layer].tolist(), strict=True
        ):
            box = boxes_LNQ4[layer, n, q]
            wanted[n, q] = int(labels[m])
            l1 += sum(abs(a - b) for a, b in zip(box.tolist(), own[m].tolist(), strict=True))
            giou += 1 - float(boxes.giou(boxes.to_corners(box), boxes.to_corners(own[m])))
        found[f"loss_ce{name}"] = slow_class(logits_LNQK[layer], wanted, count, c)
        found[f"loss_bbox{name}"], found[f"loss_giou{name}"] = l1 / count, giou / count
        objects = [
            sum(max(x[:K]) > (x[K] if c.kind == "softmax" else 0) for x in row) for row in logits_LNQK[layer].tolist()
        ]
        misses = [abs(a - len(t["class_labels"])) for a, t in zip(objects, targets, strict=True)]
        found[f"cardinality_error{name}"] = sum(misses) / len(misses)
    return found


def slow_masks(outputs: SetOutputs, targets: Labels, c: SetCriterion) -> dict[str, float]:
    matches = match(outputs.logits_LNQK, outputs.boxes_LNQ4, targets, c.match_costs)
    assert outputs.masks_NQHW is not None
    focal = dice = 0.0
    starts = [sum(len(t["boxes"]) for t in targets[:n]) for n in range(len(targets))]
    for n, q, m in zip(
        matches.rows_P.tolist(), matches.queries_LP[-1].tolist(), matches.targets_LP[-1].tolist(), strict=True
    ):
        large = torch.nn.functional.interpolate(
            outputs.masks_NQHW[n, q][None, None], size=(SIDE, SIDE), mode="bilinear"
        )
        mask = targets[n]["masks"][m - starts[n]]
        pixels = both = predicted = there = 0.0
        for y in range(SIDE):
            for x in range(SIDE):
                value = float(large[0, 0, y, x])
                inside = y < len(mask) and bool(mask[y, x])
                pixels += slow_focal(value, inside, 0.25, 2.0)
                both += sigmoid(value) * inside
                predicted += sigmoid(value)
                there += inside
        focal += pixels / SIDE**2
        dice += 1 - (2 * both + 1) / (predicted + there + 1)
    count = max(sum(len(t["boxes"]) for t in targets), 1)
    return {"loss_mask": focal / count, "loss_dice": dice / count}


def slow_loss(outputs: SetOutputs, targets: Labels, c: SetCriterion) -> dict[str, float]:
    found = slow_stage(outputs.logits_LNQK, outputs.boxes_LNQ4, targets, c, ["_0", "_1", ""])
    if outputs.encoder_logits_NQK is not None and outputs.encoder_boxes_NQ4 is not None:
        objects = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in targets]
        proposals = outputs.encoder_logits_NQK[None], outputs.encoder_boxes_NQ4[None]
        found |= slow_stage(*proposals, objects, c, ["_enc"])
    if outputs.masks_NQHW is not None:
        found |= slow_masks(outputs, targets, c)
    weight = {"ce": "class_", "bbox": "l1", "giou": "giou", "mask": "mask", "dice": "dice"}
    found["loss"] = sum(
        getattr(c.weights, weight[name.split("_")[1]]) * value for name, value in found.items() if "error" not in name
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [SIZES, [0, 0], [1]], ids=["some", "none", "one"])
def test_terms_and_total_equal_the_loop(kind: Kind, sizes: list[int]) -> None:
    outputs, targets = scene(kind, sizes)
    found = criterion(kind)(outputs, targets)
    expected = slow_loss(outputs, targets, criterion(kind))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_encoder_and_cardinality(kind: Kind) -> None:
    outputs, targets = scene(kind, masks=False, encoder=False)
    found = criterion(kind, cardinality=False)(outputs, [{k: v for k, v in t.items() if k != "masks"} for t in targets])
    assert found.keys() == {"loss", *(f"loss_{t}{s}" for t in ("ce", "bbox", "giou") for s in ("", "_0", "_1"))}


# ---------------------------------------------------------------- properties


def leaves(outputs: SetOutputs) -> list[Tensor]:
    return [value for value in vars(outputs).values() if value is not None]


def with_gradients(outputs: SetOutputs) -> SetOutputs:
    return SetOutputs(*(None if value is None else value.clone().requires_grad_() for value in vars(outputs).values()))


def over_rows(outputs: SetOutputs, change: Any) -> SetOutputs:
    """``change`` of the rows of every tensor."""
    first = [change(value.transpose(0, 1)).transpose(0, 1) for value in (outputs.logits_LNQK, outputs.boxes_LNQ4)]
    rest = (outputs.masks_NQHW, outputs.encoder_logits_NQK, outputs.encoder_boxes_NQ4)
    return SetOutputs(*first, *(None if value is None else change(value) for value in rest))


@pytest.mark.parametrize("kind", KINDS)
def test_both_streams_alike_are_one(kind: Kind) -> None:
    """The scale of a plain run: doubled rows with doubled targets leave each term as it is."""
    outputs, targets = scene(kind)
    single = criterion(kind)(outputs, targets)
    double = criterion(kind)(over_rows(outputs, lambda rows: torch.cat((rows, rows))), expand(targets))
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.3, 0.9)])
def test_stream_weights_weigh_the_losses_of_the_streams(kind: Kind, weights: tuple[float, float]) -> None:
    """Against two calls of the criterion, one for each stream."""
    plain, targets = scene(kind)
    mixed, _ = scene(kind, seed=9)
    rows = [
        torch.cat(pair, dim=1 if i < 2 else 0) for i, pair in enumerate(zip(leaves(plain), leaves(mixed), strict=True))
    ]
    both = SetOutputs(*rows)
    weighted = criterion(kind, stream_weights=weights, two_streams=lambda: True)
    found = weighted(both, expand(targets))["loss"]
    expected = sum(
        weight * criterion(kind)(outputs, targets)["loss"]
        for weight, outputs in zip(weights, (plain, mixed), strict=True)
    ) / sum(weights)
    torch.testing.assert_close(found, expected)
    # Where nothing is doubled (validation), the weights have no effect.
    alone = replace(weighted, two_streams=lambda: False)(plain, targets)["loss"]
    torch.testing.assert_close(alone, criterion(kind)(plain, targets)["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_targets_queries_and_rows_does_not_matter(kind: Kind) -> None:
    outputs, targets = scene(kind, encoder=False)
    expected = criterion(kind)(outputs, targets)
    places, rows = torch.randperm(Q), torch.randperm(len(SIZES))
    moved = SetOutputs(
        outputs.logits_LNQK[:, :, places], outputs.boxes_LNQ4[:, :, places], outputs.masks_NQHW[:, places]
    )
    moved = over_rows(moved, lambda values: values[rows])
    others = []
    for row in rows.tolist():
        order = torch.randperm(SIZES[row])
        others.append({name: value[order] for name, value in targets[row].items()})
    for name, value in criterion(kind)(moved, others).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [SIZES, [0, 0]], ids=["some", "none"])
def test_gradients_are_right_and_reach_every_output(kind: Kind, sizes: list[int]) -> None:
    """Also without any target: a rank without objects takes part in DDP's reduction."""
    outputs, targets = scene(kind, sizes)
    outputs = with_gradients(outputs)
    values = leaves(outputs)

    def loss(*parts: Tensor) -> Tensor:
        return criterion(kind, two_streams=True, stream_weights=(1.0, 0.5))(SetOutputs(*parts), targets)["loss"]

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    loss(*values).backward()
    for value in values:
        assert value.grad is not None and value.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_loss_of_every_size_of_logits(gamma: float) -> None:
    """The loss and its gradient in closed form, in fp32 against fp64 of torch's own operations."""
    x = torch.cat((torch.linspace(-30, 30, 501), torch.tensor([-200.0, -90.0, 90.0, 200.0]))).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found = terms._miss(x, gamma)
    expected = wide.sigmoid() ** gamma * -torch.nn.functional.logsigmoid(-wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-37)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-37)


def test_no_object_without_weight_and_nothing_matched_is_no_loss() -> None:
    outputs, targets = scene("softmax", [0, 0], masks=False, encoder=False)
    assert float(criterion("softmax", eos=0.0)(outputs, targets)["loss_ce"]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_to_fp32(kind: Kind, dtype: torch.dtype) -> None:
    outputs, targets = scene(kind, dtype=dtype)
    wide = SetOutputs(*(value.float() for value in leaves(outputs)))
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(kind)(outputs, targets)
    for name, value in criterion(kind)(wide, targets).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, of the tensors between its graphs
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_leaves_the_criterion_out_of_its_graphs(kind: Kind) -> None:
    outputs, targets = scene(kind)
    outputs = with_gradients(outputs)
    expected = 2 * criterion(kind)(outputs, targets)["loss"]
    compiled = torch.compile(lambda given: 2 * criterion(kind)(given, targets)["loss"], backend="eager")
    found = compiled(outputs)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert outputs.logits_LNQK.grad is not None


# ---------------------------------------------------------------- transfers


class DataDependent(TorchDispatchMode):
    """Operations that have to wait for numbers: of scalars read on the host, and of sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args
            for index in (argument if isinstance(argument, list | tuple) else [])
        )
        if by_mask or name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "repeat_interleave",
            "_unique2",
            "equal",
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the calls that bring numbers of a tensor to the host."""
    found: list[str] = []
    for name in ("cpu", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"):
        method = getattr(Tensor, name)

        def noting(self: Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            found.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, noting)
    with DataDependent() as mode:
        yield found
    monkeypatch.undo()
    found += mode.found


@pytest.mark.parametrize("kind", KINDS)
def test_one_transfer_to_the_host_in_a_step(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, both streams, encoder, masks, the count of targets and the checks: one copy, and NumPy's view of it."""
    outputs, targets = scene(kind)
    outputs = with_gradients(outputs)
    both = criterion(kind, two_streams=True, stream_weights=(1.0, 0.5))
    with host_reads(monkeypatch) as found:
        both(outputs, targets)["loss"].backward()
    assert found == ["cpu", "numpy"]


def test_the_count_of_transfers_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0)
    with host_reads(monkeypatch) as found:
        x.max().item(), x[x > 1], bool(x.sum() > 0)
    assert found[:2] == ["item", "__bool__"] and "index" in found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_one_synchronisation_on_a_gpu(kind: Kind) -> None:
    outputs, targets = scene(kind, dtype=torch.float32, device="cuda")
    expected = {name: float(value) for name, value in criterion(kind)(*scene(kind)).items()}
    outputs = with_gradients(outputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        losses = criterion(kind)(outputs, targets)
        losses["loss"].backward()
    torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchroniz" in str(w.message)]) == 1, [str(w.message) for w in found]
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-4), name


# ---------------------------------------------------------------- faults


def test_rows_without_targets_name_the_way_out() -> None:
    outputs, targets = scene("softmax")
    with pytest.raises(ValueError, match=r"targets for each of 4 rows, got 3.* handle.expand\(labels\)"):
        criterion("softmax")(outputs, targets[:3])


def test_other_numbers_of_classes_are_seen() -> None:
    outputs, targets = scene("softmax")
    with pytest.raises(
        ValueError, match=r"logits of 4 classes, got 5 in all. Check num_classes and kind, here 'focal'"
    ):
        criterion("focal")(outputs, targets)
    with pytest.raises(ValueError, match=r"logits of 3 classes and no object, got 5 in all"):
        replace(criterion("softmax"), num_classes=3)(outputs, targets)


def test_masks_that_do_not_fit_say_where() -> None:
    outputs, targets = scene("softmax")
    for masks, got in ((None, "None"), (torch.zeros(1, 4, 4), r"\(1, 4, 4\)"), (torch.zeros(7, 4), r"\(7, 4\)")):
        wrong = [*targets[:2], {**targets[2], "masks": masks}, targets[3]]
        with pytest.raises(ValueError, match=rf"masks \(T, H, W\) for the 7 targets of row 2, .* got {got}"):
            criterion("softmax")(outputs, wrong)


@pytest.mark.parametrize("where", ["logits_LNQK", "encoder_logits_NQK"])
def test_a_diverged_run_stops(where: str) -> None:
    outputs, targets = scene("focal")
    getattr(outputs, where).view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"in layers \[0\], rows \[0\]"):
        criterion("focal")(outputs, targets)


def test_stream_weights_are_checked() -> None:
    for weights in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="not negative and not both zero"):
            criterion("focal", stream_weights=weights)
    with pytest.raises(ValueError, match="Pass two_streams=lambda: handle.doubles"):
        criterion("focal", stream_weights=(1.0, 0.5))
    odd = criterion("focal", stream_weights=(1.0, 0.5), two_streams=True)
    with pytest.raises(ValueError, match="two rows for each image, .* got 3 rows"):
        odd(*scene("focal", [1, 1, 1]))
    assert odd.match_costs == MatchCosts("focal", class_=2.0)
