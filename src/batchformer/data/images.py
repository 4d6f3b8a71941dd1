"""Reading of image files: one by one, by their headers alone, or all at once into one tensor."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .lists import Samples

_T = TypeVar("_T")
_R = TypeVar("_R")


def in_threads(function: Callable[[_T], _R], items: Sequence[_T], title: str) -> list[_R]:
    """Map a function over items in threads, in order, with a progress bar on a terminal."""
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        return list(tqdm(pool.map(function, items), title, len(items), disable=None, leave=False))


def decode(path: Path, channels: int, *, upright: bool = True) -> Image.Image:
    """Open an image of any kind as 8-bit grey or RGB, opaque and upright.

    Transparent pixels become white, 16-bit grey is scaled down, floating-point grey that stays within 1 is scaled up,
    and of several frames the first is taken.

    Args:
        path: Image file.
        channels: 1 for grey, 3 for RGB.
        upright: Apply the camera's orientation. Off for detection, whose boxes are drawn on the pixels as stored.

    Raises:
        OSError: Pillow cannot decode the file.
    """
    with Image.open(path) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened) if upright else opened
        if image.mode.startswith("I") or image.mode == "F":
            pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
            most = pixels.max()
            scale = 1 / 257 if most > 255 else 255 if image.mode == "F" and most <= 1 else 1
            image = Image.fromarray((pixels * scale).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")


def probe(samples: Samples, most: int = 2000) -> tuple[int, int]:
    """Read the headers of up to ``most`` evenly spaced images.

    Returns:
        The number of channels (1 if all images are grey, else 3) and the median of their short sides in pixels.
    """
    step = -(-len(samples) // most)
    headers = in_threads(partial(_header, samples.root), samples.paths[::step], "reading image sizes")
    grey = all(is_grey for is_grey, _ in headers)
    return (1 if grey else 3), int(np.median([side for _, side in headers]))


def _header(root: Path, path: str) -> tuple[bool, int]:
    with Image.open(root / path) as image:
        return image.mode[0] in "1LIF" and image.mode != "LAB", min(image.size)


def decode_all(samples: Samples, prepare: Callable[[Image.Image], Tensor], size: int, channels: int) -> Tensor:
    """Decode all images into one tensor.

    Args:
        samples: Image files, M of them.
        prepare: Function from a Pillow image to a uint8 tensor (channels, size, size), such as
            :func:`batchformer.data.transforms.image_eval`.
        size: Side of the images in pixels.
        channels: 1 or 3.

    Returns:
        Images, uint8, shape (M, channels, size, size).
    """
    images = torch.empty(len(samples), channels, size, size, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = prepare(decode(samples.root / samples.paths[index], channels))

    in_threads(fill, range(len(samples)), "decoding images")
    return images
