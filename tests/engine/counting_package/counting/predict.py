"""Numbers read off pictures that nobody counted."""

from collections.abc import Sequence
from pathlib import Path

from batchformer.data.atomic import write_json
from batchformer.data.transforms import normalize

from .data import pixels
from .restore import CHECKPOINT, rebuild


def predict(run: Path, images: Sequence[Path], out: Path) -> list[Path]:
    network = rebuild(CHECKPOINT.read(run)).network
    numbers = {path.name: network(normalize(pixels(path)[None], (0.5,), (0.5,))).item() for path in images}
    write_json(out / "numbers.json", numbers)
    return [out / "numbers.json"]
