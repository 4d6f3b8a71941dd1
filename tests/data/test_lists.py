from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchformer.data import checks
from batchformer.data.checks import check_classes, check_samples
from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.data.images import decode, decode_all, probe
from batchformer.data.lists import Samples, check_labels, read_folder, read_list
from batchformer.data.transforms import image_eval

Writer = Callable[..., Path]


def test_folder(tmp_path: Path, write_images: Writer) -> None:
    write_images(tmp_path, [3, 2])
    (tmp_path / "class 1" / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "class 1" / "deep" / "er" / "x.PNG")
    (tmp_path / "class 0" / "notes.txt").write_text("no image")
    (tmp_path / "class 0" / "._001.jpg").write_bytes(b"left by another system")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    samples = read_folder(tmp_path)["all"]
    assert samples.classes == ["class 0", "class 1"]
    assert samples.counts.tolist() == [3, 3]
    assert samples.paths[-1] == "class 1/deep/er/x.PNG"
    assert all((samples.root / path).is_file() for path in samples.paths)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation"), ("train", "testing")])
def test_ready_made_splits(names: tuple[str, ...], tmp_path: Path, write_images: Writer) -> None:
    for n, name in enumerate(names, 1):
        write_images(tmp_path / name, [n, n])
    splits = read_folder(tmp_path)
    assert [len(samples) for samples in splits.values()] == [2 * n for n in range(1, len(names) + 1)]
    assert next(iter(splits)) == "train"
    assert set(splits) <= {"train", "val", "test"}


def test_a_class_called_train_is_a_class(tmp_path: Path, write_images: Writer) -> None:
    write_images(tmp_path, [2, 2])
    (tmp_path / "class 0").rename(tmp_path / "train")
    assert read_folder(tmp_path)["all"].classes == ["class 1", "train"]


def test_only_a_train_folder_is_unsplit(tmp_path: Path, write_images: Writer) -> None:
    write_images(tmp_path / "train", [2, 2])
    assert list(read_folder(tmp_path)) == ["all"]


def test_test_split_may_lack_a_class_but_not_add_one(tmp_path: Path, write_images: Writer) -> None:
    write_images(tmp_path / "train", [2, 2, 2])
    write_images(tmp_path / "test", [1, 1, 1])
    for image in (tmp_path / "test" / "class 1").iterdir():
        image.unlink()
    (tmp_path / "test" / "class 1").rmdir()
    assert read_folder(tmp_path)["test"].labels.tolist() == [0, 2]
    (tmp_path / "test" / "class 0").rename(tmp_path / "test" / "stranger")
    with pytest.raises(DataError, match=r"only classes of the training split, got others:\n  stranger"):
        read_folder(tmp_path)


def test_folder_errors(tmp_path: Path, write_images: Writer) -> None:
    with pytest.raises(DataNotFoundError, match="Could not find the image folder"):
        read_folder(tmp_path / "nowhere")
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"at least two sub-folders.*found 0 and 1 image\(s\) directly"):
        read_folder(tmp_path)
    write_images(tmp_path, [1, 0, 1, 0])
    with pytest.raises(DataError, match=r"2 have none:\n  class 1\n  class 3"):
        read_folder(tmp_path)
    write_images(tmp_path / "split" / "val", [1, 1])
    write_images(tmp_path / "split" / "test", [1, 1])
    with pytest.raises(DataError, match="Expected a train folder beside val, test"):
        read_folder(tmp_path / "split")


def test_list_file(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("/a/x 1.jpg 0\n\nb/y.jpg\t2\n")
    samples = read_list(tmp_path / "list.txt", tmp_path)
    assert samples.paths == ["a/x 1.jpg", "b/y.jpg"]
    assert samples.labels.tolist() == [0, 2]
    assert samples.classes == ["0", "1", "2"]
    assert samples.subset(torch.tensor([1])).paths == ["b/y.jpg"]


def test_list_errors_come_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    with pytest.raises(DataNotFoundError, match="Could not find the list file"):
        read_list(file, tmp_path)
    file.write_text("a.jpg 0\nb.jpg\nc.jpg one\n")
    with pytest.raises(DataError, match=r"in every line of .*list.txt, got:\n  line 2: 'b.jpg'\n  line 3: 'c.jpg one'"):
        read_list(file, tmp_path)
    file.write_text("\n")
    with pytest.raises(DataError, match="got an empty file"):
        read_list(file, tmp_path)
    file.write_text("a.jpg 0\nb.jpg 3\nc.jpg -1\n")
    places = r"list.txt, line 2: b.jpg has 3\n.*line 3: c.jpg has -1"
    message = rf"labels from 0 to 2 \(3 classes\), got 2 out of range:\n  {places}"
    with pytest.raises(DataError, match=message):
        read_list(file, tmp_path, classes=3)


def test_labels_and_classes() -> None:
    samples = Samples(Path(), ["a", "b"], torch.tensor([0, 5]), ["x", "y", "z"])
    with pytest.raises(DataError, match=r"got 1 out of range:\n  b has 5"):
        check_labels(samples)
    with pytest.raises(DataError, match=r"2 of 3 classes have none:\n  0 \(x\)\n  2 \(z\)"):
        check_classes(torch.tensor([0, 4, 0]), samples.classes)
    check_classes(torch.tensor([1, 4, 1]), samples.classes)


def test_all_missing_files_in_one_message(tmp_path: Path, write_images: Writer) -> None:
    samples = read_folder(write_images(tmp_path, [3, 3]))["all"]
    gone = [samples.paths[0], samples.paths[4]]
    for path in gone:
        (tmp_path / path).unlink()
    with pytest.raises(DataNotFoundError, match="Could not find 2 of 6 training images") as caught:
        check_samples(samples)
    assert all(str(tmp_path / path) in str(caught.value) for path in gone)


def test_all_corrupt_images_in_one_message(tmp_path: Path, write_images: Writer) -> None:
    samples = read_folder(write_images(tmp_path, [4, 4]))["all"]
    jpeg, png = samples.paths[0], samples.paths[1]
    content = (tmp_path / jpeg).read_bytes()
    (tmp_path / jpeg).write_bytes(content[: len(content) // 2])  # header intact, picture cut off
    (tmp_path / png).write_bytes(b"no image at all")
    with pytest.raises(DataError, match="2 of 8 test images cannot") as caught:
        check_samples(samples, what="test")
    assert jpeg in str(caught.value)
    assert png in str(caught.value)
    check_samples(samples, decode=False)


def test_good_images_are_checked_once(tmp_path: Path, write_images: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_folder(write_images(tmp_path / "images", [3, 3]))["all"]
    seen: list[str] = []
    real = checks._decoding_problem

    def watched(root: Path, path: str) -> str:
        seen.append(path)
        return real(root, path)

    monkeypatch.setattr(checks, "_decoding_problem", watched)
    for expected in (6, 0):
        seen.clear()
        check_samples(samples, cache=tmp_path / "memory")
        assert len(seen) == expected
    changed = samples.paths[2]
    (samples.root / changed).write_bytes(b"changed since")
    with pytest.raises(DataError, match="1 of 6 training images cannot"):
        check_samples(samples, cache=tmp_path / "memory")
    assert seen == [changed]
    (next((tmp_path / "memory").iterdir())).write_text("{damaged")
    (samples.root / changed).write_bytes((samples.root / samples.paths[0]).read_bytes())
    seen.clear()
    check_samples(samples, cache=tmp_path / "memory")
    assert len(seen) == 6


def test_every_kind_of_image_becomes_grey_or_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(decode(tmp_path / "deep.png", 1)) - ramp / 257).max() <= 1
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")  # hidden red
    assert decode(tmp_path / "clear.png", 3).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (5, 5), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert decode(tmp_path / "palette.png", 3).getpixel((0, 0)) == (10, 20, 30)
    turned = Image.new("RGB", (4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", 3).size == (8, 4)
    for mode, name in (("1", "bit.png"), ("LA", "la.png"), ("CMYK", "ink.jpg"), ("F", "float.tiff"), ("I", "int.tiff")):
        Image.new(mode, (6, 5)).save(tmp_path / name)
        assert decode(tmp_path / name, 3).mode == "RGB"
        assert decode(tmp_path / name, 1).mode == "L"


def test_floating_point_grey_is_read_by_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 255, 65535):
        Image.fromarray(ramp * scale).save(tmp_path / "float.tiff")
        assert np.abs(np.asarray(decode(tmp_path / "float.tiff", 1), dtype=float) - ramp * 255).max() <= 1.01, scale
    Image.fromarray(np.full((8, 8), 1, np.int32)).save(tmp_path / "dark.tiff")  # whole numbers stay what they are
    assert np.asarray(decode(tmp_path / "dark.tiff", 1)).max() == 1


def test_probe_and_decode_all(tmp_path: Path, write_images: Writer) -> None:
    colour = read_folder(write_images(tmp_path / "colour", [4, 4], side=30))["all"]
    grey = read_folder(write_images(tmp_path / "grey", [4, 4], grey=True, side=20))["all"]
    assert probe(colour)[0] == 3
    assert probe(grey)[0] == 1
    assert 20 <= probe(grey)[1] <= 28
    images = decode_all(grey, image_eval(16), 16, 1)
    assert images.shape == (8, 1, 16, 16)
    assert images.dtype == torch.uint8
    Image.fromarray(np.full((10, 20), 77, np.uint8)).save(tmp_path / "flat.png")
    flat = decode_all(Samples(tmp_path, ["flat.png"], torch.zeros(1), ["a"]), image_eval(8), 8, 3)
    assert set(flat.flatten().tolist()) == {77}
