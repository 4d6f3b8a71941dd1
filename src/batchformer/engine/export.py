"""The plain network of a run, for use elsewhere: safetensors and ONNX, each checked after writing."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from batchformer.tasks.longtail.paco import PaCo
from batchformer.tasks.longtail.restore import load_network
from batchformer.tasks.longtail.ride import RoutedExperts

from .records import write_json

FORMATS = ("safetensors", "onnx")


class _Logits(nn.Module):
    """Logits of the plain network, (N, K), whatever the number of experts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return logits.mean(dim=1) if logits.dim() == 3 else logits  # type: ignore[no-any-return]


def export(run: Path, out: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write the plain network of a run.

    Args:
        run: Run folder.
        out: Folder; gets ``model.safetensors``, ``model.onnx`` and ``model.json`` (classes, size, mean, std).
        formats: Out of ``FORMATS``.

    Returns:
        The files.

    Raises:
        ValueError: For an unknown format, and for ONNX of routed experts.
        ImportError: When a package is missing; names the extra.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"Expected formats out of {FORMATS}, got {sorted(unknown)}.")
    restored, facts, settings = load_network(run)
    network = restored.plain() if isinstance(restored, PaCo) else restored
    if isinstance(network, RoutedExperts) and "onnx" in formats:
        raise ValueError(
            "Expected a network that does the same for every image, got routed experts, which ONNX cannot say. Give "
            "--format=safetensors, or export the run of the first stage, which asks all experts."
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if "safetensors" in formats:
        written.append(_safetensors(network, out / "model.safetensors"))
    if "onnx" in formats:
        images = torch.zeros(2, facts.in_channels, facts.image_size, facts.image_size)
        written.append(_onnx(_Logits(network).eval(), images, out / "model.onnx"))
    write_json(
        out / "model.json", {"network": asdict(settings), **asdict(facts), "input": "(image / 255 - mean) / std"}
    )
    return [*written, out / "model.json"]


def _safetensors(network: nn.Module, path: Path) -> Path:
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'batchformer[export]'") from error
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    scratch = path.with_name(f".{path.name}")
    save_file(state, scratch)
    back = load_file(scratch)
    if any(not torch.equal(back[name], value) for name, value in state.items()):
        raise OSError(f"Expected {path} to hold what was written, but reading it back gave other numbers.")
    return scratch.replace(path)


def _onnx(network: nn.Module, images: torch.Tensor, path: Path) -> Path:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ImportError("onnx is missing: pip install 'batchformer[export]'") from error
    scratch = path.with_name(f".{path.name}")
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=(batch,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing.")
    program.save(str(scratch), external_data=False)
    onnx.checker.check_model(onnx.load(scratch))
    return scratch.replace(path)
