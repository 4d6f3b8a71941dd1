"""Maps of a frozen backbone, computed once for every image, and its mirror image where wanted, and read from then on.

Axis letters: M images, C channels, h, w cells of a map.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbone import Backbone

__all__ = ["FeatureCache", "fill"]


class FeatureCache:
    """Maps on disk in half precision, in memory-mapped files that all processes share.

    A row counts as there only when it is marked, which :meth:`flush` does once the maps are on the disk: a filling that
    was killed goes on where it was, and several processes may fill different rows.

    Args:
        folder: Of this cache; made if it is not there. Its name should hold a hash of what the maps depend on: see
            :meth:`key`.
        images: M.
        shapes: (C, h, w) of each map.
        mirrored: Whether there are maps of mirror images too.

    Example:
        >>> import tempfile
        >>> cache = FeatureCache(Path(tempfile.mkdtemp()), images=2, shapes=[(3, 2, 2)])
        >>> cache.missing()
        [(0, False), (0, True), (1, False), (1, True)]
        >>> cache.write(1, True, [torch.full((3, 2, 2), 0.5)])
        >>> cache.flush()
        >>> len(cache.missing()), cache.read([1], [True])[0].mean().item()
        (3, 0.5)
    """

    def __init__(
        self, folder: Path, images: int, shapes: Sequence[tuple[int, int, int]], *, mirrored: bool = True
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        views = 2 if mirrored else 1
        self.images, self.shapes = images, [tuple(shape) for shape in shapes]
        self._maps = [
            _memory(folder / f"maps-{number}.f16", np.float16, (images, views, *shape))
            for number, shape in enumerate(self.shapes)
        ]
        self._there = _memory(folder / "there.u8", np.uint8, (images, views))
        self._written: list[tuple[int, int]] = []

    @staticmethod
    def key(backbone: Backbone, files: Sequence[Path], size: int) -> str:
        """A hash of weights, images (names, bytes, times) and size: what the maps are a function of."""
        digest = hashlib.blake2b(digest_size=12)
        for name, value in sorted(backbone.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        stated = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        facts: dict[str, Any] = {"strides": backbone.strides, "size": size, "files": stated}
        facts |= {name: getattr(backbone, name).flatten().tolist() for name in ("scale", "shift")}
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def missing(self, rank: int = 0, world_size: int = 1) -> list[tuple[int, bool]]:
        """(image, mirrored) of what is not there, this process's share."""
        places = np.argwhere(self._there == 0)
        return [(int(image), bool(mirrored)) for image, mirrored in places if image % world_size == rank]

    def write(self, image: int, mirrored: bool, maps: Sequence[Tensor]) -> None:
        """Store the maps (C, h, w) of one image; they are there after :meth:`flush`.

        Raises:
            FloatingPointError: When they do not fit into half precision.
        """
        for target, x in zip(self._maps, maps, strict=True):
            half = x.detach().cpu().half()
            if not bool(torch.isfinite(half).all()):
                raise FloatingPointError(
                    "Expected maps that fit into half precision, got some above 65,504 or not finite. Set "
                    "data.cache_features=false."
                )
            target[image, int(mirrored)] = half.numpy()
        self._written.append((image, int(mirrored)))

    def flush(self) -> None:
        """Hand what was written to the disk, then mark it."""
        for x in self._maps:
            x.flush()
        for place in self._written:
            self._there[place] = 1
        self._there.flush()
        self._written.clear()

    def read(self, images: Sequence[int], mirrored: Sequence[bool]) -> list[Tensor]:
        """Maps (B, C, h, w) in float32 of B images."""
        rows = (np.asarray(images), np.asarray(mirrored, dtype=np.int64))
        return [torch.from_numpy(np.asarray(x[rows], dtype=np.float32)) for x in self._maps]


def fill(
    cache: FeatureCache,
    backbone: Backbone,
    load: Callable[[int, bool], Tensor],
    *,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    say: Callable[[int, int], None] | None = None,
) -> None:
    """Compute what is missing.

    Args:
        cache: To fill.
        backbone: Frozen.
        load: ``load(image, mirrored)`` gives the normalised, padded pixels (3, H, W).
        batch_size: Images at once.
        rank: This process.
        world_size: Number of processes; each computes its share.
        device: Where to compute; by default where the backbone is.
        say: Called with (done, of how many) after each batch.
    """
    places = cache.missing(rank, world_size)
    device = device or next(backbone.parameters()).device
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        with torch.inference_mode():
            maps = backbone.maps(torch.stack([load(image, mirrored) for image, mirrored in batch]).to(device))
        for row, (image, mirrored) in enumerate(batch):
            cache.write(image, mirrored, [x[row] for x in maps])
        if start // batch_size % 16 == 15:
            cache.flush()
        if say is not None:
            say(start + len(batch), len(places))
    cache.flush()


def _memory(path: Path, kind: Any, shape: tuple[int, ...]) -> Any:
    """A file of zeros of this shape, made whole or found as it is."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if not path.exists():
        scratch = path.with_name(f".{path.name}-{os.getpid()}")
        with scratch.open("wb") as file:
            file.truncate(size)
        try:
            os.link(scratch, path)  # whoever comes first makes it
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
    if path.stat().st_size != size:
        raise OSError(f"Expected {path} of {size} bytes, found {path.stat().st_size}. Delete its folder and try again.")
    return np.memmap(path, dtype=kind, mode="r+", shape=shape)
