"""Predictions of a long-tailed run on images without labels."""

from collections.abc import Sequence
from pathlib import Path

from batchformer.tasks.image_classification.predict import predict_classes

from .restore import exportable


def predict(run: Path, images: Sequence[Path], out: Path, *, top: int = 5) -> list[Path]:
    """Write the most probable classes of each image, see :func:`~.image_classification.predict.predict_classes`.

    Args:
        run: Run folder.
        images: Image files of any size.
        out: Folder; gets ``predictions.csv``.
        top: Largest number of classes for each image.

    Returns:
        The file.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
        ValueError: When images cannot be decoded; names all of them.
    """
    return predict_classes(exportable(run), images, out, top=top)
