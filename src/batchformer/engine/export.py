"""The plain network of a run, for use elsewhere: safetensors and ONNX, each checked after writing."""

import warnings
from pathlib import Path
from typing import cast

import torch
from torch import nn

from batchformer.data.atomic import atomic_file, write_json
from batchformer.tasks.training.contract import Exportable

from .config import run_part

FORMATS = ("safetensors", "onnx")


def export(run: Path, out: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write the plain network of a run.

    Args:
        run: Run folder.
        out: Folder that gets ``model.safetensors``, ``model.onnx``, ``model.json`` (classes, input size, normalisation)
            and the files that the task adds.
        formats: Formats out of ``FORMATS``.

    Returns:
        The files that were written.

    Raises:
        ValueError: For an unknown format, and for ONNX of a network that ONNX cannot say.
        ImportError: When a package is missing; names the extra.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"Expected formats out of {FORMATS}, got {sorted(unknown)}.")
    found = cast(Exportable, run_part(run, "restore").exportable(run))
    if found.onnx_refusal is not None and "onnx" in formats:
        raise ValueError(found.onnx_refusal)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if "safetensors" in formats:
        written.append(_safetensors(found.network, out / "model.safetensors"))
    if "onnx" in formats:
        written.append(_onnx(found, out / "model.onnx"))
    write_json(out / "model.json", found.facts)
    return [*written, out / "model.json", *(found.more(out) if found.more is not None else [])]


def _safetensors(network: nn.Module, path: Path) -> Path:
    try:
        from safetensors.torch import load_file, save_model
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'batchformer[export]'") from error
    state = network.state_dict()
    with atomic_file(path) as scratch:
        # Weights that several parts share get one name; transformers asks for the word on the format.
        save_model(network, str(scratch), metadata={"format": "pt"})
        back = load_file(scratch)
        if any(not torch.equal(value, state[name].cpu()) for name, value in back.items()):
            raise OSError(f"Expected {path} to hold what was written, but reading it back gave other numbers.")
    return path


def _onnx(found: Exportable, path: Path) -> Path:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ImportError("onnx is missing: pip install 'batchformer[export]'") from error
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # That the first axis of all inputs is one and the same is what is meant.
        warnings.filterwarnings("ignore", message=".*it shares the same shape constraints with another axis")
        program = torch.onnx.export(
            found.forward,
            found.inputs,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in found.inputs) if found.dynamic_batch else None,
            input_names=list(found.input_names),
            output_names=list(found.output_names),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing.")
    with atomic_file(path) as scratch:
        program.save(str(scratch), external_data=False)
        onnx.checker.check_model(onnx.load(scratch))
    return path
