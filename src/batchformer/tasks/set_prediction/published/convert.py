"""Conversion of a published checkpoint to a folder that transformers loads, with a file of BatchFormer's weights."""

from pathlib import Path

from batchformer.data.atomic import write_text
from batchformer.insertion import insert

from .checkpoints import load_published
from .networks import build_published

HOW = """Detector:

    from transformers import {model}
    model = {model}.from_pretrained("{folder}")
"""
# The loss of all layers in transformers changes the network, see `normalize_copies`.
HOW_ALL_LAYERS = """
Training with the loss of all decoder layers: without the lines below, the loss is on the outputs of the last layer
alone. With `auxiliary_loss`, transformers also normalises between the layers, which the published network does not;
`normalize_copies` prevents this. It is not saved with the model: set `auxiliary_loss` to False again before
`save_pretrained`.

    from batchformer.tasks.set_prediction.decoder_norm import normalize_copies
    model.config.auxiliary_loss = True
    normalize_copies(model)
"""
HOW_BATCHFORMER = """
Training with BatchFormer:

    from batchformer import insert
    from safetensors.torch import load_file
    insert(model, **{insertion})
    model.load_state_dict(load_file("{folder}/batchformer.safetensors"), strict=False)
"""


def convert(checkpoint: Path, out: Path) -> tuple[str, list[Path]]:
    """Convert a checkpoint of the official DETR, Conditional DETR or Deformable DETR code, with BatchFormer or without.

    Args:
        checkpoint: A ``.pth`` file, read as weights alone.
        out: Folder; gets ``config.json`` and ``model.safetensors`` of the plain network, ``batchformer.safetensors``
            where the checkpoint has BatchFormer, and ``README.md``, which says how to load them and to go on training.
            Files of these names from an earlier conversion are replaced or removed; other files stay.

    Returns:
        Report on the checkpoint, and the files that were written.

    Raises:
        ValueError: When the checkpoint is of another network, or not complete.
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
    if report.kind != "deformable_detr":
        how += HOW_ALL_LAYERS
    out.mkdir(parents=True, exist_ok=True)
    written = [out / name for name in ("README.md", "config.json", "model.safetensors")]
    # A file of an earlier conversion would be taken for this checkpoint's.
    (out / "batchformer.safetensors").unlink(missing_ok=True)
    model.save_pretrained(out)  # type: ignore[operator]
    if published.insertion is not None:
        insert(model, **published.insertion)
        report = load_published(model, checkpoint)
        state = {name: value for name, value in model.state_dict().items() if name.startswith("batchformer")}
        written.append(out / "batchformer.safetensors")
        save_file(state, written[-1])
        how += HOW_BATCHFORMER.format(insertion=published.insertion, folder=out)
    write_text(out / "README.md", how)
    return str(report), sorted(written)
