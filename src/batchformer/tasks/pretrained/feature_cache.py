"""Features that a frozen network computes, kept on disk: once for every image, and for its mirror image where wanted.

Axis letters: M images, B images of a batch, C channels, h, w cells of a map.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchformer.data.atomic import atomic_file

__all__ = ["FeatureCache", "fill"]


class FeatureCache:
    """Features on disk in half precision, in memory-mapped files that all processes share.

    :meth:`flush` marks an image as done once its features are on the disk. A filling that was killed therefore goes on
    where it was, and several processes may fill different images.

    Args:
        folder: Folder of this cache; made if it is absent. Its name should hold the :meth:`key`.
        images: Number of images M.
        shapes: Shape of each feature of one image, such as (C, h, w) for a map.
        mirrored: Keep the features of mirror images too.

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

    def __init__(self, folder: Path, images: int, shapes: Sequence[tuple[int, ...]], *, mirrored: bool = True) -> None:
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
    def key(network: nn.Module, facts: Mapping[str, Any]) -> str:
        """Return a hash of all that the features depend on.

        Args:
            network: Frozen network; its weights count.
            facts: Everything else, of plain types and paths: the files of the images, the size to which they are
                brought. A path counts by name, bytes and time of change.
        """
        digest = hashlib.blake2b(digest_size=12)
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps(facts, default=_stated).encode())
        return digest.hexdigest()

    def missing(self, rank: int = 0, world_size: int = 1) -> list[tuple[int, bool]]:
        """Return (image, mirrored) of the features that are not there; of several processes, the share of one."""
        places = np.argwhere(self._there == 0)
        return [(int(image), bool(mirrored)) for image, mirrored in places if image % world_size == rank]

    def write(self, image: int, mirrored: bool, maps: Sequence[Tensor]) -> None:
        """Store the features of one image; they count as there after :meth:`flush`.

        Raises:
            FloatingPointError: They do not fit into half precision.
        """
        for target, x in zip(self._maps, maps, strict=True):
            half = x.detach().cpu().half()
            if not bool(torch.isfinite(half).all()):
                raise FloatingPointError(
                    "Expected features that fit into half precision, got some above 65,504 or not finite. Set "
                    "data.cache_features=false."
                )
            target[image, int(mirrored)] = half.numpy()
        self._written.append((image, int(mirrored)))

    def flush(self) -> None:
        """Wait until what was written is on the disk, then mark it."""
        for x in self._maps:
            x.flush()
        for place in self._written:
            self._there[place] = 1
        self._there.flush()
        self._written.clear()

    def read(self, images: Sequence[int], mirrored: Sequence[bool]) -> list[Tensor]:
        """Read the features of B images: float32, each with B in front of its shape."""
        rows = (np.asarray(images), np.asarray(mirrored, dtype=np.int64))
        return [torch.from_numpy(np.asarray(x[rows], dtype=np.float32)) for x in self._maps]


def fill(
    cache: FeatureCache,
    compute: Callable[[Tensor], Sequence[Tensor]],
    load: Callable[[int, bool], Tensor],
    *,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    say: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the features that are missing.

    Args:
        cache: Cache to fill.
        compute: Function of normalised, padded pixels (B, 3, H, W) that returns the features; run without gradients.
        load: Function ``load(image, mirrored)`` that returns the pixels (3, H, W) of one image.
        batch_size: Images computed at once.
        rank: Number of this process.
        world_size: Number of processes; each computes its share.
        device: Device that the pixels are moved to; by default the processor.
        say: Function called with the numbers (done, of how many) after each batch.
    """
    places = cache.missing(rank, world_size)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        with torch.inference_mode():
            maps = compute(torch.stack([load(image, mirrored) for image, mirrored in batch]).to(device or "cpu"))
        for row, (image, mirrored) in enumerate(batch):
            cache.write(image, mirrored, [x[row] for x in maps])
        if start // batch_size % 16 == 15:
            cache.flush()
        if say is not None:
            say(start + len(batch), len(places))
    cache.flush()


def _memory(path: Path, kind: Any, shape: tuple[int, ...]) -> Any:
    """Map a file of this shape into memory; a new one is all zeros."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if not path.exists():
        with atomic_file(path, keep=True) as new, new.open("wb") as file:  # the first process makes it
            file.truncate(size)
    if path.stat().st_size != size:
        raise OSError(f"Expected {path} of {size} bytes, found {path.stat().st_size}. Delete its folder and try again.")
    return np.memmap(path, dtype=kind, mode="r+", shape=shape)


def _stated(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns
