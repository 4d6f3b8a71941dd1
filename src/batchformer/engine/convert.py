"""A published checkpoint becomes a folder that transformers loads, and BatchFormer's weights a file beside it."""

from pathlib import Path

from batchformer.adapters.detr_checkpoints import load_published
from batchformer.adapters.detr_published import build_published
from batchformer.core import insert

from .records import write_text

HOW = """Detector:

    from transformers import {model}
    model = {model}.from_pretrained("{folder}")
"""
HOW_BATCHFORMER = """
BatchFormer, to go on training with it:

    from batchformer import insert
    from safetensors.torch import load_file
    insert(model, **{insertion})
    model.load_state_dict(load_file("{folder}/batchformer.safetensors"), strict=False)
"""


def convert(checkpoint: Path, out: Path) -> tuple[str, list[Path]]:
    """Convert a checkpoint of the official DETR, Conditional DETR or Deformable DETR code, with BatchFormer or without.

    Args:
        checkpoint: A ``.pth`` file; read as weights alone.
        out: Folder; gets ``config.json`` and ``model.safetensors`` of the plain network, ``batchformer.safetensors``
            where the checkpoint has it, and ``README.md``, which says how to load them.

    Returns:
        What was found in the checkpoint, and the files.

    Raises:
        ValueError: When it is none of these, or not complete.
        FileNotFoundError: When there is no such file.
        ImportError: When a package is missing; names the extra.
    """
    try:
        from safetensors.torch import save_file

        published = build_published(checkpoint)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install 'batchformer[detection,export]'") from error
    model, report = published.model, published.report
    how = HOW.format(model=type(model).__name__, folder=out)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)  # type: ignore[operator]
    if published.insertion is not None:
        insert(model, **published.insertion)
        report = load_published(model, checkpoint)
        state = {name: value for name, value in model.state_dict().items() if name.startswith("batchformer")}
        save_file(state, out / "batchformer.safetensors")
        how += HOW_BATCHFORMER.format(insertion=published.insertion, folder=out)
    write_text(out / "README.md", how)
    return str(report), sorted(path for path in out.iterdir() if path.is_file())
