"""Speed and memory of the layer, a model with it and detection's loss: ratios against a reference in the same run.

python benchmarks/run.py                  everything; the first four parts take 7 minutes on two cores
python benchmarks/run.py --only layer     one of layer, memory, model, growth, criterion, detectors

Prints Markdown tables and writes them to benchmarks/results/.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchformer import BatchFormer, insert

SHAPES = [(128, 512), (128, 2048), (4096, 256), (2, 1000, 256), (2, 10000, 256), (8, 4000, 256), (64, 197, 192)]
ROWS = [256, 512, 1024, 2048, 4096, 8192]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Table = tuple[str, list[str], list[list[str]]]


def torch_layer(dim: int) -> Callable[[Tensor], Tensor]:
    """torch's layer used as the published code uses it: the batch as the sequence, (N, C) with an axis put in."""
    layer = nn.TransformerEncoderLayer(dim, 4, dim, 0.5).to(DEVICE)

    def mix(x: Tensor) -> Tensor:
        out: Tensor = layer(x.unsqueeze(1)).squeeze(1) if x.dim() == 2 else layer(x)
        return out

    return mix


def our_layer(dim: int) -> Callable[[Tensor], Tensor]:
    return BatchFormer(dim).to(DEVICE).mix


def step_of(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
    """Forward and backward, in bf16 autocast on a GPU and fp32 on a CPU."""
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    gradient = torch.randn(shape, device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            out = layer(x)
        out.float().backward(gradient)
        if CUDA:
            torch.cuda.synchronize()

    return step


def interleaved(steps: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Times of each step in milliseconds, taken in turns so that a busy machine disturbs all alike."""
    for step in steps * 2:
        step()
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, own in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            own.append(1000 * (time.perf_counter() - start))
    return times


def layer_times(seconds: float) -> Table:
    rows = []
    for shape in SHAPES:
        gc.collect()
        ours, theirs = interleaved([step_of(make(shape[-1]), shape) for make in (our_layer, torch_layer)], seconds)
        ratio = statistics.median(theirs) / statistics.median(ours)
        row = [str(shape), f"{statistics.median(theirs):.2f}", f"{statistics.median(ours):.2f}", f"{ratio:.2f}x"]
        rows.append([*row, f"{min(theirs) / min(ours):.2f}x"])
    head = ["shape", "torch (ms)", "ours (ms)", "faster by (median)", "faster by (best)"]
    return "Layer, forward and backward, dropout 0.5", head, rows


def layer_memory(_: float) -> Table:
    rows = []
    for shape in SHAPES:
        peaks = [peak_memory(kind, shape) for kind in ("torch", "ours")]
        rows.append([str(shape), f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", f"{peaks[1] / max(peaks[0], 0.1):.2f}"])
    return (
        "Layer, peak memory of forward and backward over what is there before",
        ["shape", "torch (MB)", "ours (MB)", "ratio"],
        rows,
    )


def growth(_: float) -> Table:
    times, peaks, rows = [], [], []
    for n in ROWS:
        times.append(statistics.median(interleaved([step_of(our_layer(512), (n, 512))], 4)[0]))
        peaks.append(peak_memory("ours", (n, 512)))
        rows.append([str(n), f"{times[-1]:.1f}", f"{peaks[-1]:.1f}"])
    rows.append(["exponent", f"{exponent(ROWS[-3:], times[-3:]):.2f}", f"{exponent(ROWS[-3:], peaks[-3:]):.2f}"])
    head = ["rows N at C = 512", "time (ms)", "peak memory (MB)"]
    return "Growth with the batch (exponent: slope of the last three in logarithms; at most 2 and 1)", head, rows


def exponent(x: list[int], y: list[float]) -> float:
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(lx, ly).slope


def model_times(seconds: float) -> Table:
    import timm

    rows = []
    for precision in ("bf16",) if CUDA else ("fp32", "bf16"):
        plain, ours = (timm.create_model("resnet50").to(DEVICE, memory_format=torch.channels_last) for _ in range(2))
        insert(ours, before="auto")
        batch = 128 if CUDA else 16
        images = torch.randn(batch, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)

        def run(model: nn.Module, images: Tensor = images, low: bool = precision == "bf16") -> None:
            with torch.set_grad_enabled(model.training), torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
                out = model(images)
            if model.training:
                out.float().square().mean().backward()
            if CUDA:
                torch.cuda.synchronize()

        for what in ("training step", "eval"):
            for model in (plain, ours):
                model.train(what == "training step")
            first, second = interleaved([lambda: run(plain), lambda: run(ours)], seconds * (3 if what == "eval" else 6))  # noqa: B023
            medians = statistics.median(first), statistics.median(second)
            row = [f"ResNet-50, {batch} x 224 px, {precision}, {what}", f"{medians[0]:.0f}", f"{medians[1]:.0f}"]
            rows.append([*row, f"{medians[1] / medians[0]:.3f}", f"{min(second) / min(first):.3f}"])
    head = ["what", "plain (ms)", "+BatchFormer (ms)", "ratio (median)", "ratio (best)"]
    return "A whole model", head, rows


def peak_memory(kind: str, shape: tuple[int, ...]) -> float:
    """In a process of its own, so that nothing else counts."""
    command = [sys.executable, __file__, "--peak", json.dumps([kind, shape])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(kind: str, shape: tuple[int, ...]) -> None:
    """Peak over the process's memory after a small warm-up, in MB."""
    make = our_layer if kind == "ours" else torch_layer
    step_of(make(shape[-1]), (2, *shape[1:-1], shape[-1]) if len(shape) == 2 else (2, 8, shape[-1]))()
    step = step_of(make(shape[-1]), shape)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    if sys.platform != "linux":
        raise SystemExit("Peak memory is read from /proc: Linux only.")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    resident = peak_resident()
    step()
    print(peak_resident() - resident)


def peak_resident() -> float:
    """Peak resident memory in MB. Not getrusage: its peak outlives exec, and would be the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def bandwidth(_: float) -> Table:
    """Share of the memory bandwidth that the layer reaches: bytes that must move at least, over time, over a copy's."""
    rows = []
    source = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    (copies,) = interleaved([copy], 1)
    peak = 2 * source.numel() * 4 / min(copies)
    for shape in SHAPES:
        (times,) = interleaved([step_of(our_layer(shape[-1]), shape)], 1)
        # Activations of the layer, written once and read once in each direction: x, qkv, out, two residuals, hidden.
        least = 2 * 2 * 2 * 8 * math.prod(shape)
        rows.append([str(shape), f"{min(times):.3f}", f"{100 * least / min(times) / peak:.0f} %"])
    return "Share of memory bandwidth (bf16)", ["shape", "ours (ms)", "share of a copy's"], rows


def criterion_times(seconds: float) -> Table:
    """The loss of detectors, forward and backward on given predictions of two streams, 6 layers and 300 queries."""
    cells = [(kind, 8, 20) for kind in ("softmax", "focal")]
    cells += [("focal", images, 20) for images in (2, 4, 16)] + [("focal", 8, targets) for targets in (0, 5, 60, 100)]
    rows = []
    for kind, images, targets in cells:
        theirs, ours = interleaved(criterion_steps(kind, images, targets), seconds)
        row = [
            kind,
            f"2 x {images}",
            str(targets),
            f"{statistics.median(theirs):.1f}",
            f"{statistics.median(ours):.1f}",
        ]
        ratios = statistics.median(theirs) / statistics.median(ours), min(theirs) / min(ours)
        rows.append([*row, *(f"{ratio:.1f}x" for ratio in ratios)])
    head = ["kind", "rows", "targets a row", "transformers (ms)", "ours (ms)", "faster by (median)", "faster by (best)"]
    return "Loss of detectors, 6 layers, 300 queries, 91 classes, forward and backward", head, rows


def criterion_steps(kind: Any, images: int, targets: int) -> list[Callable[[], None]]:
    """A step of transformers' loss and one of ours, on the same predictions."""
    from transformers import ConditionalDetrConfig, DetrConfig
    from transformers.loss.loss_utils import LOSS_MAPPING

    from batchformer.tasks.set_prediction.criterion import SetOutputs
    from batchformer.tasks.set_prediction.from_transformers import criterion_for

    model: Any = nn.Module()
    name, config = ("", DetrConfig) if kind == "softmax" else ("DeformableDetr", ConditionalDetrConfig)
    model.config = config(num_labels=91, decoder_layers=6, auxiliary_loss=True)
    logits = torch.randn(6, 2 * images, 300, 91 + (kind == "softmax"), device=DEVICE, requires_grad=True)
    boxes = torch.rand(6, 2 * images, 300, 4, device=DEVICE, requires_grad=True)
    labels = 2 * [
        {"class_labels": torch.randint(91, (targets,), device=DEVICE), "boxes": torch.rand(targets, 4, device=DEVICE)}
        for _ in range(images)
    ]
    reference, criterion = LOSS_MAPPING[f"{name}ForObjectDetection"], criterion_for(model)

    def theirs() -> None:
        finish(reference(logits[-1], labels, DEVICE, boxes[-1], model.config, logits, boxes)[0])

    def ours() -> None:
        finish(criterion(SetOutputs(logits, boxes), labels)["loss"])

    def finish(loss: Tensor) -> None:
        torch.autograd.grad(loss, (logits, boxes))
        if CUDA:
            torch.cuda.synchronize()

    return [theirs, ours]


def detector_times(seconds: float) -> Table:
    """A training step of each detector of the small recipe: 16 images of 224 px, on cached maps of stride 32."""
    rows = []
    for detector in ("detr", "conditional_detr", "deformable_detr", "smca"):
        plain, ours = interleaved([detector_step(detector, arm) for arm in ("plain", "batchformer")], seconds)
        medians = statistics.median(plain), statistics.median(ours)
        row = [detector, f"{medians[0]:.0f}", f"{medians[1]:.0f}", f"{medians[1] / medians[0]:.2f}"]
        rows.append([*row, f"{min(ours) / min(plain):.2f}"])
    head = ["detector", "plain (ms)", "+BatchFormer (ms)", "ratio (median)", "ratio (best)"]
    return (
        "Detectors, training step with the loss, 3 + 3 layers of 128 channels, everything behind layer 0 doubled",
        head,
        rows,
    )


def detector_step(detector: Any, arm: Any) -> Callable[[], None]:
    from batchformer.tasks.detection.loss import detection_criterion
    from batchformer.tasks.detection.model import build_network
    from batchformer.tasks.detection.settings import LossSettings, NetworkSettings
    from batchformer.tasks.set_prediction.backbone import BackboneSettings
    from batchformer.tasks.set_prediction.detector import backbone_of
    from batchformer.tasks.set_prediction.from_transformers import use_criterion
    from batchformer.tasks.training.arms import insert_arm

    backbone = BackboneSettings("efficientnet_lite0", pretrained=False, trains="nothing", strides=[32])
    sizes: dict[str, Any] = {"d_model": 128, "encoder_layers": 3, "decoder_layers": 3, "ffn_dim": 256}
    settings = NetworkSettings(detector, backbone, num_queries=15, dropout=0.0, feature_levels=1, **sizes)
    network = build_network(settings, 8).to(DEVICE).train()
    handle = insert_arm(network, arm, after=["model.encoder.layers.0"])
    use_criterion(
        network, detection_criterion(LossSettings(), detector, 8, two_streams=lambda: bool(handle and handle.doubles))
    )
    pixels = torch.randn(16, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        maps = [x.clone() for x in backbone_of(network).maps(pixels)]
    mask = torch.ones(16, 224, 224, dtype=torch.int64, device=DEVICE)
    labels = [
        {"class_labels": torch.randint(8, (3,), device=DEVICE), "boxes": torch.rand(3, 4, device=DEVICE) * 0.4 + 0.2}
        for _ in range(16)
    ]

    def step() -> None:
        network.zero_grad()
        with backbone_of(network).serving(maps):
            network(pixel_values=pixels, pixel_mask=mask, labels=labels).loss.backward()
        if CUDA:
            torch.cuda.synchronize()

    return step


PARTS: dict[str, Callable[[float], Table]] = {
    "layer": layer_times,
    "memory": layer_memory,
    "model": model_times,
    "growth": growth,
    "criterion": criterion_times,
    "detectors": detector_times,
    **({"bandwidth": bandwidth} if CUDA else {}),
}


def processor() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(table: Table) -> str:
    title, head, rows = table
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=8, help="for each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.peak:
        kind, shape = json.loads(arguments.peak)
        print_peak(kind, tuple(shape))
        return
    today = date.today().isoformat()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    where = f"{processor()}, {arguments.threads} threads, {versions}, {today}"
    parts = [f"# Benchmarks\n\n{where}. Command: `python benchmarks/run.py`\n"]
    print(parts[0])
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            parts.append(markdown(part(arguments.seconds)))
            print(parts[-1], flush=True)
    slug = "".join(c if c.isalnum() else "-" for c in processor().lower()).strip("-")
    name = f"{arguments.only or 'all'}-{slug}-torch{torch.__version__.partition('+')[0]}-{today}.md"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
