"""Fetching with fake clients: no network, real files, real processes."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from batchformer.data import fetch, packages
from batchformer.data.errors import DataError, DataNotFoundError, listing

Writer = Callable[..., Path]
INSIDE = "/usr/share/datasets/fashion-mnist"


@pytest.fixture
def source(tmp_path: Path, write_fashion: Writer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Fashion-MNIST whose checksums the table holds; no system installation, no client on the path."""
    import gzip

    folder = write_fashion(tmp_path / "source", per_class=1, tested=1)
    sums = {p.name: hashlib.sha256(gzip.decompress(p.read_bytes())).hexdigest() for p in sorted(folder.iterdir())}
    row = replace(fetch.DATASETS["fashion-mnist"], sha256=sums, system=(str(tmp_path / "system"),))
    monkeypatch.setitem(fetch.DATASETS, "fashion-mnist", row)
    monkeypatch.setattr(fetch, "_FASHION", replace(row, system=(INSIDE,)))
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(fetch._SOURCES["fashion-mnist"], "torchvision's download", no_network)
    return folder


def no_network(scratch: Path) -> Path:
    raise RuntimeError("no network")


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport sys, pathlib, shutil\n{text}\n")
    (folder / name).chmod(0o755)


def package(tmp_path: Path, source: Path) -> Path:
    """A stand-in for the Debian package: the tar archive that dpkg-deb would print."""
    path = tmp_path / "package.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, f".{INSIDE}/{file.name}")
    return path


def clients(tmp_path: Path, archive: Path, *, lists: bool = True) -> None:
    refuse = "" if lists else "if 'Dir::Cache' not in ' '.join(sys.argv): sys.exit('E: Unable to locate package')"
    deb = "dataset-fashion-mnist_1_all.deb"
    log = f"open({str(tmp_path / 'log')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))"
    copy = f"if 'download' in sys.argv: shutil.copy({str(archive)!r}, {deb!r})"
    program(tmp_path / "bin", "apt-get", f"{log}\n{refuse}\n{copy}")
    program(tmp_path / "bin", "dpkg-deb", "sys.stdout.buffer.write(pathlib.Path(sys.argv[2]).read_bytes())")


def same(a: Path, b: Path) -> bool:
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_import_loads_only_the_standard_library() -> None:
    code = (
        "import sys, batchformer.data.fetch; print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules])"
    )
    src = Path(fetch.__file__).parents[2]
    bare = "import sys, types; p = types.ModuleType('batchformer'); p.__path__ = [%r]; sys.modules['batchformer'] = p\n"
    done = subprocess.run(
        [sys.executable, "-c", bare % str(src / "batchformer") + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path))
    assert fetch.data_root() == tmp_path
    monkeypatch.delenv("BATCHFORMER_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.data_root() == tmp_path / ".cache" / "batchformer"


def test_debian_package(tmp_path: Path, source: Path) -> None:
    clients(tmp_path, package(tmp_path, source))
    assert fetch.locate("fashion-mnist") is None
    folder = fetch.get("fashion-mnist")
    assert folder == tmp_path / "data" / "fashion-mnist" == fetch.locate("fashion-mnist")
    assert same(folder, source)
    assert [p.name for p in folder.parent.iterdir()] == ["fashion-mnist"]  # no scratch is left behind


def test_debian_package_without_lists_updates_private_ones(tmp_path: Path, source: Path) -> None:
    clients(tmp_path, package(tmp_path, source), lists=False)
    assert same(fetch.get("fashion-mnist"), source)
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked[0] == "download dataset-fashion-mnist"
    assert [line.split()[-1] for line in asked] == ["dataset-fashion-mnist", "update", "dataset-fashion-mnist"]
    assert "Dir::State::Lists=" in asked[1]
    assert "Dir::Cache=" in asked[1]


def test_system_installation_is_used_in_place(tmp_path: Path, source: Path) -> None:
    os.rename(source, tmp_path / "system")
    assert fetch.get("fashion-mnist") == tmp_path / "system"


def test_present_data_needs_no_client(tmp_path: Path, source: Path) -> None:
    assert fetch.get("fashion-mnist", source) == source
    os.makedirs(tmp_path / "own" / "FashionMNIST")
    os.rename(source, tmp_path / "own" / "FashionMNIST" / "raw")  # torchvision's layout
    assert fetch.get("fashion-mnist", tmp_path / "own") == tmp_path / "own" / "FashionMNIST" / "raw"


def test_torchvision_is_the_last_resort(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch._SOURCES["fashion-mnist"], "torchvision's download", lambda scratch: source)
    assert same(fetch.get("fashion-mnist"), source)


def test_wrong_checksum_is_refused_and_nothing_appears(tmp_path: Path, source: Path) -> None:
    archive = package(tmp_path, source)
    clients(tmp_path, archive)
    row = fetch.DATASETS["fashion-mnist"]
    fetch.DATASETS["fashion-mnist"] = replace(row, sha256=dict.fromkeys(row.sha256, "0" * 64))
    with pytest.raises(DataNotFoundError, match=r"Debian package .*: the checksum of .* is wrong"):
        fetch.get("fashion-mnist")
    assert not (tmp_path / "data" / "fashion-mnist").exists()


def test_damaged_copy_is_replaced(tmp_path: Path, source: Path) -> None:
    clients(tmp_path, package(tmp_path, source))
    folder = fetch.get("fashion-mnist")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert same(fetch.get("fashion-mnist"), source)


def test_package_members_cannot_escape(tmp_path: Path, source: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("../escaped", "/escaped", f".{INSIDE}/../../escaped"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo(f".{INSIDE}/train-labels-idx1-ubyte.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    clients(tmp_path, archive)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"evil\.tar does not hold .*train-labels"):
        packages.unpack_deb(archive, INSIDE, fetch.DATASETS["fashion-mnist"].files, tmp_path / "unpacked")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "unpacked"}


def test_nothing_works(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        fetch.get("fashion-mnist")
    message = str(caught.value)
    for part in (
        "Could not find Fashion-MNIST. Looked in:",
        str(tmp_path / "data"),
        "apt-get is not on this machine",
        "torchvision's download: no network",
        "batchformer data get fashion-mnist",
        "train-images-idx3-ubyte.gz",
        "BATCHFORMER_DATA",
    ):
        assert part in message


def test_client_failure_is_told(tmp_path: Path, source: Path) -> None:
    program(tmp_path / "bin", "apt-get", "sys.exit('E: no space left')")
    program(tmp_path / "bin", "dpkg-deb", "")
    with pytest.raises(DataNotFoundError, match=r"ended with status 1 \(E: no space left\)"):
        fetch.get("fashion-mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet-lt", "places-lt", "inat18"])
def test_local_sets_are_never_downloaded(name: str, tmp_path: Path, source: Path) -> None:
    for ask in (fetch.get, fetch.require):
        with pytest.raises(DataNotFoundError, match="Could not find") as caught:
            ask(name, tmp_path)
        assert all(file in str(caught.value) for file in fetch.DATASETS[name].files)
        assert fetch.DATASETS[name].home in str(caught.value)
    assert not (tmp_path / name).exists()


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"Expected the name of a known data set, one of fashion-mnist, .* got 'mnist'"):
        fetch.locate("mnist")


def test_not_found_error_survives_pickling() -> None:
    error = DataNotFoundError("X", [Path("a")], ["b"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_long_listings_are_cut() -> None:
    text = listing(range(100))
    assert "\n  19\n  ... and 80 more" in text
    assert "\n  20" not in text
