"""Predictions of the plain network of a run on images that nobody labelled."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .config import run_part


def predict(run: Path, images: Sequence[Path], out: Path, **options: Any) -> list[Path]:
    """Predict on image files.

    Args:
        run: Run folder.
        images: Image files.
        out: Folder for the results; made if absent.
        options: Options of the task's own ``predict``, for example ``threshold``.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: When it is no run folder, or has no checkpoint.
        ValueError: For no images, for an option that the task has not, and for results beside the images themselves.
        ImportError: When a package is missing; names the extra.
    """
    function = run_part(run, "predict").predict
    known = inspect.signature(function).parameters
    if unknown := [name for name in options if name not in known]:
        named, own = (", ".join(f"--{name}" for name in names) for names in (unknown, list(known)[3:]))
        raise ValueError(f"This task's predict has no option {named}. It has: {own or 'none'}.")
    if not images:
        raise ValueError("Expected at least one image to predict on, got none.")
    if beside := [image for image in images if image.resolve().parent == out.resolve()]:
        raise ValueError(
            f"Expected another folder for the results than that of {beside[0]}: files of one name would be lost."
        )
    out.mkdir(parents=True, exist_ok=True)
    return cast(list[Path], function(run, list(images), out, **options))
